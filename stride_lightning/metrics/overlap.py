"""Overlap of the highest scores of two methods, two seeds or two checkpoints."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stride_lightning.metrics.base import PerQueryMetric, Reduction, reduce_over_queries
from stride_lightning.metrics.checks import check_finite, check_matrix, check_shape
from stride_lightning.runtime.checks import check_count


def top_k_overlap(one: Tensor, other: Tensor, k: int, reduction: Reduction = "mean") -> Tensor:
    """Share of training examples that two sets of scores have in common among their k highest, for each query.

    Examples that tie for the last places count with the probability that each side would draw them by lot. Scores that
    are all equal therefore overlap with any others by k / num_train, which is chance, and so do the zeros of sparse
    scores.

    Args:
        one: Scores of shape ``(num_queries, num_train)``, positive is helpful.
        other: Scores of the same queries and examples.
        k: Number of examples of each.
        reduction: ``"mean"`` over queries, or ``"none"`` for one value per query.

    Returns:
        A scalar from 0 to 1, or shape ``(num_queries,)``.

    Raises:
        ValueError: If shapes differ, something is not finite, or ``k`` is out of range.

    Example:
        >>> one, other = torch.tensor([[0.9, 0.5, 0.1, 0.0]]), torch.tensor([[0.9, 0.1, 0.5, 0.0]])
        >>> top_k_overlap(one, other, k=2), top_k_overlap(one, torch.zeros(1, 4), k=2)
        (tensor(0.5000), tensor(0.5000))

    Reference: Fagin, Kumar and Sivakumar, Comparing Top k Lists (2003).
    """
    return reduce_over_queries(_overlap(one, other, k), reduction, "no scores")


class TopKOverlap(PerQueryMetric):
    """Overlap among the k highest scores over batches of queries, and over processes.

    Args:
        k: Number of examples of each set of scores.
        reduction: ``"mean"`` over queries, or ``"none"`` for one value per query.
        kwargs: Passed to ``torchmetrics.Metric``.

    Example:
        >>> metric = TopKOverlap(k=1)
        >>> metric.update(torch.tensor([[0.9, 0.5, 0.1]]), torch.tensor([[0.9, 0.1, 0.5]]))
        >>> metric.update(torch.tensor([[0.9, 0.5, 0.1]]), torch.tensor([[0.1, 0.9, 0.5]]))
        >>> metric.compute()
        tensor(0.5000)

    Reference: Fagin, Kumar and Sivakumar, Comparing Top k Lists (2003).
    """

    def __init__(self, k: int, reduction: Reduction = "mean", **kwargs: Any) -> None:
        check_count("k", k)
        super().__init__(f"overlap_at_{k}", reduction, **kwargs)
        self.k = k

    def update(self, one: Tensor, other: Tensor) -> None:
        """Add a batch of queries; both of shape ``(num_queries, num_train)``."""
        self.append(_overlap(one, other, self.k))


def _overlap(one: Tensor, other: Tensor, k: int) -> Tensor:
    check_matrix("one", one)
    check_shape("other", other, tuple(one.shape), "the shape of `one`")
    check_finite("other", other)
    check_count("k", k, maximum=one.shape[1])
    common = (_chance_in_top(one.cpu(), k) * _chance_in_top(other.cpu(), k)).sum(1)
    return (common / k).to(one.device, torch.float32)


def _chance_in_top(scores: Tensor, k: int) -> Tensor:
    """Probability that an example is among the top k when ties are drawn by lot, (num_queries, num_train)."""
    last = scores.topk(k, dim=1).values[:, -1:]  # (num_queries, 1)
    above, tied = scores > last, scores == last
    places = (k - above.sum(1, keepdim=True)).double() / tied.sum(1, keepdim=True)
    return above + tied * places
