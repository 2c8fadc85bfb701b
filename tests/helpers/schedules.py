"""Models with every way of setting learning rates, and the same training written out by hand."""

import lightning.pytorch as L
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR, StepLR
from torch.utils.data import DataLoader

from tests.helpers.models import Classifier


class Stepped(Classifier):
    """The rate falls after every epoch, before callbacks see the epoch's end."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [StepLR(optimizer, 1, gamma=0.5)]


class OneCycle(Classifier):
    """Rate and momentum change after every step."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        schedule = OneCycleLR(optimizer, max_lr=0.3, total_steps=20)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class TwoGroups(Classifier):
    """A rate of its own for the head, and a schedule over both."""

    def configure_optimizers(self):
        head = {"params": self.network[-1].parameters(), "lr": 0.01}
        optimizer = torch.optim.SGD([head, {"params": self.network[0].parameters()}], lr=0.2)
        return [optimizer], [{"scheduler": StepLR(optimizer, 3, gamma=0.1), "interval": "step"}]


class TensorRate(Classifier):
    """A rate that is a tensor, which the schedule changes in place."""

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=torch.tensor(0.02))
        return [optimizer], [{"scheduler": StepLR(optimizer, 1, gamma=0.5), "interval": "step"}]


class TwoOptimizers(L.LightningModule):
    """Manual optimization: each batch trains both halves, the second with a schedule of its own."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, inputs):
        return self.network(inputs)

    def configure_optimizers(self):
        first = torch.optim.SGD(self.network[0].parameters(), lr=0.1)
        second = torch.optim.Adam(self.network[2].parameters(), lr=0.01)
        return [first, second], [StepLR(second, 1, gamma=0.5)]

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()
        self.lr_schedulers().step()


def by_hand(model, data, *, batch_size=16, epochs=2, accumulate=1):
    """Train as a Trainer would, in plain PyTorch; the state dict and the rates by name after each optimizer step."""
    configured = model.configure_optimizers()
    if isinstance(configured, dict):
        configured = [configured["optimizer"]], [configured["lr_scheduler"]]
    if isinstance(configured, torch.optim.Optimizer):
        configured = [configured], []
    optimizers, schedulers = configured
    schedulers = [s if isinstance(s, dict) else {"scheduler": s, "interval": "epoch"} for s in schedulers]
    names = {parameter: name for name, parameter in model.named_parameters()}
    if isinstance(model, TwoOptimizers):
        schedulers[0]["interval"] = "step"
    states, rates, seen = [], {}, []
    for _ in range(epochs):
        batches = list(DataLoader(data, batch_size))
        for number, (x, y) in enumerate(batches, 1):
            stepped = number % accumulate == 0 or number == len(batches)
            for optimizer in optimizers:
                (F.cross_entropy(model(x), y) / accumulate).backward()
                if stepped:
                    rates |= {names[p]: float(g["lr"]) for g in optimizer.param_groups for p in g["params"]}
                    optimizer.step()
                    for each in optimizers:
                        each.zero_grad()
                    states.append({name: value.clone() for name, value in model.state_dict().items()})
                    seen.append(dict(rates))
            if stepped:
                _step(schedulers, "step")
        _step(schedulers, "epoch")
    return states, seen


def _step(schedulers, interval):
    for scheduler in schedulers:
        if scheduler["interval"] == interval:
            scheduler["scheduler"].step()
