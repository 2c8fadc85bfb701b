"""A readout in the space of the features, by dense float64 algebra: what the readout is compared with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import grad, jacrev, vmap

from stride_lightning.readout.features import Observation
from stride_lightning.tasks.likelihoods import Regression, Task


@dataclass(frozen=True)
class DenseReadout:
    """Coefficients ``(p, C)`` on features, by Newton's method with the whole second derivative."""

    task: Task
    features: Tensor  # (n, p)
    encoded: Tensor  # (n, C); centred if it is a regression
    shift: Tensor  # what was taken off the targets, (C,)
    offset: Tensor  # (C,)
    precision: Tensor  # (p, C)
    temperature: Tensor  # factor of the covariance of each output, (C,)

    def loss(self, outputs: Tensor, encoded: Tensor) -> Tensor:
        return self.task.loss(outputs[None], encoded[None])[0]

    def outputs(self, coefficients: Tensor, features: Tensor) -> Tensor:
        return features @ coefficients + self.offset

    def objective(self, coefficients: Tensor, weights: Tensor) -> Tensor:
        losses = self.task.loss(self.outputs(coefficients, self.features), self.encoded)
        return weights @ losses + (self.precision * coefficients.square()).sum() / 2

    def residuals(self, coefficients: Tensor, features: Tensor, encoded: Tensor) -> Tensor:
        return vmap(grad(self.loss))(self.outputs(coefficients, features), encoded)

    def bends(self, coefficients: Tensor) -> Tensor:
        """Second derivative of every example's loss in its outputs, ``(n, C, C)``."""
        return vmap(jacrev(grad(self.loss)))(self.outputs(coefficients, self.features), self.encoded)

    def curvature(self, coefficients: Tensor, weights: Tensor) -> Tensor:
        """Shape ``(p C, p C)``."""
        weighted = weights[:, None, None] * self.bends(coefficients)
        whole = torch.einsum("ip,iq,icd->pcqd", self.features, self.features, weighted)
        return whole.flatten(2).flatten(0, 1) + self.precision.flatten().diag()

    def fit(self, weights: Tensor | None = None) -> Tensor:
        weights = self.features.new_ones(len(self.features)) if weights is None else weights.double()
        coefficients = torch.zeros_like(self.precision)
        for _ in range(100):
            surprise = self.residuals(coefficients, self.features, self.encoded) * weights[:, None]
            slope = self.features.T @ surprise + self.precision * coefficients
            step = torch.linalg.solve(self.curvature(coefficients, weights), slope.flatten()).view_as(slope)
            factor, before = 1.0, self.objective(coefficients, weights)
            while self.objective(coefficients - factor * step, weights) > before + 1e-12 * before.abs():
                factor /= 2
            coefficients = coefficients - factor * step
            if float(step.abs().max()) < 1e-13 * (1 + float(coefficients.abs().max())):
                return coefficients
        raise AssertionError("Newton's method did not converge")

    def gradients(self, coefficients: Tensor, features: Tensor, encoded: Tensor) -> Tensor:
        """Of each example's loss in the coefficients, ``(B, p C)``."""
        residuals = self.residuals(coefficients, features, encoded)
        return (features[:, :, None] * residuals[:, None, :]).flatten(1)

    def inverse(self, coefficients: Tensor) -> Tensor:
        return torch.linalg.inv(self.curvature(coefficients, self.features.new_ones(len(self.features))))

    def influence(self, features: Tensor, encoded: Tensor) -> Tensor:
        solution = self.fit()
        mine, of_training = (
            self.gradients(solution, *pair) for pair in ((features, encoded), (self.features, self.encoded))
        )
        return mine @ self.inverse(solution) @ of_training.T

    def points(self, observed: Observation) -> tuple[Tensor, Tensor]:
        """Features and targets of examples as this readout takes them."""
        return with_constant(self.task, observed.features.double()), observed.encoded.double() - self.shift


def dense_readout(task: Task, observed: Observation, variance: float = 3.0) -> DenseReadout:
    """The readout that STRIDE promises, in ``variance`` of logits; a regression's in that of its targets."""
    features, encoded = with_constant(task, observed.features.double()), observed.encoded.double()
    count, outputs = len(encoded), observed.outputs.shape[1]
    task = task.scaled_to(encoded)
    nothing = encoded.new_zeros(outputs)
    precision = encoded.new_full((features.shape[1], outputs), 1 / (variance * task.dispersion))
    temperature = (nothing + 1) / task.dispersion
    if task.is_weighted:
        return DenseReadout(task, features, encoded, 0 * encoded[0], task.constant(encoded), precision, temperature)
    if not isinstance(task, Regression):
        frequencies = (encoded.sum(0) + 1 / (outputs if task.name == "classification" else 2)) / (count + 1)
        offset = frequencies.log() if task.name == "classification" else frequencies.log() - (1 - frequencies).log()
        return DenseReadout(task, features, encoded, nothing, offset, precision, temperature)
    shift = encoded.mean(0)
    variances = (encoded - shift).square().mean(0)
    noise = torch.stack([noise_fixed_point(features, column) for column in (encoded - shift).T])
    precision = (noise.clamp(min=0.05) / task.dispersion).expand(features.shape[1], outputs).clone()
    precision[-1] = 0
    return DenseReadout(task, features, encoded - shift, shift, nothing, precision, noise * variances / task.dispersion)


def with_constant(task: Task, features: Tensor) -> Tensor:
    """A regression has a constant of its own, which no prior pulls at."""
    return torch.cat([features, torch.ones_like(features[:, :1])], 1) if isinstance(task, Regression) else features


def left_out_error(features: Tensor, targets: Tensor, ridge: float | Tensor) -> Tensor:
    """Mean square error of ridge regressions that leave one example out, by as many refits; the last has no ridge."""
    penalty = torch.full((features.shape[1],), float(ridge), dtype=torch.float64)
    penalty[-1] = 0
    errors = []
    for i in range(len(features)):
        rest = torch.arange(len(features)) != i
        moments = features[rest].T @ features[rest] + penalty.diag()
        errors.append(targets[i] - features[i] @ torch.linalg.solve(moments, features[rest].T @ targets[rest]))
    return torch.stack(errors).square().mean()


def noise_fixed_point(features: Tensor, targets: Tensor, rounds: int = 20) -> Tensor:
    """Noise variance over the variance of the targets ``(n,)`` at which leaving one out measures what it assumed."""
    variance, noise = targets.square().mean(), torch.ones((), dtype=torch.float64)
    for _ in range(rounds):
        measured = (left_out_error(features, targets, noise.clamp(min=0.05)) / variance).clamp(min=1e-6)
        if abs(measured - noise) <= 1e-4 * noise:
            return measured
        noise = measured
    return noise
