"""Modules whose loss is a mean or a sum of its examples' losses, which are written out by hand."""

import torch
from torch import nn
from torch.nn import functional as F

from tests.helpers.own_losses import Own, network, numbers


class Absolute(Own):
    """L1, which no likelihood is."""

    data = staticmethod(numbers)

    def __init__(self):
        super().__init__()
        self.net = network(2)

    def training_step(self, batch, batch_idx):
        return F.l1_loss(self.net(batch[0]), batch[1])

    def loss_of(self, example):
        return (self.net(example[0]) - example[1]).abs().sum() / 2


class Summed(Absolute):
    def training_step(self, batch, batch_idx):
        return F.smooth_l1_loss(self.net(batch[0]), batch[1], reduction="sum")

    def loss_of(self, example):
        gap = (self.net(example[0]) - example[1]).abs()
        return torch.where(gap < 1, gap.square() / 2, gap - 0.5).sum()


class Penalised(Absolute):
    """A penalty on weights is no part of an example."""

    def training_step(self, batch, batch_idx):
        penalty = sum(weight.square().sum() for weight in self.parameters())
        return super().training_step(batch, batch_idx) + 0.1 * penalty


class InEval(Absolute):
    """Another term in training only, with a head of its own."""

    def __init__(self):
        super().__init__()
        self.aux = nn.Linear(5, 2)

    def training_step(self, batch, batch_idx):
        hidden = torch.tanh(self.net[0](batch[0]))
        loss = F.l1_loss(self.net[2](hidden), batch[1])
        if self.training:
            loss = loss + 0.3 * F.huber_loss(self.aux(hidden), batch[1], delta=0.5)
        return loss

    def loss_of(self, example):
        gap = (self.aux(torch.tanh(self.net[0](example[0]))) - example[1]).abs()
        huber = torch.where(gap < 0.5, gap.square() / 2, 0.5 * (gap - 0.25)).mean()
        return super().loss_of(example) + 0.3 * huber


class Mixed(Absolute):
    """Mixup: the examples of a batch enter each other in training mode."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        if self.training:
            order = torch.randperm(len(x))
            x, y = 0.7 * x + 0.3 * x[order], 0.7 * y + 0.3 * y[order]
        return F.l1_loss(self.net(x), y)


class MixedTargets(Absolute):
    """Targets alone are mixed, so that rows of the network stay those of examples."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        outputs = self.net(x)
        loss = F.l1_loss(outputs, y)
        return 0.7 * loss + 0.3 * F.l1_loss(outputs, y.roll(1, 0)) if self.training else loss


class TiedMixed(Mixed):
    """Mixup where no module sees how a weight is used."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        if self.training:
            x, y = 0.7 * x + 0.3 * x.roll(1, 0), 0.7 * y + 0.3 * y.roll(1, 0)
        return F.l1_loss(F.linear(self.net[:2](x), self.net[2].weight, self.net[2].bias), y)


class SkipsBad(Absolute):
    """Batches with an example that cannot be learned are left out, as of bad readings."""

    @staticmethod
    def data(num, seed):
        data = numbers(num, seed)
        data.tensors[1][2::6] = float("nan")
        return data

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return None if torch.isnan(loss) else loss

    def loss_of(self, example):
        loss = super().loss_of(example)
        return 0 * self.net[0].bias.sum() if torch.isnan(loss) else loss


class UsedTwice(Own):
    """A code enters the loss by itself and through a decoder."""

    data = staticmethod(numbers)

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(4, 3), network(2)
        self.decoder[0] = nn.Linear(3, 5)

    def training_step(self, batch, batch_idx):
        code = self.encoder(batch[0])
        return F.l1_loss(self.decoder(code), batch[1]) + 0.2 * code.pow(4).mean()

    def loss_of(self, example):
        code = self.encoder(example[0])
        return (self.decoder(code) - example[1]).abs().mean() + 0.2 * code.pow(4).mean()


class Manual(Absolute):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


MEANS = [Absolute, Summed, Penalised, InEval, Mixed, MixedTargets, TiedMixed, SkipsBad, UsedTwice, Manual]
