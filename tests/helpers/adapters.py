"""Models of which only a part trains, and TracIn by hand."""

import copy

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import BaseFinetuning
from torch import nn

from tests.helpers.models import NUM_FEATURES, Tiny


class LowRank(nn.Module):
    """A frozen linear layer plus a product of two thin matrices, which train."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Adapted(Tiny):
    """A frozen network with low-rank adapters; ``base`` is the seed of the network."""

    def __init__(self, base=0, width=8):
        with torch.random.fork_rng():
            torch.manual_seed(base)
            first, second = nn.Linear(NUM_FEATURES, width), nn.Linear(width, 3)
        super().__init__(nn.Sequential(LowRank(first), nn.Tanh(), LowRank(second)))

    def configure_optimizers(self):
        return torch.optim.SGD([value for value in self.parameters() if value.requires_grad], lr=self.lr)


class AdapterAlone(Adapted):
    """Its checkpoints hold what trains, as Lightning's documentation shows it."""

    def __init__(self, base=0):
        super().__init__(base)
        self.strict_loading = False

    def state_dict(self):
        return {name: value for name, value in super().state_dict().items() if ".base." not in name}


class Backbone(Tiny):
    """A frozen backbone with BatchNorm, in training mode, and a head."""

    def __init__(self):
        backbone = nn.Sequential(nn.Linear(NUM_FEATURES, 8), nn.BatchNorm1d(8), nn.Tanh())
        super().__init__(nn.Sequential(backbone, nn.Linear(8, 3)))
        backbone.requires_grad_(False)

    def configure_optimizers(self):
        return torch.optim.SGD(self.network[1].parameters(), lr=self.lr)


class Unfrozen(Tiny):
    """A backbone and a head, for :class:`UnfreezeAt`."""

    def __init__(self):
        backbone = nn.Sequential(nn.Linear(NUM_FEATURES, 8), nn.Tanh())
        super().__init__(nn.Sequential(backbone, nn.Linear(8, 3)))

    def configure_optimizers(self):
        return torch.optim.SGD([value for value in self.parameters() if value.requires_grad], lr=self.lr)


class UnfreezeAt(BaseFinetuning):
    """Lightning's own way to train a backbone from some epoch on."""

    def __init__(self, epoch=2):
        super().__init__()
        self.epoch = epoch

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.network[0])

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == self.epoch:
            self.unfreeze_and_add_param_group(pl_module.network[0], optimizer, lr=0.05)


class States(L.Callback):
    """Whole states, and the parameters that train with their rates, at the ends of epochs."""

    def __init__(self):
        self.states, self.rates = [], []

    def on_train_epoch_end(self, trainer, pl_module):
        self.states.append(copy.deepcopy(nn.Module.state_dict(pl_module)))
        by_id = {id(value): group["lr"] for group in trainer.optimizers[0].param_groups for value in group["params"]}
        named = {name: value for name, value in pl_module.named_parameters() if value.requires_grad}
        self.rates.append({name: by_id[id(value)] for name, value in named.items() if id(value) in by_id})


def tracin_by_hand(model, states, queries, data):
    """Sums over checkpoints of products of gradients in what trained there, times its learning rate."""
    total = 0
    for state, rates in zip(states.states, states.rates, strict=True):
        twin = copy.deepcopy(model).eval().requires_grad_(True)
        nn.Module.load_state_dict(twin, state)
        parameters = {name: value for name, value in twin.named_parameters() if name in rates}

        def gradients(dataset, twin=twin, parameters=parameters, rates=rates):
            rows = []
            for x, y in dataset:
                loss = twin.loss(twin(x[None]), y[None])
                parts = torch.autograd.grad(loss, list(parameters.values()))
                named = zip(parameters, parts, strict=True)
                rows.append(torch.cat([part.flatten() * rates[name] ** 0.5 for name, part in named]))
            return torch.stack(rows)

        total = total + gradients(queries) @ gradients(data).T
    return total
