"""The counterfactual score against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stride_lightning.metrics import CounterfactualScore, counterfactual_score
from tests.helpers.refusals import assert_refused
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
    shape = r"Expected `losses_removed` of shape \(num_ks, num_queries\)"
    broken, broken_full = removed.clone(), full.clone()
    broken[:2, 2], broken_full[1] = torch.nan, torch.nan
    assert_refused(
        counterfactual_score,
        *((shape, wrong, full) for wrong in (removed[0], removed[:, :0])),
        (r"`losses_full` of shape \(4,\), one loss for each column .* got \(3,\)", removed, full[:3]),
        ("finite `losses_full`, got 1 of 4 values that are not finite, in queries 1", removed, broken_full),
        (r"finite `losses_removed`, got 2 of 12 .* in queries 2", broken, full),
    )
    no_tensor = "Expected `losses_removed` to be a torch.Tensor, got ndarray"
    assert_refused(counterfactual_score, (no_tensor, removed.numpy(), full), error=TypeError)


def test_class_refuses_ks_that_do_not_fit() -> None:
    assert_refused(CounterfactualScore, *(("each larger than the last", ks) for ks in ((), (5, 1), (1, 1))))
    count = "`ks` must be an integer of at least 1, got"
    assert_refused(CounterfactualScore, *((f"{count} {k}", [k]) for k in (0, 1.5, True)))
    data = random_tensor(3, 4, seed=0), random_tensor(4, seed=1)
    assert_refused(CounterfactualScore([1, 2]).update, (r"a row for each of ks=\(1, 2\), got 3 rows", *data))


def test_one_k_is_a_scalar() -> None:
    metric = CounterfactualScore([3])
    metric.update(torch.tensor([[1.0, 2.0]]), torch.tensor([0.0, 0.0]))
    assert metric.compute() == torch.tensor(1.5)
