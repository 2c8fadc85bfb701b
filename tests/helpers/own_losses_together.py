"""Modules whose loss couples the examples of a batch, or draws random numbers."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from tests.helpers.own_losses import Own, network
from tests.helpers.tiny import random_tensor


class Contrastive(Own):
    """InfoNCE: the other examples of a batch are the negatives."""

    def __init__(self):
        super().__init__()
        self.one, self.other = network(), network()

    @staticmethod
    def data(num, seed):
        x = random_tensor(num, 4, seed=seed)
        return TensorDataset(x, x + 0.3 * random_tensor(num, 4, seed=seed + 50))

    def loss_from(self, one, other):
        logits = F.normalize(one, dim=1) @ F.normalize(other, dim=1).T / 0.3
        return F.cross_entropy(logits, torch.arange(len(logits)))

    def training_step(self, batch, batch_idx):
        return self.loss_from(self.one(batch[0]), self.other(batch[1]))

    def gradient_of(self, batch, row):
        """The part of a batch's gradient that flows through one example: the codes of all others are constants."""
        codes = [net(x) for net, x in zip((self.one, self.other), batch, strict=True)]
        mine = torch.arange(len(batch[0])) == row
        held = [torch.where(mine[:, None], code, code.detach()) for code in codes]
        return torch.autograd.grad(self.loss_from(*held), list(self.parameters()))


class VAE(Own):
    def __init__(self):
        super().__init__()
        self.encoder, self.mean, self.log_var = nn.Linear(6, 5), nn.Linear(5, 2), nn.Linear(5, 2)
        self.decoder = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 6))

    @staticmethod
    def data(num, seed):
        return TensorDataset(random_tensor(num, 6, seed=seed), torch.arange(num))

    def training_step(self, batch, batch_idx):
        x, _ = batch
        hidden = torch.tanh(self.encoder(x))
        mean, log_var = self.mean(hidden), self.log_var(hidden)
        code = mean + torch.randn_like(mean) * (log_var / 2).exp()
        divergence = (mean.square() + log_var.exp() - log_var - 1).sum(1) / 2
        return ((self.decoder(code) - x).square().sum(1) + 0.5 * divergence).mean()


class Diffusion(Own):
    """A denoising step: a time and noise for every example."""

    def __init__(self):
        super().__init__()
        self.times = nn.Embedding(10, 5)
        self.inner, self.outer = nn.Linear(6, 5), nn.Linear(5, 6)

    @staticmethod
    def data(num, seed):
        return TensorDataset(random_tensor(num, 6, seed=seed))

    def training_step(self, batch, batch_idx):
        (x,) = batch
        time = torch.randint(0, 10, (len(x),), device=x.device)
        noise = torch.randn_like(x)
        kept = torch.cos(time / 10)[:, None].to(x)
        noisy = kept * x + (1 - kept**2).sqrt() * noise
        return F.mse_loss(self.outer(torch.tanh(self.inner(noisy) + self.times(time))), noise)


class Dropped(Own):
    """Functional dropout that is always on."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 5), nn.Linear(5, 1)

    @staticmethod
    def data(num, seed):
        return TensorDataset(random_tensor(num, 6, seed=seed), random_tensor(num, seed=seed + 50))

    def training_step(self, batch, batch_idx):
        hidden = F.dropout(torch.tanh(self.first(batch[0])), 0.4, training=True)
        return F.l1_loss(self.last(hidden)[:, 0], batch[1])
