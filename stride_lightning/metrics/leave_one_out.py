"""Agreement with leave-one-out retraining."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from stride_lightning.metrics.base import PerQueryMetric, Reduction, reduce_over_queries
from stride_lightning.metrics.checks import check_choice
from stride_lightning.metrics.correlation import centred, centred_ranks, row_cosines
from stride_lightning.metrics.further_training import check_effects

_UNDEFINED = "constant scores or effects"


def leave_one_out_correlation(
    scores: Tensor, effects: Tensor, kind: Literal["spearman", "pearson"] = "spearman", reduction: Reduction = "mean"
) -> Tensor:
    """Correlation between scores and the effect of retraining without one example on the loss, for each query.

    Args:
        scores: Scores of the ``m`` examples that were left out, one at a time, shape ``(num_queries, m)``, positive
            is helpful.
        effects: Loss without the example minus loss with it, shape ``(num_queries, m)``, positive is helpful. One
            example changes losses less than another seed does: average over seeds.
        kind: ``"spearman"`` compares ranks (equal values share the mean of theirs), ``"pearson"`` the values.
        reduction: ``"mean"`` over queries, or ``"none"`` for one value per query.

    Returns:
        A scalar, or shape ``(num_queries,)``. A query whose scores or effects are all equal counts 0, and a warning
        says how many there are.

    Raises:
        ValueError: If shapes do not fit, something is not finite, or there are fewer than two examples.

    Example:
        >>> leave_one_out_correlation(torch.tensor([[0.5, 0.0, -0.5]]), torch.tensor([[2.0, 0.1, 0.0]]))
        tensor(1.)

    Reference: arXiv:1703.04730 (influence functions), section 4.1.
    """
    return reduce_over_queries(_values(scores, effects, kind), reduction, _UNDEFINED)


class LeaveOneOutCorrelation(PerQueryMetric):
    """Agreement with leave-one-out retraining over batches of queries, and over processes.

    Args:
        kind: ``"spearman"`` compares ranks, ``"pearson"`` the values.
        reduction: ``"mean"`` over queries, or ``"none"`` for one value per query.
        kwargs: Passed to ``torchmetrics.Metric``.

    Example:
        >>> metric = LeaveOneOutCorrelation()
        >>> metric.update(torch.tensor([[0.5, 0.0, -0.5]]), torch.tensor([[2.0, 0.1, 0.0]]))
        >>> metric.update(torch.tensor([[0.5, 0.0, -0.5]]), torch.tensor([[0.1, 2.0, 0.0]]))
        >>> metric.compute()
        tensor(0.7500)

    Reference: arXiv:1703.04730 (influence functions), section 4.1.
    """

    plot_lower_bound: float | None = -1.0

    def __init__(
        self, kind: Literal["spearman", "pearson"] = "spearman", reduction: Reduction = "mean", **kwargs: Any
    ) -> None:
        check_choice("kind", kind, ("spearman", "pearson"))
        super().__init__(f"leave_one_out_{kind}", reduction, _UNDEFINED, **kwargs)
        self.kind: Literal["spearman", "pearson"] = kind

    def update(self, scores: Tensor, effects: Tensor) -> None:
        """Add a batch of queries; both of shape ``(num_queries, m)``, positive is helpful."""
        self.append(_values(scores, effects, self.kind))


def _values(scores: Tensor, effects: Tensor, kind: Literal["spearman", "pearson"]) -> Tensor:
    """One value per query, NaN where there is none."""
    check_choice("kind", kind, ("spearman", "pearson"))
    check_effects(scores, effects)
    transform = centred_ranks if kind == "spearman" else centred
    return row_cosines(transform(scores), transform(effects)).to(scores.device, torch.float32)
