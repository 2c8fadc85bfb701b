"""Measurements against a loop over operators and queries with torch's own losses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from stride_lightning.steering import operators
from stride_lightning.steering.basis import Observation
from stride_lightning.steering.operators import mean_prediction, measure
from stride_lightning.tasks.likelihoods import BinaryClassification, Classification, Task
from tests.helpers.tiny import every_task, observation, random_tensor

COEFFICIENTS = 0.5 * random_tensor(3, 5, 7, seed=4)  # (C, r, K)
every_anchor = pytest.mark.parametrize("anchored", [False, True])


def torch_loss(task: Task, outputs: Tensor, encoded: Tensor) -> Tensor:
    """Loss of one example."""
    if isinstance(task, Classification):
        return F.cross_entropy(outputs, encoded.argmax())
    if isinstance(task, BinaryClassification):
        return F.binary_cross_entropy_with_logits(outputs, encoded, reduction="sum")
    return F.mse_loss(outputs, encoded, reduction="sum") / (2 * 0.7**2)


def steered(observed: Observation, i: int, k: int, anchored: bool) -> Tensor:
    change = torch.stack([observed.features[i] @ COEFFICIENTS[c, :, k] for c in range(3)])
    return observed.outputs[i] + change if anchored else change


@every_task
@every_anchor
def test_measure_equals_a_loop(task: Task, anchored: bool) -> None:
    queries = observation(task, size=11, seed=3)
    obtained = measure(queries, COEFFICIENTS, task, anchored=anchored)
    assert obtained.shape == (11, 7)
    for i in range(11):
        before = torch_loss(task, queries.outputs[i], queries.encoded[i])
        for k in range(7):
            after = torch_loss(task, steered(queries, i, k, anchored), queries.encoded[i])
            torch.testing.assert_close(obtained[i, k], before - after)


@every_task
@every_anchor
def test_mean_prediction_equals_a_loop(task: Task, anchored: bool) -> None:
    queries = observation(task, size=4, seed=3)
    obtained = mean_prediction(queries, COEFFICIENTS, task, anchored=anchored)
    for i in range(4):
        expected = sum(task.mean(steered(queries, i, k, anchored)) for k in range(7)) / 7
        torch.testing.assert_close(obtained[i], expected)


@every_task
@every_anchor
def test_blocks_change_nothing(task: Task, anchored: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    queries = observation(task, size=11, seed=3)
    whole = [fn(queries, COEFFICIENTS, task, anchored=anchored) for fn in (measure, mean_prediction)]
    for size in (1, 8 * 3 * 7 * 4):  # blocks of one and of four examples
        monkeypatch.setattr(operators, "BLOCK_BYTES", size)
        again = [fn(queries, COEFFICIENTS, task, anchored=anchored) for fn in (measure, mean_prediction)]
        torch.testing.assert_close(again, whole)


@every_task
def test_positive_when_the_operator_helps(task: Task) -> None:
    """A small step down the loss's gradient gives positive measurements, a step up negative ones."""
    queries = observation(task, size=1, seed=3)
    down = torch.outer((queries.encoded - task.mean(queries.outputs))[0], queries.features[0])  # (C, r)
    both = 1e-3 * torch.stack([down, -down], 2)
    helped, harmed = measure(queries, both, task, anchored=True)[0]
    assert helped > 0 > harmed
    expected = 1e-3 * down.square().sum() / task.dispersion
    torch.testing.assert_close(helped, expected, rtol=0.05, atol=0)


@every_task
def test_zero_operators_leave_an_anchored_model_alone(task: Task) -> None:
    queries = observation(task, size=6)
    nothing = torch.zeros(3, 5, 2, dtype=torch.float64)
    assert measure(queries, nothing, task, anchored=True).abs().max() < 1e-12
    torch.testing.assert_close(mean_prediction(queries, nothing, task, anchored=True), task.mean(queries.outputs))
    unanchored = task.loss(torch.zeros(6, 3).double(), queries.encoded)
    expected = (queries.losses - unanchored)[:, None].expand(-1, 2)
    torch.testing.assert_close(measure(queries, nothing, task, anchored=False), expected)
