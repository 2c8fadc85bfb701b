"""Agreement of two vectors per query: ranks, centring, cosines, and their bootstrap; float64 on the CPU throughout."""

from __future__ import annotations

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

# Deviations from the mean of a row below this share of its largest entry are rounding of the mean: the row is constant.
# scipy.stats.pearsonr has the same bound.
_ROUNDING = 1e-13
_BLOCK = 2**20  # entries of an array in the bootstrap, 8 MiB


def centred_ranks(values: Tensor) -> Tensor:
    """Ranks along each row of ``(num_queries, m)`` minus their mean; equal values share the mean of their ranks.

    Returns:
        Multiples of a half in float64, shape ``(num_queries, m)``; zeros in a constant row.

    Example:
        >>> centred_ranks(torch.tensor([[0.5, 7.0, 0.5, -1.0]]))
        tensor([[ 0.0000,  1.5000,  0.0000, -1.5000]], dtype=torch.float64)
    """
    ranks = rankdata(values.cpu().double().numpy(), axis=1)
    return torch.from_numpy(ranks - (values.shape[1] + 1) / 2)


def tied(values: Tensor, tolerance: Tensor) -> Tensor:
    """Dense ranks along each row, neighbours that differ by no more than the tolerance taken for equal.

    Args:
        values: Shape ``(num_queries, m)``.
        tolerance: Shape ``(num_queries, 1)``.

    Returns:
        float64 whole numbers from 0 on, shape ``(num_queries, m)``.

    Example:
        >>> tied(torch.tensor([[0.1 + 0.2, 0.5, 0.3]], dtype=torch.float64), torch.tensor([[1e-12]]))
        tensor([[0., 1., 0.]], dtype=torch.float64)
    """
    ordered, order = values.sort(dim=1)
    steps = (ordered.diff(dim=1, prepend=ordered[:, :1]) > tolerance).cumsum(1)
    return torch.zeros_like(values).scatter(1, order, steps.to(values.dtype))


def centred(values: Tensor) -> Tensor:
    """Rows of ``(num_queries, m)`` minus their means; exactly zero in a row that is constant up to rounding.

    Returns:
        float64, shape ``(num_queries, m)``, each row scaled to a largest entry of about 1 beforehand.

    Example:
        >>> centred(torch.full((1, 3), 0.1, dtype=torch.float64))
        tensor([[0., 0., 0.]], dtype=torch.float64)
    """
    scaled = _scaled(values.cpu().double())
    deviations = scaled - scaled.mean(1, keepdim=True)
    return deviations * (deviations.abs().amax(1, keepdim=True) > _ROUNDING)


def row_cosines(one: Tensor, other: Tensor) -> Tensor:
    """Cosine between each row of one and the same row of the other, both of shape ``(num_queries, m)``.

    Returns:
        float64, shape ``(num_queries,)``; NaN where a row is all zeros, as there is no angle.

    Example:
        >>> row_cosines(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[1.0, 0.0], [1.0, 2.0]]))
        tensor([0.6000,    nan], dtype=torch.float64)
    """
    one, other = _scaled(one.cpu().double()), _scaled(other.cpu().double())
    norms = one.norm(dim=1) * other.norm(dim=1)
    return (one * other).sum(1) / norms.where(norms > 0, torch.nan)


def resampled_rank_correlations(one: Tensor, other: Tensor, counts: np.ndarray) -> np.ndarray:
    """Spearman's correlation of each pair of rows, in many resamples of the columns.

    A resample is the number of times each column was drawn. Mid-ranks within it follow from cumulated counts, so
    each row is sorted once and not once per resample.

    Args:
        one: Shape ``(num_queries, m)``.
        other: Shape ``(num_queries, m)``.
        counts: How often each column was drawn, shape ``(num_resamples, m)``; every row sums to ``m``.

    Returns:
        Shape ``(num_resamples, num_queries)``; 0 where a row is constant within the resample.

    Example:
        >>> one, other = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.0, 3.0, 2.0]])
        >>> resampled_rank_correlations(one, other, np.array([[1, 1, 1], [1, 2, 0]]))
        array([[0.5],
               [1. ]])
    """
    pairs = list(zip(_OrderedRow.of_rows(one), _OrderedRow.of_rows(other), strict=True))
    correlations = np.empty((len(counts), len(pairs)))
    block = max(1, _BLOCK // counts.shape[1])
    for start in range(0, len(counts), block):
        rows = slice(start, start + block)
        columns = np.ascontiguousarray(counts[rows].T, dtype=np.float64)  # (m, block)
        for query, (first, second) in enumerate(pairs):
            x, y = first.centred_ranks(columns), second.centred_ranks(columns)
            weighted = columns * x
            covariance, variance = (weighted * y).sum(0), (weighted * x).sum(0)
            norms = np.sqrt(variance * (columns * y * y).sum(0))
            correlations[rows, query] = covariance / np.where(norms > 0, norms, 1)
    return correlations


class _OrderedRow:
    """One row, sorted once: for every entry how many are smaller, and how many are not larger."""

    def __init__(self, values: np.ndarray) -> None:
        self.order = values.argsort(kind="stable")
        ordered = values[self.order]
        self.below = np.searchsorted(ordered, values, side="left")
        self.up_to = np.searchsorted(ordered, values, side="right")

    @classmethod
    def of_rows(cls, values: Tensor) -> list[_OrderedRow]:
        return [cls(row) for row in values.cpu().double().numpy()]

    def centred_ranks(self, columns: np.ndarray) -> np.ndarray:
        """Twice the centred mid-ranks within resamples, columns and result of shape (m, num_resamples).

        A mid-rank is (number below + number up to + 1) / 2, and the mean over a resample is always (m + 1) / 2.
        """
        cumulated = np.zeros((len(columns) + 1, columns.shape[1]))
        np.cumsum(columns[self.order], axis=0, out=cumulated[1:])
        return cumulated[self.below] + cumulated[self.up_to] - len(columns)


def _scaled(values: Tensor) -> Tensor:
    """Rows divided by their largest magnitude, so that squares neither overflow nor vanish."""
    largest = values.abs().amax(1, keepdim=True)
    return values / largest.where(largest > 0, 1)
