"""The examples behind a Dataset, a DataLoader or a LightningDataModule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from stride_lightning.data.examples import Examples, overridden_hook
from stride_lightning.data.loading import loading_of, partial_sampler

#: What errors call the examples of each side.
TRAINING_EXAMPLE, QUERY = "training example", "query"


def resolve_train_data(
    source: Any,
    train_indices: Sequence[int] | Tensor | None = None,
    model: object | None = None,
    datamodule: object | None = None,
) -> Examples:
    """The training set behind a Dataset, a DataLoader or a LightningDataModule.

    Args:
        source: The training data. Random, sequential and distributed samplers are read through.
        train_indices: Positions that were trained on, for any other sampler.
        model: Its batch-transfer hooks apply where the data module defines none.
        datamodule: The data module that made a DataLoader.

    Raises:
        TypeError: If the source is not map-style data.
        ValueError: If it is empty, not batched, or drawn by a sampler whose positions are unknown.
    """
    if isinstance(source, Examples):
        return source.called(TRAINING_EXAMPLE)
    owners = (source if hasattr(source, "train_dataloader") else datamodule, model)
    if hasattr(source, "train_dataloader"):
        if getattr(source, "trainer", None) is None:
            source.prepare_data()
            source.setup("fit")
        source = source.train_dataloader()
    examples = _from_loader_or_dataset(source, "train_data", owners)
    if train_indices is not None:
        examples.positions = checked_positions(train_indices, len(examples.dataset))
    elif not isinstance(examples.dataset, _HACK) and (sampler := partial_sampler(source)):
        raise ValueError(
            f"The training DataLoader draws through a {sampler}, which does not say which examples were trained on. "
            "Pass `train_indices=` with their positions in the dataset."
        )
    return examples


def resolve_queries(source: Any, model: object | None = None) -> Examples:
    """The queries behind a Dataset, a DataLoader or a LightningDataModule (its test data, else validation data)."""
    if isinstance(source, Examples):
        return source.called(QUERY)
    owners = (source, model) if hasattr(source, "train_dataloader") else (model,)
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
    examples = _from_loader_or_dataset(source, "queries", owners)
    if not isinstance(examples.dataset, _HACK) and (sampler := partial_sampler(source)):
        raise ValueError(
            f"The query DataLoader draws through a {sampler}. Queries are named by their position: pass "
            "torch.utils.data.Subset(dataset, positions) instead."
        )
    return examples


def _from_loader_or_dataset(source: Any, what: str, owners: tuple[Any, ...]) -> Examples:
    wrong = f"`{what}` must be a Dataset, a DataLoader or a LightningDataModule, got {type(source).__name__}."
    is_several = isinstance(source, list) and any(isinstance(loader, DataLoader) for loader in source)
    if isinstance(source, tuple | dict) or is_several:
        raise TypeError(f"{wrong} Wrap tensors in torch.utils.data.TensorDataset; pass one of several loaders.")
    dataset = source.dataset if isinstance(source, DataLoader) else source
    if isinstance(source, DataLoader) and source.batch_sampler is None:
        examples = Examples(_HACK(len(dataset)), owners=owners, kind=QUERY if what == "queries" else TRAINING_EXAMPLE)
        examples.collate_fn = lambda idx: source.collate_fn(dataset[list(idx)])
        from stride_lightning.data.loading import Loading

        examples.loading = Loading(source.sampler.batch_size, True, False)
        return examples
    if isinstance(dataset, IterableDataset):
        raise TypeError(
            f"`{what}` is an IterableDataset ({type(dataset).__name__}): its examples have no position to be named by. "
            "Pass a map-style dataset with __getitem__ and __len__."
        )
    if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")) or isinstance(dataset, Tensor | str):
        raise TypeError(wrong)
    if len(dataset) == 0:  # type: ignore[arg-type]
        raise ValueError(f"`{what}` is empty: give at least one example.")
    examples = Examples(dataset, owners=owners, kind=QUERY if what == "queries" else TRAINING_EXAMPLE)
    if isinstance(source, DataLoader):
        examples.collate_fn, examples.loading = source.collate_fn, loading_of(source)
        examples.num_workers, examples.worker_init_fn = source.num_workers, source.worker_init_fn
    return examples


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


class _HACK:
    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return i
