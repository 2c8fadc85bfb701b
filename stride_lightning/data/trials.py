"""Trials: a few small batches of a data set, of several sizes, with examples of all kinds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from stride_lightning.data.examples import Examples
from stride_lightning.model.layers import cloned

#: Examples of each trial; a divisor that is not the number of examples shows where these differ.
SIZES = (64, 16, 5, 1)
#: Most examples that are read to find one of each kind.
MOST_READ = 1024


@dataclass(frozen=True)
class Trial:
    """A batch of a few examples."""

    places: Tensor  # among the examples, int64 of shape (B,)
    keys: Tensor  # their positions in the dataset, int64 of shape (B,)
    held: Any  # the batch, on the device

    def __len__(self) -> int:
        return len(self.places)

    @property
    def batch(self) -> Any:
        """A copy, which a model may change."""
        return cloned(self.held) if pytree.tree_leaves(self.held) else self.held


def spread_places(count: int) -> Tensor:
    """Places of at most ``MOST_READ`` examples, evenly spaced over ``count``; so are those of every head."""
    places = torch.linspace(0, count - 1, min(count, MOST_READ), dtype=torch.float64).round().long()
    return places[torch.randperm(len(places), generator=torch.Generator().manual_seed(0))]


def read_trial(examples: Examples, places: Tensor, device: torch.device) -> Trial:
    """The batch that the loader's ``collate_fn`` makes of some examples."""
    part = examples.subset(places.tolist())
    part.num_workers = 0
    batch, _ = next(part.batches(len(places), device))
    return Trial(places, part.positions.to(device), batch)


def read_kinds(
    examples: Examples, head: Trial, kinds_of: Callable[[Any], Tensor], num_kinds: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Places and kinds of the first examples, until all kinds ``0..num_kinds-1`` are among them.

    ``kinds_of`` tells the kinds of a batch, integers of shape ``(B,)``.
    """
    spread = spread_places(len(examples))
    places, kinds = [head.places], [kinds_of(head.batch).cpu()]
    for start in range(len(head), len(spread), len(head)):
        chunk = spread[start : start + len(head)]
        if len(set(torch.cat(kinds).tolist()) & set(range(num_kinds))) == num_kinds:
            break
        trial = read_trial(examples, chunk, device)
        places.append(chunk)
        kinds.append(kinds_of(trial.batch).cpu())
    return torch.cat(places), torch.cat(kinds)


def mixed(places: Tensor, kinds: Tensor) -> Tensor:
    """The places in another order: one of each kind, another of each, and so on."""
    seen: dict[int, int] = {}
    rounds = []
    for kind in kinds.tolist():
        seen[kind] = seen.get(kind, 0) + 1
        rounds.append(seen[kind])
    return places[torch.tensor(rounds).argsort(stable=True)]


def read_trials(examples: Examples, places: Tensor, alone: int, limit: int, device: torch.device) -> Iterator[Trial]:
    """Trials of up to ``limit`` examples, in the order of the places; the last is the example ``alone``."""
    start = 0
    for size in sorted({min(size, limit, len(places)) for size in SIZES}, reverse=True):
        if size == 1:
            yield read_trial(examples, torch.tensor([alone]), device)
            return
        yield read_trial(examples, places[torch.arange(start, start + size) % len(places)], device)
        start += size
