"""Likelihoods with a loss for each output: of yes or no, and of numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self, override

from stride_lightning.runtime.checks import check_positive
from stride_lightning.tasks.classification import Classification as Classification
from stride_lightning.tasks.task import HOW_TO_PASS_TASK as HOW_TO_PASS_TASK
from stride_lightning.tasks.task import Task as Task
from stride_lightning.tasks.task import check_rows as check_rows
from stride_lightning.tasks.task import columns as columns
from stride_lightning.tasks.task import describe as describe


class PerOutput(Task):
    """Outputs with a likelihood each, whose weights stand beside the statistic: ``[w t, w]``, shape ``(B, 2 C)``."""

    def weighted(self, statistic: Tensor, weights: Tensor | None) -> Tensor:
        """Encoded targets of statistics ``(B, C)``, with weights of the examples or of each output."""
        if weights is None:
            return statistic
        weights = weights.to(statistic).expand_as(statistic)
        return torch.cat([weights * statistic, weights], 1)

    @override
    def split(self, encoded: Tensor, dim: int = -1) -> tuple[Tensor, Tensor | float]:
        if not self.is_weighted:
            return encoded, 1.0
        statistic, weights = encoded.chunk(2, dim)
        return statistic, weights

    def statistic(self, encoded: Tensor, dim: int = -1) -> Tensor:
        """The statistic without its weight; 0 where the weight is."""
        statistic, weights = self.split(encoded, dim)
        return (
            statistic / weights.clamp(min=torch.finfo(weights.dtype).tiny) if isinstance(weights, Tensor) else statistic
        )

    @override
    def outputs(self, model: nn.Module, inputs: Any) -> Tensor:
        outputs = super().outputs(model, inputs)
        return outputs.flatten(1) if isinstance(outputs, Tensor) and outputs.ndim > 2 else outputs

    @override
    def decode(self, encoded: Tensor) -> Tensor | None:
        return super().decode(self.statistic(encoded))


class BinaryClassification(PerOutput):
    """Targets 0 or 1, one logit per example (or several independent ones), logistic loss.

    Args:
        pos_weight: Weight of the loss where the target is 1, a number or one for each logit.

    Example:
        >>> task = BinaryClassification()
        >>> task.loss(torch.zeros(1, 1), task.encode(torch.tensor([1]), 1))  # log 2
        tensor([0.6931])
    """

    name = "binary classification"
    pos_weight: Tensor | None = None

    def __init__(self, *, pos_weight: float | Sequence[float] | Tensor | None = None) -> None:
        if pos_weight is not None:
            self.pos_weight = torch.as_tensor(pos_weight, dtype=torch.float64).cpu().reshape(-1)

    @property
    @override
    def is_weighted(self) -> bool:
        return self.pos_weight is not None or super().is_weighted

    @override
    def encode(self, targets: Tensor, num_outputs: int) -> Tensor:
        targets, weights = self.unpacked(targets, num_outputs)
        encoded = as_columns(targets, num_outputs)
        check_rows((encoded == 0) | (encoded == 1), encoded, f"and a binary target must be 0 or 1. {HOW_TO_PASS_TASK}")
        if self.pos_weight is not None:
            of_targets = 1 + (self.pos_weight.to(encoded) - 1) * encoded
            weights = of_targets if weights is None else weights * of_targets
        return self.weighted(encoded, weights)

    @override
    def constant(self, encoded: Tensor) -> Tensor:
        statistic, weights = self.split(encoded)
        count = len(encoded) if not isinstance(weights, Tensor) else weights.sum(0)
        return ((statistic.sum(0) + 1 / 2) / (count + 1)).logit()

    @override
    def mean(self, outputs: Tensor, dim: int = -1) -> Tensor:
        return outputs.sigmoid()

    @override
    def loss(self, outputs: Tensor, encoded: Tensor, dim: int = -1) -> Tensor:
        statistic, weights = self.split(encoded, dim)
        return (weights * F.softplus(outputs) - statistic * outputs).sum(dim) / self.dispersion

    @override
    def margin(self, outputs: Tensor, encoded: Tensor) -> Tensor:
        if outputs.shape[-1] != 1:
            raise ValueError("Several independent logits have no one margin.")
        return ((2 * self.statistic(encoded) - 1) * outputs)[:, 0]

    @override
    def curvature(self, mean: Tensor, direction: Tensor, dim: int = -1) -> Tensor:
        return self.curvature_diagonal(mean) * direction

    @override
    def curvature_diagonal(self, mean: Tensor) -> Tensor:
        return mean * (1 - mean) / self.dispersion

    @override
    def curvature_root(self, mean: Tensor, direction: Tensor) -> Tensor:
        return self.curvature_diagonal(mean).sqrt() * direction

    @override
    def predict(self, outputs: Tensor) -> Tensor:
        return (outputs > 0).long()

    @override
    def settings(self) -> list[str]:
        if self.pos_weight is None:
            return super().settings()
        return [
            *super().settings(),
            f"pos_weight=[{', '.join(f'{weight:.6g}' for weight in self.pos_weight.tolist())}]",
        ]


class Regression(PerOutput):
    """Real targets with Gaussian noise: the loss is ``|o - y|^2 / (2 noise_std^2)``, its constant left out.

    Args:
        noise_std: Standard deviation of the noise, in units of the target. It scales all scores by
            ``1 / noise_std^2`` and changes no ranking; at 1 the unit of a score is half a squared error.

    Example:
        >>> task = Regression(noise_std=0.5)
        >>> task.loss(torch.tensor([[2.0]]), task.encode(torch.tensor([1.0]), 1))
        tensor([2.])
    """

    name = "regression"

    def __init__(self, noise_std: float = 1.0) -> None:
        self.noise_std = check_positive("noise_std", noise_std)

    @override
    def with_scale(self, factor: float) -> Self:
        return self.changed(noise_std=self.noise_std / factor**0.5)

    @property
    @override
    def dispersion(self) -> float:
        return self.noise_std**2 * super().dispersion

    @override
    def encode(self, targets: Tensor, num_outputs: int) -> Tensor:
        targets, weights = self.unpacked(targets, num_outputs)
        return self.weighted(as_columns(targets, num_outputs), weights)

    @override
    def constant(self, encoded: Tensor) -> Tensor:
        statistic, weights = self.split(encoded)
        return statistic.mean(0) if not isinstance(weights, Tensor) else statistic.sum(0) / weights.sum(0)

    @override
    def mean(self, outputs: Tensor, dim: int = -1) -> Tensor:
        return outputs

    @override
    def loss(self, outputs: Tensor, encoded: Tensor, dim: int = -1) -> Tensor:
        weights = self.split(encoded, dim)[1]
        return (weights * (outputs - self.statistic(encoded, dim)).square()).sum(dim) / (2 * self.dispersion)

    @override
    def curvature(self, mean: Tensor, direction: Tensor, dim: int = -1) -> Tensor:
        return direction / self.dispersion

    @override
    def curvature_diagonal(self, mean: Tensor) -> Tensor:
        return torch.full_like(mean, 1 / self.dispersion)

    @override
    def curvature_root(self, mean: Tensor, direction: Tensor) -> Tensor:
        return direction / self.dispersion**0.5

    @override
    def predict(self, outputs: Tensor) -> Tensor:
        raise ValueError(
            "target='predicted' says nothing for a regression: the loss of a prediction against itself is zero, "
            "whatever the training data are. Give each query a target, such as the value that surprised you."
        )

    @override
    def settings(self) -> list[str]:
        return [f"noise_std={self.noise_std:g}", *super().settings()]


def as_columns(targets: Tensor, num_outputs: int) -> Tensor:
    """Targets as floats of shape ``(B, C)``; another number of them is refused."""
    if targets.numel() != len(targets) * num_outputs:
        raise ValueError(f"Expected {num_outputs} target(s) per example, got {describe(targets)}.")
    columns = targets.reshape(len(targets), num_outputs)
    return columns if columns.is_floating_point() else columns.float()
