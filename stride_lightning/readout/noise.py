"""The noise of a regression, measured by leaving examples out."""

from __future__ import annotations

import torch
from torch import Tensor

#: Most rounds, and the least noise relative to the variance of the targets.
MAX_ROUNDS, FLOOR = 20, 1e-6
#: Least noise that the ridge is made for, over the variance of the targets. A network is not trained long enough for
#: finer directions: where targets have next to no noise (energy), this is worth .04 to .12 of LDS.
RIDGE_NOISE = 0.05


def relative_noise(features: Tensor, energies: Tensor, targets: Tensor, prior_variance: float) -> Tensor:
    r"""Noise variance of each output over the variance of its targets, float64 of shape ``(C,)``.

    The noise and the ridge that it makes, :func:`ridge_of`, are iterated to a fixed point: the noise is the
    mean square of the leave-one-out residuals of the ridge itself, ``r_i / (1 - h_i)``.

    Args:
        features: Coordinates with orthogonal columns, shape ``(n, m)``; the last is the constant, without a ridge.
        energies: Sums of squares of the columns, shape ``(m,)``.
        targets: Centred targets, shape ``(n, C)``.
        prior_variance: Of the function, relative to the variance of the targets.

    Example:
        >>> features = torch.ones(4, 1, dtype=torch.float64)  # the constant alone explains nothing
        >>> targets = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]], dtype=torch.float64)
        >>> relative_noise(features, torch.tensor([4.0]), targets, 1.0)
        tensor([1.7778], dtype=torch.float64)
    """
    variances = targets.double().square().mean(0)
    projected = torch.stack([_projected(*parts) for parts in zip(*_blocks(features, targets), strict=True)]).sum(0)
    noise = measured = torch.ones_like(variances)
    for _ in range(MAX_ROUNDS):
        inverse = 1 / (energies.double()[:, None] + ridge_of(noise, prior_variance))  # (m, C)
        inverse[-1] = 1 / energies[-1].double()
        squares = torch.zeros_like(variances)
        for rows, y in zip(*_blocks(features, targets), strict=True):
            exact = rows.double()
            left = 1 - exact.square() @ inverse
            squares += ((y.double() - exact @ (inverse * projected)) / left.clamp(min=1e-6)).square().sum(0)
        measured = torch.where(variances > 0, squares / len(targets) / variances, 1.0).clamp(min=FLOOR)
        if bool(((measured - noise).abs() <= 1e-4 * noise).all()):
            break
        noise = measured
    return measured


def ridge_of(noise: Tensor, prior_variance: float) -> Tensor:
    """The ridge of a regression, for noise relative to the variance of the targets."""
    return noise.clamp(min=RIDGE_NOISE) / prior_variance


def _blocks(features: Tensor, targets: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    return features.split(2048), targets.split(2048)


def _projected(features: Tensor, targets: Tensor) -> Tensor:
    return features.double().T @ targets.double()
