"""Steering operators at work: the outputs they give, and their effect on the loss of a query."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from stride_lightning.steering.basis import Observation
from stride_lightning.steering.solvers import BLOCK_BYTES
from stride_lightning.tasks.likelihoods import Task


def steer(outputs: Tensor, features: Tensor, coefficients: Tensor, *, anchored: bool) -> Tensor:
    """Outputs under every operator, ``phi a_k``, on top of the frozen model's outputs ``(B, C)`` if anchored.

    From features ``(B, r)`` and operators ``(C, r, K)``, of shape ``(C, B, K)``: classes first, so that the likelihood
    runs over contiguous memory.
    """
    steered = features @ coefficients
    return steered + outputs.T[:, :, None] if anchored else steered


def measure(observed: Observation, coefficients: Tensor, task: Task, *, anchored: bool) -> Tensor:
    """How much each operator lowers the loss of each query below the frozen model's, in nats.

    ``y_k(x) = loss(x) - loss of x under operator k``, shape ``(q, K)`` for operators ``(C, r, K)``. Positive: the
    subset helps.

    Reference: arXiv:2606.05165 (STRIDE), measurement of subset effects.
    """
    measurements = observed.losses.new_empty(len(observed), coefficients.shape[2])
    for rows, steered in _blocks(observed, coefficients, anchored=anchored):
        encoded = observed.encoded[rows].T[:, :, None]
        measurements[rows] = observed.losses[rows, None] - task.loss(steered, encoded, dim=0)
    return measurements


def mean_prediction(observed: Observation, coefficients: Tensor, task: Task, *, anchored: bool) -> Tensor:
    """Prediction of every example averaged over the operators, shape ``(n, C)``."""
    predictions = torch.empty_like(observed.outputs)
    for rows, steered in _blocks(observed, coefficients, anchored=anchored):
        predictions[rows] = task.mean(steered, dim=0).mean(2).T
    return predictions


def _blocks(observed: Observation, coefficients: Tensor, *, anchored: bool) -> Iterator[tuple[slice, Tensor]]:
    block = max(1, BLOCK_BYTES // (coefficients.element_size() * len(coefficients) * coefficients.shape[2]))
    for start in range(0, len(observed), block):
        rows = slice(start, start + block)
        yield rows, steer(observed.outputs[rows], observed.features[rows], coefficients, anchored=anchored)
