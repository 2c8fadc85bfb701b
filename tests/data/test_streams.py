"""Iterable data: read once, in order, and held."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from stride_lightning.data import streams
from stride_lightning.data.loading import Loading, NoPositionsError
from stride_lightning.data.sources import resolve_queries, resolve_train_data
from tests.helpers.models import classification_data
from tests.helpers.tiny import read

DATA = classification_data(20)


class Stream(IterableDataset):
    """Shuffled by the global generator, as buffers are."""

    def __iter__(self):
        yield from (DATA[i] for i in torch.randperm(20).tolist())


class Bare:
    """A stream that is no IterableDataset, as those of ``datasets``."""

    def __iter__(self):
        yield from ({"__key__": f"scan_{i}", "x": DATA[i][0]} for i in range(20))


class Endless(IterableDataset):
    def __iter__(self):
        i = 0
        while True:
            yield DATA[i % 20]
            i += 1


class Indexed(Stream):
    """A streaming dataset whose examples have positions."""

    def __len__(self):
        return 20

    def __getitem__(self, position):
        return DATA[position]


class Trained:
    """A model attached to a Trainer that reads a part of the stream."""

    def __init__(self, limit, loader, world_size=1):
        attributes = {"callbacks": [], "limit_train_batches": limit, "train_dataloader": loader}
        self.trainer = type("Trainer", (), attributes | {"world_size": world_size})()


@pytest.mark.parametrize("resolve", [resolve_train_data, resolve_queries])
def test_a_stream_is_read_once_in_the_same_order_everywhere(resolve):
    torch.manual_seed(1)
    random_state = torch.get_rng_state()
    one = resolve(Stream())
    assert torch.get_rng_state().equal(random_state)
    torch.manual_seed(2)
    two = resolve(DataLoader(Stream(), 4))
    assert read(one)[1] == read(two)[1]
    x = read(one)[0]
    assert x.equal(read(one)[0])
    assert sorted(x.tolist()) == sorted(DATA.tensors[0].tolist())
    assert not x.equal(DATA.tensors[0])


def test_examples_that_carry_a_key():
    examples = resolve_train_data(DataLoader(Bare(), 4))
    assert examples.info() == {"key": [f"scan_{i}" for i in range(20)]}
    assert examples.subset([3]).info() == {"key": ["scan_3"]}
    assert resolve_train_data(Stream()).info() == {}
    read_before = list(Bare())
    assert resolve_train_data(read_before).info() == examples.info()
    assert resolve_train_data(DataLoader(read_before, sampler=[3])).info() == {"key": ["scan_3"]}
    assert len(resolve_train_data(iter([{"id": 1, "x": 0}, {"x": 1}]))) == 2


def test_positions_of_a_streaming_dataset():
    examples = resolve_train_data(DataLoader(Indexed(), 4))
    assert read(examples)[0].equal(DATA.tensors[0])
    assert examples.notes == ()  # the loader has no sampler of its own


def test_batches_of_a_stream():
    """Training on a stream can be repeated, in its order."""
    assert resolve_train_data(DataLoader(Stream(), 4)).loading == Loading(4, shuffle=False, drop_last=False)
    assert resolve_train_data(DataLoader(Stream(), 6, drop_last=True)).loading == Loading(6, False, True)
    assert resolve_train_data(Stream()).loading is None


class OfBatches(IterableDataset):
    """Holds a loader, as the ``WebLoader`` of webdataset does."""

    def __init__(self):
        self.pipeline = [DataLoader(Stream(), 4)]

    def __iter__(self):
        return iter(self.pipeline[0])


def test_a_stream_of_batches_is_refused():
    with pytest.raises(NoPositionsError, match="a OfBatches, makes its batches in a way of its own"):
        resolve_train_data(OfBatches())


@pytest.mark.parametrize(("world_size", "count"), [(1, 12), (2, 24)])
def test_a_trainer_that_limits_its_batches(world_size, count):
    loader = DataLoader(Endless(), 4)
    model = Trained(3, loader, world_size)
    assert len(resolve_train_data(loader, model=model)) == count
    assert len(resolve_train_data(Endless(), model=model)) == count
    assert len(resolve_train_data(Stream(), model=Trained(1.0, loader))) == 20


def test_queries_are_not_limited():
    assert len(resolve_queries(Stream(), model=Trained(1, DataLoader(Stream(), 4)))) == 20


def test_endless_and_large_streams_are_refused(monkeypatch):
    monkeypatch.setattr(streams, "MOST_EXAMPLES", 30)
    message = r"`train_data` \(Endless\) gives more than 30 examples\. Pass a list of the examples"
    with pytest.raises(ValueError, match=message):
        resolve_train_data(DataLoader(Endless(), 4))
    assert len(resolve_train_data(Endless(), model=Trained(7, DataLoader(Endless(), 4)))) == 28
    with pytest.raises(ValueError, match=message):
        resolve_train_data(Endless(), model=Trained(8, DataLoader(Endless(), 4)))
    monkeypatch.setattr(streams, "MOST_BYTES", 100)
    with pytest.raises(ValueError, match=r"`queries` \(Stream\) is held in memory, and its first 5 examples take more"):
        resolve_queries(Stream())
    with pytest.raises(ValueError, match="its first 2 examples"):
        resolve_train_data(iter([{"x": np.ones(12), "y": "ab"}] * 3))


def test_a_generator_that_has_been_read():
    items = iter([{"x": 1}, {"x": 2}])
    assert len(resolve_train_data(items)) == 2
    with pytest.raises(ValueError, match=r"`train_data`, a list_iterator, gave no example\. A generator gives its"):
        resolve_train_data(items)


@pytest.mark.parametrize("source", [{}, "text", 7, {"a": 1}])
def test_what_is_no_stream(source):
    assert not streams.is_stream(source)
