"""Ground truth: losses of queries after retraining on random subsets, or without chosen examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor
from typing_extensions import Self, override

from stride_lightning.storage.stored import Stored
from stride_lightning.tasks.measures import harm_of, in_words, measure_of


@dataclass
class Retrained(Stored):
    """Losses of queries under models retrained on subsets; the base of the classes below.

    Args:
        masks: The training examples of each model, bool of shape ``(K, n)``.
        losses_by_seed: Loss of every query under every model, shape ``(S, K, q)``; or minus the value of the measure,
            so that lower is better, always.
        seeds: The seeds, ``S`` of them.
        metadata: Settings of the training, fingerprints of both data sets, seconds, versions. ``"measure"`` is what was
            measured, its name and direction.
    """

    masks: Tensor
    losses_by_seed: Tensor
    seeds: list[int]
    metadata: dict[str, Any] = field(default_factory=dict)

    kind = "retrained"
    group = "retrained"

    def __post_init__(self) -> None:
        if self.masks.ndim != 2 or self.losses_by_seed.shape[:2] != (len(self.seeds), len(self.masks)):
            raise ValueError(
                f"Expected masks (K, n) and losses (seeds, K, q) for {len(self.seeds)} seeds, got "
                f"{tuple(self.masks.shape)} and {tuple(self.losses_by_seed.shape)}."
            )
        bad = (~torch.isfinite(self.losses_by_seed)).nonzero()
        if len(bad):
            seed, subset, query = bad[0].tolist()
            raise ValueError(
                f"{len(bad)} losses are not finite. The first is that of query {query} under the model of subset "
                f"{subset} and seed {self.seeds[seed]}. Did training diverge? Lower the learning rate."
            )
        self.masks = self.masks.bool()

    @property
    def losses(self) -> Tensor:
        """Loss of every query under the models of every subset, averaged over seeds, shape ``(K, q)``."""
        return self.losses_by_seed.double().mean(0).float()

    @property
    def measure(self) -> dict[str, str]:
        """Name of what was measured of the queries, and whether a positive score ``"lowers"`` or ``"raises"`` it."""
        return measure_of(self.metadata)

    @property
    def values(self) -> Tensor:
        """What was measured, in its own sign, averaged over seeds, shape ``(K, q)``: losses, or values of a measure."""
        return self.losses if self.measure["direction"] == "lowers" else -self.losses

    @property
    def num_train(self) -> int:
        """Number of training examples, which are the columns of the masks."""
        return self.masks.shape[1]

    @property
    def num_queries(self) -> int:
        """Number of queries, which are the columns of the losses."""
        return self.losses_by_seed.shape[2]

    @override
    def info(self) -> dict[str, Any]:
        return {"kind": self.kind, "seeds": self.seeds, "metadata": self.metadata, "num_train": self.num_train}

    @override
    def tensors(self) -> dict[str, Tensor]:
        packed = torch.from_numpy(np.packbits(self.masks.numpy(), axis=1))
        return {"masks": packed, "losses": self.losses_by_seed}

    @classmethod
    @override
    def from_contents(cls, info: Mapping[str, Any], tensors: Mapping[str, Tensor], **more: Any) -> Self:
        masks = torch.from_numpy(np.unpackbits(tensors["masks"].numpy(), axis=1, count=info["num_train"])).bool()
        return cls(masks, tensors["losses"], info["seeds"], info["metadata"], **more)

    def check_data(self, metadata: Mapping[str, Any], what: str = "The attribution") -> None:
        """Refuse scores of other data, by the fingerprints in both ``metadata``; the error names the difference."""
        for key, name in {"data": "training data", "query_data": "queries"}.items():
            expected, given = self.metadata.get(key), metadata.get(key)
            if expected is not None and given is not None and _differ(expected, given):
                raise ValueError(
                    f"{what} has other {name} than the ground truth: {_short(given)} instead of {_short(expected)}. "
                    "Make both with the same data in the same order."
                )

    def check_measure(self, metadata: Mapping[str, Any], what: str = "The attribution") -> None:
        """Refuse scores that explain something else than was measured, where their ``metadata`` say what."""
        given = measure_of(metadata)
        if "measure" in metadata and given != self.measure:
            raise ValueError(
                f"{what} explains what {in_words(given)}, but the ground truth measures what {in_words(self.measure)}. "
                "Make both with the same `measure=`."
            )


@dataclass
class GroundTruth(Retrained):
    """Losses of queries under models retrained on random subsets, the measure of scores.

    Arguments as in :class:`Retrained`.

    Example:
        >>> truth = GroundTruth(torch.eye(3).bool(), torch.rand(2, 3, 1), seeds=[0, 1])
        >>> truth.losses.shape
        torch.Size([3, 1])
    """

    kind = "ground-truth"

    @property
    def split_half(self) -> float | None:
        """Agreement of two halves of the seeds: mean Spearman correlation over queries and splits.

        None for fewer than two seeds.
        """
        return split_half_correlation(self.losses_by_seed)

    @property
    def ceiling(self) -> float | None:
        """The linear datamodeling score of a perfect predictor, by Spearman and Brown's formula.

        It is ``sqrt(r)`` for the reliability ``r`` of the mean over all seeds; None for fewer than two seeds.
        """
        if (correlation := self.split_half) is None:
            return None
        half, whole, correlation = len(self.seeds) // 2, len(self.seeds), max(correlation, 0.0)
        single = correlation / (half - (half - 1) * correlation)
        return float(np.sqrt(whole * single / (1 + (whole - 1) * single)))

    def __repr__(self) -> str:
        measured = "" if self.measure["direction"] == "lowers" else f", {in_words(self.measure)}"
        ceiling = "unknown" if (ceiling := self.ceiling) is None else f"{ceiling:.2f}"
        return (
            f"GroundTruth({len(self.masks)} subsets of {self.num_train} examples x {len(self.seeds)} seeds, "
            f"{self.num_queries} queries{measured}, noise ceiling {ceiling})"
        )


@dataclass
class Counterfactual(Retrained):
    """Losses of queries under models retrained without the examples with the highest scores for each query.

    Arguments as in :class:`Retrained`. The first mask is the whole training set. The masks of all queries for the first
    ``k`` follow, then those for the second.

    Args:
        ks: Numbers of removed examples.
    """

    ks: Sequence[int] = ()

    kind = "counterfactual"

    @property
    def losses_full(self) -> Tensor:
        """Loss of every query under the model of the whole training set, shape ``(q,)``."""
        return self.losses[0]

    @property
    def losses_removed(self) -> Tensor:
        """Loss of each query under the model without its top k, shape ``(len(ks), q)``."""
        return self.losses[1:].reshape(len(self.ks), self.num_queries, self.num_queries).diagonal(dim1=1, dim2=2)

    def __repr__(self) -> str:
        rises = (self.losses_removed - self.losses_full).mean(1).tolist()
        curve = ", ".join(f"top {k}: {rise:+.3g}" for k, rise in zip(self.ks, rises, strict=True))
        return f"Counterfactual({self.num_queries} queries; mean {harm_of(self.measure)} without {curve})"

    @override
    def info(self) -> dict[str, Any]:
        return {**super().info(), "ks": list(self.ks)}

    @classmethod
    @override
    def from_contents(cls, info: Mapping[str, Any], tensors: Mapping[str, Tensor], **more: Any) -> Self:
        return super().from_contents(info, tensors, ks=info["ks"], **more)


def split_half_correlation(losses_by_seed: Tensor, *, num_splits: int = 20) -> float | None:
    """Spearman correlation between the means of two halves of the seeds, averaged over queries and splits.

    Losses have shape ``(S, K, q)``. There are ``num_splits`` random splits, or all if there are fewer; None for fewer
    than two seeds.
    """
    num_seeds = len(losses_by_seed)
    if num_seeds < 2:
        return None
    values = losses_by_seed.double()
    correlations = []
    for halves in _splits(num_seeds, num_splits):
        one, other = (_centred_ranks(values[list(half)].mean(0).T) for half in halves)
        norms = np.sqrt((one**2).sum(1) * (other**2).sum(1))
        correlations.append(((one * other).sum(1) / np.where(norms == 0, 1, norms)).mean())
    return float(np.mean(correlations))


def _splits(num_seeds: int, num_splits: int) -> list[tuple[Sequence[int], Sequence[int]]]:
    """All splits into two equal halves, or ``num_splits`` random ones if there are more."""
    half = num_seeds // 2
    if num_seeds <= 6:  # 15 ways at most
        halves = combinations(combinations(range(num_seeds), half), 2)
        pairs: list[Any] = [(one, other) for one, other in halves if set(one).isdisjoint(other)]
        if len(pairs) <= num_splits:
            return pairs
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(num_seeds, generator=generator).tolist() for _ in range(num_splits)]
    return [(order[:half], order[half : 2 * half]) for order in orders]


def _centred_ranks(values: Tensor) -> np.ndarray:
    ranks = rankdata(values.numpy(), axis=1)
    return ranks - ranks.mean(1, keepdims=True)


def _differ(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether fingerprints are of other data; earlier versions stored the targets beside the content."""
    return any(one.get(key) != other.get(key) for key in {*one, *other} - {"targets"})


def _short(fingerprint: Mapping[str, Any]) -> str:
    examples = fingerprint.get("content") or fingerprint.get("shapes") or ""
    return f"{fingerprint.get('num_examples')} examples {str(examples)[:12]}"
