"""Streaming statistics of activations, watched while a model trains."""

from __future__ import annotations

import torch
from torch import Tensor

#: Covariances are kept of at most this many features; wider inputs are sketched.
MAX_COVARIANCE = 256


class StreamingStatistics:
    """Mean, variance and (sketched) covariance of a stream of activations, in float64.

    Batches are merged by Chan's update, so large means and long streams lose no digits.

    Example:
        >>> statistics = StreamingStatistics()
        >>> statistics.update(torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
        >>> statistics.mean.tolist(), statistics.scalars()["dead_fraction"]
        ([2.0, 0.0], 0.5)

    Reference: Chan, Golub, LeVeque (1983), Algorithms for computing the sample variance.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.empty(0)
        self._squares = torch.empty(0)  # sum of squared deviations, (d,)
        self._scatter = torch.empty(0)  # sum of outer products of (sketched) deviations
        self._sketch: Tensor | None = None

    def update(self, features: Tensor) -> None:
        """Take in a batch of features, shape ``(B, d)``."""
        features = features.detach().double()
        if self.count == 0:
            self._start(features)
        count = len(features)
        mean = features.mean(0)
        deviations, shift = features - mean, mean - self.mean
        between = self.count * count / (self.count + count)
        self._squares += deviations.square().sum(0) + between * shift.square()
        if self._sketch is not None:
            deviations, shift = deviations @ self._sketch, shift @ self._sketch
        self._scatter += deviations.T @ deviations + between * torch.outer(shift, shift)
        self.count += count
        self.mean = self.mean + (mean - self.mean) * (count / self.count)

    def _start(self, features: Tensor) -> None:
        width, rank = features.shape[1], min(features.shape[1], MAX_COVARIANCE)
        self.mean, self._squares = features.new_zeros(width), features.new_zeros(width)
        self._scatter = features.new_zeros(rank, rank)
        if width > rank:
            generator = torch.Generator().manual_seed(width)
            sketch = torch.randn(width, rank, generator=generator, dtype=torch.float64)
            self._sketch = sketch.to(features.device) / rank**0.5

    @property
    def variance(self) -> Tensor:
        """Variance of each feature, shape ``(d,)``."""
        return self._squares / max(self.count, 1)

    @property
    def covariance(self) -> Tensor:
        """Covariance of the features, or of their Gaussian sketch when there are more than ``MAX_COVARIANCE``."""
        return self._scatter / max(self.count, 1)

    def scalars(self) -> dict[str, float]:
        """Root mean square norm, effective rank ``tr(C)^2 / tr(C^2)`` and share of features that never change."""
        covariance = self.covariance
        total = covariance.diagonal().sum()
        norm = (self.mean.square() + self.variance).sum().sqrt()
        dead = self.variance <= 1e-14 * self.variance.max().clamp(min=1e-30)
        return {
            "norm": float(norm),
            "effective_rank": float(total.square() / covariance.square().sum().clamp(min=1e-300)),
            "dead_fraction": float(dead.double().mean()),
        }

    def tensors(self) -> dict[str, Tensor]:
        """Plain tensors to store."""
        values = {name: getattr(self, name).float() for name in ("mean", "variance", "covariance")}
        return {"count": torch.tensor(self.count), **values}
