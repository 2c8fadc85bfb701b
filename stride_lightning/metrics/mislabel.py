"""Detection of mislabelled training examples."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc, binary_average_precision

from stride_lightning.metrics.base import AttributionMetric
from stride_lightning.metrics.checks import check_choice, check_finite, check_flags, check_shape, check_tensor

_METRICS = {"auroc": binary_auroc, "average_precision": binary_average_precision}


def mislabel_detection(
    suspicion: Tensor, mislabelled: Tensor, metric: Literal["auroc", "average_precision"] = "auroc"
) -> Tensor:
    """How well scores tell mislabelled training examples from the others.

    Args:
        suspicion: Shape ``(num_train,)``, higher is more suspicious: minus each example's score for itself, for
            instance. Or scores of shape ``(num_queries, num_train)``: suspicion is then minus the mean over queries,
            as examples that harm many queries are suspicious.
        mislabelled: Which examples are mislabelled, booleans of shape ``(num_train,)``.
        metric: ``"auroc"``, the probability that a mislabelled example is more suspicious than another (.5 by
            chance, and equal suspicion counts a half), or ``"average_precision"`` (the share of mislabelled examples
            by chance). Only the order of suspicion counts.

    Returns:
        A scalar from 0 to 1.

    Raises:
        ValueError: If shapes do not fit, something is not finite, or all or no examples are mislabelled.

    Example:
        >>> mislabel_detection(torch.tensor([0.1, 0.7, 0.3, 0.9]), torch.tensor([False, True, False, False]))
        tensor(0.6667)

    Reference: arXiv:2002.08484 (TracIn).
    """
    check_choice("metric", metric, tuple(_METRICS))
    return _detection(_checked_suspicion(suspicion, mislabelled), mislabelled, metric).to(suspicion.device)


class MislabelDetection(AttributionMetric):
    """Detection of mislabelled examples over batches of training examples, and over processes.

    A batch may lack either kind of example, as long as all batches together have both. Calling the metric itself
    (``forward``) also computes the value of the batch, so each batch must have both.

    Args:
        metric: ``"auroc"`` or ``"average_precision"``.
        kwargs: Passed to ``torchmetrics.Metric``.

    Raises:
        ValueError: If an option or a batch does not fit, or if at ``compute`` all or no examples are mislabelled.

    Example:
        >>> detection = MislabelDetection()
        >>> detection.update(torch.tensor([0.1, 0.7]), torch.tensor([False, True]))
        >>> detection.update(torch.tensor([0.3, 0.9]), torch.tensor([False, False]))
        >>> detection.compute()
        tensor(0.6667)

    Reference: arXiv:2002.08484 (TracIn).
    """

    plot_lower_bound: float | None = 0.0
    plot_upper_bound: float | None = 1.0
    state_dtype = torch.float64  # ranks are computed at the end only, and float32 would tie close values
    suspicion: list[Tensor]
    mislabelled: list[Tensor]

    def __init__(self, metric: Literal["auroc", "average_precision"] = "auroc", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_choice("metric", metric, tuple(_METRICS))
        self.metric: Literal["auroc", "average_precision"] = metric
        self.add_state("suspicion", [], dist_reduce_fx="cat")
        self.add_state("mislabelled", [], dist_reduce_fx="cat")

    def update(self, suspicion: Tensor, mislabelled: Tensor) -> None:
        """Add examples: flags ``(batch_size,)``, suspicion of that shape or scores ``(num_queries, batch_size)``."""
        self.suspicion.append(_checked_suspicion(suspicion, mislabelled).to(self.device, self.dtype))
        self.mislabelled.append(mislabelled.to(self.device, self.dtype))

    def compute(self) -> Tensor:
        """The value over all examples so far, a scalar.

        Raises:
            ValueError: If there has been no update, or all or no examples are mislabelled.
        """
        suspicion, mislabelled = self.gathered(self.suspicion), self.gathered(self.mislabelled)
        return _detection(suspicion.cpu(), mislabelled, self.metric).to(self.device)


def _checked_suspicion(suspicion: Tensor, mislabelled: Tensor) -> Tensor:
    """One suspicion per example, float64 on the CPU."""
    check_tensor("suspicion", suspicion)
    if suspicion.ndim not in (1, 2) or not suspicion.numel():
        raise ValueError(
            "Expected `suspicion` of shape (num_train,), or scores of shape (num_queries, num_train), "
            f"got {tuple(suspicion.shape)}."
        )
    check_finite("suspicion", suspicion, what="examples" if suspicion.ndim == 1 else "queries")
    values = suspicion.cpu().double()
    values = values if suspicion.ndim == 1 else -values.mean(0)
    check_shape("mislabelled", mislabelled, tuple(values.shape), "one flag for each example of `suspicion`")
    check_flags("mislabelled", mislabelled)
    return values


def _detection(suspicion: Tensor, mislabelled: Tensor, metric: str) -> Tensor:
    flags = mislabelled.cpu().long()
    if flags.all() or not flags.any():
        raise ValueError(
            f"Expected mislabelled and correct examples, got {int(flags.sum())} mislabelled of {len(flags)}: with one "
            "kind only there is nothing to detect."
        )
    # torchmetrics takes values outside [0, 1] for logits, and its sigmoid ties large ones: give it ranks in (0, 1).
    distinct, places = torch.unique(suspicion, return_inverse=True)
    return _METRICS[metric]((places + 0.5) / len(distinct), flags).float()
