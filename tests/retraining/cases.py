"""Models, data and a plain training loop that the tests of retraining share."""

from contextlib import contextmanager
from functools import partial

import lightning.pytorch as L
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from stride_lightning.retraining.batches import batch_order

NUM_TRAIN, NUM_QUERIES = 25, 6


class Net(L.LightningModule):
    """A network, a loss, and what configure_optimizers returns."""

    def __init__(self, network, optimize, loss=F.cross_entropy):
        super().__init__()
        self.network, self.optimize, self.loss = network, optimize, loss

    def forward(self, inputs):
        return self.network(inputs)

    def training_step(self, batch, batch_idx):
        loss = self.loss(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return self.optimize(self)


#: What is made of a model's parameters.
OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.3),
    "momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.05),
    "dampening": partial(torch.optim.SGD, lr=0.2, momentum=0.9, dampening=0.3),
    "adam": partial(torch.optim.Adam, lr=0.02),
    "adamw amsgrad": partial(torch.optim.AdamW, lr=0.03, amsgrad=True, weight_decay=0.1),
}


class Manual(Net):
    """Optimizes by hand."""

    def __init__(self, *args):
        super().__init__(*args)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.optimizers().zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        self.optimizers().step()


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.8)


def plain_net():
    return Net(mlp(), sgd)


@contextmanager
def threads(num):
    before = torch.get_num_threads()
    torch.set_num_threads(num)
    try:
        yield
        assert torch.get_num_threads() == num
    finally:
        torch.set_num_threads(before)


def mlp(outputs=3):
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, outputs))


def conv():
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 2))


def tokens():
    return nn.Sequential(nn.Embedding(7, 5), nn.Flatten(), nn.LayerNorm(20), nn.Linear(20, 3))


class Tied(nn.Module):
    """One weight used in two places."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.second.weight = self.first.weight
        self.register_buffer("scale", torch.rand(4))

    def forward(self, x):
        return self.head(self.second(torch.tanh(self.first(x * self.scale))))


def frozen():
    network = mlp()
    network[0].weight.requires_grad_(False)
    return network


class LastState(nn.Module):
    """An LSTM over four numbers."""

    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(1, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.lstm(x[:, :, None])[0][:, -1])


class Deciding(nn.Module):
    """Control flow that depends on the outputs of the model."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        outputs = self.layer(x)
        return outputs if outputs.sum() > 0 else 2 * outputs


def batchnorm():
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def points(num=NUM_TRAIN, seed=0):
    x = random(num, 4, seed=seed)
    return TensorDataset(x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long())


def numbers(num=NUM_TRAIN, seed=0):
    x = random(num, 4, seed=seed)
    return TensorDataset(x, x[:, :1] - x[:, 1:2] + 0.3 * random(num, 1, seed=seed + 9))


def yes_or_no(num=NUM_TRAIN, seed=0):
    x = random(num, 4, seed=seed)
    return TensorDataset(x, (x[:, :1] + 0.5 * random(num, 1, seed=seed + 9) > 0).long())


def pictures(num=NUM_TRAIN, seed=0):
    x = random(num, 1, 6, 6, seed=seed)
    return TensorDataset(x, (x[:, 0, :3].mean((1, 2)) > 0).long())


def words(num=NUM_TRAIN, seed=0):
    x = torch.randint(7, (num, 4), generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, x[:, 0] % 3)


def in_double(data):
    return TensorDataset(*(x.double() if x.is_floating_point() else x for x in data.tensors))


def some_masks(count, fraction=0.6, num=NUM_TRAIN, seed=5):
    return torch.rand(count, num, generator=torch.Generator().manual_seed(seed)) < fraction


def cross_entropies(outputs, targets):
    return F.cross_entropy(outputs, targets, reduction="none")


def squares(outputs, targets):
    return (outputs - targets).square().sum(1)


def half_squares(outputs, targets):
    return 0.5 * squares(outputs, targets)


def logistic_losses(outputs, targets):
    return F.binary_cross_entropy_with_logits(outputs, targets.to(outputs), reduction="none")[:, 0]


def mean_logistic_loss(outputs, targets):
    return logistic_losses(outputs, targets).mean()


#: A network, its data, its loss, and the loss of each example.
NETWORKS = {
    "classes": (mlp, points, F.cross_entropy, cross_entropies),
    "squares": (partial(mlp, 1), numbers, F.mse_loss, squares),
    "one logit": (partial(mlp, 1), yes_or_no, mean_logistic_loss, logistic_losses),
    "conv": (conv, pictures, F.cross_entropy, cross_entropies),
    "tokens": (tokens, words, F.cross_entropy, cross_entropies),
    "tied": (Tied, points, F.cross_entropy, cross_entropies),
    "frozen": (frozen, points, F.cross_entropy, cross_entropies),
}


def train_by_hand(model_fn, data, mask, seed, *, max_epochs, batch_size, shuffle=True, drop_last=False, loss=None):
    """One model, a plain loop and torch's own optimizer; `loss(model, x, y)` in place of the model's."""
    torch.manual_seed(seed)
    model = model_fn()
    config = model.configure_optimizers()
    config = config if isinstance(config, dict) else {"optimizer": config}
    optimizer, schedule = config["optimizer"], config.get("lr_scheduler")
    schedule = {"scheduler": schedule} if schedule is not None and not isinstance(schedule, dict) else schedule
    every, interval = (schedule.get("frequency", 1), schedule.get("interval", "epoch")) if schedule else (1, None)
    for epoch in range(max_epochs):
        steps = 0
        for places in batch_order(len(mask), batch_size, shuffle, drop_last, seed, epoch):
            members = places[mask[places]]
            if not len(members):
                continue
            x, y = (tensor[members] for tensor in data.tensors)
            optimizer.zero_grad()
            (model.loss(model(x), y) if loss is None else loss(model, x, y)).backward()
            optimizer.step()
            steps += 1
            if interval == "step" and steps % every == 0:
                schedule["scheduler"].step()
        if interval == "epoch" and (epoch + 1) % every == 0:
            schedule["scheduler"].step()
    return model


def by_hand(model_fn, data, queries, masks, seed, *, measure=cross_entropies, **how):
    """Losses of the queries under a model for every mask."""
    rows = []
    for mask in masks:
        model = train_by_hand(model_fn, data, mask, seed, **how).eval()
        with torch.no_grad():
            rows.append(measure(model(queries.tensors[0]), queries.tensors[1]))
    return torch.stack(rows)
