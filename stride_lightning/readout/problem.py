"""The convex problem of a readout: its losses, slopes and curvature, for many weightings of the data at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from stride_lightning.tasks.likelihoods import Task

#: Bytes of the outputs of a block of examples under a block of coefficients.
BLOCK_BYTES = 2**25


@dataclass(frozen=True)
class Problem:
    r"""Coefficients ``a`` of shape ``(m, C)`` that minimise a penalised loss.

    .. math:: \sum_i w_i \, \ell(b + \phi_i a, \; y_i) + \frac{1}{2} \sum_{jc} \lambda_{jc} a_{jc}^2

    Coefficients for K weightings ``w`` of the data have shape ``(m, C, K)``, their outputs ``(n, C, K)``.

    Args:
        task: The likelihood.
        features: Coordinates ``phi`` of the training examples, shape ``(n, m)``.
        encoded: Targets, shape ``(n, C)``, or wider with weights.
        offset: Outputs ``b`` of the best constant prediction, shape ``(C,)``; no penalty pulls at it.
        precision: Of the prior, ``lambda``, shape ``(m, C)``.
        noise: Of a regression, the noise variance of each output in the targets' unit, shape ``(C,)``; else None.
        base: Outputs of the training examples where coefficients are zero, shape ``(n, C)``; None for the offset.
        balance: Residuals of these, shape ``(n, C)``, whose slope is taken off, so that zero is the solution on all
            data; None for nothing.
    """

    task: Task
    features: Tensor
    encoded: Tensor
    offset: Tensor
    precision: Tensor
    noise: Tensor | None = None
    base: Tensor | None = None
    balance: Tensor | None = None

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.features)

    @property
    def shape(self) -> tuple[int, int]:
        """Of coefficients, ``(m, C)``."""
        return self.precision.shape[0], self.precision.shape[1]

    def blocks(self, num_columns: int) -> Iterator[slice]:
        """Blocks of examples whose outputs fit ``BLOCK_BYTES``, for so many columns of coefficients."""
        step = max(64, BLOCK_BYTES // (self.features.element_size() * self.shape[1] * num_columns))
        for start in range(0, len(self), step):
            yield slice(start, min(start + step, len(self)))

    def outputs(self, coefficients: Tensor, features: Tensor, base: Tensor | None = None) -> Tensor:
        """Outputs of some examples, shape ``(B, C, K)``: ``base``, or the offset, where coefficients are zero."""
        flat = features @ coefficients.flatten(1)
        return flat.unflatten(1, coefficients.shape[1:]) + (self.offset if base is None else base)[..., None]

    def around(self, coefficients: Tensor) -> Problem:
        """The problem in moves from its solution, shape ``(m, C)``.

        The move of all data is zero up to rounding, and small moves lose no digits beside large coefficients.
        """
        base = torch.cat([self._outputs(rows, coefficients[..., None])[..., 0] for rows in self.blocks(1)])
        return replace(self, base=base, balance=self.residuals(base, self.encoded))

    def residuals(self, outputs: Tensor, encoded: Tensor) -> Tensor:
        """Gradient of each example's loss in its outputs, shape ``(B, C)``."""
        return self.task.residual(self.task.mean(outputs), encoded)

    def means(self, rows: slice, coefficients: Tensor) -> Tensor:
        """Predictions of some training examples, shape ``(B, C, K)``."""
        return self.task.mean(self._outputs(rows, coefficients), dim=1)

    def _outputs(self, rows: slice, coefficients: Tensor) -> Tensor:
        """Outputs of some training examples, shape ``(B, C, K)``."""
        return self.outputs(coefficients, self.features[rows], None if self.base is None else self.base[rows])

    def objective(self, coefficients: Tensor, weights: Tensor | None) -> Tensor:
        """The penalised loss, float64 of shape ``(K,)``; weights have shape ``(n, K)``, None are all 1."""
        total = 0.5 * (self.precision[..., None] * coefficients.square()).double().sum((0, 1))
        for rows in self.blocks(coefficients.shape[2]):
            losses = self.task.loss(self._outputs(rows, coefficients), self.encoded[rows][..., None], dim=1)
            total += (losses if weights is None else losses * weights[rows]).double().sum(0)
        if self.balance is not None:
            total -= (self._balancing_slope[..., None] * coefficients).double().sum((0, 1))
        return total

    @cached_property
    def _balancing_slope(self) -> Tensor:
        assert self.balance is not None
        return self.features.T @ self.balance

    def losses(self, coefficients: Tensor, features: Tensor, encoded: Tensor) -> Tensor:
        """Losses of some examples under every column of coefficients, shape ``(B, K)``."""
        return self.task.loss(self.outputs(coefficients, features), encoded[..., None], dim=1)

    def slope(self, coefficients: Tensor, weights: Tensor | None) -> Tensor:
        """Gradient of the objective, shape ``(m, C, K)``."""
        total = self.precision[..., None] * coefficients
        for rows in self.blocks(coefficients.shape[2]):
            surprise = self.task.residual(self.means(rows, coefficients), self.encoded[rows][..., None], dim=1)
            surprise = surprise if weights is None else surprise * weights[rows][:, None]
            if self.balance is not None:
                surprise = surprise - self.balance[rows][..., None]
            total += (self.features[rows].T @ surprise.flatten(1)).view_as(total)
        return total

    def curved(self, rows: slice | Tensor, means: Tensor, moved: Tensor) -> Tensor:
        """Second derivative of the losses of some training examples, times moves of their outputs ``(B, C, K)``."""
        curved = self.task.curvature(means, moved, dim=1)
        weights = self.task.output_weights(self.encoded[rows][..., None], dim=1)
        return curved * weights if isinstance(weights, Tensor) else curved

    @cached_property
    def temperature(self) -> Tensor:
        """Factor of the covariance ``H^-1`` of each output, shape ``(C,)``: the factor of the loss, times the noise."""
        noise = torch.ones_like(self.offset) if self.noise is None else self.noise
        return noise / self.task.dispersion


class Curvature:
    """The second derivative of the objective at coefficients of shape ``(m, C, 1)`` or ``(m, C, K)``.

    That of one column serves any number of vectors; its predictions are stored. With K columns every vector has one.
    """

    def __init__(self, problem: Problem, coefficients: Tensor, weights: Tensor | None = None) -> None:
        self.problem, self._coefficients, self._weights = problem, coefficients, weights
        self._stored = coefficients.new_empty(len(problem), problem.shape[1], 1) if coefficients.shape[2] == 1 else None
        if self._stored is not None:
            for rows in problem.blocks(1):
                self._stored[rows] = problem.means(rows, coefficients)

    def means(self, rows: slice) -> Tensor:
        """Predictions of some examples, shape ``(B, C, 1)`` or ``(B, C, K)``."""
        return self.problem.means(rows, self._coefficients) if self._stored is None else self._stored[rows]

    def __call__(self, vectors: Tensor) -> Tensor:
        """The second derivative times vectors of shape ``(m, C, K)``."""
        total = self.problem.precision[..., None] * vectors
        for rows in self.problem.blocks(vectors.shape[2]):
            features = self.problem.features[rows]
            moved = (features @ vectors.flatten(1)).view(len(features), *vectors.shape[1:])
            curved = self.problem.curved(rows, self.means(rows), moved)
            curved = curved if self._weights is None else curved * self._weights[rows][:, None]
            total += (features.T @ curved.flatten(1)).view_as(total)
        return total
