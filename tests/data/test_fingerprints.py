"""What identifies a data set."""

import os
import subprocess
import sys
import weakref
from collections import deque, namedtuple
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from enum import Enum
from functools import partial
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import Subset, TensorDataset

from stride_lightning.data.examples import Examples
from stride_lightning.data.fingerprints import digest
from tests.helpers.models import Augmented, classification_data
from tests.helpers.tiny import CPU, read

DATA = classification_data(20)


def fingerprint_of(dataset):
    return read(Examples(dataset))[1]


def test_fingerprint_sees_every_change():
    x, y = DATA.tensors
    pixel, label = x.clone(), y.clone()
    pixel[3, 1] = torch.nextafter(pixel[3, 1], torch.tensor(9.0))
    label[4] = 2 - label[4] if label[4] != 1 else 0
    others = {
        "same": DATA,
        "pixel": TensorDataset(pixel, y),
        "label": TensorDataset(x, label),
        "order": Subset(DATA, [1, 0, *range(2, 20)]),
        "length": Subset(DATA, range(19)),
        "dtype": TensorDataset(x.double(), y),
        "shape": TensorDataset(x.reshape(20, 2, 2), y),
    }
    prints = {name: fingerprint_of(dataset) for name, dataset in others.items()}
    assert prints["same"] == fingerprint_of(DATA)
    assert len({p["content"] for p in prints.values()}) == len(others)


@pytest.mark.filterwarnings("ignore:Two reads of one example")
@pytest.mark.parametrize("batch_size", [1, 6, 20])
def test_fingerprint_under_augmentation_is_of_shapes_and_targets(batch_size):
    """And does not depend on how examples are batched."""
    x, y = DATA.tensors
    _, summary = read(Examples(Augmented(DATA)), batch_size)
    assert summary == read(Examples(Augmented(TensorDataset(x + 1, y))), 4)[1]
    assert summary["content"] is None
    assert summary != read(Examples(Augmented(TensorDataset(x, 2 - y))), 4)[1]
    assert summary != read(Examples(Augmented(TensorDataset(x[:, :3], y))), 4)[1]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (np.zeros(3), np.zeros(3, np.float32)),
        ({"a": 1}, {"b": 1}),
        ([1, 2], [[1], 2]),
        ("ab", b"ab"),
        (torch.zeros(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.bfloat16)),
        (torch.tensor(True), torch.tensor(False)),
        (None, 0),
    ],
)
def test_kinds_of_content(one, other):
    assert digest(one) == digest(one)
    assert digest(one) != digest(other)


def test_pictures_and_objects():
    image = pytest.importorskip("PIL.Image")
    red, blue = (image.new("RGB", (4, 4), colour) for colour in ("red", "blue"))
    examples = Examples([(red, 0), (blue, 0), (red, 0)], collate_fn=lambda items: items)
    _, digests = next(examples.batches(3, CPU))
    assert digests[0].equal(digests[2])
    assert not digests[0].equal(digests[1])


class Colour(Enum):
    RED = 1
    BLUE = 2


class Plain:
    """An object of a package's own class."""

    def __init__(self, **attributes):
        vars(self).update(attributes)


class Slots:
    __slots__ = ("more", "value")

    def __init__(self, value, more=None):
        self.value, self.more = value, more


class Storage(Mapping):
    """A graph's storage: a mapping, with a weak reference to what holds it."""

    def __init__(self, mapping, parent):
        self.mapping, self.parent = mapping, weakref.ref(parent)

    def __getitem__(self, name):
        return self.mapping[name]

    def __iter__(self):
        return iter(self.mapping)

    def __len__(self):
        return len(self.mapping)


class Graph:
    def __init__(self, **parts):
        self._storage = Storage(parts, self)


class Tagged(torch.Tensor):
    """A tensor that carries more, as monai's."""


class Arrow:
    def __init__(self, values):
        self.hidden = object()
        self.values = values

    def to_pylist(self):
        return self.values


def linked(value):
    """An object that contains itself."""
    one = Plain(value=value)
    one.itself = one
    return one


def carrying(holder, value):
    holder.label = value
    return holder


def coalesced(value, order=(0, 1)):
    places = torch.tensor([[0, 1], [2, 0]])[:, order]
    return torch.sparse_coo_tensor(places, torch.tensor([1.0, value])[list(order)], (2, 3))


def in_a_frame(value):
    return pd.DataFrame({"a": [1.0, value], "b": ["x", "y"]}, index=[3, 5])


def quantised(value):
    return torch.quantize_per_tensor(torch.tensor([1.0, value]), 0.5, 0, torch.quint8)


#: How to make an example that holds a value.
HOLDERS = {
    "mapping proxy": lambda value: MappingProxyType({"x": value}),
    "graph": lambda value: Graph(x=torch.ones(2), y=value),
    "object": lambda value: Plain(x=torch.tensor(value)),
    "private": lambda value: Plain(_x=np.array([value])),
    "slots": Slots,
    "named tuple": lambda value: namedtuple("Pair", "x y")(value, 0),
    "dataclass": lambda value: dataclass(type("Item", (), {"__annotations__": {"x": float}, "x": value}))(value),
    "itself": linked,
    "set": lambda value: {"a", "b", value},
    "sets in sets": lambda value: frozenset({frozenset({"b", "a"}), frozenset({value})}),
    "keys that are objects": lambda value: {(1, "a"): 0, (value, "b"): 1},
    "object array": lambda value: np.array([{"a": value}, None], dtype=object),
    "datetime64": lambda value: np.array(["2026-11-30", f"2026-11-0{int(value)}"], dtype="datetime64[D]"),
    "strided array": lambda value: np.arange(6.0).reshape(2, 3).T * value,
    "arrow": lambda value: Arrow([1, {"a": value}]),
    "series": lambda value: pd.Series([1.0, value], name="a"),
    "frame": in_a_frame,
    "strings": lambda value: pd.Series(["a", f"b{value}"], dtype="string"),
    "categories": lambda value: pd.Series(["a", f"b{value}"], dtype="category"),
    "index": lambda value: pd.Index(["a", f"b{value}"]),
    "deque": lambda value: deque([1, value]),
    "range": lambda value: range(10**12 + int(value)),
    "path": lambda value: Path(f"a/{value}.png"),
    "date": lambda value: datetime(2026, 11, int(value)),
    "decimal": lambda value: Decimal(value),
    "dtype": lambda value: {2.0: torch.float32, 3.0: torch.int64}[value],
    "sparse": coalesced,
    "csr": lambda value: torch.tensor([[1.0, 0.0], [0.0, value]]).to_sparse_csr(),
    "csc": lambda value: torch.tensor([[1.0, 0.0], [0.0, value]]).to_sparse_csc(),
    "quantised": quantised,
    "nested": lambda value: torch.nested.nested_tensor([torch.ones(2), torch.tensor([value])]),
    "conjugate": lambda value: torch.tensor([1 + value * 1j]).conj(),
    "tensor subclass": lambda value: torch.tensor([value]).as_subclass(Tagged),
    "bfloat16": lambda value: torch.tensor([1.0, value], dtype=torch.bfloat16)[::1],
    "transposed": lambda value: torch.tensor([[1.0, 2.0], [value, 4.0]]).T,
    "tensor that carries more": lambda value: carrying(torch.ones(1).as_subclass(Tagged), value),
    "list that carries more": lambda value: carrying(type("Items", (list,), {})([1]), value),
    "mapping that carries more": lambda value: carrying(type("Named", (dict,), {})(x=1), value),
    "array that carries more": lambda value: carrying(np.ones(1).view(type("Array", (np.ndarray,), {})), value),
    "partial": lambda value: partial(max, value, key=str),
    "lone surrogate": lambda value: chr(0xD800 + int(value)),
}


@pytest.mark.filterwarnings("ignore:Sparse", "ignore:The PyTorch API of nested tensors", "ignore:.*uantize")
@pytest.mark.parametrize("make", HOLDERS.values(), ids=HOLDERS)
def test_content_is_read_wherever_it_lies(make):
    one, again, other = digest(make(2.0)), digest(make(2.0)), digest(make(3.0))
    assert one == again
    assert one != other
    assert one[-1] == other[-1] == 1


def test_order_that_means_nothing_does_not_count():
    assert digest({"x": 1, "y": {"a": 2, "b": 3}}) == digest({"y": {"b": 3, "a": 2}, "x": 1})
    assert digest(coalesced(2.0)) == digest(coalesced(2.0, order=(1, 0)))
    assert digest([1, 2]) != digest([2, 1])
    assert digest({"x": 1, "y": 2}) != digest({"x": 2, "y": 1})


class Unreadable:
    @property
    def __array__(self):
        raise RuntimeError("closed")


@pytest.mark.parametrize(
    "value",
    [object(), iter([1]), Unreadable(), torch.ones(2, device="meta")],
    ids=["object", "iterator", "unreadable", "meta"],
)
def test_what_tells_nothing_of_its_content_makes_a_weaker_fingerprint(value):
    assert digest(value)[-1] == 0
    dataset = [{"x": torch.ones(2), "more": value if i == 7 else 0} for i in range(20)]
    examples = Examples(dataset, collate_fn=lambda items: torch.stack([item["x"] for item in items]))
    summary = read(examples)[1]
    assert summary["content"] is None
    other = Examples([*dataset[:19], {"x": torch.zeros(2), "more": 0}], examples.collate_fn)
    assert summary["shapes"] != read(other)[1]["shapes"]  # what can be read counts
    assert not examples.is_random


def test_an_iterator_is_not_used_up():
    items = iter([1, 2])
    digest({"x": items})
    assert list(items) == [1, 2]


def test_what_leads_out_of_an_example_is_not_read():
    """Its data set, modules and methods: reading them would take for ever."""

    def example(value):
        return Plain(x=1, source=TensorDataset(torch.full((2,), value)), call=[value].append, module=os)

    assert digest(example(0.0)) == digest(example(1.0))
    assert digest(example(0.0))[-1] == 0  # the label may be read from there
    held = Plain(value=1)
    assert digest(Plain(x=1, other=weakref.ref(held)))[-1] == 0
    assert digest(Plain(x=1, call=[].append))[-1] == 1


def test_the_same_in_every_process():
    """Whatever seeds the hashes of strings there."""
    code = (
        "import numpy as np, torch\n"
        "from stride_lightning.data.fingerprints import digest\n"
        "class Plain: pass\n"
        "one = Plain(); one.names = {'a', 'b', 'c', 'd'}; one.x = torch.arange(3); one.extra = object()\n"
        "example = {'one': one, 'array': np.array(['p', None, {'q', 'r', 's'}], dtype=object)}\n"
        "print(digest(example).hex())\n"
    )
    environments = [os.environ | {"PYTHONHASHSEED": seed} for seed in ("1", "2")]
    runs = [subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE) for env in environments]
    printed = {run.communicate()[0] for run in runs}
    assert len(printed) == 1
    assert len(printed.pop()) == 67


def test_classes_and_enumerations_have_a_name():
    assert digest(Slots) == digest(Slots) != digest(Plain)
    assert digest(Colour.RED) == digest(Colour.RED) != digest(Colour.BLUE)


def test_a_column_of_a_table_is_as_its_contiguous_copy():
    """``torch.from_numpy(table[["y"]].values)``: rows of one element, whose stride is that of the table."""
    column = torch.arange(60.0).reshape(3, 20)[1:2].T
    copied = torch.arange(20.0, 40.0)[:, None]
    assert column[4].stride() == (20,)
    assert digest(column[4]) == digest(copied[4])
    x = torch.ones(20, 3)
    assert fingerprint_of(TensorDataset(x, column)) == fingerprint_of(TensorDataset(x, copied))
