"""Modules whose loss is a mean with weights that the batch normalises; that of one example is written out by hand."""

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from tests.helpers.own_losses import Own, classes, network, numbers

CLASS_WEIGHTS = torch.tensor([0.3, 1.0, 2.5], dtype=torch.float64)


class ClassWeights(Own):
    data = staticmethod(classes)

    def __init__(self):
        super().__init__()
        self.net = network()

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]).clamp(max=0.5), batch[1], CLASS_WEIGHTS)

    def loss_of(self, example):
        return -self.net(example[0]).clamp(max=0.5).log_softmax(0)[example[1]]

    def weight_of(self, example):
        return float(CLASS_WEIGHTS[example[1]])


class TiedWeights(ClassWeights):
    """No module sees how the head's weight is used, so each example is read by itself."""

    def training_step(self, batch, batch_idx):
        logits = F.linear(self.net[:2](batch[0]), self.net[2].weight, self.net[2].bias)
        return F.cross_entropy(logits.clamp(max=0.5), batch[1], CLASS_WEIGHTS)


class Ignored(ClassWeights):
    """A batch of which all are ignored has the loss NaN."""

    data = staticmethod(partial(classes, ignored=3))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]).clamp(max=0.5), batch[1])

    def loss_of(self, example):
        return super().loss_of((example[0], example[1].clamp(min=0)))

    def weight_of(self, example):
        return float(example[1] >= 0)


class TiedIgnored(Ignored):
    """The same, each example read by itself."""

    def training_step(self, batch, batch_idx):
        logits = F.linear(self.net[:2](batch[0]), self.net[2].weight, self.net[2].bias)
        return F.cross_entropy(logits.clamp(max=0.5), batch[1])


class Skipping(Ignored):
    """Such a batch is skipped."""

    def training_step(self, batch, batch_idx):
        counted = batch[1] >= 0
        if not counted.any():
            return None
        return F.cross_entropy(self.net(batch[0])[counted].clamp(max=0.5), batch[1][counted])


class Dropping(Skipping):
    """Ignored examples do not even enter the network, so its rows are not those of the batch."""

    def training_step(self, batch, batch_idx):
        counted = batch[1] >= 0
        return super().training_step([part[counted] for part in batch], batch_idx) if counted.any() else None


class ExampleWeights(Own):
    """A weight for each example, and a mean with these weights."""

    def __init__(self):
        super().__init__()
        self.net = network(2)

    @staticmethod
    def data(num, seed):
        weights = torch.rand(num, generator=torch.Generator().manual_seed(seed + 70), dtype=torch.float64) + 0.2
        return TensorDataset(*numbers(num, seed).tensors, weights)

    def training_step(self, batch, batch_idx):
        x, y, weights = batch
        return (weights * F.l1_loss(self.net(x), y, reduction="none").mean(1)).sum() / weights.sum()

    def loss_of(self, example):
        return (self.net(example[0]) - example[1]).abs().mean()

    def weight_of(self, example):
        return float(example[2])


class Texts(Own):
    """Texts of unequal lengths, padded; the loss is a mean over all tokens of a batch."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 4), nn.Linear(4, 7)

    @staticmethod
    def data(num, seed):
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(2, 6, (num,), generator=generator).tolist()
        return [torch.randint(1, 7, (length,), generator=generator) for length in lengths]

    @staticmethod
    def collate(texts):
        return nn.utils.rnn.pad_sequence(texts, batch_first=True)

    def training_step(self, batch, batch_idx):
        logits = self.head(torch.tanh(self.embedding(batch[:, :-1]))).clamp(max=0.4)
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), ignore_index=0)

    def loss_of(self, example):
        logits = self.head(torch.tanh(self.embedding(example[:-1]))).clamp(max=0.4)
        return F.nll_loss(logits.log_softmax(-1), example[1:])

    def weight_of(self, example):
        return float(len(example) - 1)


WEIGHTED = [ClassWeights, Ignored, Skipping, Dropping, ExampleWeights, TiedWeights, TiedIgnored, Texts]
