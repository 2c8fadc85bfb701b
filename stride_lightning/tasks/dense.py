"""Tasks with a class for each place of an example: pixels of a picture, tokens of a text."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from typing_extensions import override

from stride_lightning.runtime.checks import RowError
from stride_lightning.tasks.classification import Classification
from stride_lightning.tasks.task import Task, describe

Reduction = Literal["mean", "sum"]

#: Label of places that are not predicted, as in torch and in Hugging Face's models.
IGNORED = -100


class ClassesOfPlaces(Classification):
    """Targets and losses where an example has many places: targets are a label and a weight for each of them.

    Outputs have shape ``(B, T, C)``, targets and their encoding ``(B, T, 2)``.
    """

    has_tokens: ClassVar[bool] = True
    reduction: Reduction = "mean"

    def __init__(self, reduction: Reduction = "mean", *, normalised: bool = False) -> None:
        if reduction not in get_args(Reduction):
            raise ValueError(f"`reduction` must be one of {get_args(Reduction)}, got {reduction!r}.")
        self.reduction: Reduction = reduction
        self.is_normalised = normalised

    @property
    @override
    def is_weighted(self) -> bool:
        return False  # weights are those of places

    @override
    def encode(self, targets: Tensor, num_outputs: int) -> Tensor:
        labels, weights = targets[..., 0], targets[..., 1]
        if (row := first_row(weights < 0)) is not None:
            raise RowError(row, "has a negative loss weight. Give it 0 or more")
        self.check_counted(weights)
        outside = (labels < 0) | (labels >= num_outputs)
        if (row := first_row(outside)) is not None:
            raise RowError(row, self.problem_of_label(int(labels[row][outside[row]][0]), num_outputs))
        return targets

    def check_counted(self, weights: Tensor) -> None:
        """Refuse, by a RowError, examples of which no place counts; by default they may be, with a loss of 0."""

    def problem_of_label(self, label: int, num_outputs: int) -> str:
        """What is wrong with a label that is no class."""
        return f"has the label {label}; the model predicts 0..{num_outputs - 1}. Labels not to predict are {IGNORED}"

    @override
    def decode(self, encoded: Tensor) -> None:
        """Nothing: the labels of all places are not shown as a target."""

    @override
    def output_weights(self, encoded: Tensor, dim: int = -1) -> Tensor:
        """Shape ``(B, T, 1)``."""
        weights = encoded[..., 1:]
        if self.reduction == "sum":
            return weights
        return weights / weights.sum(1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)

    @override
    def loss(self, outputs: Tensor, encoded: Tensor, dim: int = -1) -> Tensor:
        precise = encoded.to(torch.promote_types(encoded.dtype, outputs.dtype))
        losses = (self.token_losses(outputs, encoded) * self.output_weights(precise)[..., 0]).sum(-1)
        return losses / self.dispersion

    @override
    def example_weights(self, encoded: Tensor) -> Tensor:
        weights = encoded[..., 1].sum(1)
        return torch.ones_like(weights) if self.reduction == "mean" else weights

    def token_losses(self, outputs: Tensor, encoded: Tensor) -> Tensor:
        """Negative log-likelihood of every label in nats, shape ``(B, T)``."""
        chosen = outputs.gather(-1, encoded[..., :1].long())[..., 0]
        return outputs.logsumexp(-1) - chosen

    @override
    def margin(self, outputs: Tensor, encoded: Tensor) -> Tensor:
        raise ValueError("An example with many places has no margin, only its places have.")

    @override
    def predict(self, outputs: Tensor) -> Tensor:
        labels = outputs.argmax(-1)
        return torch.stack([labels.float(), torch.ones_like(labels, dtype=torch.float32)], -1)

    @override
    def settings(self) -> list[str]:
        shown = [f"reduction={self.reduction!r}"] + (["normalised=True"] if self.is_normalised else [])
        return shown + Task.settings(self)


class DenseClassification(ClassesOfPlaces):
    """A class for each place of an example, as in segmentation: the loss is the mean, or the sum, over its places.

    Outputs are ``(B, C, ...)`` and targets integers ``(B, ...)``. Places with the label -100 (or another
    ``ignore_index``) do not count.

    Args:
        reduction: ``"mean"`` over the places of an example that count, or their ``"sum"``.
        classes_last: Whether outputs are ``(B, ..., C)``.
        ignore_index: The label of places that do not count.
        normalised: Whether training takes the mean over all places of a batch that count: with the reduction ``"sum"``
            each example then counts by its number of these, over the mean number in the training set.

    Example:
        >>> task = DenseClassification()
        >>> batch = torch.zeros(1, 3, 2, 2), torch.tensor([[[0, 1], [2, -100]]])
        >>> outputs = task.outputs(nn.Identity(), task.inputs(batch))
        >>> task.loss(outputs, task.encode(task.targets(batch), 3))  # log 3
        tensor([1.0986])
    """

    name = "dense classification"

    def __init__(
        self,
        reduction: Reduction = "mean",
        *,
        classes_last: bool = False,
        ignore_index: int = IGNORED,
        normalised: bool = False,
    ) -> None:
        super().__init__(reduction, normalised=normalised)
        self.classes_last, self.ignore_index = classes_last, ignore_index

    @override
    def outputs(self, model: nn.Module, inputs: Any) -> Tensor:
        outputs = super().outputs(model, inputs)
        if not isinstance(outputs, Tensor) or outputs.ndim < 3:
            return outputs
        return outputs.flatten(1, -2) if self.classes_last else outputs.flatten(2).transpose(1, 2)

    @override
    def targets(self, batch: Any) -> Tensor | None:
        labels = super().targets(batch)
        if labels is None:
            return None
        if labels.is_floating_point():
            raise ValueError(f"Labels of places are integers, got {describe(labels)}.")
        return labels_and_weights(labels.flatten(1), labels.flatten(1) != self.ignore_index)

    @override
    def settings(self) -> list[str]:
        shown = [] if self.ignore_index == IGNORED else [f"ignore_index={self.ignore_index}"]
        return (["classes_last=True"] if self.classes_last else []) + shown + super().settings()


def labels_and_weights(labels: Tensor, weights: Tensor) -> Tensor:
    """Labels and their weights, float32 of shape ``(B, T, 2)``; exact for 2^24 labels."""
    return torch.stack([labels.masked_fill(weights == 0, 0).float(), weights.float()], -1)


def first_row(flags: Tensor) -> int | None:
    """The first row of ``(B, T)`` flags with one that is set."""
    rows = flags.any(1).nonzero()
    return int(rows[0]) if len(rows) else None
