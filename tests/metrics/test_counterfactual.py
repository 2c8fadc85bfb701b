"""The counterfactual score against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stride_lightning.metrics import CounterfactualScore, counterfactual_score
from tests.helpers.tiny import random_tensor


def test_equals_numpy() -> None:
    removed, full = random_tensor(3, 50, seed=0), random_tensor(50, seed=1)
    expected = removed.numpy() - full.numpy()[None]
    obtained = counterfactual_score(removed, full, reduction="none")
    np.testing.assert_allclose(obtained, expected.astype(np.float32))
    np.testing.assert_allclose(counterfactual_score(removed, full), expected.mean(1), rtol=1e-5, atol=1e-6)


def test_a_loss_that_rises_without_helpful_examples_is_positive() -> None:
    rises = counterfactual_score(torch.tensor([[1.0, 1.5], [3.0, 2.0]]), torch.tensor([1.0, 1.0]))
    torch.testing.assert_close(rises, torch.tensor([0.25, 1.5]))


def test_differences_are_taken_in_float64() -> None:
    removed, full = torch.tensor([[1e6 + 1e-6]], dtype=torch.float64), torch.tensor([1e6], dtype=torch.float64)
    assert counterfactual_score(removed, full).item() == pytest.approx(1e-6, rel=1e-3)


def test_what_does_not_fit_is_refused() -> None:
    removed, full = random_tensor(3, 4, seed=0), random_tensor(4, seed=1)
    for wrong in (removed[0], removed[:, :0]):
        with pytest.raises(ValueError, match=r"Expected `losses_removed` of shape \(num_ks, num_queries\)"):
            counterfactual_score(wrong, full)
    with pytest.raises(
        ValueError, match=r"`losses_full` of shape \(4,\), one loss for each column .* got \(3,\)"
    ) as caught:
        counterfactual_score(removed, full[:3])
    assert "torch.Size" not in str(caught.value)
    with pytest.raises(TypeError, match=r"Expected `losses_removed` to be a torch.Tensor, got ndarray"):
        counterfactual_score(removed.numpy(), full)
    full[1] = torch.nan
    with pytest.raises(ValueError, match="finite `losses_full`, got 1 of 4 values that are not finite, in queries 1"):
        counterfactual_score(removed, full)
    removed[:2, 2] = torch.nan
    with pytest.raises(ValueError, match=r"finite `losses_removed`, got 2 of 12 .* in queries 2"):
        counterfactual_score(removed, full)


def test_class_refuses_ks_that_do_not_fit() -> None:
    for ks in ((), (5, 1), (1, 1)):
        with pytest.raises(ValueError, match="each larger than the last"):
            CounterfactualScore(ks)
    for k in (0, 1.5, True):
        with pytest.raises(ValueError, match=f"`ks` must be an integer of at least 1, got {k}"):
            CounterfactualScore([k])
    metric = CounterfactualScore([1, 2])
    with pytest.raises(ValueError, match=r"a row for each of ks=\(1, 2\), got 3 rows"):
        metric.update(random_tensor(3, 4, seed=0), random_tensor(4, seed=1))


def test_one_k_is_a_scalar() -> None:
    metric = CounterfactualScore([3])
    metric.update(torch.tensor([[1.0, 2.0]]), torch.tensor([0.0, 0.0]))
    assert metric.compute() == torch.tensor(1.5)
