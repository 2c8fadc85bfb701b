"""Data sets that make batches by themselves from lists of positions, read by a DataLoader with ``batch_size=None``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, Dataset

from stride_lightning.runtime.randomness import preserved_random_state


@dataclass(frozen=True)
class Listed:
    """An example of such a data set: the batch that it makes of this example alone."""

    source: IndexLists
    position: int
    batch: Any


class IndexLists(Dataset[Listed]):
    """A data set that makes a batch of a list of positions, as one whose examples have positions."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, position: int) -> Listed:
        return Listed(self, position, self.dataset[[position]])


class CollateLists:
    """Makes the batch of some examples: the data set does, and the loader's ``collate_fn`` converts it."""

    def __init__(self, convert: Callable[[Any], Any]) -> None:
        self.convert = convert

    def __call__(self, examples: Sequence[Listed]) -> Any:
        """The batch of some examples of one data set."""
        first = examples[0]
        if len(examples) == 1:
            return self.convert(first.batch)
        if any(example.source.dataset is not first.source.dataset for example in examples):
            raise ValueError("these examples are of two datasets, each of which makes batches by itself")
        return self.convert(first.source.dataset[[example.position for example in examples]])


def draws_lists(loader: DataLoader[Any]) -> bool:
    """Whether the sampler of a loader with ``batch_size=None`` draws lists of positions."""
    sampler: Any = loader.sampler
    if isinstance(sampler, BatchSampler):
        return True
    with preserved_random_state(sampler):
        return isinstance(next(iter(copy.copy(sampler)), None), list | tuple)
