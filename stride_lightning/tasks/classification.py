"""Classification: one class of several, with weights, smoothing, ignored targets and soft labels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from stride_lightning.tasks.task import HOW_TO_PASS_TASK, Task, check_rows, describe


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
        weighted -= mean * weighted.sum(dim, keepdim=True)  # in place: these may be large
        return weighted if self.dispersion == 1 else weighted / self.dispersion

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
