"""Losses as practitioners write them that were once read wrongly, or not at all."""

import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from stride_lightning import OwnLoss, self_influence
from stride_lightning.runtime.randomness import mix, seeded
from tests.helpers.gradient_models import close_scores
from tests.helpers.own_losses import QUIET, Own, ask, brute_force, built, classes, network, numbers
from tests.helpers.own_losses_together import Contrastive
from tests.helpers.tiny import correlation, random_tensor


class Angular(Own):
    """A head that is a parameter of the module itself, and labels that torch does not vectorise."""

    def __init__(self):
        super().__init__()
        self.net, self.head = network(), nn.Parameter(torch.linspace(-1, 1, 9).reshape(3, 3))

    data = staticmethod(classes)

    def forward(self, x):
        return F.normalize(self.net(x), dim=1) @ F.normalize(self.head, dim=1).T

    def training_step(self, batch, batch_idx):
        return (self(batch[0]).sigmoid() - F.one_hot(batch[1], 3)).square().mean()

    def loss_of(self, example):
        return self.training_step([value[None] for value in example], 0)


class Physics(Own):
    """Takes gradients in its inputs itself, as networks for differential equations do."""

    def __init__(self):
        super().__init__()
        self.net = network(1)

    data = staticmethod(numbers)

    def training_step(self, batch, batch_idx):
        x = batch[0].detach().requires_grad_()
        (slopes,) = torch.autograd.grad(self.net(x).sum(), x, create_graph=True)
        return (slopes.sum(1) - batch[1][:, 0]).square().mean()

    def loss_of(self, example):
        return self.training_step([value[None] for value in example], 0)


@pytest.mark.parametrize("cls", [Angular, Physics], ids=lambda cls: cls.__name__)
def test_scores_are_those_of_single_examples(cls):
    model, train, queries = built(cls), cls.data(13, 0), cls.data(3, 9)
    close_scores(ask(model, train, queries).scores, brute_force(model, train, queries))


class Mixed(Own):
    """Mixup, of which most draws leave the examples nearly as they are."""

    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        share, order = float(torch.distributions.Beta(0.1, 0.1).sample()), torch.randperm(len(x))
        outputs = self(share * x + (1 - share) * x[order])
        return share * F.cross_entropy(outputs, y) + (1 - share) * F.cross_entropy(outputs, y[order])


@pytest.mark.parametrize("task", [None, OwnLoss()], ids=["inferred", "own"])
def test_examples_that_are_mixed_in_some_draws_only_are_refused(task):
    data = classes(13, 0)
    with pytest.raises(ValueError, match=r"it mixes examples, as mixup does.*`loss=`"):
        ask(built(Mixed), data, data, task=task)


class SometimesMixed(Own):
    """Mixes examples, but not in the draw that is looked at first."""

    def __init__(self):
        super().__init__()
        self.net = network()
        with seeded(mix(0)):
            self.first = random.random()

    def training_step(self, batch, batch_idx):
        x = batch[0] if random.random() == self.first else (batch[0] + batch[0].roll(1, 0)) / 2
        return F.cross_entropy(self.net(x), batch[1])


def test_other_draws_than_the_first_are_looked_at():
    data = classes(13, 0)
    with pytest.raises(ValueError, match="couples them"):
        ask(built(SometimesMixed), data, data)


@pytest.mark.parametrize("method", ["grad-dot", "diagonal"])
def test_self_influence_of_a_coupled_loss(method):
    """All examples stand in one batch, so the part of an example is that of the only fixed batch."""
    model, data = built(Contrastive), Contrastive.data(13, 0)
    train = DataLoader(data, batch_size=13)
    influence = self_influence(model, train_data=train, method=method, task=OwnLoss(), **QUIET)
    assert influence.min() > 0
    if method == "grad-dot":
        rows = [torch.cat([g.flatten() for g in model.gradient_of(data.tensors, row)]) for row in range(13)]
        squares = 13**2 * torch.stack(rows).square().sum(1)
        torch.testing.assert_close(influence, squares.float(), rtol=1e-4, atol=1e-7)


class Rounded(Own):
    def __init__(self):
        super().__init__()
        self.net = network()

    def training_step(self, batch, batch_idx):
        probabilities = self.net(batch[0]).softmax(1).gather(1, batch[1][:, None])
        return ((1 - probabilities**0.7) / 0.7).mean()


def test_a_mean_in_half_precision_is_a_mean():
    data = classes(32, 0)
    scored = ask(built(Rounded).bfloat16(), data, data)
    assert "the mean over the examples of a batch" in scored.metadata["loss"]


def first_output(model, batch):
    return model.net(batch[0])[:, 0]


@pytest.mark.parametrize(
    ("measure", "unit"),
    [
        (None, "query loss in its own unit per unit of learning rate"),
        (first_output, "first_output per unit of learning rate"),
    ],
    ids=["loss", "measure"],
)
def test_the_unit_names_what_is_explained(measure, unit):
    data = classes(9, 0)
    assert unit in ask(built(Rounded), data, data, measure=measure).metadata["unit"]


class Windows(Own):
    """Series of 9 steps, 5 windows each; a step draws 312 windows of the whole batch, as forecasting packages do."""

    num_windows = 312

    def __init__(self):
        super().__init__()
        self.net = network(1)

    @staticmethod
    def data(num, seed):
        return TensorDataset(random_tensor(num, 9, seed=seed).cumsum(1) / 2)

    def training_step(self, batch, batch_idx):
        windows = batch[0].unfold(1, 5, 1).flatten(0, 1)
        windows = windows[torch.randint(len(windows), (self.num_windows,))]
        return F.mse_loss(self.net(windows[:, :4]), windows[:, 4:])

    def loss_of(self, example):
        windows = example[0].unfold(0, 5, 1)
        return F.mse_loss(self.net(windows[:, :4]), windows[:, 4:])


def test_a_step_that_draws_a_sample_of_its_batch():
    """It is a mean over examples on average only."""
    model, train, queries = built(Windows), Windows.data(13, 0), Windows.data(3, 9)
    scored = ask(model, train, queries)
    assert "the mean over the examples of a batch; a mean over 8 draws" in scored.metadata["loss"]
    assert correlation(scored.scores, brute_force(model, train, queries)) > 0.99


def test_a_sample_that_is_too_small_to_tell():
    model = built(Windows)
    model.num_windows = 1
    with pytest.raises(ValueError, match="couples them"):
        ask(model, Windows.data(13, 0), Windows.data(3, 9))
