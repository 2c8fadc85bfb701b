"""The examples behind a Dataset, a DataLoader or a LightningDataModule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from stride_lightning.data.examples import Examples
from stride_lightning.data.index_lists import CollateLists, IndexLists, draws_lists
from stride_lightning.data.loading import Loading, NoPositionsError, iterates_itself, loading_of, own_batches
from stride_lightning.data.samplers import drawn_by
from stride_lightning.data.several import collection_of, joined
from stride_lightning.data.streams import examples_of_an_epoch, hold, is_stream, keys_of
from stride_lightning.data.transfer import overridden_hook
from stride_lightning.model.weights import attached_trainer
from stride_lightning.runtime.distributed import all_equal, world_size

#: What errors call the examples of each side.
TRAINING_EXAMPLE, QUERY = "training example", "query"
#: Stages of a pipeline that are looked at.
_MOST_STAGES = 100


def resolve_train_data(
    source: Any,
    train_indices: Sequence[int] | Tensor | None = None,
    model: object | None = None,
    datamodule: object | None = None,
    *,
    has_rows_loss: bool = False,
    show: bool = True,
) -> Examples:
    """The training set behind a Dataset, a DataLoader, several of them, or a LightningDataModule.

    Positions are read off samplers: examples that one never draws are left out. Iterable data are read once and held.

    Args:
        source: The training data.
        train_indices: Positions that were trained on, where the sampler does not say it.
        model: Its batch-transfer hooks apply where the data module defines none.
        datamodule: The data module that made a DataLoader.
        has_rows_loss: Whether the user says what the loss of an example is, as several loaders need it.
        show: Show a progress bar while a stream is read.

    Raises:
        TypeError: If the source holds no examples.
        ValueError: If it is empty.
        NoPositionsError: If its examples cannot be named by a position, as in batches of several loaders.
    """
    if isinstance(source, Examples):
        return source.called(TRAINING_EXAMPLE)
    owners = (source if hasattr(source, "train_dataloader") else datamodule, model)
    if hasattr(source, "train_dataloader"):
        if getattr(source, "trainer", None) is None:
            source.prepare_data()
            source.setup("fit")
        source = source.train_dataloader()
        _refuse_batches(source, "train_data")
    elif isinstance(model, nn.Module) and source is getattr(attached_trainer(model), "train_dataloader", None):
        _refuse_batches(source, "train_data")
    # As Trainer.fit() combines several loaders.
    examples = _resolve(source, "train_data", owners, model, "max_size_cycle", has_rows_loss, show)
    if train_indices is not None:
        notes = tuple(note for note in examples.notes if "some may never" not in note)
        examples = replace(examples, positions=checked_positions(train_indices, len(examples.dataset)), notes=notes)
    return examples


def resolve_queries(
    source: Any, model: object | None = None, beside: Examples | None = None, *, show: bool = True
) -> Examples:
    """The queries behind a Dataset, a DataLoader or a LightningDataModule (its test data, else validation data).

    A dataset is collated as the training examples ``beside`` it, and moved by the hooks of their data module.
    """
    if isinstance(source, Examples):
        return source.called(QUERY)
    owners = (source, model) if hasattr(source, "train_dataloader") else beside.owners if beside else (model,)
    if hasattr(source, "train_dataloader"):
        if getattr(source, "trainer", None) is None:
            source.prepare_data()
        stage = next((s for s in ("test", "val") if overridden_hook(source, f"{s}_dataloader")), None)
        if stage is None:
            raise ValueError(
                f"{type(source).__name__} defines neither test_dataloader nor val_dataloader for queries. Define "
                "one of them, or pass a dataset of queries."
            )
        source.setup("test" if stage == "test" else "validate")
        source = getattr(source, f"{stage}_dataloader")()
        _refuse_batches(source, "queries")
    queries = _resolve(source, "queries", owners, model, "sequential", True, show)
    if beside is None or queries.loading is not None or isinstance(source, DataLoader):
        return queries
    if isinstance(beside.dataset, IndexLists):
        if type(source) is not type(beside.dataset.dataset):
            return queries
        queries = replace(queries, dataset=IndexLists(queries.dataset))
    return replace(queries, collate_fn=beside.collate_fn)


def _resolve(
    source: Any, what: str, owners: tuple[Any, ...], model: object | None, mode: str, has_rows_loss: bool, show: bool
) -> Examples:
    def examples_of(source: Any) -> Examples:
        return _from_loader_or_dataset(source, what, owners, model, show=show)

    collection = collection_of(source, what, mode)
    if collection is None:
        return examples_of(source)
    return joined(*collection, what, examples_of, has_rows_loss=has_rows_loss)


def _refuse_batches(source: Any, what: str) -> None:
    """Refuse what a Trainer iterates to get batches, where it is no DataLoader."""
    is_combined = hasattr(source, "flattened")  # several loaders, each of which is looked at
    if is_stream(source) and not isinstance(source, DataLoader) and not is_combined:
        raise own_batches(source, what)


def _from_loader_or_dataset(
    source: Any, what: str, owners: tuple[Any, ...], model: object | None, *, show: bool
) -> Examples:
    is_loader = isinstance(source, DataLoader)
    dataset: Any = source.dataset if is_loader else source
    if (is_loader and iterates_itself(source)) or (is_stream(dataset) and _holds_loader(dataset)):
        raise own_batches(source, what)
    kind = QUERY if what == "queries" else TRAINING_EXAMPLE
    if is_stream(dataset):
        examples = _from_stream(source, what, model if kind == TRAINING_EXAMPLE else None, show=show)
    elif not _has_positions(dataset) or (not is_loader and isinstance(dataset, tuple | dict | Tensor | str)):
        hint = " Wrap tensors in torch.utils.data.TensorDataset." if isinstance(dataset, tuple | dict) else ""
        raise TypeError(
            f"`{what}` must be a Dataset, a DataLoader or a LightningDataModule, got {type(source).__name__}.{hint}"
        )
    elif len(dataset) == 0:
        raise ValueError(f"`{what}` is empty: give at least one example.")
    else:
        examples = _from_loader(source, what) if is_loader else Examples(dataset)
    # A list may be what a user has read of a stream.
    columns = keys_of(examples.dataset) if isinstance(examples.dataset, list) else {}
    return replace(examples, owners=owners, kind=kind, columns=columns)


def _from_stream(source: Any, what: str, model: object | None, *, show: bool) -> Examples:
    """The examples of a stream, which is read once; the model's Trainer may read a part of it."""
    loader = source if isinstance(source, DataLoader) else None
    stream: Any = source if loader is None else loader.dataset
    if loader is not None and loader.batch_size is None:
        raise NoPositionsError(
            f"`{what}` is a stream ({type(stream).__name__}) read with batch_size=None: it makes batches by itself, so "
            "single examples have no position. Give the DataLoader a batch_size and the stream no batches, or pass a "
            "list of examples."
        )
    held = hold(stream, what, examples_of_an_epoch(loader, model), show=show)
    if not held:
        raise ValueError(
            f"`{what}`, a {type(stream).__name__}, gave no example. A generator gives its examples only once: pass a "
            "list of them to use them again."
        )
    if loader is None or loader.batch_size is None:
        return Examples(held)
    return Examples(held, loader.collate_fn, loading=Loading(loader.batch_size, False, loader.drop_last))


def _from_loader(loader: DataLoader[Any], what: str) -> Examples:
    dataset, collate_fn = loader.dataset, loader.collate_fn
    if loader.batch_sampler is None:
        if not draws_lists(loader):
            raise NoPositionsError(
                f"The `{what}` DataLoader has batch_size=None: its dataset makes batches by itself, so single "
                "examples have no position. Give it a batch_size, a sampler of lists of positions, or pass a dataset "
                "of examples."
            )
        dataset, collate_fn = IndexLists(dataset), CollateLists(collate_fn)
    drawn = drawn_by(loader, len(dataset))  # pyright: ignore[reportArgumentType]  # it has a length
    return Examples(
        dataset,
        collate_fn,
        drawn.positions,  # pyright: ignore[reportArgumentType]  # None: all
        loader.num_workers,
        loader.worker_init_fn,
        loading=loading_of(loader),
        notes=(drawn.note,) if drawn.note else (),
    )


def _has_positions(dataset: Any) -> bool:
    return hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")


def _holds_loader(stream: Any) -> bool:
    """Whether an iterable gives the batches of a DataLoader among its attributes, as a pipeline does."""
    parts = list(getattr(stream, "__dict__", {}).values())
    stages = [stage for part in parts if isinstance(part, list | tuple) for stage in part[:_MOST_STAGES]]
    return any(isinstance(part, DataLoader) for part in (*parts, *stages))


def check_same_on_ranks(examples: Examples) -> None:
    """Refuse examples that differ between the ranks of a distributed run, by what a few of them hold."""
    if world_size() > 1 and not all_equal((examples.positions.tolist(), examples.sample())):
        raise ValueError(
            f"The ranks were given other {'queries' if examples.kind == QUERY else 'training examples'}. All ranks "
            "must pass the same data, in the same order; was random_split given no seed?"
        )


def checked_positions(indices: Sequence[int] | Tensor, size: int | None = None) -> Tensor:
    """``train_indices`` as int64; those of a dataset of ``size`` examples, if it is known."""
    positions = torch.as_tensor(indices).flatten()
    if positions.is_floating_point() or positions.dtype == torch.bool:
        raise TypeError(
            f"`train_indices` must be integer positions, at least one, got {positions.dtype} of shape "
            f"{tuple(positions.shape)}."
        )
    if len(positions) == 0:
        raise ValueError("`train_indices` names no example. Leave it out where the sampler reads them all.")
    outside = positions[(positions < 0) if size is None else (positions < 0) | (positions >= size)]
    if len(outside):
        bounds = "not be negative" if size is None else f"be positions in 0..{size - 1}"
        raise ValueError(f"`train_indices` must {bounds}, got {outside[:5].tolist()}.")
    names, counts = positions.unique(return_counts=True)
    if len(names) < len(positions):
        raise ValueError(f"`train_indices` names examples twice, such as {int(names[counts > 1][0])}. Name each once.")
    return positions.long()
