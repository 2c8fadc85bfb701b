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
from stride_lightning.data.loading import Loading, NoPositionsError, iterates_itself, loading_of
from stride_lightning.data.samplers import drawn_by
from stride_lightning.data.several import collection_of, joined
from stride_lightning.data.streams import examples_of_an_epoch, hold, is_stream, keys_of
from stride_lightning.data.transfer import overridden_hook
from stride_lightning.model.weights import attached_trainer
from stride_lightning.runtime.distributed import all_equal, world_size

#: What errors call the examples of each side.
TRAINING_EXAMPLE, QUERY = "training example", "query"


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

    collection = collection_of(source, mode)
    if collection is None:
        return examples_of(source)
    return joined(*collection, what, examples_of, has_rows_loss=has_rows_loss)


def _refuse_batches(source: Any, what: str) -> None:
    """Refuse what a Trainer iterates to get batches, where it is no DataLoader."""
    is_combined = hasattr(source, "flattened")  # several loaders, each of which is looked at
    if is_stream(source) and not isinstance(source, DataLoader) and not is_combined:
        raise _own_batches(source, what)


def _own_batches(loader: object, what: str) -> NoPositionsError:
    return NoPositionsError(
        f"The `{what}` loader, a {type(loader).__name__}, makes its batches in a way of its own, so that nothing "
        "says which examples they hold. Pass a torch.utils.data.DataLoader of the same dataset, with the "
        "collate_fn that makes such batches, or the dataset."
    )


def _from_loader_or_dataset(
    source: Any, what: str, owners: tuple[Any, ...], model: object | None, *, show: bool
) -> Examples:
    wrong = f"`{what}` must be a Dataset, a DataLoader or a LightningDataModule, got {type(source).__name__}."
    if isinstance(source, tuple | dict):
        raise TypeError(f"{wrong} Wrap tensors in torch.utils.data.TensorDataset.")
    loader = source if isinstance(source, DataLoader) else None
    dataset: Any = source if loader is None else loader.dataset
    kind = QUERY if what == "queries" else TRAINING_EXAMPLE
    if loader is None and is_stream(source) and any(isinstance(part, DataLoader) for part in _parts_of(source)):
        raise NoPositionsError(
            f"`{what}`, a {type(source).__name__}, gives the batches of a DataLoader, whose examples have no position. "
            "Pass the DataLoader."
        )
    if loader is not None and iterates_itself(loader):
        raise _own_batches(loader, what)
    held = None
    if is_stream(dataset):
        if any(isinstance(stage, DataLoader) for stage in getattr(dataset, "pipeline", ())):  # of webdataset
            raise NoPositionsError(
                f"`{what}` is a stream ({type(dataset).__name__}) of batches, whose examples have no position. Pass "
                "torch.utils.data.DataLoader(stream, batch_size) with the stream of examples."
            )
        if loader is not None and loader.batch_size is None:
            raise NoPositionsError(
                f"`{what}` is a stream ({type(dataset).__name__}) read with batch_size=None: it makes batches by "
                "itself, so single examples have no position. Give the DataLoader a batch_size and the stream no "
                "batches, or pass a list of examples."
            )
        limit = examples_of_an_epoch(loader, model) if kind == TRAINING_EXAMPLE else None
        dataset = held = hold(dataset, what, limit, show=show)
    if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")) or isinstance(dataset, Tensor | str):
        raise TypeError(wrong)
    if held is not None and not held:
        raise ValueError(
            f"`{what}`, a {type(source).__name__}, gave no example. A generator gives its examples only once: pass a "
            "list of them to use them again."
        )
    if len(dataset) == 0:
        raise ValueError(f"`{what}` is empty: give at least one example.")
    columns = keys_of(dataset) if isinstance(dataset, list) else {}  # a stream, or what a user has read of one
    if held is not None:
        examples = Examples(held, owners=owners, kind=kind, columns=columns)
        if loader is None:
            return examples
        assert loader.batch_size is not None  # refused above
        loading = Loading(loader.batch_size, shuffle=False, drop_last=loader.drop_last)
        return replace(examples, collate_fn=loader.collate_fn, loading=loading)
    if loader is None:
        return Examples(dataset, owners=owners, kind=kind, columns=columns)
    collate_fn: Any = loader.collate_fn
    if loader.batch_sampler is None:
        if not draws_lists(loader):
            raise NoPositionsError(
                f"The `{what}` DataLoader has batch_size=None: its dataset makes batches by itself, so single "
                "examples have no position. Give it a batch_size, a sampler of lists of positions, or pass a dataset "
                "of examples."
            )
        dataset, collate_fn = IndexLists(dataset), CollateLists(collate_fn)
    drawn = drawn_by(loader, len(dataset))
    return Examples(
        dataset,
        collate_fn,
        drawn.positions,  # pyright: ignore[reportArgumentType]  # None: all
        loader.num_workers,
        loader.worker_init_fn,
        owners,
        loading_of(loader),
        kind,
        columns,
        notes=(drawn.note,) if drawn.note else (),
    )


def check_same_on_ranks(examples: Examples) -> None:
    """Refuse examples that differ between the ranks of a distributed run, by what a few of them hold."""
    if world_size() > 1 and not all_equal((examples.positions.tolist(), examples.sample())):
        raise ValueError(
            f"The ranks were given other {'queries' if examples.kind == QUERY else 'training examples'}. All ranks "
            "must pass the same data, in the same order; was random_split given no seed?"
        )


def _parts_of(source: Any) -> list[Any]:
    """What an object holds among its attributes."""
    return list(getattr(source, "__dict__", {}).values())


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
