"""Iterable data: read once, in the order of one full iteration, and held in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset, IterableDataset

from stride_lightning.data.fingerprints import digest_rows
from stride_lightning.model.weights import attached_trainer
from stride_lightning.runtime.distributed import all_equal, world_size
from stride_lightning.runtime.progress import track
from stride_lightning.runtime.randomness import seeded

#: Most examples of a stream.
MOST_EXAMPLES = 10**6
#: Most bytes of a stream that are held in memory.
MOST_BYTES = 4 * 2**30
#: Names under which an example carries its key.
_KEYS = ("__key__", "key", "id")


class Held(list[Any]):
    """The examples of a stream, in the order in which it gave them."""


def is_stream(dataset: Any) -> bool:
    """Whether data are iterable, without positions; a streaming dataset may have positions all the same."""
    has_positions = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    if isinstance(dataset, Dataset):
        has_positions &= type(dataset).__getitem__ is not Dataset.__getitem__
    is_iterable = isinstance(dataset, IterableDataset) or hasattr(dataset, "__iter__")
    return is_iterable and not has_positions and not isinstance(dataset, Mapping | str | bytes)


def hold(dataset: Iterable[Any], what: str, limit: int | None, *, show: bool = True) -> Held:
    """Read a stream once.

    Args:
        dataset: The stream; it is iterated in this process, under a fixed seed.
        what: Name of the argument.
        limit: Most examples that training reads in an epoch; None if nothing limits it.
        show: Show a progress bar.

    Raises:
        ValueError: If it gives more than ``MOST_EXAMPLES``, or more than ``MOST_BYTES``.
    """
    name = type(dataset).__name__
    held, size = Held(), 0
    most = MOST_EXAMPLES + 1 if limit is None else min(limit, MOST_EXAMPLES + 1)
    way_out = (
        "Pass a list of the examples that are to be attributed, such as list(itertools.islice(stream, 10_000)), or a "
        "map-style dataset with __getitem__ and __len__."
    )
    with seeded(0):
        for example in track(islice(dataset, most), f"Reading {name}", limit, show=show):
            held.append(example)
            size += _num_bytes(example)
            if len(held) > MOST_EXAMPLES:
                raise ValueError(f"`{what}` ({name}) gives more than {MOST_EXAMPLES:,} examples. {way_out}")
            if size > MOST_BYTES:
                raise ValueError(
                    f"`{what}` ({name}) is held in memory, and its first {len(held):,} examples take more than "
                    f"{MOST_BYTES / 2**30:.0f} GiB. {way_out}"
                )
    digest = hashlib.sha256(digest_rows(held, content=True).numpy().tobytes()).hexdigest() if world_size() > 1 else ""
    if not all_equal(digest):
        raise ValueError(
            f"`{what}` ({name}) gives other examples on every rank, so none of them holds all. Call attribute() in one "
            "process after training, or pass the same list of examples on every rank."
        )
    return held


def keys_of(held: list[Any]) -> dict[str, list[Any]]:
    """The key of each example, where all carry one."""
    for name in _KEYS:
        if held and all(isinstance(example, Mapping) and isinstance(example.get(name), str | int) for example in held):
            return {"key": [example[name] for example in held]}
    return {}


def examples_of_an_epoch(loader: DataLoader[Any] | None, model: object | None) -> int | None:
    """Examples that ``limit_train_batches`` of the model's Trainer leaves of a stream; None if it limits nothing."""
    trainer = None if model is None else attached_trainer(model)  # pyright: ignore[reportArgumentType]
    limit = getattr(trainer, "limit_train_batches", None)
    loader = loader if isinstance(loader, DataLoader) else getattr(trainer, "train_dataloader", None)
    size = getattr(loader, "batch_size", None)
    if trainer is None or not isinstance(limit, int) or not isinstance(size, int):
        return None
    return limit * size * trainer.world_size


def _num_bytes(example: Any) -> int:
    leaves = pytree.tree_leaves(example)
    return sum(
        leaf.nbytes if isinstance(leaf, Tensor | np.ndarray) else len(leaf) if isinstance(leaf, str | bytes) else 8
        for leaf in leaves
    )
