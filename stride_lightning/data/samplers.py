"""The positions that a sampler draws, read off the sampler."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from operator import index
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

from stride_lightning.runtime.randomness import preserved_random_state

#: Draws of a sampler that are looked at.
_MOST_DRAWS = 10_000


@dataclass(frozen=True)
class Drawn:
    """The examples that a sampler draws, and what a user should know of it."""

    positions: Tensor | None  # int64; None: all, in the order of the dataset
    note: str = ""


def drawn_by(loader: DataLoader[Any], size: int) -> Drawn:
    """The positions that a loader draws from a dataset of ``size`` examples, each once.

    Positions are in the order of the dataset, or of a list that stands in for a sampler.
    """
    if isinstance(loader.dataset, IterableDataset):  # one with positions; it decides on the order by itself
        return Drawn(None)
    # Not loader.sampler where there is a batch sampler: that is a stand-in where the user gave one.
    return _drawn(loader.sampler if loader.batch_sampler is None else loader.batch_sampler, size)


def _drawn(sampler: Any, size: int) -> Drawn:
    if isinstance(sampler, DistributedSampler):
        # Lightning wraps a user's sampler for distributed runs; look at the one inside.
        inner = getattr(sampler.dataset, "_sampler", None)
        return Drawn(None) if inner is None else _drawn(inner, size)
    name = type(sampler).__name__
    if isinstance(sampler, RandomSampler | SequentialSampler):
        repeats = isinstance(sampler, RandomSampler) and sampler.replacement
        note = f"The {name} draws with replacement, which does not change what a score means." if repeats else ""
        return _some(torch.arange(min(len(sampler.data_source), size)), size, name, note)
    if isinstance(sampler, WeightedRandomSampler):
        note = "The WeightedRandomSampler's weights do not change what a score means: what training on an example does."
        return _some(sampler.weights.nonzero().flatten(), size, name, note)
    if isinstance(sampler, list | tuple | range | Tensor | np.ndarray):
        return _some(_listed(sampler), size, "sampler, a list,")
    # A sampler that is told the epoch may have other indices in each.
    positions = None if hasattr(sampler, "set_epoch") else _listed(getattr(sampler, "indices", None))
    if positions is not None and (isinstance(sampler, SubsetRandomSampler) or _draws_only(sampler, positions)):
        return _some(positions.sort().values, size, name)
    inner = getattr(sampler, "sampler", None)
    if isinstance(sampler, BatchSampler) and inner is not None:
        return _drawn(inner, size)
    return Drawn(None, f"The {name} does not say which examples it draws: some may never have been seen.")


def _some(positions: Tensor | None, size: int, name: str, note: str = "") -> Drawn:
    """All positions, or some of them, with a word about the others."""
    if positions is not None:
        positions = torch.where(positions < 0, positions + size, positions)  # counted from the end, as lists do
    if positions is None or len(positions) == 0 or bool((positions < 0).any() | (positions >= size).any()):
        return Drawn(None, note or f"The {name} does not say which examples it draws: some may never have been seen.")
    if len(positions) == size:
        return Drawn(None if positions.equal(torch.arange(size)) else positions, note)
    left_out = f"{size - len(positions)} of {size} examples are left out: the {name} never draws them."
    return Drawn(positions, f"{note} {left_out}".strip())


def _listed(indices: Any) -> Tensor | None:
    """Positions in a list, or in a list of batches, each once and in their order; None if it holds anything else."""
    flat: list[int] = []
    try:
        for item in indices.tolist() if isinstance(indices, Tensor | np.ndarray) else _sequence(indices):
            flat += map(index, item) if isinstance(item, Sequence) or getattr(item, "ndim", 0) else [index(item)]
    except TypeError:
        return None
    return torch.tensor(list(dict.fromkeys(flat)), dtype=torch.int64)


def _sequence(value: Any) -> Sequence[Any]:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise TypeError("a list of positions was expected")
    return value


def _draws_only(sampler: Any, positions: Tensor) -> bool:
    """Whether the first draws of a sampler are among some positions: its ``indices`` may be of something else."""
    allowed = set(positions.tolist())
    try:
        with preserved_random_state(sampler):
            drawn = _listed(list(islice(copy.copy(sampler), _MOST_DRAWS)))
    except Exception:  # a sampler that cannot be iterated here, as one that waits for other processes
        return False
    return drawn is not None and allowed.issuperset(drawn.tolist())
