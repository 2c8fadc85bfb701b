"""Streaming statistics against numpy on the whole stream."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from stride_lightning.steering import statistics
from stride_lightning.steering.statistics import StreamingStatistics
from tests.helpers.tiny import random_tensor


def stream(features: Tensor, sizes: list[int]) -> StreamingStatistics:
    collected = StreamingStatistics()
    for batch in features.split(sizes):
        collected.update(batch)
    return collected


FEATURES = random_tensor(60, 5, seed=0) @ random_tensor(5, 5, seed=1) + 3


@pytest.mark.parametrize("sizes", [[60], [1] * 60, [7, 20, 1, 32]])
def test_equals_numpy_for_any_batches(sizes: list[int]) -> None:
    collected, whole = stream(FEATURES, sizes), FEATURES.numpy()
    assert collected.count == 60
    np.testing.assert_allclose(collected.mean, whole.mean(0), rtol=1e-12)
    np.testing.assert_allclose(collected.variance, whole.var(0), rtol=1e-11)
    np.testing.assert_allclose(collected.covariance, np.cov(whole.T, bias=True), rtol=1e-10, atol=1e-12)


def test_large_means_lose_no_digits() -> None:
    collected = stream((1e4 + FEATURES).float(), [1] * 60)
    expected = (1e4 + FEATURES).float().double().numpy().var(0)
    np.testing.assert_allclose(collected.variance, expected, rtol=1e-9)


def test_scalars_equal_their_definitions() -> None:
    features = FEATURES.clone()
    features[:, 2] = 7.0
    scalars = stream(features, [10] * 6).scalars()
    eigenvalues = np.linalg.eigvalsh(np.cov(features.numpy().T, bias=True))
    assert scalars["norm"] == pytest.approx(float(features.square().sum(1).mean().sqrt()), rel=1e-12)
    assert scalars["effective_rank"] == pytest.approx(eigenvalues.sum() ** 2 / (eigenvalues**2).sum(), rel=1e-9)
    assert scalars["dead_fraction"] == 0.2


def test_constant_stream_is_dead() -> None:
    scalars = stream(torch.ones(8, 3), [3, 5]).scalars()
    assert scalars == {"norm": pytest.approx(3**0.5), "effective_rank": 0.0, "dead_fraction": 1.0}


def test_wide_features_are_sketched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "MAX_COVARIANCE", 64)
    wide = random_tensor(400, 3, seed=0) @ random_tensor(3, 200, seed=1)
    collected, again = stream(wide, [400]), stream(wide, [150, 250])
    assert collected.covariance.shape == (64, 64)
    assert collected.variance.shape == (200,)
    torch.testing.assert_close(again.covariance, collected.covariance)
    # The sketch keeps inner products on average: traces and the effective rank stay about the same.
    total = float(collected.variance.sum())
    assert float(collected.covariance.trace()) == pytest.approx(total, rel=0.3)
    exact = torch.linalg.eigvalsh(torch.cov(wide.T, correction=0))
    expected = float(exact.sum() ** 2 / exact.square().sum())
    assert collected.scalars()["effective_rank"] == pytest.approx(expected, rel=0.3)


def test_stored_tensors_are_single_precision_and_keep_no_graph() -> None:
    collected = stream(FEATURES.clone().requires_grad_(), [30, 30])
    stored = collected.tensors()
    assert stored.pop("count").dtype == torch.int64
    assert stored.keys() == {"mean", "variance", "covariance"}
    assert {value.dtype for value in stored.values()} == {torch.float32}
    assert not any(value.requires_grad for value in stored.values())
    torch.testing.assert_close(stored["mean"].double(), FEATURES.mean(0), rtol=1e-6, atol=1e-6)


def test_half_precision_batches_are_summed_in_double() -> None:
    collected = stream(torch.full((5000, 1), 0.1, dtype=torch.float16), [1000] * 5)
    assert collected.mean.dtype == torch.float64
    assert float(collected.mean) == pytest.approx(float(torch.tensor(0.1, dtype=torch.float16)), rel=1e-12)
