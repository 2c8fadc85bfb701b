"""The linear datamodeling score (LDS)."""

from __future__ import annotations

import warnings
from typing import Literal

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor


def linear_datamodeling_score(
    scores: Tensor, masks: Tensor, losses: Tensor, reduction: Literal["mean", "none"] = "mean"
) -> Tensor:
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
        ValueError: If shapes do not fit or something is not finite.

    Example:
        >>> masks = torch.tensor([[1, 0], [0, 1], [1, 1]])
        >>> losses = torch.tensor([[0.2], [0.9], [0.1]])
        >>> linear_datamodeling_score(torch.tensor([[0.7, 0.1]]), masks, losses)
        tensor(1.)

    Reference: arXiv:2303.14186 (TRAK), definition 2.4.
    """
    num_queries, num_train = scores.shape
    if masks.ndim != 2 or masks.shape[1] != num_train or losses.shape != (len(masks), num_queries):
        raise ValueError(
            f"For scores of shape {(num_queries, num_train)} expected masks (num_subsets, {num_train}) and losses "
            f"(num_subsets, {num_queries}); got {tuple(masks.shape)} and {tuple(losses.shape)}."
        )
    if reduction not in ("mean", "none"):
        raise ValueError(f"`reduction` must be 'mean' or 'none', got {reduction!r}.")
    for name, value in {"scores": scores, "losses": losses}.items():
        if not torch.isfinite(value).all():
            raise ValueError(f"The {name} hold {int((~torch.isfinite(value)).sum())} values that are not finite.")
    predicted = -(scores.double().cpu() @ masks.double().cpu().T)
    one, other = _centred_ranks(predicted), _centred_ranks(losses.double().cpu().T)
    norms = np.sqrt((one**2).sum(1) * (other**2).sum(1))
    constant = int((norms == 0).sum())
    if constant:
        warnings.warn(f"{constant} of {num_queries} queries have constant scores or losses and count 0.", stacklevel=2)
    correlations = torch.from_numpy((one * other).sum(1) / np.where(norms == 0, 1, norms)).float()
    return correlations.mean() if reduction == "mean" else correlations


def _centred_ranks(values: Tensor) -> np.ndarray:
    ranks = rankdata(values.numpy(), axis=1)
    return ranks - ranks.mean(1, keepdims=True)
