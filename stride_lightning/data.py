"""A data set in fixed order: positions and sequential reading."""

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
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    default_collate,
)
from torch.utils.data.distributed import DistributedSampler

from stride_lightning.fingerprints import digest
from stride_lightning.loading import Loading, loading_of
from stride_lightning.randomness import mix, preserved_random_state, seed_all

#: Largest data set that is kept in memory while models train on it again and again.
HELD_BYTES = 2**28
#: Examples that are read twice to find out whether reading is random.
_NUM_PROBES = 16
#: Texts that are looked at to find out what a batch means.
_TEXTS_TO_LOOK_AT = 4


class RowError(ValueError):
    """An example that cannot be read: its row in a batch, and what is wrong with it."""

    def __init__(self, row: int, problem: str) -> None:
        super().__init__(f"Row {row} of the batch {problem}.")
        self.row, self.problem = row, problem


@dataclass(eq=False)
class Examples:
    """A data set whose examples are named by their position and always read in the same order.

    Args:
        dataset: Map-style data set.
        collate_fn: How its examples become a batch.
        positions: Positions that are read, in order; all of them when None.
        num_workers: Worker processes that read.
        worker_init_fn: Passed on to the DataLoader.
        owners: Objects whose Lightning batch-transfer hooks apply, first match wins (data module, then model).
        loading: How a DataLoader the data came from makes batches of them.
    """

    dataset: Any
    collate_fn: Callable[[list[Any]], Any] = default_collate
    positions: Tensor | None = None
    num_workers: int = 0
    worker_init_fn: Callable[[int], None] | None = None
    owners: tuple[Any, ...] = ()
    loading: Loading | None = None
    _random: bool | None = field(default=None, init=False)
    _held: Any = field(default=None, init=False, repr=False)

    def __len__(self) -> int:
        """Number of examples that are read."""
        return len(self.dataset) if self.positions is None else len(self.positions)

    def __getitem__(self, index: int) -> Any:
        """The example at the given place of the reading order, as the dataset returns it."""
        return self.dataset[index if self.positions is None else int(self.positions[index])]

    def subset(self, indices: Sequence[int]) -> Examples:
        """The examples at the given places of the reading order."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        part = replace(self, positions=chosen if self.positions is None else self.positions[chosen])
        part._random = self._random
        return part

    def name(self, place: int) -> int:
        """Position in the dataset of the example at a place of the reading order."""
        return place if self.positions is None else int(self.positions[place])

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
            probes = (range(len(self)) if self.positions is None else self.positions.tolist())[::step][:_NUM_PROBES]
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
        positions = range(len(self)) if self.positions is None else self.positions.tolist()
        loader = DataLoader(
            reader,
            batch_size=batch_size,
            sampler=positions,
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
        positions = [(batch if self.positions is None else self.positions[batch]).tolist() for batch in batches]
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


def resolve_train_data(
    source: Any,
    train_indices: Sequence[int] | Tensor | None = None,
    model: object | None = None,
    datamodule: object | None = None,
) -> Examples:
    """The training set behind a Dataset, a DataLoader or a LightningDataModule.

    Args:
        source: What holds the training data. Random, sequential and distributed samplers are read through.
        train_indices: Positions that were trained on, for any other sampler.
        model: Its batch-transfer hooks apply unless the data module has its own.
        datamodule: The data module that a DataLoader came from.

    Raises:
        TypeError: If the source is not map-style data.
        ValueError: If it is empty, not batched, or drawn by a sampler whose positions are unknown.
    """
    if isinstance(source, Examples):
        return source
    owners = (source if hasattr(source, "train_dataloader") else datamodule, model)
    if hasattr(source, "train_dataloader"):
        if getattr(source, "trainer", None) is None:
            source.prepare_data()
            source.setup("fit")
        source = source.train_dataloader()
    examples = _from_loader_or_dataset(source, "train_data", owners)
    if train_indices is not None:
        examples.positions = _checked_positions(train_indices, len(examples.dataset))
    elif isinstance(source, DataLoader) and not _reads_everything(source):
        raise ValueError(
            f"The training DataLoader draws through {_sampler_name(source)}, so which examples were trained on cannot "
            "be told. Pass `train_indices=` with their positions in the dataset."
        )
    return examples


def resolve_queries(source: Any, model: object | None = None) -> Examples:
    """The queries behind a Dataset, a DataLoader or a LightningDataModule (its test data, else validation data)."""
    if isinstance(source, Examples):
        return source
    owners = (source, model) if hasattr(source, "train_dataloader") else (model,)
    if hasattr(source, "train_dataloader"):
        if getattr(source, "trainer", None) is None:
            source.prepare_data()
        stage = next((s for s in ("test", "val") if _is_overridden(source, f"{s}_dataloader")), None)
        if stage is None:
            raise ValueError(f"{type(source).__name__} defines neither test_dataloader nor val_dataloader for queries.")
        source.setup("test" if stage == "test" else "validate")
        source = getattr(source, f"{stage}_dataloader")()
    examples = _from_loader_or_dataset(source, "queries", owners)
    if isinstance(source, DataLoader) and not _reads_everything(source):
        raise ValueError(
            f"The query DataLoader draws through {_sampler_name(source)}. Queries are named by their position: pass "
            "torch.utils.data.Subset(dataset, positions) instead."
        )
    return examples


def _from_loader_or_dataset(source: Any, what: str, owners: tuple[Any, ...]) -> Examples:
    if isinstance(source, tuple | dict) or (
        isinstance(source, list) and any(isinstance(x, DataLoader) for x in source)
    ):
        raise TypeError(
            f"`{what}` must be a Dataset, a DataLoader or a LightningDataModule, got {type(source).__name__}. Wrap "
            "tensors in torch.utils.data.TensorDataset; pass one of several loaders."
        )
    if isinstance(source, DataLoader):
        dataset = source.dataset
        if source.batch_sampler is None:
            raise ValueError(
                f"The `{what}` DataLoader has batch_size=None: its dataset makes batches by itself, so single examples "
                "have no position. Give it a batch_size, or pass a dataset of examples."
            )
        workers = source.num_workers, source.worker_init_fn
        examples = Examples(dataset, source.collate_fn, None, *workers, owners, loading_of(source))
    else:
        dataset = source
        examples = Examples(dataset, owners=owners)
    if isinstance(dataset, IterableDataset):
        raise TypeError(
            f"`{what}` is an IterableDataset ({type(dataset).__name__}): its examples have no position to be named by. "
            "Pass a map-style dataset with __getitem__ and __len__."
        )
    if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")) or isinstance(dataset, Tensor | str):
        raise TypeError(
            f"`{what}` must be a Dataset, a DataLoader or a LightningDataModule, got {type(source).__name__}."
        )
    if len(dataset) == 0:  # type: ignore[arg-type]
        raise ValueError(f"`{what}` is empty.")
    return examples


def _reads_everything(loader: DataLoader[Any]) -> bool:
    """Whether the loader's sampler only shuffles, repeats or splits the whole dataset."""
    if type(loader.batch_sampler) is not BatchSampler:
        return False
    # Not loader.sampler: that is a stand-in where the user gave a batch sampler.
    sampler: Any = loader.batch_sampler.sampler
    # Lightning wraps a sampler of the user's own for distributed runs; look at the one inside.
    inner = getattr(getattr(sampler, "dataset", None), "_sampler", None)
    if isinstance(sampler, DistributedSampler) and inner is not None:
        sampler = inner
    return type(sampler) in (RandomSampler, SequentialSampler) or isinstance(sampler, DistributedSampler)


def _sampler_name(loader: DataLoader[Any]) -> str:
    batch_sampler = loader.batch_sampler
    return f"a {type(batch_sampler.sampler if type(batch_sampler) is BatchSampler else batch_sampler).__name__}"


def _is_overridden(owner: object, name: str) -> bool:
    method = getattr(owner, name, None)  # of the object: LightningDataModule.from_datasets() sets them there
    return method is not None and not method.__qualname__.startswith("DataHooks.")


def _checked_positions(indices: Sequence[int] | Tensor, size: int) -> Tensor:
    positions = torch.as_tensor(indices).flatten()
    if positions.is_floating_point() or positions.dtype == torch.bool:
        raise TypeError(f"`train_indices` must be integer positions, got {positions.dtype}.")
    if len(positions) == 0 or int(positions.min()) < 0 or int(positions.max()) >= size:
        raise ValueError(
            f"`train_indices` must be positions in 0..{size - 1}; got {len(positions)} of them, out of range."
        )
    if len(positions.unique()) < len(positions):
        raise ValueError("`train_indices` names some examples twice; each position may stand once.")
    return positions.long()


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
