"""Losses of modules' own: asking for scores, and gradients of losses that were written out by hand."""

import lightning.pytorch as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from stride_lightning import attribute
from stride_lightning.tasks.own_loss import OwnLoss
from tests.helpers.gradient_models import flat
from tests.helpers.tiny import random_tensor

QUIET = {"show_progress": False}


class Own(L.LightningModule):
    """The base: no optimizer is needed to be attributed."""

    #: Factor of each example's loss in a weighted mean, before weights are scaled to a mean of 1.
    def weight_of(self, example):
        return 1.0

    def loss_of(self, example):
        """The loss of one example, as the training set holds it, by hand."""
        raise NotImplementedError


def numbers(num, seed):
    """Four inputs and one real target."""
    return TensorDataset(random_tensor(num, 4, seed=seed), random_tensor(num, 2, seed=seed + 50))


def classes(num, seed, ignored=0):
    """Four inputs and one of three classes; every third of the ``ignored`` examples has none."""
    labels = torch.randint(3, (num,), generator=torch.Generator().manual_seed(seed + 50))
    if ignored:
        labels[1::ignored] = -100
    return TensorDataset(random_tensor(num, 4, seed=seed), labels)


def network(num_outputs=3, width=5):
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, num_outputs))


def built(cls, seed=0):
    """A module in double precision with reproducible weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return cls().double()


def loader(cls, dataset, **options):
    """A loader of a dataset with the class's own ``collate_fn``."""
    return DataLoader(dataset, batch_size=4, collate_fn=getattr(cls, "collate", None), **options)


def ask(model, train, queries, method="grad-dot", **options):
    """Scores of datasets in the form of the module's class."""
    cls, options = type(model), QUIET | {"task": OwnLoss()} | options
    train, queries = loader(cls, train), loader(cls, queries)
    return attribute(model, queries, train_data=train, method=method, **options)


def gradients(model, examples, scale=None):
    """Gradients of the examples' losses, each times its weight over ``scale``, the mean of all by default."""
    parameters = [value for value in model.parameters() if value.requires_grad]
    weights = torch.tensor([model.weight_of(example) for example in examples], dtype=torch.float64)
    rows = []
    for example in examples:
        with torch.enable_grad():
            slopes = torch.autograd.grad(model.loss_of(example), parameters, allow_unused=True)
        rows.append(flat(slopes, parameters))
    return torch.stack(rows) * (weights / (weights.mean() if scale is None else scale))[:, None]


def mean_weight(model, examples):
    return sum(model.weight_of(example) for example in examples) / len(examples)


def rows_of(dataset, places=None):
    """Examples of a dataset as a list."""
    return [dataset[place] for place in (range(len(dataset)) if places is None else places)]


def brute_force(model, train, queries):
    """Inner products of gradients that were taken one example after the other, shape ``(q, n)``."""
    train, queries = rows_of(train), rows_of(queries)
    return gradients(model, queries, mean_weight(model, train)) @ gradients(model, train).T
