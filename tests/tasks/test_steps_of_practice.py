"""Steps that draw, keep state and change weights, as practitioners write them.

The gradient of a batch is the mean of those of its examples, and nothing stays.
"""

import copy

import lightning.pytorch as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stride_lightning.model.weights import weight_hash
from stride_lightning.tasks.step_checks import check_step
from stride_lightning.tasks.training_step import Moment, TrainingStep

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
Y, KEYS = torch.tensor([0, 1, 2, 2, 1, 0]), torch.tensor([5, 9, 0, 77, 13, 2])


class Quantised(L.LightningModule):
    """A codebook that is a moving average, started from the first batch."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(8, 4), nn.Linear(4, 8)
        self.register_buffer("codes", torch.randn(16, 4))
        self.register_buffer("sizes", torch.ones(16))
        self.register_buffer("sums", self.codes.clone())
        self.register_buffer("is_started", torch.tensor([False]))

    def training_step(self, batch, batch_idx):
        x, z = batch[0], self.encoder(batch[0])
        if not self.is_started:
            self.is_started.data.copy_(torch.tensor([True]))
        nearest = torch.cdist(z, self.codes).argmin(1)
        code = F.embedding(nearest, self.codes)
        chosen = F.one_hot(nearest, 16).float()
        self.sizes.data.mul_(0.9).add_(chosen.sum(0), alpha=0.1)
        self.sums.data.mul_(0.9).add_(chosen.T @ z.detach(), alpha=0.1)
        self.codes.data.copy_(self.sums / self.sizes[:, None])
        return F.mse_loss(self.decoder(z + (code - z).detach()), x) + F.mse_loss(z, code.detach())


class Momentum(L.LightningModule):
    """A slow copy of the network and a queue of its outputs."""

    def __init__(self):
        super().__init__()
        self.fast = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
        self.slow = copy.deepcopy(self.fast).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(4, 32), dim=0))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.long))

    def training_step(self, batch, batch_idx):
        x = batch[0]
        one = F.normalize(self.fast(x + 0.1 * torch.randn_like(x)), dim=1)
        with torch.no_grad():
            for fast, slow in zip(self.fast.parameters(), self.slow.parameters(), strict=True):
                slow.data = slow.data * 0.9 + fast.data * 0.1
            other = F.normalize(self.slow(x + 0.1 * torch.randn_like(x)), dim=1)
        logits = torch.cat([(one * other).sum(1, keepdim=True), one @ self.queue.clone()], 1) / 0.2
        place = int(self.pointer)
        self.queue[:, place : place + len(x)] = other.T
        self.pointer[0] = (place + len(x)) % 32
        return F.cross_entropy(logits, torch.zeros(len(x), dtype=torch.long))


class Prototypes(L.LightningModule):
    """Weights that the step normalises before it uses them."""

    def __init__(self):
        super().__init__()
        self.encoder, self.prototypes = nn.Linear(8, 4), nn.Linear(4, 3, bias=False)

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            self.prototypes.weight.copy_(F.normalize(self.prototypes.weight.data.clone(), dim=1))
        return F.cross_entropy(self.prototypes(F.normalize(self.encoder(batch[0]), dim=1)) / 0.1, batch[1])


class NoisyWeights(L.LightningModule):
    """Noise of the weights, kept in a buffer, and a random number for the whole batch."""

    def __init__(self):
        super().__init__()
        self.mean, self.scale = nn.Parameter(torch.randn(3, 8) * 0.1), nn.Parameter(torch.full((3, 8), 0.1))
        self.register_buffer("noise", torch.zeros(3, 8))

    def training_step(self, batch, batch_idx):
        self.noise.copy_(torch.randn(3)[:, None] * torch.randn(8))
        weight = self.mean + self.scale * self.noise
        weight = weight + torch.rand(1) * torch.distributions.Normal(self.mean, self.scale.exp()).rsample()
        return F.cross_entropy(batch[0] @ weight.T, batch[1])


class SeveralSamples(L.LightningModule):
    """Samples along the first axis, examples along the second."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(8, 4), nn.Linear(2, 8)

    def training_step(self, batch, batch_idx):
        mean, spread = self.encoder(batch[0]).chunk(2, -1)
        posterior = torch.distributions.Normal(mean, spread.exp())
        z = posterior.rsample((3,))
        weights = -((self.decoder(z) - batch[0]) ** 2).sum(-1) - (z**2).sum(-1) / 2 - posterior.log_prob(z).sum(-1)
        return -torch.logsumexp(weights, 0).mean()


class TimeFirst(L.LightningModule):
    """Dropout on sequences whose first axis is time."""

    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(2, 4, num_layers=2, dropout=0.5), nn.Linear(4, 3)

    def training_step(self, batch, batch_idx):
        x = batch[0].reshape(-1, 4, 2).transpose(0, 1)
        return F.cross_entropy(self.head(self.lstm(F.dropout(x, 0.2))[0][-1]), batch[1])


class Masked(L.LightningModule):
    """Patches that are kept by the order of random numbers, and gates that are drawn."""

    def __init__(self):
        super().__init__()
        self.encoder, self.gate, self.decoder = nn.Linear(2, 4), nn.Linear(4, 2), nn.Linear(4, 2)

    def training_step(self, batch, batch_idx):
        x = batch[0].reshape(-1, 4, 2)
        kept = torch.rand(len(x), 4).argsort(1)[:, :2]
        x = torch.gather(x, 1, kept[..., None].expand(-1, -1, 2))
        hidden = self.encoder(x)
        gates = F.gumbel_softmax(self.gate(hidden), tau=0.5, hard=True)
        path = hidden.new_empty(len(x), 1, 1).bernoulli_(0.8).div_(0.8)
        return F.mse_loss(self.decoder(path * hidden) * gates, x)


class Remembering(L.LightningModule):
    """Attributes, lists, arrays and a running mean that is made at the first step."""

    def __init__(self):
        super().__init__()
        self.net, self.outputs, self.running, self.beta = nn.Linear(8, 3), [], None, 1.0
        self.options, self.bank = {"a": [1]}, np.zeros((10, 8))

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.running = loss.detach() if self.running is None else 0.9 * self.running + 0.1 * loss.detach()
        self.outputs.append(loss)
        self.beta *= 0.9
        self.options["a"].append(2)
        self.bank[batch_idx] = batch[0][0].numpy()
        return loss * self.beta


class FrozenBackbone(L.LightningModule):
    """A part that stays in eval mode whatever train() says."""

    def __init__(self):
        super().__init__()
        self.backbone, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def train(self, mode=True):
        super().train(mode)
        self.backbone.eval()
        return self

    def training_step(self, batch, batch_idx):
        assert self.training
        assert not self.backbone.training
        with torch.no_grad():
            x = self.backbone(batch[0])
        return F.cross_entropy(self.head(x), batch[1])


class InputGradients(L.LightningModule):
    """A penalty on gradients of the inputs, once by autograd and once by torch.func."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))

    def training_step(self, batch, batch_idx):
        x = batch[0].requires_grad_(True)
        (slope,) = torch.autograd.grad(self.net(x).sum(), x, create_graph=True)
        other = torch.func.vmap(torch.func.grad(lambda x: self.net(x).squeeze()))(batch[0])
        return (slope.norm(dim=1) - 1).square().mean() + other.square().sum(1).mean()


class Compiled(L.LightningModule):
    """A compiled layer."""

    def __init__(self):
        super().__init__()
        self.net, self.head = nn.Linear(8, 8), nn.Linear(8, 3)
        self.net.compile(backend="eager")

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.head(F.dropout(self.net(batch[0]), 0.5)), batch[1])


KINDS = [
    *(Quantised, Momentum, Prototypes, NoisyWeights, SeveralSamples, TimeFirst),
    *(Masked, Remembering, FrozenBackbone, InputGradients, Compiled),
]


def gradient(loss, model):
    options = {"allow_unused": True, "materialize_grads": True}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained, **options)])


def batch_of(places):
    return X[places].clone(), Y[places]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_add_up_and_nothing_stays(kind):
    torch.manual_seed(0)
    model = kind()
    attributes = [sorted(vars(module)) for module in model.modules()]
    before = weight_hash(model), [value._version for value in model.state_dict(keep_vars=True).values()]
    step = TrainingStep(model, Moment(1, 5))
    assert check_step(step, [(batch_of(range(6)), KEYS), (batch_of([0, 1]), KEYS[:2])]) == []
    rows = torch.stack([gradient(step(batch_of([i]), KEYS[i : i + 1], 1), model) for i in range(6)])
    whole, turned = (gradient(step(batch_of(p), KEYS[p], 1), model) for p in (list(range(6)), [3, 1, 5, 0, 2, 4]))
    assert whole.norm() > 0
    for other in (turned, rows.mean(0)):
        assert (whole - other).norm() <= 1e-5 * whole.norm()
    assert (weight_hash(model), [value._version for value in model.state_dict(keep_vars=True).values()]) == before
    assert [sorted(vars(module)) for module in model.modules()] == attributes
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_is_remembered_is_forgotten():
    model = Remembering()
    TrainingStep(model)(batch_of(range(6)), KEYS)
    assert (model.outputs, model.running, model.beta, model.options) == ([], None, 1.0, {"a": [1]})
    assert not model.bank.any()
