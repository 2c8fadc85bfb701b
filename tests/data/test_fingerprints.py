"""What identifies a data set."""

import numpy as np
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
    assert prints["pixel"]["targets"] == prints["same"]["targets"] != prints["label"]["targets"]


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
    with pytest.raises(TypeError, match="holds a object, whose content cannot be fingerprinted"):
        Examples([(object(), 0)]).is_random  # noqa: B018
