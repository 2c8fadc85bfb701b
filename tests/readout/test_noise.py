"""The noise of a regression against refits that leave one example out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stride_lightning.readout import noise as noise_module
from stride_lightning.readout.coordinates import principal_coordinates
from stride_lightning.readout.noise import FLOOR, MAX_ROUNDS, relative_noise
from tests.helpers.tiny import random_tensor
from tests.readout.dense import left_out_error, noise_fixed_point


def regression(
    size: int, num_features: int, noise: float, num_outputs: int = 2, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Features with the constant last, and centred targets."""
    features = random_tensor(size, num_features, seed=seed)
    targets = features @ random_tensor(num_features, num_outputs, seed=seed + 1)
    targets = targets + noise * random_tensor(size, num_outputs, seed=seed + 2)
    return torch.cat([features, torch.ones(size, 1).double()], 1), targets - targets.mean(0)


def measured(features: Tensor, targets: Tensor, prior_variance: float = 1.0) -> Tensor:
    coordinates, values = principal_coordinates(features.clone(), is_centred=True)
    return relative_noise(values, coordinates.energies, targets, prior_variance)


@pytest.mark.parametrize("noise", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("size", [(40, 5), (12, 20)], ids=["n > r", "r > n"])
def test_noise_is_a_fixed_point_of_leaving_one_out(size: tuple[int, int], noise: float) -> None:
    features, targets = regression(*size, noise)
    values = measured(features, targets)
    for value, column in zip(values, targets.T, strict=True):
        again = (left_out_error(features, column, value.clamp(min=0.05)) / column.square().mean()).clamp(min=FLOOR)
        assert float(again) == pytest.approx(float(value), rel=1e-3)
        assert float(value) == pytest.approx(float(noise_fixed_point(features, column)), rel=1e-6)


def test_noise_is_that_of_the_data() -> None:
    features, targets = regression(400, 5, 0.5)
    noise = measured(features, targets) * targets.square().mean(0)
    torch.testing.assert_close(noise, torch.full((2,), 0.25).double(), rtol=0.15, atol=0)


def test_prior_variance_divides_the_ridge() -> None:
    features, targets = regression(40, 5, 1.0)
    value = measured(features, targets, 0.1)[0]
    again = left_out_error(features, targets[:, 0], value.clamp(min=0.05) / 0.1) / targets[:, 0].square().mean()
    assert float(again) == pytest.approx(float(value), rel=1e-3)


def test_targets_without_noise_stop_at_the_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    features, targets = regression(40, 5, 0.0)
    noise = measured(features, targets)
    assert FLOOR < float(noise.min()) < 1e-2  # that of a ridge as for 5 %
    monkeypatch.setattr(noise_module, "RIDGE_NOISE", 0.0)
    assert measured(features, targets).tolist() == [FLOOR] * 2


def test_rounds_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 20, however slowly they come to rest: one reading of the data in each, and one before."""
    monkeypatch.setattr(noise_module, "RIDGE_NOISE", 0.0)  # which comes to rest at once
    readings = []
    plain = noise_module._blocks
    monkeypatch.setattr(noise_module, "_blocks", lambda *parts: readings.append(0) or plain(*parts))
    most = 0
    for size in ((40, 5), (12, 20), (12, 9), (12, 12)):
        for noise in (0.0, 1e-2, 1.0):
            readings.clear()
            values = measured(*regression(*size, noise))
            assert values.isfinite().all()
            most = max(most, len(readings) - 1)
    assert most == MAX_ROUNDS == 20
    monkeypatch.setattr(noise_module, "MAX_ROUNDS", 3)
    readings.clear()
    measured(*regression(12, 20, 0.0))
    assert len(readings) - 1 == 3


@pytest.mark.parametrize("scale", [1e-3, 1e5])
def test_scale_of_the_targets_does_not_matter(scale: float) -> None:
    features, targets = regression(40, 5, 1.0)
    torch.testing.assert_close(measured(features, targets * scale), measured(features, targets), rtol=1e-9, atol=0)


def test_constant_targets_are_all_noise() -> None:
    features, targets = regression(10, 3, 1.0)
    targets[:, 0] = 0
    values = measured(features, targets)
    assert float(values[0]) == 1
    assert float(values[1]) == pytest.approx(float(measured(features, targets[:, 1:])), rel=1e-9)


def test_blocks_of_examples_change_only_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    features, targets = regression(40, 5, 1.0)
    expected = measured(features, targets)
    monkeypatch.setattr(noise_module, "_blocks", lambda *parts: tuple(part.split(7) for part in parts))
    torch.testing.assert_close(measured(features, targets), expected, rtol=1e-9, atol=0)
