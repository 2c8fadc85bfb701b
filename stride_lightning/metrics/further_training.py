"""Agreement with further training: the change of a query's loss when further training leaves an example out."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from stride_lightning.metrics.base import PerQueryMetric, Reduction, reduce_over_queries
from stride_lightning.metrics.checks import check_choice, check_finite, check_matrix, check_shape
from stride_lightning.metrics.correlation import centred, row_cosines

_UNDEFINED = {"cosine": "scores of zero or constant effects", "pearson": "constant scores or effects"}


def further_training_cosine(
    scores: Tensor, effects: Tensor, kind: Literal["cosine", "pearson"] = "cosine", reduction: Reduction = "mean"
) -> Tensor:
    """Cosine between scores and the effects of leaving examples out of further training, for each query.

    Effects are centred over the examples, because a common part tells no examples apart: all further training lowers
    the loss, for instance. Scores are not centred, so a method pays for a common offset of its scores: the cosine is
    Pearson's correlation times (standard deviation / root mean square) of the scores. Report both.

    Args:
        scores: Scores of the ``m`` examples that were left out, shape ``(num_queries, m)``, positive is helpful.
        effects: Loss after further training without the example minus loss after further training on everything,
            averaged over seeds; shape ``(num_queries, m)``, positive is helpful.
        kind: ``"cosine"``, or ``"pearson"``, which centres the scores as well.
        reduction: ``"mean"`` over queries, or ``"none"`` for one value per query.

    Returns:
        A scalar, or shape ``(num_queries,)``. A query whose scores are all zero (for ``"pearson"``: all equal) or
        whose effects are all equal counts 0, and a warning says how many there are.

    Raises:
        ValueError: If shapes do not fit, something is not finite, or there are fewer than two examples.

    Example:
        >>> scores, effects = torch.tensor([[1.0, 1.0, 4.0]]), torch.tensor([[0.0, 0.0, 3.0]])
        >>> further_training_cosine(scores, effects), further_training_cosine(scores, effects, kind="pearson")
        (tensor(0.5774), tensor(1.))

    Reference: arXiv:2412.03906 (FiMODA), equation 13.
    """
    return reduce_over_queries(_values(scores, effects, kind), reduction, _UNDEFINED[kind])


class FurtherTrainingCosine(PerQueryMetric):
    """Agreement with further training over batches of queries, and over processes.

    Args:
        kind: ``"cosine"``, or ``"pearson"``, which centres the scores as well.
        reduction: ``"mean"`` over queries, or ``"none"`` for one value per query.
        kwargs: Passed to ``torchmetrics.Metric``.

    Example:
        >>> metric = FurtherTrainingCosine()
        >>> metric.update(torch.tensor([[1.0, 1.0, 4.0]]), torch.tensor([[0.0, 0.0, 3.0]]))
        >>> metric.update(torch.tensor([[1.0, 0.0, -1.0]]), torch.tensor([[0.5, 0.25, 0.0]]))
        >>> metric.compute()
        tensor(0.7887)

    Reference: arXiv:2412.03906 (FiMODA), equation 13.
    """

    plot_lower_bound: float | None = -1.0

    def __init__(
        self, kind: Literal["cosine", "pearson"] = "cosine", reduction: Reduction = "mean", **kwargs: Any
    ) -> None:
        check_choice("kind", kind, ("cosine", "pearson"))
        super().__init__(f"further_training_{kind}", reduction, _UNDEFINED[kind], **kwargs)
        self.kind: Literal["cosine", "pearson"] = kind

    def update(self, scores: Tensor, effects: Tensor) -> None:
        """Add a batch of queries; both of shape ``(num_queries, m)``, positive is helpful."""
        self.append(_values(scores, effects, self.kind))


def _values(scores: Tensor, effects: Tensor, kind: Literal["cosine", "pearson"]) -> Tensor:
    """One value per query, NaN where there is none."""
    check_choice("kind", kind, ("cosine", "pearson"))
    check_effects(scores, effects)
    aligned = centred(scores) if kind == "pearson" else scores
    return row_cosines(aligned, centred(effects)).to(scores.device, torch.float32)


def check_effects(scores: Tensor, effects: Tensor) -> None:
    """Refuse scores and effects that are not of one shape ``(num_queries, m)``, finite, and of two examples or more."""
    check_matrix("scores", scores, columns="num_left_out")
    check_shape("effects", effects, tuple(scores.shape), "the shape of `scores`")
    check_finite("effects", effects)
    if scores.shape[1] < 2:
        raise ValueError(f"Expected effects of at least 2 left-out examples, got {scores.shape[1]}: leave out more.")
