"""Principal coordinates against numpy's singular value decomposition."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from stride_lightning.readout import coordinates as coordinates_module
from stride_lightning.readout.coordinates import Coordinates, principal_coordinates
from tests.helpers.tiny import random_tensor

SIZES = {"more examples": (30, 9), "as many": (9, 9), "more features": (9, 30), "one more": (9, 10)}
every_size = pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
centred_or_not = pytest.mark.parametrize("is_centred", [False, True], ids=["plain", "centred"])


def features_of(size: tuple[int, int], dtype: torch.dtype = torch.float64) -> Tensor:
    """Columns of falling size with a mean, two of them alike, and the constant last."""
    values = random_tensor(*size, seed=0) * torch.logspace(0, -1, size[1], dtype=torch.float64) + 0.5
    values[:, 3] = values[:, 2]
    values[:, -1] = 1
    return values.to(dtype)


def turned(features: Tensor, is_centred: bool) -> tuple[Coordinates, Tensor]:
    return principal_coordinates(features.clone(), is_centred=is_centred)


@every_size
@centred_or_not
def test_coordinates_are_those_of_the_singular_value_decomposition(size: tuple[int, int], is_centred: bool) -> None:
    features = features_of(size)
    coordinates, values = turned(features, is_centred)
    reference = features.numpy()
    if is_centred:
        reference = reference - reference.mean(0)
        assert (values[:, -1] == 1).all()
        assert float(coordinates.energies[-1]) == len(features)
        values, energies = values[:, :-1], coordinates.energies[:-1]
    else:
        energies = coordinates.energies
    singular = np.linalg.svd(reference, compute_uv=False)
    spanned = singular[singular**2 > 1e-13 * singular[0] ** 2]
    np.testing.assert_allclose(energies, spanned**2, rtol=1e-9)
    torch.testing.assert_close(values.T @ values, torch.diag(energies), rtol=0, atol=1e-10)
    np.testing.assert_allclose(values @ values.T, reference @ reference.T, rtol=0, atol=1e-9)
    rotation = coordinates.rotation
    torch.testing.assert_close(rotation.T @ rotation, torch.eye(len(energies)).double(), rtol=0, atol=1e-7)


@every_size
@centred_or_not
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_coordinates_of_training_examples_are_those_of_the_map(
    size: tuple[int, int], is_centred: bool, dtype: torch.dtype
) -> None:
    features = features_of(size, dtype)
    coordinates, values = turned(features, is_centred)
    assert values.dtype == coordinates.rotation.dtype == coordinates.energies.dtype == dtype
    tolerance = 1e-2 if dtype == torch.float32 else 1e-7
    torch.testing.assert_close(coordinates(features), values, rtol=0, atol=tolerance)
    torch.testing.assert_close(coordinates.outside(features), features.new_zeros(size[0]), rtol=0, atol=tolerance)


@every_size
@centred_or_not
def test_coefficients_go_out_and_come_back(size: tuple[int, int], is_centred: bool) -> None:
    features, queries = features_of(size), features_of((4, size[1])) + 0.3
    queries[:, -1] = 1
    coordinates, values = turned(features, is_centred)
    inner = random_tensor(values.shape[1], 2, 3, seed=1)
    outer = coordinates.outward(inner)
    assert outer.shape == (coordinates.width, 2, 3) == (size[1], 2, 3)
    torch.testing.assert_close(coordinates.inward(outer), inner, rtol=0, atol=1e-8)
    moved = queries
    if coordinates.centre is not None:
        moved = torch.cat([queries[:, :-1] - coordinates.centre, queries[:, -1:]], 1)
    expected = torch.einsum("br,rck->bck", moved, outer)
    torch.testing.assert_close(torch.einsum("bm,mck->bck", coordinates(queries), inner), expected, rtol=0, atol=1e-8)


@centred_or_not
def test_what_is_outside_the_span_is_measured(is_centred: bool) -> None:
    features = features_of((30, 9))
    features[:, 5] = 0.0 if not is_centred else 0.25  # a constant is nothing once the mean is off
    coordinates, _ = turned(features, is_centred)
    queries = features[:4].clone()
    queries[:, 5] += torch.tensor([0.0, 1.0, -2.0, 0.5]).double()
    expected = torch.tensor([0.0, 1.0, 4.0, 0.25]).double()
    torch.testing.assert_close(coordinates.outside(queries), expected, rtol=0, atol=1e-9)


@centred_or_not
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(30, 4), (3, 9)])
def test_features_that_never_change(size: tuple[int, int], dtype: torch.dtype, is_centred: bool) -> None:
    features = torch.full(size, 0.1, dtype=dtype)
    coordinates, values = turned(features, is_centred)
    assert (values - values[0]).abs().max() < 1e-6
    kernel = 1.0 if is_centred else 0.01 * size[1]
    torch.testing.assert_close(values @ values.T, torch.full((size[0], size[0]), kernel, dtype=dtype))
    assert coordinates.outside(features).max() < 1e-6


@pytest.mark.parametrize("size", [(30, 9), (9, 30)])
@centred_or_not
def test_the_memory_of_the_features_is_used(size: tuple[int, int], is_centred: bool) -> None:
    """Features in a file stay there: the larger result of the two lies where they were."""
    features = features_of(size)
    coordinates, values = principal_coordinates(features, is_centred=is_centred)
    larger = values if size[0] > size[1] else coordinates.rotation
    assert larger.untyped_storage().data_ptr() == features.untyped_storage().data_ptr()


@every_size
@centred_or_not
def test_blocks_change_only_rounding(size: tuple[int, int], is_centred: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    features = features_of(size)
    expected = turned(features, is_centred)[1]
    monkeypatch.setattr(coordinates_module, "BLOCK_NUMBERS", 20)
    values = turned(features, is_centred)[1]
    torch.testing.assert_close(values @ values.T, expected @ expected.T, rtol=0, atol=1e-10)


def test_features_in_a_file(tmp_path: Path) -> None:
    features = features_of((30, 9))
    mapped = torch.from_numpy(np.memmap(tmp_path / "features", np.float64, "w+", shape=(30, 9)))
    mapped.copy_(features)
    _, values = principal_coordinates(mapped, is_centred=True)
    expected = turned(features, True)[1]
    torch.testing.assert_close(values @ values.T, expected @ expected.T, rtol=0, atol=1e-10)
