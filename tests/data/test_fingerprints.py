"""What identifies a data set."""

from enum import Enum

import numpy as np
import pytest
import torch
from torch.utils.data import Subset, TensorDataset

from stride_lightning.data.examples import Examples
from stride_lightning.data.fingerprints import digest
from stride_lightning.data.sources import resolve_queries, resolve_train_data
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


class Slots:
    __slots__ = ("value",)


class Endless:
    def __init__(self):
        self.itself = self


@pytest.mark.parametrize(
    ("value", "what"),
    [(Slots(), "a Slots"), (Endless(), "a dict that contains itself"), (torch.eye(2).to_sparse(), "a tensor with lay")],
    ids=["slots", "endless", "sparse"],
)
def test_what_has_no_content_is_refused_by_name(value, what):
    """Whether the data set is probed for randomness or read."""
    dataset = [{"x": torch.ones(2), "more": value if i == 7 else 0} for i in range(20)]
    with pytest.raises(TypeError, match=f"^Query 7 cannot be fingerprinted: it holds {what}.*Examples may hold"):
        read(resolve_queries(dataset))
    probed = [{"x": torch.ones(2), "more": value if i == 0 else 0} for i in range(20)]
    with pytest.raises(TypeError, match=f"^Training example 0 cannot be fingerprinted: it holds {what}"):
        resolve_train_data(probed).is_random  # noqa: B018


def test_classes_and_enumerations_have_a_name():
    assert digest(Slots) == digest(Slots) != digest(Endless)
    assert digest(Colour.RED) == digest(Colour.RED) != digest(Colour.BLUE)


class Colour(Enum):
    RED = 1
    BLUE = 2


def test_a_column_of_a_table_is_as_its_contiguous_copy():
    """``torch.from_numpy(table[["y"]].values)``: rows of one element, whose stride is that of the table."""
    column = torch.arange(60.0).reshape(3, 20)[1:2].T
    copied = torch.arange(20.0, 40.0)[:, None]
    assert column[4].stride() == (20,)
    assert digest(column[4]) == digest(copied[4])
    x = torch.ones(20, 3)
    assert fingerprint_of(TensorDataset(x, column)) == fingerprint_of(TensorDataset(x, copied))
