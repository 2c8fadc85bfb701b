"""The curvature of a loss of the module's own: closed forms at its tap, or the empirical Fisher matrix."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from stride_lightning.gradients import signs
from tests.helpers.gradient_models import close_scores, flat
from tests.helpers.own_losses import Own, ask, built, gradients, numbers, rows_of
from tests.helpers.own_losses_together import Contrastive
from tests.helpers.own_means import Absolute, Summed
from tests.helpers.own_shapes import TiedFunction
from tests.helpers.own_weighted import ClassWeights, Texts
from tests.helpers.tiny import random_tensor

#: Strong enough that conjugate gradients end in a few steps.
EXACT = {"damping": 0.3, "tolerance": 1e-10}
#: Torch's own, of the first forward-mode derivatives.
pytestmark = pytest.mark.filterwarnings(r"ignore:.torch\.jit\.script. is deprecated:DeprecationWarning")


class TwoHeads(Own):
    """A mean and a log-variance, from heads of their own."""

    def __init__(self):
        super().__init__()
        self.body, self.mean, self.log_var = nn.Linear(4, 5), nn.Linear(5, 1), nn.Linear(5, 1)

    @staticmethod
    def data(num, seed):
        return TensorDataset(random_tensor(num, 4, seed=seed), random_tensor(num, seed=seed + 50))

    def outputs(self, x):
        hidden = torch.tanh(self.body(x))
        return self.mean(hidden)[..., 0], self.log_var(hidden)[..., 0]

    def training_step(self, batch, batch_idx):
        mean, log_var = self.outputs(batch[0])
        return F.gaussian_nll_loss(mean, batch[1], log_var.exp())

    def loss_of(self, example):
        mean, log_var = self.outputs(example[0])
        return (log_var + (mean - example[1]) ** 2 / log_var.exp()) / 2

    def hessian_of(self, example):
        mean, log_var = self.outputs(example[0])
        gap, precision = mean - example[1], 1 / log_var.exp()
        return torch.stack([precision, -gap * precision, -gap * precision, gap**2 * precision / 2]).reshape(2, 2)


class Weighted(ClassWeights):
    """Softmax with class weights."""

    def training_step(self, batch, batch_idx):
        weights = torch.tensor([0.3, 1.0, 2.5], dtype=torch.float64)
        return F.cross_entropy(self.net(batch[0]), batch[1], weights)

    def loss_of(self, example):
        return -self.net(example[0]).log_softmax(0)[example[1]]

    def outputs(self, x):
        return self.net(x)

    def hessian_of(self, example):
        p = self.net(example[0]).softmax(0)
        return p.diag() - p.outer(p)


class Summing(Summed):
    """Squared errors, summed over the batch."""

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self.net(batch[0]), batch[1], reduction="sum")

    def loss_of(self, example):
        return (self.net(example[0]) - example[1]).square().sum()

    def outputs(self, x):
        return self.net(x)

    def hessian_of(self, example):
        return 2 * torch.eye(2, dtype=torch.float64)


def matrix_of(model, examples):
    """The Gauss-Newton matrix, with Hessians at the outputs in closed form and without negative eigenvalues."""
    parameters, total = list(model.parameters()), 0.0
    weights = torch.tensor([model.weight_of(example) for example in examples], dtype=torch.float64)
    for example, weight in zip(examples, weights / weights.mean(), strict=True):
        outputs = model.outputs(example[0])
        outputs = outputs if isinstance(outputs, torch.Tensor) else torch.stack(outputs)
        jacobian = [torch.autograd.grad(o, parameters, retain_graph=True, allow_unused=True) for o in outputs]
        jacobian = torch.stack([flat(one, parameters) for one in jacobian])
        values, vectors = torch.linalg.eigh(model.hessian_of(example).detach())
        total = total + weight * jacobian.T @ vectors @ values.clamp(min=0).diag() @ vectors.T @ jacobian
    return total / len(examples)


def influence(model, train, queries, matrix):
    """``g' (H + damping)^-1 g / n``."""
    mean = sum(map(model.weight_of, rows_of(train))) / len(train)
    mine, theirs = gradients(model, rows_of(train)), gradients(model, rows_of(queries), mean)
    damping = EXACT["damping"] * matrix.trace() / min(len(train), len(matrix))
    damped = matrix + damping * torch.eye(len(matrix), dtype=matrix.dtype)
    return theirs @ torch.linalg.solve(damped, mine.T) / len(train)


@pytest.mark.parametrize("batch_size", [1, 64])
@pytest.mark.parametrize("cls", [TwoHeads, Weighted, Summing], ids=lambda cls: cls.__name__)
def test_gauss_newton_at_the_tap_is_the_closed_form(cls, batch_size):
    model, train, queries = built(cls), cls.data(13, 0), cls.data(4, 1)
    attribution = ask(model, train, queries, "influence-cg", batch_size=batch_size, **EXACT)
    close_scores(attribution.scores, influence(model, train, queries, matrix_of(model, rows_of(train))))
    width = 3 if cls is Weighted else 2
    assert f"curvature: Gauss-Newton, at {width} outputs of an example" in attribution.metadata["loss"]


class Wide(Own):
    """More outputs than curvature is taken along."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 300)

    @staticmethod
    def data(num, seed):
        return TensorDataset(random_tensor(num, 4, seed=seed), random_tensor(num, 300, seed=seed + 50))

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self.net(batch[0]), batch[1])

    def loss_of(self, example):
        return (self.net(example[0]) - example[1]).square().mean()


FLAT = {
    Absolute: "the second derivatives of the loss vanish for most examples",
    Wide: "the loss has 300 outputs of an example, more than 256",
    Texts: "the outputs of an example have padding",
    TiedFunction: "outputs of single examples cannot be told apart in a batch",
}


@pytest.mark.parametrize("cls", FLAT, ids=lambda cls: cls.__name__)
def test_the_fisher_matrix_where_there_is_no_curvature(cls):
    model, train, queries = built(cls), cls.data(13, 0), cls.data(4, 1)
    attribution = ask(model, train, queries, "influence-cg", **EXACT)
    mine = gradients(model, rows_of(train))
    close_scores(attribution.scores, influence(model, train, queries, mine.T @ mine / len(train)), 1e-4)
    assert attribution.metadata["loss"].endswith(f"curvature: empirical Fisher matrix, because {FLAT[cls]}")


def test_a_coupled_loss_has_the_fisher_matrix():
    model, data = built(Contrastive), Contrastive.data(4, 0)
    assert (
        ask(model, data, data, "ekfac", damping=0.1)
        .metadata["loss"]
        .endswith("curvature: empirical Fisher matrix, because the loss couples the examples of a batch")
    )


@pytest.mark.parametrize("unit", [1e-3, 1e4])
def test_the_unit_of_the_targets_decides_nothing(unit):
    """Prices in dollars or in thousands of them are squares all the same."""

    class InUnits(Summing):
        def training_step(self, batch, batch_idx):
            return F.mse_loss(unit * self.net(batch[0]), unit * batch[1])

    model, train = built(InUnits), numbers(13, 0)
    assert "Gauss-Newton, at 2 outputs" in ask(model, train, train).metadata["loss"]


@pytest.mark.parametrize("width", [0.01, 3.0])
def test_huber_is_curved_near_zero_only(width):
    class Huber(Absolute):
        def training_step(self, batch, batch_idx):
            return F.huber_loss(self.net(batch[0]), batch[1], delta=width)

    model, train = built(Huber), numbers(30, 0)
    assert ("Gauss-Newton" in ask(model, train, train).metadata["loss"]) is (width > 1)


def test_many_outputs_have_random_directions(monkeypatch):
    """Beyond a limit curvature is a mean over random signs, the same for every batch size."""
    monkeypatch.setattr(signs, "MAX_EXACT_OUTPUTS", 1)
    model, train, queries = built(Weighted), Weighted.data(13, 0), Weighted.data(4, 1)
    one, other = (ask(model, train, queries, "ekfac", damping=0.3, batch_size=size).scores for size in (3, 64))
    close_scores(one, other)
    monkeypatch.undo()
    exact = ask(model, train, queries, "ekfac", damping=0.3).scores
    assert 0.9 < torch.corrcoef(torch.stack([one.flatten(), exact.flatten()]))[0, 1] < 0.9999
