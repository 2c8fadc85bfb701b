"""Products of per-example gradients in factors against the same products of vectors."""

import pytest
import torch

from stride_lightning.model import blocks
from stride_lightning.model.blocks import Block, Gradients, Outer, concatenated
from tests.helpers.gradient_models import tokens
from tests.helpers.tiny import random_tensor

NUM, ROWS, COLUMNS = 5, 6, 4


def outer(places, seed, num=NUM):
    return Outer(random_tensor(num, places, ROWS, seed=seed), random_tensor(num, places, COLUMNS, seed=seed + 1), ROWS)


def lookup(places, seed, num=NUM):
    return Outer(tokens(num, places, size=ROWS, seed=seed), random_tensor(num, places, COLUMNS, seed=seed + 1), ROWS)


KINDS = {
    "dense": lambda seed, num=NUM: Block(random_tensor(num, ROWS * COLUMNS, seed=seed)),
    "one place": lambda seed, num=NUM: Block(None, (outer(1, seed, num),)),
    "places": lambda seed, num=NUM: Block(None, (outer(3, seed, num),)),
    "lookup": lambda seed, num=NUM: Block(None, (lookup(1, seed, num),)),
    "lookups": lambda seed, num=NUM: Block(None, (lookup(3, seed, num),)),
    "tied": lambda seed, num=NUM: Block(None, (lookup(2, seed, num), outer(3, seed + 2, num))),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
every_other = pytest.mark.parametrize("other", KINDS)


def by_hand(block):
    """Vectors of a block, by loops."""
    if block.values is not None:
        return block.values
    rows = torch.zeros(len(block), ROWS, COLUMNS, dtype=torch.float64)
    for part in block.outers:
        for i in range(len(block)):
            for t in range(part.right.shape[1]):
                if part.is_lookup:
                    rows[i, part.left[i, t]] += part.right[i, t]
                else:
                    rows[i] += torch.outer(part.left[i, t], part.right[i, t])
    return rows.reshape(len(block), -1)


@pytest.fixture(params=["whole", "in chunks"])
def chunks(request, monkeypatch):
    """Everything at once, and one or two examples at a time."""
    if request.param == "in chunks":
        monkeypatch.setattr(blocks, "CHUNK_BYTES", 2 * ROWS * COLUMNS * 4)


@pytest.fixture(params=[True, False], ids=["factors", "vectors"])
def cheaper(request, monkeypatch):
    """Either side of the cost rule."""
    monkeypatch.setattr(blocks, "_factors_are_cheaper", lambda one, other: request.param)
    return request.param


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@every_kind
def test_one_block(kind, chunks):
    block = KINDS[kind](0)
    vectors = by_hand(block)
    assert (len(block), block.size, block.is_dense) == (NUM, ROWS * COLUMNS, kind == "dense")
    assert block.shape == ((ROWS * COLUMNS, 1) if kind == "dense" else (ROWS, COLUMNS))
    close(block.dense(), vectors)
    close(block.squared_norms(), vectors.square().sum(1))
    close(block.sum_of_squares(), vectors.square().sum(0))
    coefficients = random_tensor(3, NUM, seed=9)
    close(block.combined(coefficients), coefficients @ vectors)
    scaled = block.scaled(coefficients[0])
    close(scaled.dense(), vectors * coefficients[0][:, None])
    close(block.dense(), vectors)  # as it was
    for rows in (slice(1, 4), torch.tensor([3, 0])):
        close(block[rows].dense(), vectors[rows])
        assert block[rows].is_dense == block.is_dense


@every_kind
@every_other
def test_two_blocks(kind, other, chunks, cheaper):
    mine, theirs, same_size = KINDS[kind](0), KINDS[other](20, num=7), KINDS[other](40)
    a, b, c = (by_hand(block) for block in (mine, theirs, same_size))
    close(mine.inner(theirs), a @ b.T)
    close(mine.prepared(theirs).inner(theirs), a @ b.T)
    close(mine.row_inner(same_size), (a * c).sum(1))
    close(mine.dense(), a)


@pytest.mark.parametrize("size", [30, 2])
@pytest.mark.parametrize("pair", [("one place", "one place"), ("places", "lookups"), ("tied", "tied")])
def test_row_inner_on_either_side_of_its_rule(pair, size, monkeypatch):
    """``T T' (L + R) < L R`` decides here too: both answers are the same."""
    monkeypatch.setattr(Block, "size", property(lambda self: 10**6 if size == 30 else 24))
    seen = []
    dense = Block.dense
    monkeypatch.setattr(Block, "dense", lambda self: seen.append(1) or dense(self))
    mine, theirs = (KINDS[kind](seed) for kind, seed in zip(pair, (0, 40), strict=True))
    close(mine.row_inner(theirs), (by_hand(mine) * by_hand(theirs)).sum(1))
    assert bool(seen) == (size == 2 and mine.num_places * theirs.num_places * 10 >= 24)


@pytest.mark.parametrize(
    ("places", "others", "in_factors"),
    [(1, 1, True), (1, 2, True), (2, 1, True), (2, 2, False), (1, 3, False)],
)
def test_cost_rule(places, others, in_factors):
    """Matrices of 6 x 6 have 36 values; products of factors take 12 operations per pair of places."""
    mine, theirs = (
        Block(None, (Outer(random_tensor(2, t, 6, seed=t), random_tensor(2, t, 6, seed=t + 9), 6),))
        for t in (places, others)
    )
    assert mine.prepared(theirs).is_dense == (not in_factors)
    assert Block(mine.dense()).prepared(theirs).is_dense
    assert mine.prepared(Block(theirs.dense())).is_dense


def test_inner_products_of_factors_make_no_matrices(monkeypatch):
    """Where factors are cheaper no matrix is made."""
    big = Block(None, (Outer(random_tensor(3, 1, 40, seed=0), random_tensor(3, 1, 50, seed=1), 40),))
    expected = big.dense() @ big.dense().T
    monkeypatch.setattr(Outer, "dense", lambda self: pytest.fail("a matrix was made"))
    close(big.inner(big), expected)
    close(big.squared_norms(), expected.diagonal())
    assert not big.prepared(big).is_dense


@pytest.mark.parametrize(
    ("first", "second", "is_dense"),
    [
        ("dense", "dense", True),
        ("dense", "places", True),
        ("places", "places", False),
        ("places", "one place", True),
        ("lookups", "lookups", False),
        ("lookups", "places", True),
        ("tied", "tied", False),
    ],
)
def test_concatenated(first, second, is_dense):
    parts = [KINDS[first](0), KINDS[second](20, num=2)]
    joined = concatenated([Gradients({"a": part, "b": KINDS["dense"](5, num=len(part))}) for part in parts])
    close(joined["a"].dense(), torch.cat([by_hand(part) for part in parts]))
    assert joined["a"].is_dense == is_dense
    assert joined.num_examples == NUM + 2


def test_all_blocks():
    one, other = (Gradients({"b": KINDS["places"](s), "a": KINDS["dense"](s + 1)}) for s in (0, 30))
    a, b = one.dense(), other.dense()
    close(a, torch.cat([by_hand(one["b"]), by_hand(one["a"])], 1))  # blocks keep their order
    close(one.inner(other), a @ b.T)
    close(one.row_inner(other), (a * b).sum(1))
    close(one.squared_norms(), (a * a).sum(1))
    close(one.prepared(other).rows(slice(1, 3)).inner(other), a[1:3] @ b.T)
    factors = random_tensor(NUM, seed=3)
    close(one.scaled(factors).dense(), a * factors[:, None])
    assert (list(one), len(one), one.num_examples) == (["b", "a"], 2, NUM)


def test_float32_stays_float32():
    block = Block(None, (Outer(tokens(2, 3, size=4), torch.ones(2, 3, 5), 4),))
    for result in (block.dense(), block.squared_norms(), block.scaled(torch.ones(2)).dense(), block.inner(block)):
        assert result.dtype == torch.float32
