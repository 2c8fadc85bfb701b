"""The linear datamodeling score (LDS): do scores predict the losses of models retrained on random subsets?"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from stride_lightning.metrics.base import AttributionMetric, Reduction, reduce_over_queries
from stride_lightning.metrics.checks import check_choice, check_finite, check_matrix, check_tensor
from stride_lightning.metrics.correlation import centred_ranks, resampled_rank_correlations, row_cosines, tied
from stride_lightning.runtime.checks import check_count

_UNDEFINED = "constant scores or losses"
_ROUNDING = 1e-12  # of a sum in float64, relative to the sum of magnitudes; generous
_COLUMNS = 2**16  # examples at a time, so that masks are never whole in float64


def linear_datamodeling_score(scores: Tensor, masks: Tensor, losses: Tensor, reduction: Reduction = "mean") -> Tensor:
    """Rank agreement between losses that scores predict and losses of models retrained on random subsets.

    The scores of a query predict that its loss on a subset falls with the sum of the subset's scores. For each
    query that prediction is compared with the losses by Spearman's correlation over subsets.

    Args:
        scores: Shape ``(num_queries, num_train)``, positive is helpful.
        masks: Which examples each retrained model saw, 0/1 of shape ``(num_subsets, num_train)``.
        losses: Loss of each query under each retrained model, shape ``(num_subsets, num_queries)``.
        reduction: ``"mean"`` over queries, or ``"none"`` for one value per query.

    Returns:
        A scalar, or shape ``(num_queries,)``. A query whose predictions or losses are all equal counts 0, and a
        warning says how many there are.

    Raises:
        ValueError: If shapes do not fit, something is not finite, there are fewer than two subsets, or no query's
            loss varies over the subsets.

    Example:
        >>> masks = torch.tensor([[1, 0], [0, 1], [1, 1]])
        >>> losses = torch.tensor([[0.2], [0.9], [0.1]])
        >>> linear_datamodeling_score(torch.tensor([[0.7, 0.1]]), masks, losses)
        tensor(1.)

    Reference: arXiv:2303.14186 (TRAK), definition 2.4.
    """
    correlations = _correlations(*_ranks(scores, masks, losses)).to(scores.device)
    return reduce_over_queries(correlations, reduction, _UNDEFINED)


def linear_datamodeling_interval(
    scores: Tensor, masks: Tensor, losses: Tensor, *, confidence: float = 0.95, num_resamples: int = 1000, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Bootstrap interval of the mean linear datamodeling score, for other queries and other subsets like these.

    Each resample draws queries and subsets with replacement: the same subsets for all its queries, as all queries
    share the retrained models. The interval lies between percentiles of the resampled scores. With fewer than about
    20 subsets it is too narrow.

    Args:
        scores: As in :func:`linear_datamodeling_score`, shape ``(num_queries, num_train)``.
        masks: Shape ``(num_subsets, num_train)``.
        losses: Shape ``(num_subsets, num_queries)``.
        confidence: Probability that the interval holds the score, between 0 and 1.
        num_resamples: Number of resamples.
        seed: Seed of the resamples.

    Returns:
        Lower and upper end, scalars. Queries with constant scores or losses count 0, and a warning says how many.

    Raises:
        ValueError: As in ``linear_datamodeling_score``, or if an option is out of range.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> masks = torch.rand(50, 20, generator=generator) < 0.5
        >>> scores, noise = torch.randn(8, 20, generator=generator), torch.randn(50, 8, generator=generator)
        >>> losses = 2 * noise - masks.float() @ scores.T
        >>> low, high = linear_datamodeling_interval(scores, masks, losses, num_resamples=200)
        >>> low < linear_datamodeling_score(scores, masks, losses) < high
        tensor(True)

    Reference: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    return _interval(*_ranks(scores, masks, losses), confidence, num_resamples, seed, scores.device)


class LinearDatamodelingScore(AttributionMetric):
    """The linear datamodeling score over batches of queries, and over processes.

    The metric stores two ranks per query and subset, never scores. ``num_constant`` is the number of queries of this
    process so far that have constant predictions or losses; they count 0. Calling the metric itself (``forward``)
    computes the score of the batch as well, so the loss of some query must vary in each batch; ``update`` does not.

    Args:
        masks: Which examples each retrained model saw, 0/1 of shape ``(num_subsets, num_train)``.
        reduction: ``"mean"`` over queries, or ``"none"`` for one value per query.
        kwargs: Passed to ``torchmetrics.Metric``.

    Raises:
        ValueError: If the masks are no matrix of at least two rows, or an option or a batch does not fit.

    Example:
        >>> metric = LinearDatamodelingScore(torch.tensor([[1, 0], [0, 1], [1, 1]]))
        >>> metric.update(torch.tensor([[0.7, 0.1]]), torch.tensor([[0.2], [0.9], [0.1]]))
        >>> metric.update(torch.tensor([[0.2, 0.5]]), torch.tensor([[0.8], [0.9], [0.1]]))
        >>> metric.compute()
        tensor(0.7500)

    Reference: arXiv:2303.14186 (TRAK), definition 2.4.
    """

    plot_lower_bound: float | None = -1.0
    plot_upper_bound: float | None = 1.0
    predicted: list[Tensor]
    losses: list[Tensor]

    def __init__(self, masks: Tensor, reduction: Reduction = "mean", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_choice("reduction", reduction, ("mean", "none"))
        _check_masks(masks)
        # Not a buffer: predictions are computed on the CPU, and DDP would broadcast a buffer before every forward pass.
        self.masks = masks.cpu()
        self.reduction: Reduction = reduction
        # Centred ranks: multiples of a half, so that float32 holds exactly what the functions compute in float64.
        self.add_state("predicted", [], dist_reduce_fx="cat")
        self.add_state("losses", [], dist_reduce_fx="cat")

    def update(self, scores: Tensor, losses: Tensor) -> None:
        """Add a batch of queries: scores ``(num_queries, num_train)`` and losses ``(num_subsets, num_queries)``."""
        predicted, observed = _ranks(scores, self.masks, losses)
        self.predicted.append(predicted.flatten().to(self.device, self.dtype))
        self.losses.append(observed.flatten().to(self.device, self.dtype))

    def compute(self) -> Tensor:
        """The score over all queries so far.

        Returns:
            A scalar, or shape ``(num_queries,)`` in the order of updates (and ranks).

        Raises:
            ValueError: If there has been no update, or no query's loss varies over the subsets.
        """
        correlations = _correlations(*self._rows(self.predicted, self.losses)).to(self.device)
        return reduce_over_queries(correlations, self.reduction, _UNDEFINED, stacklevel=4)

    def interval(self, confidence: float = 0.95, num_resamples: int = 1000, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Lower and upper end of a bootstrap interval; with several processes, call it in all of them.

        The interval is that of :func:`linear_datamodeling_interval` for queries in the order of updates (and ranks).

        Raises:
            ValueError: If there has been no update, no query's loss varies, or an option is out of range.
        """
        with self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=self.sync_on_compute):
            states = self.predicted, self.losses
        # Outside the block: an error inside it would leave the metric synchronised.
        return _interval(*self._rows(*states), confidence, num_resamples, seed, self.device)

    @property
    def num_constant(self) -> int:
        """Number of queries of this process so far that have constant predictions or losses and so count 0."""
        if not len(self.predicted):
            return 0
        return int(row_cosines(*self._rows(self.predicted, self.losses)).isnan().sum())

    def _rows(self, predicted: list[Tensor] | Tensor, losses: list[Tensor] | Tensor) -> tuple[Tensor, Tensor]:
        shape = (-1, len(self.masks))
        return self.gathered(predicted).reshape(shape), self.gathered(losses).reshape(shape)


def _ranks(scores: Tensor, masks: Tensor, losses: Tensor) -> tuple[Tensor, Tensor]:
    """Centred ranks of predicted and of measured losses, each of shape (num_queries, num_subsets)."""
    check_matrix("scores", scores)
    check_tensor("masks", masks)
    check_tensor("losses", losses)
    num_queries, num_train = scores.shape
    if masks.ndim != 2 or masks.shape[1] != num_train or losses.shape != (len(masks), num_queries):
        raise ValueError(
            f"For scores of shape {(num_queries, num_train)} expected masks (num_subsets, {num_train}) and losses "
            f"(num_subsets, {num_queries}); got {tuple(masks.shape)} and {tuple(losses.shape)}."
        )
    _check_masks(masks)
    check_finite("losses", losses, dim=1)
    predicted = torch.zeros(num_queries, len(masks), dtype=torch.float64)
    for start in range(0, num_train, _COLUMNS):
        columns = slice(start, start + _COLUMNS)
        predicted -= scores[:, columns].cpu().double() @ masks[:, columns].cpu().double().T
    # Equal sums of two subsets must tie in any batch, though the order of the summands differs.
    rounding = _ROUNDING * scores.cpu().double().abs().sum(1, keepdim=True)
    return centred_ranks(tied(predicted, rounding)), centred_ranks(losses.T)


def _check_masks(masks: Tensor) -> None:
    check_tensor("masks", masks)
    if masks.ndim != 2 or len(masks) < 2 or not masks.shape[1]:
        raise ValueError(
            f"Expected `masks` of shape (num_subsets, num_train) with at least 2 subsets, got {tuple(masks.shape)}: "
            "ranks of losses need several retrained models."
        )
    check_finite("masks", masks, what="subsets")


def _correlations(predicted: Tensor, losses: Tensor) -> Tensor:
    """Spearman's correlation of each query, float32, from centred ranks; NaN where one side is constant."""
    if not losses.any():
        raise ValueError(
            f"No query's loss varies over the subsets: all {losses.shape[1]} losses of each of the {len(losses)} "
            "queries are equal, so there is nothing to predict. Were models retrained on different subsets?"
        )
    return row_cosines(predicted, losses).float()


def _interval(
    predicted: Tensor, losses: Tensor, confidence: float, num_resamples: int, seed: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` must be between 0 and 1, got {confidence!r}.")
    check_count("num_resamples", num_resamples)
    reduce_over_queries(_correlations(predicted, losses), "mean", _UNDEFINED, stacklevel=4)  # warns
    generator = np.random.default_rng(seed)
    num_queries, num_subsets = predicted.shape
    subsets = generator.multinomial(num_subsets, np.full(num_subsets, 1 / num_subsets), size=num_resamples)
    queries = generator.multinomial(num_queries, np.full(num_queries, 1 / num_queries), size=num_resamples)
    correlations = resampled_rank_correlations(predicted, losses, subsets)  # (num_resamples, num_queries)
    means = (correlations * queries).sum(1) / num_queries
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return torch.tensor(low, dtype=torch.float32, device=device), torch.tensor(high, dtype=torch.float32, device=device)
