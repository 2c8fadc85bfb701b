"""Collate functions that draw random numbers, as those that mask tokens do."""

import random

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from stride_lightning import attribute
from stride_lightning.data.sources import resolve_train_data
from tests.helpers.gradient_models import close_scores

WHERE = torch.device("cpu")
SENTENCES = [torch.randint(1, 9, (6,), generator=torch.Generator().manual_seed(number)) for number in range(13)]


def masked(texts, is_masked):
    ids = torch.stack(texts)
    return {"ids": ids.masked_fill(is_masked, 0), "labels": ids, "masked": is_masked}


def by_torch(texts):
    return masked(texts, torch.bernoulli(torch.full((len(texts), 6), 0.4)).bool())


def one_after_the_other(texts):
    return masked(texts, torch.stack([torch.rand(len(text)) < 0.4 for text in texts]))


def by_numpy(texts):
    return masked(texts, torch.stack([torch.from_numpy(np.random.random(len(text)) < 0.4) for text in texts]))  # noqa: NPY002


def by_python(texts):
    return masked(texts, torch.tensor([[random.random() < 0.4 for _ in text] for text in texts]))


class WithGenerator:
    """It goes on drawing from a generator of its own."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(3)

    def __call__(self, texts):
        return masked(texts, torch.rand((len(texts), 6), generator=self.generator) < 0.4)


class Masked(L.LightningModule):
    """Says what was masked; the mean over all tokens of a batch, masked ones count more."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(9, 4), nn.Linear(4, 9)

    def training_step(self, batch, batch_idx):
        logits = self.head(torch.tanh(self.embedding(batch["ids"])).cumsum(1))
        losses = F.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="none")
        return (losses * (1 + batch["masked"])).mean()


def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Masked().double()


def scores(collate_fn, batch_size=64, seed=0):
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    random.seed(seed)
    data = DataLoader(SENTENCES, 4, shuffle=True, collate_fn=collate_fn)
    queries = DataLoader(SENTENCES[:3], 4, collate_fn=collate_fn)
    how = {"method": "grad-dot", "batch_size": batch_size, "show_progress": False}
    with pytest.warns(UserWarning, match="The collate_fn draws random numbers.* seeds made from their positions"):
        return attribute(model(), queries, train_data=data, **how).scores


@pytest.mark.parametrize(
    "collate_fn", [by_torch, one_after_the_other, by_numpy, by_python], ids=lambda function: function.__name__
)
def test_what_is_drawn_belongs_to_the_example(collate_fn):
    together = scores(collate_fn)
    assert scores(collate_fn, seed=1).equal(together)
    for batch_size in (1, 5):
        close_scores(scores(collate_fn, batch_size, seed=batch_size), together)
    assert together.std(1).min() > 0


@pytest.mark.filterwarnings("ignore:The collate_fn draws")
def test_epochs_draw_anew_and_the_loader_is_left_as_it_was():
    collate_fn = WithGenerator()
    before = collate_fn.generator.get_state()
    examples = resolve_train_data(DataLoader(SENTENCES, 4, collate_fn=by_torch))
    places = torch.arange(13)
    first, again, other = (next(iter(examples.drawn([places], seed, WHERE)))["masked"] for seed in (0, 0, 1))
    assert first.equal(again)
    assert not first.equal(other)
    examples = resolve_train_data(DataLoader(SENTENCES, 4, collate_fn=collate_fn))
    one, two = (next(examples.batches(13, WHERE))[0]["masked"] for _ in range(2))
    assert one.equal(two)
    assert collate_fn.generator.get_state().equal(before)


def test_a_collate_fn_that_draws_nothing_is_left_alone(recwarn):
    examples = resolve_train_data(DataLoader(SENTENCES, 4, collate_fn=torch.stack))
    assert not examples.is_drawn
    assert not recwarn.list
