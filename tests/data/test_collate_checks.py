"""Collate functions that sort examples, and data that draw from generators of their own."""

import random

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pack_sequence, pad_sequence
from torch.utils.data import Dataset

from stride_lightning.data.collate_checks import reorders
from stride_lightning.data.examples import Examples
from tests.helpers.tiny import CPU

TEXTS = [(torch.arange(1, 3 + (7 * i) % 5) + i, i % 3) for i in range(20)]


def padded(items, side="right"):
    return pad_sequence([text for text, _ in items], True, padding_side=side), torch.tensor(
        [label for _, label in items]
    )


def left(items):
    return padded(items, "left")


def by_length(items):
    return padded(sorted(items, key=lambda item: -len(item[0])))


def left_by_length(items):
    return left(sorted(items, key=lambda item: -len(item[0])))[0]


def beside_ones(items):
    """A tensor whose rows are all alike says nothing of their order."""
    return torch.ones(len(items), 2), by_length(items)


def packed(items):
    """In the order of lengths, which the pack remembers; targets stay."""
    return pack_sequence([text for text, _ in items], enforce_sorted=False), torch.tensor([label for _, label in items])


def sorted_packed(items):
    items = sorted(items, key=lambda item: -len(item[0]))
    return pack_sequence([text for text, _ in items]), torch.tensor([label for _, label in items])


def with_negatives(items):
    """Every example beside another one of its batch."""
    texts, labels = padded(items)
    return texts, texts.roll(1, 0), labels


def standardised(items):
    texts = padded(items)[0].float()
    return (texts - texts.mean()) / texts.std()


@pytest.mark.parametrize(
    ("collate_fn", "is_other"),
    [
        (padded, False),
        (left, False),
        (by_length, True),
        (left_by_length, True),
        (beside_ones, True),
        (packed, False),
        (sorted_packed, True),
        (with_negatives, False),
        (standardised, False),
        (lambda items: {"x": padded(items)[0].flip(0)}, True),
        (lambda items: [1 / 0], False),
        (lambda items: torch.ones(len(items), 2), False),
        (list, False),
    ],
    ids=lambda value: getattr(value, "__name__", value) if value is not True and value is not False else str(value),
)
def test_the_order_of_examples_in_a_batch(collate_fn, is_other):
    assert reorders(collate_fn, TEXTS[:12]) is is_other


def test_a_function_that_sorts_is_refused():
    message = "^by_length changes the order of the examples in a batch.*enforce_sorted=False"
    with pytest.raises(ValueError, match=message):
        next(Examples(TEXTS, by_length).batches(4, CPU))
    with pytest.raises(ValueError, match=message):
        next(Examples(TEXTS, by_length).drawn([torch.tensor([1, 2])], 0, CPU))
    assert len(next(Examples(TEXTS, packed).batches(4, CPU))[0][1]) == 4


class Jittered(Dataset):
    """Draws from a generator of its own."""

    def __init__(self, generator, draw):
        self.generator, self.draw = generator, draw

    def __len__(self):
        return 9

    def __getitem__(self, position):
        return torch.tensor([float(position), self.draw(self.generator)])


GENERATORS = {
    "torch": (lambda: torch.Generator().manual_seed(1), lambda own: float(torch.rand(1, generator=own))),
    "numpy": (lambda: np.random.default_rng(1), lambda own: own.random()),
    "old numpy": (lambda: np.random.RandomState(1), lambda own: own.rand()),
    "python": (lambda: random.Random(1), lambda own: own.random()),
}


@pytest.mark.filterwarnings("ignore:Two reads of one example", "ignore:The collate_fn draws")
@pytest.mark.parametrize("kind", GENERATORS)
def test_generators_that_data_hold_are_seeded_by_the_position_and_put_back(kind):
    make, draw = GENERATORS[kind]
    data = Jittered(make(), draw)
    before = draw(make())
    one, three = (torch.cat([batch for batch, _ in Examples(data).batches(size, CPU)]) for size in (1, 3))
    assert one.equal(three)
    assert len(one[:, 1].unique()) == 9
    assert next(Examples(data).subset([5, 3]).batches(2, CPU))[0].equal(one[[5, 3]])
    held = data.generator

    def jittered(items):  # over its closure
        return torch.stack([torch.tensor([float(item), draw(held)]) for item in items])

    of_batches = [
        torch.cat([batch for batch, _ in Examples(list(range(9)), jittered).batches(size, CPU)]) for size in (1, 3)
    ]
    assert of_batches[0].equal(of_batches[1])
    assert draw(data.generator) == before
