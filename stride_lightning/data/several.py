"""Several training loaders: one space of positions, loader after loader."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils.data import ConcatDataset, DataLoader

from stride_lightning.data.examples import Examples
from stride_lightning.data.loading import NoPositionsError, own_batches


def collection_of(source: Any, what: str, mode: str) -> tuple[Any, str] | None:
    """Loaders in a ``CombinedLoader``, or in a dict or list, which a Trainer combines in ``mode``; else None."""
    if hasattr(source, "iterables") and hasattr(source, "flattened"):  # a CombinedLoader of either Lightning
        for loader in source.flattened:
            if not isinstance(loader, DataLoader):
                raise own_batches(loader, what)
        return source.iterables, source._mode
    if isinstance(source, Mapping | list | tuple):
        leaves = pytree.tree_leaves(source)
        if leaves and all(isinstance(leaf, DataLoader) for leaf in leaves):
            return source, mode
    return None


class CollateInto:
    """The batch of one loader as a Trainer hands it over: inside the structure in which the loader stands."""

    def __init__(self, collate_fn: Callable[[list[Any]], Any], structure: Any) -> None:
        self.collate_fn, self.structure = collate_fn, structure

    def __call__(self, examples: list[Any]) -> Any:
        """The batch, in the structure."""
        return pytree.tree_unflatten([self.collate_fn(examples)], self.structure)


def joined(
    collection: Any, mode: str, what: str, examples_of: Callable[[DataLoader[Any]], Examples], *, has_rows_loss: bool
) -> Examples:
    """The examples of all loaders, one loader after the other; batches are those of a single loader.

    Args:
        collection: The loaders.
        mode: Mode of the ``CombinedLoader``. A single loader gives its batch inside the structure in which it stands,
            unless it is ``"sequential"``.
        what: Name of the argument.
        examples_of: Reads the examples of one loader.
        has_rows_loss: Whether the user says what the loss of an example is.

    Raises:
        NoPositionsError: If a batch of training holds examples of several loaders, and nothing says what the loss of
            one is; or if their batches are made in different ways.
    """
    paths, loaders, structure = _paths(collection)
    if len(loaders) == 1:
        examples = examples_of(loaders[0])
        if mode == "sequential":
            return examples
        return replace(examples, collate_fn=CollateInto(examples.collate_fn, structure))
    shown = ", ".join(map(str, paths))
    if mode != "sequential" and not has_rows_loss:
        raise NoPositionsError(
            f"`{what}` are {len(loaders)} loaders ({shown}), and every batch of training holds examples of all of them "
            f"(mode {mode!r}). What one example adds to such a loss is not told from the others. Pass `loss=fn` with "
            "fn(model, batch) -> (B,), the losses of the examples of a batch of any one loader, or a likelihood as "
            "`task=`."
        )
    parts = [examples_of(loader) for loader in loaders]
    if any(part.collate_fn != parts[0].collate_fn for part in parts):
        raise NoPositionsError(
            f"`{what}` are {len(loaders)} loaders ({shown}) with different collate_fns, so that their examples have no "
            "batch in common. Give them the same collate_fn, or pass one loader."
        )
    sizes = [len(part.dataset) for part in parts]
    starts = torch.tensor([0, *sizes]).cumsum(0).tolist()
    return replace(
        parts[0],
        dataset=ConcatDataset([part.dataset for part in parts]),
        positions=torch.cat([part.positions + start for part, start in zip(parts, starts, strict=False)]),
        num_workers=max(part.num_workers for part in parts),
        loading=parts[0].loading if all(part.loading == parts[0].loading for part in parts) else None,
        columns={
            "loader": [path for path, size in zip(paths, sizes, strict=True) for _ in range(size)],
            "position": [position for size in sizes for position in range(size)],
        },
        notes=tuple(note for part in parts for note in part.notes),
    )


def _paths(collection: Any) -> tuple[list[Any], list[DataLoader[Any]], Any]:
    """The name of each loader, the loaders, and the structure in which they stand."""
    pairs, structure = pytree.tree_flatten_with_path(collection)
    names = [".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path) for path, _ in pairs]
    numbered = [int(name) if name.isdecimal() else name for name in names]
    return numbered, [loader for _, loader in pairs], structure
