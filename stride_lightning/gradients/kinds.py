"""How a batch's loss is made of those of its examples: their mean, sum or weighted mean, or of all together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

#: ``"weighted"`` is a mean with weights that the batch's sum of weights normalises.
Kind = Literal["mean", "sum", "weighted", "coupled"]

#: What each kind says in the log and the metadata.
KINDS: dict[Kind, str] = {
    "mean": "the mean over the examples of a batch",
    "sum": "the sum over the examples of a batch; scores are of its terms",
    "weighted": "a weighted mean over the examples of a batch; weights are scaled to a mean of 1 over the training set",
    "coupled": "one loss of all examples of a batch together; scores are of the batch size times an example's share, "
    "with each query in the place of one example (`measure=` explains a query by itself)",
}


def kind_of(batches: Sequence[tuple[Tensor, Tensor]], alone: Tensor) -> Kind | None:
    """The kind of a loss, from its slopes at the outputs of examples in batches and of the same examples alone.

    Args:
        batches: Places of the examples of a batch among all, shape ``(B,)``, and their slopes there, ``(B, C)``.
        alone: The slopes of every example in a batch of its own, ``(n, C)``; zero where that has no loss.

    Returns:
        The kind, or None if too few examples have a slope to tell.

    Example:
        >>> alone = torch.tensor([[1.0], [2.0], [-1.0]])
        >>> kind_of([(torch.arange(3), alone / 3), (torch.arange(2), alone[:2] / 2)], alone)
        'mean'
    """
    rounding = {torch.float64: 1e-6, torch.float32: 1e-3}.get(alone.dtype, 0.05)
    alone = alone.double()
    batches = [(places, slopes.double()) for places, slopes in batches]
    for kind in ("mean", "sum"):
        factors = [torch.full((len(places),), 1 / len(places) if kind == "mean" else 1.0) for places, _ in batches]
        if all(
            _agree(slopes, alone[places], f, rounding) for (places, slopes), f in zip(batches, factors, strict=True)
        ):
            return kind if (alone.abs().amax(1) > 0).sum() > 1 else None
    weights = torch.full((len(alone),), torch.nan, dtype=torch.float64)
    for places, slopes in batches:
        shares = shares_of(slopes, alone[places])
        if not _agree(slopes, alone[places], shares, rounding):
            return "coupled"
        # The shares of the first batch, which holds all examples, are the weights.
        weights = shares if len(places) == len(alone) else weights
        expected = weights[places] / weights[places].sum().clamp(min=1e-300)
        if (shares - expected).abs().max() > rounding * expected.abs().max():
            return "coupled"
    return "weighted"


def shares_of(slopes: Tensor, alone: Tensor) -> Tensor:
    """The share of each example in a batch: its slopes there over those alone, shape ``(B,)``; 0 without slopes."""
    return (slopes * alone).sum(1) / alone.square().sum(1).clamp(min=torch.finfo(alone.dtype).tiny)


def _agree(slopes: Tensor, alone: Tensor, shares: Tensor, rounding: float) -> bool:
    """Whether slopes in a batch are those alone times the shares, up to rounding."""
    expected = alone * shares.to(alone)[:, None]
    gaps = (slopes - expected).abs().amax(1)
    each = torch.maximum(slopes.abs().amax(1), expected.abs().amax(1))
    largest = max(float(slopes.abs().max()), 1e-300)
    return bool((gaps <= rounding * (each + 1e-2 * largest)).all())
