"""Retrieval of training examples that are known to matter: backdoors, leaked copies, the source of a fact."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stride_lightning.metrics.base import PerQueryMetric, Reduction, reduce_over_queries
from stride_lightning.metrics.checks import check_flags, check_matrix, check_shape, listed
from stride_lightning.runtime.checks import check_count


def retrieval_recall(scores: Tensor, relevant: Tensor, k: int, reduction: Reduction = "mean") -> Tensor:
    """Share of a query's relevant training examples that are among its k highest scores, for each query.

    Among examples of equal score the relevant ones come last. So ties, such as the zeros of sparse scores, retrieve
    nothing by luck.

    Args:
        scores: Shape ``(num_queries, num_train)``, positive is helpful.
        relevant: Which examples matter, booleans of the same shape, at least one in each row.
        k: Number of highest scores that count. A recall of 1 needs at least as many as there are relevant examples.
        reduction: ``"mean"`` over queries, or ``"none"`` for one value per query.

    Returns:
        A scalar, or shape ``(num_queries,)``.

    Raises:
        ValueError: If shapes do not fit, something is not finite, ``k`` is out of range, or a query has no relevant
            example.

    Example:
        >>> scores = torch.tensor([[0.9, 0.5, 0.1, 0.0], [0.0, 0.0, 0.0, 0.0]])
        >>> relevant = torch.tensor([[True, False, True, False], [True, False, False, False]])
        >>> retrieval_recall(scores, relevant, k=2, reduction="none")
        tensor([0.5000, 0.0000])

    Reference: Manning, Raghavan and Schuetze, Introduction to Information Retrieval (2008), section 8.3.
    """
    return reduce_over_queries(_recall(scores, relevant, k), reduction, "no relevant example")


def mean_reciprocal_rank(scores: Tensor, relevant: Tensor, reduction: Reduction = "mean") -> Tensor:
    """One over the rank of the highest-scoring relevant training example, for each query.

    Among examples of equal score the relevant ones come last, as in ``retrieval_recall``.

    Args:
        scores: Shape ``(num_queries, num_train)``, positive is helpful.
        relevant: Which examples matter, booleans of the same shape, at least one in each row.
        reduction: ``"mean"`` over queries, or ``"none"`` for one value per query.

    Returns:
        A scalar, or shape ``(num_queries,)``.

    Raises:
        ValueError: As in ``retrieval_recall``.

    Example:
        >>> scores = torch.tensor([[0.9, 0.5, 0.1, 0.0], [0.0, 0.0, 0.0, 0.0]])
        >>> relevant = torch.tensor([[True, False, True, False], [True, False, False, False]])
        >>> mean_reciprocal_rank(scores, relevant, reduction="none")
        tensor([1.0000, 0.2500])

    Reference: Voorhees, The TREC-8 Question Answering Track Report (1999).
    """
    return reduce_over_queries(_reciprocal_rank(scores, relevant), reduction, "no relevant example")


class RetrievalRecall(PerQueryMetric):
    """Recall among the k highest scores over batches of queries, and over processes.

    Args:
        k: Number of highest scores that count.
        reduction: ``"mean"`` over queries, or ``"none"`` for one value per query.
        kwargs: Passed to ``torchmetrics.Metric``.

    Example:
        >>> metric = RetrievalRecall(k=2)
        >>> metric.update(torch.tensor([[0.9, 0.5, 0.1]]), torch.tensor([[True, False, True]]))
        >>> metric.update(torch.tensor([[0.9, 0.5, 0.1]]), torch.tensor([[False, True, False]]))
        >>> metric.compute()
        tensor(0.7500)

    Reference: Manning, Raghavan and Schuetze, Introduction to Information Retrieval (2008), section 8.3.
    """

    def __init__(self, k: int, reduction: Reduction = "mean", **kwargs: Any) -> None:
        check_count("k", k)
        super().__init__(f"recall_at_{k}", reduction, **kwargs)
        self.k = k

    def update(self, scores: Tensor, relevant: Tensor) -> None:
        """Add a batch of queries; both of shape ``(num_queries, num_train)``, something relevant in each row."""
        self.append(_recall(scores, relevant, self.k))


class MeanReciprocalRank(PerQueryMetric):
    """The mean reciprocal rank over batches of queries, and over processes.

    Args:
        reduction: ``"mean"`` over queries, or ``"none"`` for one value per query.
        kwargs: Passed to ``torchmetrics.Metric``.

    Example:
        >>> metric = MeanReciprocalRank()
        >>> metric.update(torch.tensor([[0.9, 0.5, 0.1]]), torch.tensor([[True, False, True]]))
        >>> metric.update(torch.tensor([[0.9, 0.5, 0.1]]), torch.tensor([[False, True, False]]))
        >>> metric.compute()
        tensor(0.7500)

    Reference: Voorhees, The TREC-8 Question Answering Track Report (1999).
    """

    def __init__(self, reduction: Reduction = "mean", **kwargs: Any) -> None:
        super().__init__("reciprocal_ranks", reduction, **kwargs)

    def update(self, scores: Tensor, relevant: Tensor) -> None:
        """Add a batch of queries; both of shape ``(num_queries, num_train)``, something relevant in each row."""
        self.append(_reciprocal_rank(scores, relevant))


def _recall(scores: Tensor, relevant: Tensor, k: int) -> Tensor:
    hits = _ranked(scores, relevant)
    check_count("k", k, maximum=scores.shape[1])
    return (hits[:, :k].sum(1).double() / hits.sum(1)).to(scores.device, torch.float32)


def _reciprocal_rank(scores: Tensor, relevant: Tensor) -> Tensor:
    first = _ranked(scores, relevant).byte().argmax(1)  # the first of the ones
    return (1 / (first + 1).double()).to(scores.device, torch.float32)


def _ranked(scores: Tensor, relevant: Tensor) -> Tensor:
    """The relevance flags by falling score, relevant ones last among equals; booleans (num_queries, num_train)."""
    check_matrix("scores", scores)
    check_shape("relevant", relevant, tuple(scores.shape), "the shape of `scores`")
    check_flags("relevant", relevant)
    scores, flags = scores.cpu(), relevant.cpu().bool()
    without = (~flags.any(1)).nonzero().flatten().tolist()
    if without:
        raise ValueError(
            f"Expected a relevant example for every query, got none in rows {listed(without)} of `relevant`: leave "
            "these queries out."
        )
    # Two stable sorts, the one by score last.
    order = flags.byte().argsort(dim=1, stable=True)
    order = order.gather(1, scores.gather(1, order).argsort(dim=1, descending=True, stable=True))
    return flags.gather(1, order)
