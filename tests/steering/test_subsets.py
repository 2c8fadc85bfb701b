"""Designs: exact degrees and sizes, uniform draws, products against the dense matrix."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.stats import chi2
from torch import Tensor

from stride_lightning.steering import subsets
from stride_lightning.steering.subsets import Design, default_num_subsets, sample_design
from tests.helpers.tiny import random_tensor

SHAPES = [
    (2, 2, 1),
    (2, 3, 2),
    (3, 2, 1),
    (3, 7, 3),
    (5, 4, 3),
    (7, 5, 4),
    (17, 9, 2),
    (50, 64, 2),
    (100, 33, 1),
    (101, 10, 9),
    (1000, 20, 10),
    (200, 400, 3),
    (4099, 9, 4),
    (9000, 128, 4),
]
STORAGES = {"bits": (45, 37, 18), "indices": (45, 70, 2)}
every_storage = pytest.mark.parametrize("shape", STORAGES.values(), ids=STORAGES.keys())


def irregular_masks(num_subsets: int = 21, num_train: int = 45) -> Tensor:
    """Examples in none, some and all of the subsets, and a subset without any."""
    generator = torch.Generator().manual_seed(4)
    masks = torch.rand(num_subsets, num_train, generator=generator) < torch.linspace(0, 1, num_train)
    masks[:, 0], masks[:, -1], masks[5] = False, True, False
    return masks


DESIGNS = {name: sample_design(*shape, seed=3) for name, shape in STORAGES.items()}
DESIGNS["drawn elsewhere"] = Design.from_masks(irregular_masks())
every_design = pytest.mark.parametrize("design", DESIGNS.values(), ids=DESIGNS.keys())


def dense_of(num_train: int, num_subsets: int, degree: int, seed: int = 0) -> Tensor:
    return sample_design(num_train, num_subsets, degree, seed=seed).dense(torch.int64)


@pytest.mark.parametrize(("num_train", "num_subsets", "degree"), SHAPES)
@pytest.mark.parametrize("seed", [0, 1])
def test_every_example_has_the_degree_and_sizes_are_level(
    num_train: int, num_subsets: int, degree: int, seed: int
) -> None:
    design = sample_design(num_train, num_subsets, degree, seed=seed)
    matrix = design.dense(torch.int64)
    assert matrix.shape == (num_subsets, num_train)
    assert set(matrix.unique().tolist()) <= {0, 1}
    assert (matrix.sum(0) == degree).all()
    assert matrix.sum(1).max() - matrix.sum(1).min() <= 1
    torch.testing.assert_close(design.sizes, matrix.sum(1))


def test_empty_subsets_have_a_size_too() -> None:
    sizes = sample_design(2, 64, 1).sizes
    assert sorted(sizes.tolist()) == [0] * 62 + [1, 1]
    assert sample_design(3, 5, 1).sizes.shape == (5,)


def test_seed_reproduces_and_changes_the_design() -> None:
    first, again, other = (dense_of(60, 20, 10, seed) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("shape", "checksum"),
    [((5000, 40, 20), "578a970e6c5d7185"), ((5000, 200, 5), "4dac28870de49862")],
    ids=["bits", "indices"],
)
def test_design_is_the_same_on_every_machine(shape: tuple[int, int, int], checksum: str) -> None:
    packed = np.packbits(dense_of(*shape, seed=7).numpy().astype(np.uint8), axis=1)
    assert hashlib.sha256(packed.tobytes()).hexdigest()[:16] == checksum


def test_drawing_leaves_the_random_state_alone() -> None:
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    sample_design(50, 10, 5)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002


def test_smaller_storage_is_chosen() -> None:
    dense, sparse = sample_design(10, 63, 2), sample_design(10, 64, 2)
    assert dense.indices is sparse.bits is None
    assert (dense.bits.shape, dense.bits.dtype) == ((10, 8), torch.uint8)
    assert (sparse.indices.shape, sparse.indices.dtype) == ((10, 2), torch.int32)


@every_design
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("block_size", [1, 7, 8192])
def test_products_equal_the_dense_matrix(design: Design, dtype: torch.dtype, block_size: int) -> None:
    matrix = design.dense(dtype)
    scores = random_tensor(3, design.num_train, seed=1, dtype=dtype)
    measurements = random_tensor(3, design.num_subsets, seed=2, dtype=dtype)
    weights = scores.square()
    torch.testing.assert_close(design.responses(scores, block_size), scores @ matrix.T)
    torch.testing.assert_close(design.backproject(measurements, block_size), measurements @ matrix)
    expected = torch.einsum("kn,qn,ln->qkl", matrix, weights, matrix)
    torch.testing.assert_close(design.gram(weights, block_size), expected)


@every_design
def test_rows_and_blocks_read_the_matrix(design: Design) -> None:
    matrix = design.dense()
    chosen = torch.tensor([44, 0, 7, 7])
    assert torch.equal(design.rows(chosen), matrix.T[chosen])
    blocks = list(design.blocks(torch.empty(0, dtype=torch.uint8), 40))
    assert [torch.equal(members, matrix.T[places]) for places, members in blocks] == [True, True]
    assert torch.cat([members for _, members in blocks]).equal(matrix.T.to(torch.uint8))


@every_storage
def test_both_storages_are_the_same_design(shape: tuple[int, int, int]) -> None:
    design = sample_design(*shape, seed=3)
    matrix = design.dense(torch.uint8).T
    bits = torch.from_numpy(np.packbits(matrix.numpy(), axis=1))
    indices = matrix.nonzero()[:, 1].reshape(design.num_train, design.degree).int()
    for stored in ({"bits": bits, "indices": None}, {"bits": None, "indices": indices}):
        other = dataclasses.replace(design, **stored)
        assert torch.equal(other.dense(torch.uint8).T, matrix)
        assert torch.equal(other.sizes, design.sizes)


@every_design
def test_stored_design_comes_back(design: Design) -> None:
    restored = Design.restore(design.info(), design.tensors())
    assert restored.info() == design.info()
    assert design.info().keys() == {"num_subsets", "num_train", "degree", "seed"}
    assert torch.equal(restored.dense(), design.dense())


@pytest.mark.parametrize(("num_train", "num_subsets", "degree"), [(40, 8, 4), (40, 33, 3)])
def test_pairs_of_subsets_share_members_uniformly(num_train: int, num_subsets: int, degree: int) -> None:
    """Over many seeds every pair of subsets meets in an example as often as any other pair (chi-square, p > 1e-4)."""
    repeats = 200
    together = torch.zeros(num_subsets, num_subsets, dtype=torch.int64)
    for seed in range(repeats):
        matrix = dense_of(num_train, num_subsets, degree, seed)
        together += matrix @ matrix.T
    pairs = list(itertools.combinations(range(num_subsets), 2))
    counts = np.array([int(together[i, j]) for i, j in pairs])
    expected = repeats * num_train * degree * (degree - 1) / (num_subsets * (num_subsets - 1))
    assert abs(counts.mean() - expected) < 1e-9
    # The total and the size of each subset are fixed, so fewer terms vary freely than there are pairs.
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert statistic < chi2.isf(1e-4, len(pairs) - num_subsets)
    assert statistic > chi2.ppf(1e-4, len(pairs) - num_subsets) / degree


@pytest.mark.parametrize(("num_train", "num_subsets", "degree"), [(30, 8, 4), (30, 12, 1)])
def test_pairs_of_examples_share_subsets_uniformly(num_train: int, num_subsets: int, degree: int) -> None:
    repeats = 300
    together = torch.zeros(num_train, num_train, dtype=torch.int64)
    for seed in range(repeats):
        matrix = dense_of(num_train, num_subsets, degree, seed)
        together += matrix.T @ matrix
    counts = np.array([int(together[i, j]) for i, j in itertools.combinations(range(num_train), 2)])
    # Level sizes make sharing a little rarer than d^2 / K: from the sum of squared sizes.
    sizes = np.full(num_subsets, num_train * degree // num_subsets)
    sizes[: num_train * degree % num_subsets] += 1
    expected = repeats * (sizes * (sizes - 1)).sum() / (num_train * (num_train - 1))
    assert abs(counts.mean() - expected) < 1e-9
    assert ((counts - expected) ** 2 / expected).sum() < chi2.isf(1e-4, len(counts))


def test_every_set_of_subsets_is_equally_likely() -> None:
    """An example far from any levelling: all 6 pairs out of 4 subsets come up alike."""
    codes = 2 ** torch.arange(4)
    counts = torch.bincount(codes @ dense_of(6000, 4, 2), minlength=16)
    used = counts[counts > 0].numpy()
    assert len(used) == 6
    assert ((used - 1000) ** 2 / 1000).sum() < chi2.isf(1e-4, 5)


def test_draw_block_joins_are_seamless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subsets, "_DRAW_BLOCK", 8)
    matrix = dense_of(45, 37, 18)
    assert (matrix.sum(0) == 18).all()
    assert matrix.sum(1).max() - matrix.sum(1).min() <= 1
    assert len(matrix.T.unique(dim=0)) == 45


def test_defaults() -> None:
    assert [default_num_subsets(n) for n in (2, 1000, 10_000, 100_000, 10**6, 10**8)] == [200, 200, 200, 400, 600, 1000]
    assert all(default_num_subsets(n) % 2 == 0 for n in range(1, 10**6, 7919))
    assert sample_design(30, 10).degree == 5
    assert sample_design(30, 3).degree == 1


def test_large_designs_are_sparse_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subsets, "DENSE_LIMIT", 30 * 50)
    assert sample_design(30, 50).degree == 25
    assert sample_design(31, 50).degree == 10
    assert sample_design(200, 12).degree == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, 4, 2), "at least 2 training examples, got 1"),
        ((5, 4, 4), "at least 1 subset and in fewer than all: got degree=4 with num_subsets=4"),
        ((5, 4, 0), "got degree=0 with num_subsets=4"),
        ((5, 1), "`num_subsets` must be an integer of at least 2, got 1"),
        ((5, 10.5), "`num_subsets` must be an integer of at least 2, got 10.5"),
    ],
)
def test_impossible_designs_are_refused(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample_design(*arguments)


def test_malformed_memberships_are_refused() -> None:
    bits, indices = torch.zeros(3, 1, dtype=torch.uint8), torch.zeros(3, 2, dtype=torch.int32)
    for stored in ({}, {"bits": bits, "indices": indices}):
        with pytest.raises(ValueError, match="either as `bits` or as `indices`: give one"):
            Design(4, 3, 2, 0, **stored)
    with pytest.raises(ValueError, match=r"bits have shape \(3, 1\); expected \(3, 2\) for 3 examples, 9 subsets"):
        Design(9, 3, 2, 0, bits=bits)
    with pytest.raises(ValueError, match=r"indices have shape \(3, 2\); expected \(4, 2\)"):
        Design(9, 4, 2, 0, indices=indices)


# ---- subsets drawn elsewhere ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [Tensor.bool, Tensor.int, lambda masks: masks.T.contiguous().T])
def test_masks_are_a_design(layout: Callable[[Tensor], Tensor]) -> None:
    masks = irregular_masks()
    design = Design.from_masks(layout(masks))
    assert torch.equal(design.dense(torch.int64), masks.long())
    assert torch.equal(design.sizes, masks.sum(1))
    assert (design.num_subsets, design.num_train, design.seed) == (21, 45, -1)
    assert design.degree == round(masks.sum(0).double().mean().item())
    assert masks.sum(0).unique().numel() > 5  # or this would show nothing


@every_storage
def test_masks_of_a_sampled_design_give_it_again(shape: tuple[int, int, int]) -> None:
    sampled = sample_design(*shape, seed=3)
    design = Design.from_masks(sampled.dense().bool())
    assert torch.equal(design.dense(), sampled.dense())
    assert design.degree == sampled.degree
