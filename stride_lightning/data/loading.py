"""The batches that a DataLoader makes, so that training can be repeated."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, WeightedRandomSampler
from torch.utils.data.distributed import DistributedSampler

from stride_lightning.runtime.checks import check_count


class NoPositionsError(ValueError):
    """Single examples of the data cannot be named by a position."""


def own_batches(loader: object, what: str) -> NoPositionsError:
    """The refusal of what gives batches and is no DataLoader, or is one with an iteration of its own."""
    return NoPositionsError(
        f"The `{what}` loader, a {type(loader).__name__}, makes its batches in a way of its own, so that nothing "
        "says which examples they hold. Pass a torch.utils.data.DataLoader of the same dataset, with the "
        "collate_fn that makes such batches, or the dataset."
    )


#: Packages whose loaders iterate by themselves and make the same batches as torch's.
_LIKE_TORCH = ("torchdata.", "litdata.")


@dataclass(frozen=True)
class Loading:
    """Batches of a DataLoader: their size, whether they are in random order, whether a smaller last one is dropped."""

    batch_size: int
    shuffle: bool
    drop_last: bool
    #: Whether an epoch reads every example exactly once.
    is_whole: bool = True


def iterates_itself(loader: DataLoader[Any]) -> bool:
    """Whether a loader of the user's class makes its batches otherwise than by ``collate_fn`` of single examples."""
    definitions = {name: _home_of(type(loader), name) for name in ("__iter__", "_get_iterator")}
    return isinstance(loader.dataset, DataLoader) or any(
        home is not DataLoader and not home.__module__.startswith(_LIKE_TORCH) for home in definitions.values()
    )


def _home_of(cls: type, name: str) -> type:
    """The class that defines a method."""
    return next(base for base in cls.__mro__ if name in vars(base))


def loading_of(loader: DataLoader[Any]) -> Loading | None:
    """The batches of a loader; None if a batch sampler of the user's makes them."""
    sampler: Any = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    if type(sampler) is not BatchSampler:
        return None
    inner: Any = sampler.sampler
    is_list = isinstance(inner, list | tuple | range | Tensor | np.ndarray)
    # Subclasses may have an order of their own.
    is_ordered = is_list or type(inner) is SequentialSampler
    if isinstance(inner, DistributedSampler):
        is_ordered = not inner.shuffle
    wrapped = getattr(getattr(inner, "dataset", None), "_sampler", inner)  # Lightning's, in distributed runs
    is_whole = not isinstance(wrapped, WeightedRandomSampler)
    if isinstance(wrapped, RandomSampler):
        is_whole = not wrapped.replacement and wrapped.num_samples == len(wrapped.data_source)
    if is_list:
        is_whole = len(np.unique(np.asarray(inner))) == len(inner)
    return Loading(sampler.batch_size, not is_ordered, sampler.drop_last, is_whole)


def check_loading(loading: Loading | None, batch_size: int | None) -> Loading:
    """The batches of training: those of the DataLoader of its data, with another batch size if one is given.

    Raises:
        ValueError: If training cannot be repeated, because the batch size is not known, or an epoch does not read every
            example exactly once.
    """
    if loading is not None and not loading.is_whole:
        raise ValueError(
            "The training DataLoader's sampler draws with replacement, or only some examples in each epoch. "
            "Training is repeated with every example once per epoch: pass a DataLoader that does so too, or the "
            "dataset and `batch_size=`."
        )
    if batch_size is not None:
        batch_size = check_count("batch_size", batch_size)
        return Loading(batch_size, True, False) if loading is None else replace(loading, batch_size=batch_size)
    if loading is None:
        raise ValueError(
            "The training data do not say their batch size, which decides what training gives. Pass a DataLoader with "
            "a batch_size, or `batch_size=`."
        )
    return loading
