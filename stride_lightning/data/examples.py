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
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, default_collate

from stride_lightning.data.collate_checks import draws, reorders
from stride_lightning.data.collating import Collate, CollateWithDigests, MissingExample, OneByOne, key_of, name_of
from stride_lightning.data.fingerprints import digest
from stride_lightning.data.loading import Loading
from stride_lightning.data.transfer import transferred
from stride_lightning.runtime.checks import RowError
from stride_lightning.runtime.progress import track
from stride_lightning.runtime.randomness import mix, preserved_random_state

#: Most examples of the first batch that is looked at.
FIRST_LOOK = 32
#: Bytes of the largest data set that stays in memory while models train on it again and again.
HELD_BYTES = 2**28
#: Examples that are read twice, to see whether reading is random.
_NUM_PROBES = 16


@dataclass(eq=False)
class Examples:
    """A data set whose examples are named by their position and always read in the same order.

    Args:
        dataset: Map-style data set.
        collate_fn, num_workers, worker_init_fn: Passed on to the DataLoader that reads.
        positions: Positions to read, in order, int64 of shape ``(n,)``; by default all of the dataset.
        owners: Objects whose Lightning batch-transfer hooks apply, first match wins (data module, then model).
        loading: How the DataLoader of the data makes batches, where there is one.
        columns: What is known of every position of the dataset beside the example, by name.
        notes: What a user should know of how the data are read, in sentences.
        kind: What errors call an example of them.
    """

    dataset: Any
    collate_fn: Callable[[list[Any]], Any] = default_collate
    positions: Tensor = None  # pyright: ignore[reportAssignmentType]  # set in __post_init__
    num_workers: int = 0
    worker_init_fn: Callable[[int], None] | None = None
    owners: tuple[Any, ...] = ()
    loading: Loading | None = None
    kind: str = "example"
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    _random: bool | None = field(default=None, init=False)
    _draws: bool | None = field(default=None, init=False)
    _held: Any = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.positions is None:
            self.positions = torch.arange(len(self.dataset))

    @property
    def is_whole(self) -> bool:
        """Whether the examples are the whole dataset, in its order."""
        return torch.equal(self.positions, torch.arange(len(self.dataset)))

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> Any:
        """The example at a place, as the dataset returns it."""
        return self.dataset[int(self.positions[index])]

    def subset(self, places: Sequence[int]) -> Examples:
        """The examples at some places."""
        return self._changed(positions=self.positions[torch.as_tensor(places, dtype=torch.int64)])

    def called(self, kind: str) -> Examples:
        """The same examples, which errors call ``kind``."""
        return self if self.kind == kind else self._changed(kind=kind)

    def with_data(self, dataset: Any, positions: Tensor) -> Examples:
        """Examples of another dataset, read and collated in the same way."""
        return self._changed(dataset=dataset, positions=positions, num_workers=0)

    def _changed(self, **changes: Any) -> Examples:
        other = replace(self, **changes)
        other._random, other._draws = self._random, self._draws
        return other

    def info(self) -> dict[str, list[Any]]:
        """What is known of every example beside its position, by name."""
        positions = self.positions.tolist()
        return {name: [values[position] for position in positions] for name, values in self.columns.items()}

    def without_missing(self, *, show: bool = True) -> Examples:
        """The examples that the dataset does not give as None; reads them all."""
        reader = OneByOne(self.dataset, self.kind)
        places = [
            place
            for place, position in enumerate(track(self.positions.tolist(), "Looking for None", show=show))
            if not _is_missing(reader, position)
        ]
        names = f"{len(self) - len(places)} {'queries' if self.kind == 'query' else f'{self.kind}s'}"
        note = f"{names} are None in {type(self.dataset).__name__} and are left out."
        return replace(self.subset(places), notes=(*self.notes, note))

    def name(self, place: int) -> int:
        """Position in the dataset of the example at a place."""
        return int(self.positions[place])

    @contextmanager
    def naming(self, start: int | Tensor) -> Iterator[None]:
        """Turn an error about a row of a batch into one that names the example, by its kind and position.

        ``start`` is the place at which the batch begins, or the places of all its rows.
        """
        try:
            yield
        except RowError as error:
            positions = self.positions[start:] if isinstance(start, int) else self.positions[start]
            named = positions[[error.row, *error.others]].tolist()
            first, *others = named if isinstance(start, int) else sorted(named)
            message = f"{self.kind.capitalize()} {first} {error.problem}."
            if others:
                more = f" and {len(others) - 9} more" if len(others) > 9 else ""
                message += f" Likewise {', '.join(map(str, others[:9]))}{more}."
            raise ValueError(message) from error

    @property
    def is_random(self) -> bool:
        """Whether two reads of one example differ, as under random augmentation; a few are read twice to see."""
        if self._random is None:
            _ = self.is_drawn  # of all examples, not of a part of them that shows it less
            probes = self._probes()
            reader = OneByOne(self.dataset, self.kind)
            with preserved_random_state(self.dataset):
                self._random = any(digest(reader[position][1]) != digest(reader[position][1]) for position in probes)
            if self._random:
                warnings.warn(
                    f"Two reads of one example of {type(self.dataset).__name__} differ (random augmentation). Examples "
                    "are read under a seed made from their position, and only the data set's length, shapes and "
                    "targets identify it. For scores of examples without augmentation, pass a dataset that has none.",
                    stacklevel=2,
                )
        return self._random

    def sample(self) -> list[bytes]:
        """Digests of a few examples."""
        reader, content = OneByOne(self.dataset, self.kind), not self.is_random
        with preserved_random_state(self.dataset):
            return [digest(reader[position][1], content=content) for position in self._probes()]

    def _probes(self) -> list[int]:
        """Positions of a few examples."""
        return self.positions[:: max(1, len(self) // _NUM_PROBES)][:_NUM_PROBES].tolist()

    @property
    def is_drawn(self) -> bool:
        """Whether the ``collate_fn`` makes different batches of the same examples, as one that masks tokens does."""
        if self._draws is None:
            reader = OneByOne(self.dataset, self.kind)
            with preserved_random_state(self.dataset):
                is_known = self.collate_fn is default_collate
                probes = [] if is_known else [reader[position][1] for position in self._probes()]
            self._draws = bool(probes) and draws(self.collate_fn, probes)
            if not self._draws and len(probes) > 1 and reorders(self.collate_fn, probes):
                raise ValueError(
                    f"{name_of(self.collate_fn)} changes the order of the examples in a batch, as functions do that "
                    "sort by length. Scores name examples by their row, so a collate_fn must keep their order: sort "
                    "inside the model, or let pack_padded_sequence(enforce_sorted=False) do it."
                )
            if self._draws:
                warnings.warn(
                    "The collate_fn draws random numbers, as those do that mask tokens. Examples are collated under "
                    "seeds made from their positions, and scores are about what is drawn there.",
                    stacklevel=2,
                )
        return self._draws

    def batches(self, batch_size: int, device: torch.device) -> Iterator[tuple[Any, Tensor]]:
        """Read everything once, in order, and leave the random state as it was.

        A seed made from its position gives an example the same random augmentation for any batch size and number of
        workers.

        Yields:
            The batch on ``device``, and the digest of each of its examples, uint8 of shape ``(B, 33)``.
        """
        # Three generators are seeded for each example, so only where reading is random.
        seed = 0 if self.is_drawn else None
        collate_fn = CollateWithDigests(self.collate_fn, self.kind, seed, content=not self.is_random)
        seed_of = key_of if self.is_random else None
        loader = self._loader(seed_of, collate_fn, batch_size=batch_size, sampler=self.positions.tolist())
        with preserved_random_state(self.dataset, self.collate_fn):
            start = 0
            for batch, digests in loader:
                places = slice(start, start := start + len(digests))
                yield self.transfer(batch, device, partial(self._keys, places)), digests

    def drawn(self, batches: Sequence[Tensor], seed: int, device: torch.device) -> Iterator[Any]:
        """Read batches of the examples at given places, onto ``device``, as one epoch of training does.

        Under random augmentation every example is read under a seed that is made of ``seed`` and its position. The
        global generators are left seeded then.
        """
        if self._held is not None:
            for batch in batches:
                held = pytree.tree_map(lambda whole, batch=batch: whole[batch], self._held)
                yield self.transfer(held, device, partial(self._keys, batch), seed)
            return
        loader = self._loader(
            partial(mix, seed) if self.is_random else None,
            Collate(self.collate_fn, self.kind, seed if self.is_drawn else None),
            batch_sampler=[self.positions[batch].tolist() for batch in batches],
            generator=torch.Generator().manual_seed(seed),  # for the seeds of workers, else drawn from the global one
        )
        for places, batch in zip(batches, loader, strict=True):
            yield self.transfer(batch, device, partial(self._keys, places), seed)

    def _keys(self, places: slice | Tensor) -> Tensor:
        return torch.tensor([key_of(position) for position in self.positions[places].tolist()])

    def _loader(self, seed_of: Callable[[int], int] | None, collate_fn: Collate, **order: Any) -> DataLoader[Any]:
        reader = OneByOne(self.dataset, self.kind, seed_of)
        workers = {"num_workers": self.num_workers, "worker_init_fn": self.worker_init_fn}
        return DataLoader(reader, collate_fn=collate_fn, **workers, **order)

    def hold(self) -> None:
        """Hold everything in memory for :meth:`drawn`, if it is small, not random, and collated by stacking alone.

        Reading example by example takes longer than a training step of a small model.
        """
        if self._held is not None or self.is_random or self.collate_fn is not default_collate:
            return
        if num_bytes(default_collate([self[0]]), 1) * len(self) <= HELD_BYTES:
            self._held = default_collate([self[place] for place in range(len(self))])

    def transfer(
        self, batch: Any, device: torch.device, keys_of: Callable[[], Tensor] | None = None, seed: int = 0
    ) -> Any:
        """Move a batch through the hooks that a Trainer calls; see :func:`~stride_lightning.data.transfer.transferred`.

        Hooks see a Trainer that trains, except for queries.
        """
        return transferred(batch, device, self.owners, is_training=self.kind != "query", keys_of=keys_of, seed=seed)


def _is_missing(reader: OneByOne, position: int) -> bool:
    try:
        _ = reader[position]
    except MissingExample:
        return True
    return False


def num_bytes(inputs: Any, num_examples: int) -> int:
    """Bytes of tensors that can be cut into examples; for others, as collated texts, more than may be held."""
    leaves = pytree.tree_leaves(inputs)
    if not all(isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == num_examples for leaf in leaves):
        return HELD_BYTES + 1
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves)


def first_batch(examples: Examples, batch_size: int, device: torch.device) -> Any:
    """The first batch in reading order."""
    _ = examples.is_random  # of all examples, so that the warning comes once
    head = examples.subset(range(min(batch_size, len(examples))))
    head.num_workers = 0
    return next(head.batches(batch_size, device))[0]


def first_look(examples: Examples, batch_size: int, device: torch.device) -> Any:
    """The first batch, of up to ``FIRST_LOOK`` examples, or 4 texts: more of them may not fit memory."""
    one = first_batch(examples, 1, device)
    is_text = isinstance(one, Mapping) and "input_ids" in one
    return first_batch(examples, min(batch_size, 4 if is_text else FIRST_LOOK), device)
