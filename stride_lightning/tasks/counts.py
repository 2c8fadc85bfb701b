"""Counts with a Poisson distribution, whose logarithm of the rate is the output."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import override

from stride_lightning.tasks.likelihoods import PerOutput, as_columns, check_rows


class PoissonRegression(PerOutput):
    """Counts: the outputs are logarithms of rates, and the loss is ``exp(o) - y o``, its constant left out.

    Example:
        >>> import torch
        >>> task = PoissonRegression()
        >>> task.loss(torch.zeros(1, 1), task.encode(torch.tensor([3]), 1))
        tensor([1.])
    """

    name = "poisson regression"

    @override
    def encode(self, targets: Tensor, num_outputs: int) -> Tensor:
        targets, weights = self.unpacked(targets, num_outputs)
        encoded = as_columns(targets, num_outputs)
        check_rows(encoded >= 0, encoded, "and a count must not be negative")
        return self.weighted(encoded, weights)

    @override
    def constant(self, encoded: Tensor) -> Tensor:
        statistic, weights = self.split(encoded)
        total = weights.sum(0) if isinstance(weights, Tensor) else len(encoded)
        # One more example has the mean count of all outputs.
        return ((statistic.sum(0) + statistic.mean().clamp(min=1e-3)) / (total + 1)).log()

    @override
    def mean(self, outputs: Tensor, dim: int = -1) -> Tensor:
        return outputs.exp()

    @override
    def loss(self, outputs: Tensor, encoded: Tensor, dim: int = -1) -> Tensor:
        statistic, weights = self.split(encoded, dim)
        return (weights * outputs.exp() - statistic * outputs).sum(dim) / self.dispersion

    @override
    def curvature(self, mean: Tensor, direction: Tensor, dim: int = -1) -> Tensor:
        return mean * direction / self.dispersion

    @override
    def curvature_diagonal(self, mean: Tensor) -> Tensor:
        return mean / self.dispersion

    @override
    def curvature_root(self, mean: Tensor, direction: Tensor) -> Tensor:
        return self.curvature_diagonal(mean).sqrt() * direction

    @override
    def predict(self, outputs: Tensor) -> Tensor:
        return outputs.exp().round()
