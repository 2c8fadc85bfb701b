"""Kinds of training data, each of the same examples, and what attribution makes of them in a process of its own."""

import os
import sys
import warnings
from collections import namedtuple
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
    default_collate,
)

from stride_lightning import StrideAttributor, attribute
from stride_lightning.data import streams
from stride_lightning.runtime.distributed import RankError
from tests.helpers.models import Augmented, Classifier, OfTwoLoaders, build, classification_data
from tests.helpers.processes import start

DATA, QUERIES = classification_data(24), classification_data(5, seed=1)
ALL, SOME = list(range(24)), [1, 2, 5, 8, 9, 13, 21]


class Stream(IterableDataset):
    def __iter__(self):
        return iter([DATA[i] for i in range(24)])


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield from Stream()


class Batches(Dataset):
    """Makes a batch of a list of positions."""

    def __len__(self):
        return 24

    def __getitem__(self, positions):
        x, y = DATA.tensors
        return x[positions].numpy(), y[positions].numpy()


class Bucketed(Sampler):
    """Batches of a sampler of the user's, which does not say what it draws."""

    def __iter__(self):
        yield from torch.randperm(24).reshape(6, 4).tolist()

    def __len__(self):
        return 6


class WithNone(Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, i):
        return DATA[i] if i in SOME else None


def dropping(items):
    return default_collate([item for item in items if item is not None])


def ready_made():
    x, y = DATA.tensors
    return list(zip(x.split(8), y.split(8), strict=True))


class ReadyMade(IterableDataset):
    """A stream that makes batches by itself."""

    def __iter__(self):
        return iter(ready_made())


class Graph:
    """An example of a package's own class, or a batch of them."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def to(self, device):
        self.x, self.y = self.x.to(device), self.y.to(device)


class OfGraphs(Classifier):
    def training_step(self, batch, batch_idx):
        return super().training_step((batch.x, batch.y), batch_idx)


class Graphs(Dataset):
    def __init__(self, data=DATA):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        return Graph(*self.data[i])


def batch_of_graphs(items):
    return Graph(torch.stack([item.x for item in items]), torch.stack([item.y for item in items]))


class Memory(Dataset):
    """Memory-mapped arrays."""

    def __init__(self, folder):
        x, y = DATA.tensors
        path = folder / f"x{os.getpid()}.npy"  # ranks write at the same time
        np.save(path, x.numpy())
        self.x, self.y = np.load(path, mmap_mode="r"), y.numpy()

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return np.array(self.x[i]), self.y[i]


class Huggingface(Classifier):
    """Takes the dictionaries of a Hugging Face dataset."""

    def training_step(self, batch, batch_idx):
        return super().training_step((batch["x"], batch["y"]), batch_idx)


def huggingface(*, is_stream=False):
    import datasets

    x, y = DATA.tensors
    data = datasets.Dataset.from_dict({"x": x.tolist(), "y": y.tolist()})
    return DataLoader(
        (data.to_iterable_dataset() if is_stream else data).with_format("torch"), 8, shuffle=not is_stream
    )


def losses_of_rows(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def both():
    return {"a": DataLoader(DATA, 8), "b": DataLoader(Subset(DATA, SOME), 8)}


#: Of a kind of data: what makes it in a folder; the positions that are attributed; the words in which attribute()
#: refuses it, and a callback that needs examples by position; the module, its queries, options of its Trainer, and the
#: loss of an example where the user says it.
Kind = namedtuple(
    "Kind",
    "make positions refusal callbacks model queries options loss",
    defaults=[ALL, "", "", Classifier, QUERIES, {}, None],
)
of = partial(DataLoader, DATA)
_TWO = "every batch of training holds examples of all of them"
_JOINT = {"positions": None, "refusal": _TWO, "callbacks": _TWO, "model": OfTwoLoaders}
_STREAM = {"callbacks": "Training reads from a stream"}
_OF_BATCHES = {"positions": None, "refusal": "batch_size=None"}
_DICTS = {"model": Huggingface, "queries": [{"x": x, "y": y} for x, y in QUERIES]}
KINDS = {
    "map-style": Kind(lambda _: of(8, shuffle=True)),
    "subset": Kind(lambda _: of(4, sampler=SubsetRandomSampler(SOME)), SOME),
    "weighted": Kind(lambda _: of(8, sampler=WeightedRandomSampler([float(i in SOME) for i in ALL], 16)), SOME),
    "replacement": Kind(lambda _: of(8, sampler=RandomSampler(DATA, replacement=True))),
    "batch sampler": Kind(lambda _: of(batch_sampler=Bucketed())),
    "list": Kind(lambda _: of(4, sampler=SOME), SOME),
    "index lists": Kind(
        lambda _: DataLoader(Batches(), sampler=BatchSampler(SequentialSampler(ALL), 8, False), batch_size=None)
    ),
    "batches": Kind(lambda _: DataLoader(ready_made(), batch_size=None), callbacks="batch_size=None", **_OF_BATCHES),
    "None": Kind(lambda _: DataLoader(WithNone(), 12, collate_fn=dropping), SOME),
    "graphs": Kind(
        lambda _: DataLoader(Graphs(), 8, collate_fn=batch_of_graphs), model=OfGraphs, queries=Graphs(QUERIES)
    ),
    "memory-mapped": Kind(lambda folder: DataLoader(Memory(folder), 8)),
    "augmentation": Kind(lambda _: DataLoader(Augmented(DATA), 8)),
    "stream": Kind(lambda _: DataLoader(Stream(), 8), **_STREAM),
    "endless": Kind(lambda _: DataLoader(Endless(), 8), options={"limit_train_batches": 3}, **_STREAM),
    "endless, no limit": Kind(
        lambda _: DataLoader(Endless(), 8), None, "gives more than 100 examples", options={"max_steps": 3}, **_STREAM
    ),
    "stream of batches": Kind(lambda _: DataLoader(ReadyMade(), batch_size=None), **_OF_BATCHES, **_STREAM),
    "one loader in a dict": Kind(lambda _: {"a": of(8)}, model=OfTwoLoaders),
    "dict": Kind(lambda _: both(), **_JOINT),
    "min_size": Kind(lambda _: CombinedLoader(both(), "min_size"), **_JOINT),
    "max_size": Kind(lambda _: CombinedLoader(both(), "max_size"), **_JOINT),
    "max_size_cycle": Kind(lambda _: CombinedLoader(both(), "max_size_cycle"), **_JOINT),
    "dict, with a loss": Kind(lambda _: both(), [*ALL, *SOME], model=OfTwoLoaders, loss=losses_of_rows),
    "datasets": Kind(lambda _: huggingface(), **_DICTS),
    "datasets, stream": Kind(lambda _: huggingface(is_stream=True), **_STREAM, **_DICTS),
}


def known_kinds():
    """The kinds whose packages are installed."""
    return [name for name in KINDS if find_spec("datasets") or "datasets" not in name]


def answer(name, folder, model=None):
    """Scores of grad-dot, or the words of a refusal; from the checkpoint in a folder, or of a model."""
    kind = KINDS[name]
    how = {"ckpt_path": folder / f"{name}.ckpt"} if model is None else {}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Two reads of one example")
            data, model = kind.make(folder), model or build(kind.model, seed=9)
            options = {"method": "grad-dot", "show_progress": False, "batch_size": 5, "loss": kind.loss} | how
            return attribute(model, kind.queries, train_data=data, **options).scores
    except ValueError as error:
        return str(error)


def answers(folder):
    """Those of all kinds."""
    streams.MOST_EXAMPLES = 100
    return {name: answer(name, folder) for name in known_kinds()}


class OfARank(Stream):
    """Each rank gets its part, as training wants it."""

    def __iter__(self):
        yield from list(super().__iter__())[torch.distributed.get_rank() :: 2]


class StreamThatFailsOnTheSecond(Stream):
    def __iter__(self):
        if torch.distributed.get_rank() == 1:
            raise ValueError("the second has no stream")
        return super().__iter__()


class FailsOnTheSecond(Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, i):
        if torch.distributed.get_rank() == 1 and i == 20:
            raise OSError("out of luck")
        return DATA[i]


def refusal(model, data, queries):
    """The error that data end in."""
    with pytest.raises((ValueError, RankError)) as caught:
        attribute(model, queries, train_data=data, method="grad-dot", batch_size=4, show_progress=False)
    return f"{caught.type.__name__}: {caught.value}"


def refusal_of_groups(model, data, queries):
    """The error that queries end in where groups of training examples are asked about."""
    attributor = StrideAttributor(batch_size=4, show_progress=False).fit(model, data)
    with pytest.raises((ValueError, RankError)) as caught:
        attributor.effect(queries, [[0, 1], [2, 3]])
    return f"{caught.type.__name__}: {caught.value}"


def in_two(number, port, folder):
    """A rank of two, with a share of the work; and data that are not the same on both."""
    start(number, port, group=True)
    results, model = answers(folder), build(Classifier)
    mine = [number, 2, 3]
    differing = {
        "parts": (OfARank(), QUERIES),
        "splits": (Subset(DATA, mine), QUERIES),
        "queries": (DATA, Subset(QUERIES, mine)),
        "fails": (FailsOnTheSecond(), QUERIES),
        "stream fails": (StreamThatFailsOnTheSecond(), QUERIES),
    }
    results |= {name: refusal(model, *data) for name, data in differing.items()}
    results["effect"] = refusal_of_groups(model, DATA, Subset(QUERIES, [0, number + 4]))
    torch.save(results, folder / f"rank{number}.pt")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    torch.save(answers(folder), folder / "alone.pt")
    print("{}")
