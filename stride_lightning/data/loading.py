"""The batches that a DataLoader makes and the positions that its sampler draws, so that training can be repeated."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from stride_lightning.runtime.checks import check_count


@dataclass(frozen=True)
class Loading:
    """Batches of a DataLoader: their size, whether they are in random order, whether a smaller last one is dropped."""

    batch_size: int
    shuffle: bool
    drop_last: bool
    #: Whether an epoch reads every example exactly once.
    is_whole: bool = True


def loading_of(loader: DataLoader[Any]) -> Loading | None:
    """The batches of a loader; None if a batch sampler of the user's makes them."""
    sampler: Any = loader.batch_sampler
    if type(sampler) is not BatchSampler:
        return None
    inner = sampler.sampler
    shuffles = not isinstance(inner, SequentialSampler) and getattr(inner, "shuffle", True)
    is_random = isinstance(inner, RandomSampler)
    is_whole = not is_random or (not inner.replacement and inner.num_samples == len(inner.data_source))
    return Loading(sampler.batch_size, bool(shuffles), sampler.drop_last, is_whole)


def partial_sampler(source: Any) -> str:
    """The type of a loader's sampler if it does more than shuffle, repeat or split the whole dataset; else empty."""
    if not isinstance(source, DataLoader):
        return ""
    if type(source.batch_sampler) is not BatchSampler:
        return type(source.batch_sampler).__name__
    # Not source.sampler: that is a stand-in where the user gave a batch sampler.
    outer: Any = source.batch_sampler.sampler
    # Lightning wraps a user's sampler for distributed runs; look at the one inside.
    inner = getattr(getattr(outer, "dataset", None), "_sampler", None)
    sampler = inner if isinstance(outer, DistributedSampler) and inner is not None else outer
    is_known = type(sampler) in (RandomSampler, SequentialSampler) or isinstance(sampler, DistributedSampler)
    return "" if is_known else type(outer).__name__


def check_loading(loading: Loading | None, batch_size: int | None) -> Loading:
    """The batches of training: those of the DataLoader of its data, with another batch size if one is given.

    Raises:
        ValueError: If training cannot be repeated, because the batch size is not known, or an epoch does not read every
            example exactly once.
    """
    if loading is not None and not loading.is_whole:
        raise ValueError(
            "The training DataLoader's RandomSampler draws with replacement, or only some examples in each epoch. "
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
