"""A data set in fixed order, read one example after the other.

Four words for an index, here and everywhere:

* ``position``: index of an example in the user's dataset;
* ``place``: index among the examples that are read, ``0..n-1``;
* ``row``: index of an example within a batch;
* ``column``: index of a training example in a matrix of scores.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import (
    DataLoader,
    Dataset,
    default_collate,
)

from stride_lightning.data.fingerprints import digest
from stride_lightning.data.loading import Loading
from stride_lightning.runtime.randomness import mix, preserved_random_state, seed_all
from stride_lightning.tasks.likelihoods import RowError

#: Largest data set that is kept in memory while models train on it again and again.
HELD_BYTES = 2**28
#: Examples that are read twice to find out whether reading is random.
_NUM_PROBES = 16
#: Texts that are looked at to find out what a batch means.
_TEXTS_TO_LOOK_AT = 4


@dataclass(eq=False)
class Examples:
    """A data set whose examples are named by their position and always read in the same order.

    Args:
        dataset: Map-style data set.
        collate_fn: How its examples become a batch.
        positions: Positions that are read, in order, int64 of shape ``(n,)``; by default all of the dataset.
        num_workers: Worker processes that read.
        worker_init_fn: Passed on to the DataLoader.
        owners: Objects whose Lightning batch-transfer hooks apply, first match wins (data module, then model).
        loading: How a DataLoader the data came from makes batches of them.
    """

    dataset: Any
    collate_fn: Callable[[list[Any]], Any] = default_collate
    positions: Tensor = None  # pyright: ignore[reportAssignmentType]  # set in __post_init__
    num_workers: int = 0
    worker_init_fn: Callable[[int], None] | None = None
    owners: tuple[Any, ...] = ()
    loading: Loading | None = None
    _random: bool | None = field(default=None, init=False)
    _held: Any = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.positions is None:
            self.positions = torch.arange(len(self.dataset))

    @property
    def is_whole(self) -> bool:
        """Whether the whole dataset is read in its own order."""
        return torch.equal(self.positions, torch.arange(len(self.dataset)))

    def __len__(self) -> int:
        """Number of examples that are read."""
        return len(self.positions)

    def __getitem__(self, index: int) -> Any:
        """The example at the given place of the reading order, as the dataset returns it."""
        return self.dataset[int(self.positions[index])]

    def subset(self, indices: Sequence[int]) -> Examples:
        """The examples at the given places of the reading order."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        part = replace(self, positions=self.positions[chosen])
        part._random = self._random
        return part

    def name(self, place: int) -> int:
        """Position in the dataset of the example at a place of the reading order."""
        return int(self.positions[place])

    @contextmanager
    def naming(self, start: int | Tensor) -> Iterator[None]:
        """Say the position in the dataset of a row that cannot be read.

        Args:
            start: The place at which its batch begins, or the places of all its rows.
        """
        try:
            yield
        except RowError as error:
            place = start + error.row if isinstance(start, int) else int(start[error.row])
            raise ValueError(f"Example {self.name(place)} {error.problem}.") from error

    @property
    def is_random(self) -> bool:
        """Whether two reads of one example differ, as under random augmentation (found out by trying)."""
        if self._random is None:
            step = max(1, len(self) // _NUM_PROBES)
            probes = self.positions[::step][:_NUM_PROBES].tolist()
            with preserved_random_state():
                self._random = any(digest(self.dataset[i]) != digest(self.dataset[i]) for i in probes)
            if self._random:
                warnings.warn(
                    f"Two reads of one example of {type(self.dataset).__name__} differ (random augmentation). Examples "
                    "are read under a seed made from their position, and only the data set's length, shapes and "
                    "targets identify it.",
                    stacklevel=2,
                )
        return self._random

    def batches(self, batch_size: int, device: torch.device) -> Iterator[tuple[Any, Tensor, int]]:
        """Read everything once, in order.

        Every example is read under a seed made from its position, so that random augmentation gives the same
        example for any batch size and number of workers. The caller's random state is left as it was.

        Yields:
            The batch on ``device``, the digest of each of its examples (uint8, ``(B, 32)``) and ``B``.
        """
        reader = _SeededReader(self.dataset, content=not self.is_random)
        loader = DataLoader(
            reader,
            batch_size=batch_size,
            sampler=self.positions.tolist(),
            collate_fn=_CollateWithDigests(self.collate_fn),
            num_workers=self.num_workers,
            worker_init_fn=self.worker_init_fn,
        )
        with preserved_random_state():
            for batch, digests in loader:
                yield self.transfer(batch, device), digests, len(digests)

    def drawn(self, batches: Sequence[Tensor], seed: int, device: torch.device) -> Iterator[Any]:
        """Read batches of the examples at given places of the reading order, as one epoch of training does.

        Args:
            batches: Places of the examples of each batch.
            seed: Under random augmentation every example is read under a seed made of this one and its position.
            device: Where to put the batches.

        Yields:
            One batch after the other on ``device``. Random augmentation leaves the global generators seeded.
        """
        if self._held is not None:
            for batch in batches:
                yield self.transfer(pytree.tree_map(lambda whole, batch=batch: whole[batch], self._held), device)
            return
        positions = [self.positions[batch].tolist() for batch in batches]
        loader = DataLoader(
            _Redrawn(self.dataset, seed) if self.is_random else self.dataset,
            batch_sampler=positions,
            collate_fn=self.collate_fn,
            num_workers=self.num_workers,
            worker_init_fn=self.worker_init_fn,
            generator=torch.Generator().manual_seed(seed),  # for the seeds of workers, else drawn from the global one
        )
        for batch in loader:
            yield self.transfer(batch, device)

    def hold(self) -> None:
        """Keep everything in memory for :meth:`drawn`, if that is small, not random, and collated by stacking alone.

        Reading example by example takes longer than a training step of a small model.
        """
        if self._held is not None or self.is_random or self.collate_fn is not default_collate:
            return
        leaves = pytree.tree_leaves(default_collate([self[0]]))
        if not all(isinstance(leaf, Tensor) and leaf.ndim > 0 for leaf in leaves):
            return  # texts are collated into lists
        if sum(leaf.numel() * leaf.element_size() for leaf in leaves) * len(self) <= HELD_BYTES:
            self._held = default_collate([self[place] for place in range(len(self))])

    def transfer(self, batch: Any, device: torch.device) -> Any:
        """Move a batch through the hooks a Trainer would call, so that the model sees what it saw in training."""
        batch = self._hook("on_before_batch_transfer", lambda value, _: value)(batch, 0)
        move = self._hook("transfer_batch_to_device", lambda value, where, _: _to_device(value, where))
        batch = move(batch, device, 0)
        return self._hook("on_after_batch_transfer", lambda value, _: value)(batch, 0)

    def _hook(self, name: str, default: Callable[..., Any]) -> Callable[..., Any]:
        for owner in self.owners:
            method = getattr(owner, name, None)
            if method is not None and not method.__qualname__.startswith("DataHooks."):
                return method
        return default


def first_batch(examples: Examples, batch_size: int, device: torch.device) -> Any:
    """The first batch in reading order, to find out what a batch means."""
    _ = examples.is_random  # asked of all examples, so that it is found out (and warned of) once
    head = examples.subset(range(min(batch_size, len(examples))))
    head.num_workers = 0
    return next(batch for batch, _, _ in head.batches(batch_size, device))


def first_look(examples: Examples, batch_size: int, device: torch.device) -> Any:
    """The first batch, of up to 64 examples but only a few texts: the logits of many long ones may not fit."""
    one = first_batch(examples, 1, device)
    is_text = isinstance(one, Mapping) and "input_ids" in one
    return first_batch(examples, min(batch_size, _TEXTS_TO_LOOK_AT if is_text else 64), device)


class _SeededReader(Dataset[Any]):
    """Reads each example under a seed made from its position, and digests it."""

    def __init__(self, dataset: Any, *, content: bool) -> None:
        self.dataset, self.content = dataset, content

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, position: int) -> tuple[Any, bytes]:
        if not self.content:  # three generators to seed, so only where reading is random
            seed_all(position)
        example = self.dataset[position]
        return example, digest(example, content=self.content)


class _Redrawn(Dataset[Any]):
    """Reads each example under a seed made from an epoch's and its position."""

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, position: int) -> Any:
        seed_all(mix(self.seed, position))
        return self.dataset[position]


class _CollateWithDigests:
    """The user's collate function, with the digests of the examples beside the batch."""

    def __init__(self, collate_fn: Callable[[list[Any]], Any]) -> None:
        self.collate_fn = collate_fn

    def __call__(self, items: list[tuple[Any, bytes]]) -> tuple[Any, Tensor]:
        digests = np.frombuffer(b"".join(digest for _, digest in items), np.uint8).reshape(len(items), 32)
        return self.collate_fn([example for example, _ in items]), torch.from_numpy(digests.copy())


def _to_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, dict):
        return type(value)({key: _to_device(item, device) for key, item in value.items()})
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_to_device(item, device) for item in value))
    if isinstance(value, tuple | list):
        return type(value)(_to_device(item, device) for item in value)
    return value.to(device) if hasattr(value, "to") else value
