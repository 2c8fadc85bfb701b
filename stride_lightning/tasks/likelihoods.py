"""Likelihoods: the losses of classes, of yes or no, and of numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self, override

from stride_lightning.runtime.checks import check_positive
from stride_lightning.tasks.task import HOW_TO_PASS_TASK as HOW_TO_PASS_TASK
from stride_lightning.tasks.task import Task as Task
from stride_lightning.tasks.task import check_rows as check_rows
from stride_lightning.tasks.task import columns as columns
from stride_lightning.tasks.task import describe as describe


class Classification(Task):
    r"""Integer targets, one output per class, softmax cross-entropy.

    With weights and smoothing the loss is ``-sum_c m_c log p_c`` for the masses
    ``m_c = w_c ((1 - e) [c = y] + e / C)``, as torch's ``cross_entropy`` has it. Its mean over a batch divides by the
    sum of ``w_y``; so do scores, whose weights have mean 1 over the training set.

    Args:
        class_weights: Weight ``w_c`` of each class; all 1 by default.
        label_smoothing: Share ``e`` of a target that is spread over all classes.
        ignore_index: The target of examples whose loss is 0.
        soft_labels: Whether targets are a weight for each class, float of shape ``(B, C)``.
        normalised: Whether training divides by the sum of a batch's weights; else by its size.

    Example:
        >>> task = Classification()
        >>> task.loss(torch.zeros(1, 4), task.encode(torch.tensor([2]), 4))  # log 4
        tensor([1.3863])
    """

    name = "classification"
    # Class attributes, so that subclasses need not call this __init__.
    class_weights: Tensor | None = None
    label_smoothing: float = 0.0
    ignore_index: int | None = None
    soft_labels: bool = False

    def __init__(
        self,
        *,
        class_weights: Sequence[float] | Tensor | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int | None = None,
        soft_labels: bool = False,
        normalised: bool = True,
    ) -> None:
        if class_weights is not None:
            self.class_weights = torch.as_tensor(class_weights, dtype=torch.float64).cpu()
            if self.class_weights.ndim != 1 or not bool((self.class_weights >= 0).all()):
                raise ValueError(
                    f"`class_weights` must be one number of at least 0 for each class, got {class_weights}."
                )
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"`label_smoothing` must be at least 0 and below 1, got {label_smoothing!r}.")
        self.label_smoothing, self.ignore_index, self.soft_labels = label_smoothing, ignore_index, soft_labels
        self.is_normalised = normalised and (class_weights is not None or ignore_index is not None)

    @property
    @override
    def is_weighted(self) -> bool:
        has_masses = self.class_weights is not None or self.ignore_index is not None or self.soft_labels
        return has_masses or super().is_weighted

    @override
    def encode(self, targets: Tensor, num_outputs: int) -> Tensor:
        targets, weights = self.unpacked(targets, num_outputs if self.soft_labels else 1)
        if self.soft_labels and targets.ndim > 1:
            if targets.shape != (len(targets), num_outputs) or not targets.is_floating_point():
                raise ValueError(f"Soft labels are floats of shape (B, {num_outputs}), got {describe(targets)}.")
            check_rows(targets >= 0, targets, "and a soft label must not be negative")
            encoded, ignored = targets, None
        else:
            targets = targets[:, 0] if targets.ndim == 2 and targets.shape[1] == 1 else targets
            if targets.ndim != 1 or (targets.is_floating_point() and bool((targets % 1 != 0).any())):
                raise ValueError(f"Classification expects integer targets of shape (B,), got {describe(targets)}.")
            ignored = None if self.ignore_index is None else targets == self.ignore_index
            counted = targets if ignored is None else targets.masked_fill(ignored, 0)
            check_rows(
                (counted >= 0) & (counted < num_outputs),
                targets,
                f"and a model with {num_outputs} outputs takes 0..{num_outputs - 1}. Leave out examples that training "
                "ignores (such as those labelled -100): torch.utils.data.Subset(dataset, positions). Or say what the "
                f"target means. {HOW_TO_PASS_TASK}",
            )
            encoded = F.one_hot(counted.long(), num_outputs).float()
        if self.label_smoothing:
            encoded = (1 - self.label_smoothing) * encoded + self.label_smoothing / num_outputs
        if self.class_weights is not None:
            if len(self.class_weights) != num_outputs:
                raise ValueError(
                    f"{len(self.class_weights)} class weights do not fit a model of {num_outputs} outputs."
                )
            encoded = encoded * self.class_weights.to(encoded)
        encoded = encoded if ignored is None else encoded.masked_fill(ignored[:, None], 0)
        return encoded if weights is None else encoded * weights.to(encoded)

    @override
    def decode(self, encoded: Tensor) -> Tensor | None:
        weights = self.class_weights
        if weights is None:
            classes = encoded.argmax(-1)
        else:
            classes = (encoded / weights.to(encoded).clamp(min=torch.finfo(torch.float32).tiny)).argmax(-1)
        if self.ignore_index is not None:
            classes = classes.masked_fill(encoded.sum(-1) == 0, self.ignore_index)
        elif weights is not None:
            classes = classes.masked_fill(encoded.sum(-1) == 0, int(weights.argmin()))
        return classes

    @override
    def split(self, encoded: Tensor, dim: int = -1) -> tuple[Tensor, Tensor | float]:
        return encoded, encoded.sum(dim, keepdim=True) if self.is_weighted else 1.0

    @override
    def example_weights(self, encoded: Tensor) -> Tensor:
        if self.class_weights is None:
            return super().example_weights(encoded)
        classes = self.decode(encoded)
        assert classes is not None
        of_classes = self.class_weights.to(encoded)[classes.clamp(0, encoded.shape[-1] - 1)]
        return of_classes.masked_fill(encoded.sum(-1) == 0, 0)

    @override
    def constant(self, encoded: Tensor) -> Tensor:
        total = encoded.sum() if self.is_weighted else len(encoded)
        return ((encoded.sum(0) + 1 / encoded.shape[1]) / (total + 1)).log()

    @override
    def mean(self, outputs: Tensor, dim: int = -1) -> Tensor:
        return outputs.softmax(dim)

    @override
    def loss(self, outputs: Tensor, encoded: Tensor, dim: int = -1) -> Tensor:
        return -(encoded * outputs.log_softmax(dim)).sum(dim) / self.dispersion

    @override
    def margin(self, outputs: Tensor, encoded: Tensor) -> Tensor:
        if self.label_smoothing or self.soft_labels or self.ignore_index is not None:
            raise ValueError("A loss with soft labels, smoothing or ignored targets is no function of a margin.")
        is_target = encoded.bool()
        others = outputs.masked_fill(is_target, -torch.inf).logsumexp(-1)
        return outputs.masked_fill(~is_target, -torch.inf).logsumexp(-1) - others

    @override
    def curvature(self, mean: Tensor, direction: Tensor, dim: int = -1) -> Tensor:
        weighted = mean * direction
        return (weighted - mean * weighted.sum(dim, keepdim=True)) / self.dispersion

    @override
    def curvature_diagonal(self, mean: Tensor) -> Tensor:
        return mean * (1 - mean) / self.dispersion

    @override
    def curvature_root(self, mean: Tensor, direction: Tensor) -> Tensor:
        # One column per class c, sqrt(p_c) (e_c - p): the gradient at the label c, weighted by its probability.
        weighted = mean.sqrt() * direction
        return (weighted - mean * weighted.sum(-1, keepdim=True)) / self.dispersion**0.5

    @override
    def predict(self, outputs: Tensor) -> Tensor:
        return outputs.argmax(-1)

    @override
    def settings(self) -> list[str]:
        shown: list[str] = []
        if self.class_weights is not None:
            shown.append(f"class_weights=[{', '.join(f'{weight:.6g}' for weight in self.class_weights.tolist())}]")
        if self.label_smoothing:
            shown.append(f"label_smoothing={self.label_smoothing:.6g}")
        if self.ignore_index is not None:
            shown.append(f"ignore_index={self.ignore_index}")
        if self.soft_labels:
            shown.append("soft_labels=True")
        if self.is_weighted and not self.is_normalised and not self.soft_labels:
            shown.append("normalised=False")
        return shown + super().settings()


class _PerOutput(Task):
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


class BinaryClassification(_PerOutput):
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
        encoded = _as_columns(targets, num_outputs)
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


class Regression(_PerOutput):
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
        return self.weighted(_as_columns(targets, num_outputs), weights)

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


def _as_columns(targets: Tensor, num_outputs: int) -> Tensor:
    if targets.numel() != len(targets) * num_outputs:
        raise ValueError(f"Expected {num_outputs} target(s) per example, got {describe(targets)}.")
    columns = targets.reshape(len(targets), num_outputs)
    return columns if columns.is_floating_point() else columns.float()
