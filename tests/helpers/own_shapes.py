"""Modules with outputs, calls and batches of many shapes; the loss of one example is written out by hand."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

from tests.helpers.own_losses import Own, network, numbers
from tests.helpers.own_means import Absolute
from tests.helpers.tiny import random_tensor


class Loop(Own):
    """A cell that is called once for each step, and a head for the last state."""

    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.GRUCell(2, 3), nn.Linear(3, 1)

    @staticmethod
    def data(num, seed):
        return TensorDataset(random_tensor(num, 3, 2, seed=seed), random_tensor(num, seed=seed + 50))

    def run(self, x):
        state = x.new_zeros(len(x), 3)
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.head(state)[:, 0]

    def training_step(self, batch, batch_idx):
        return F.l1_loss(self.run(batch[0]), batch[1])

    def loss_of(self, example):
        return (self.run(example[0][None])[0] - example[1]).abs()


class EveryStep(Loop):
    """The head is called at every step too."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        state, loss = x.new_zeros(len(x), 3), 0.0
        for step in x.unbind(1):
            state = self.cell(step, state)
            loss = loss + F.l1_loss(self.head(state)[:, 0], y)
        return loss

    def loss_of(self, example):
        state, loss = example[0].new_zeros(1, 3), 0.0
        for step in example[0]:
            state = self.cell(step[None], state)
            loss = loss + (self.head(state)[0, 0] - example[1]).abs()
        return loss


class Siamese(Own):
    """One encoder, called for both sides of a pair."""

    def __init__(self):
        super().__init__()
        self.encoder = network()

    @staticmethod
    def data(num, seed):
        labels = torch.randint(2, (num,), generator=torch.Generator().manual_seed(seed + 50)).double()
        return TensorDataset(random_tensor(num, 4, seed=seed), random_tensor(num, 4, seed=seed + 9), labels)

    def codes(self, one, other):
        return self.encoder(one), self.encoder(other)

    def training_step(self, batch, batch_idx):
        one, other = self.codes(*batch[:2])
        distance = (one - other).norm(dim=1)
        return torch.where(batch[2] > 0, distance.square(), F.relu(1.5 - distance).square()).mean()

    def loss_of(self, example):
        distance = (self.encoder(example[0]) - self.encoder(example[1])).square().sum().sqrt()
        return distance**2 if example[2] else (1.5 - distance).clamp(min=0) ** 2


class ViewMajor(Siamese):
    """Both views in one call: all first ones, then all second ones."""

    def codes(self, one, other):
        return self.encoder(torch.cat([one, other])).chunk(2)


class PairMajor(Siamese):
    """Both views in one call: those of an example beside each other."""

    def codes(self, one, other):
        codes = self.encoder(torch.stack([one, other], 1).flatten(0, 1)).unflatten(0, (-1, 2))
        return codes[:, 0], codes[:, 1]


class Flattened(Own):
    """Rows of all examples and places in one head, ``(B*T, V)``."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 4), nn.Linear(4, 7)

    @staticmethod
    def data(num, seed):
        return TensorDataset(torch.randint(7, (num, 5), generator=torch.Generator().manual_seed(seed)))

    def training_step(self, batch, batch_idx):
        (words,) = batch
        hidden = torch.tanh(self.embedding(words[:, :-1])).reshape(-1, 4)
        return F.cross_entropy(self.head(hidden).clamp(max=0.4), words[:, 1:].reshape(-1))

    def loss_of(self, example):
        logits = self.head(torch.tanh(self.embedding(example[0][:-1]))).clamp(max=0.4)
        return F.nll_loss(logits.log_softmax(-1), example[0][1:])


class TiedFunction(Flattened):
    """The matrix of the embedding is used as a function's argument too, where no module sees it."""

    def training_step(self, batch, batch_idx):
        (words,) = batch
        hidden = torch.tanh(self.head(self.embedding(words[:, :-1])))[..., :4]
        logits = F.linear(hidden, self.embedding.weight)
        return F.cross_entropy(logits.flatten(0, 1), words[:, 1:].flatten())

    def loss_of(self, example):
        hidden = torch.tanh(self.head(self.embedding(example[0][:-1])))[:, :4]
        return F.nll_loss((hidden @ self.embedding.weight.T).log_softmax(-1), example[0][1:])


class Rows(Dataset):
    """Examples as a function makes them of those of another dataset."""

    def __init__(self, dataset, form):
        self.dataset, self.form = dataset, form

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, place):
        return self.form(self.dataset[place])


class ListOfDicts(Absolute):
    """Batches are lists of dictionaries, as of detection models."""

    collate = list

    @staticmethod
    def data(num, seed):
        return Rows(numbers(num, seed), lambda pair: dict(zip("xy", pair, strict=True)))

    def training_step(self, batch, batch_idx):
        x, y = (torch.stack([row[name] for row in batch]) for name in "xy")
        return F.l1_loss(self.net(x), y)

    def loss_of(self, example):
        return super().loss_of((example["x"], example["y"]))


@dataclass
class Bunch:
    """A batch of a user's own class."""

    x: torch.Tensor
    y: torch.Tensor

    def to(self, *where):
        return Bunch(self.x.to(*where), self.y.to(*where))


def bunch(pairs):
    return Bunch(*map(torch.stack, zip(*pairs, strict=True)))


class OfObjects(Absolute):
    collate = staticmethod(bunch)

    def training_step(self, batch, batch_idx):
        return super().training_step((batch.x, batch.y), batch_idx)


SHAPES = [Loop, EveryStep, Siamese, ViewMajor, PairMajor, Flattened, TiedFunction, ListOfDicts, OfObjects]
