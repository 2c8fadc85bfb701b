"""What runs inside a block leaves nothing behind, and the graph it made can be used."""

import copy
import functools
import random
from collections import deque

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from torch import nn
from torch.utils.data import TensorDataset

from stride_lightning.model.undisturbed import undisturbed
from stride_lightning.model.weights import weight_hash
from tests.helpers.models import hooks_of


class History:
    """An object of the user's own."""

    made: list = []  # noqa: RUF012

    def __init__(self):
        self.values, self.count, self.rng = [], 0, np.random.default_rng(0)
        self.inner = {"deep": [[1]]}


class Busy(nn.Module):
    """Changes everything that it holds."""

    runs = 0

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(4, 4), nn.BatchNorm1d(4), nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3))
        )
        self.target = copy.deepcopy(self.net[0])
        self.register_buffer("queue", torch.zeros(8, 4))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.long))
        self.register_buffer("replaced", torch.ones(2))
        self.accuracy = torchmetrics.MeanMetric()
        self.collection = torchmetrics.MetricCollection([torchmetrics.MaxMetric(), torchmetrics.CatMetric()])
        self.history, self.losses, self.recent = History(), [1.0], deque([1, 2], maxlen=2)
        self.options, self.names, self.long = {"a": {"b": 1}}, {"x"}, list(range(200_000))
        self.generator, self.python = torch.Generator().manual_seed(3), random.Random(4)
        self.draw = functools.partial(torch.rand, 1, generator=torch.Generator().manual_seed(5))
        self.running, self.counts, self.tensors = torch.ones(3), np.zeros(2), [torch.zeros(2)]
        self.teacher = [nn.Linear(4, 4)]  # in a list, so that it is no child
        self.teacher[0].seen = 0
        self.optimizer = torch.optim.Adam(self.net.parameters(), 0.1)
        self.bound = random.Random(6).random
        self.maker = lambda: None

    def change(self, x):
        loss = self.net(x).square().mean()
        with torch.no_grad():
            self.queue[: len(x)] = x
            self.pointer += len(x)
            self.replaced = self.replaced * 2
            for mine, other in zip(self.target.parameters(), self.net[0].parameters(), strict=True):
                mine.data.mul_(0.9).add_(other.data)
            self.target.bias.data = self.target.bias.data + 1
            self.teacher[0].weight.clamp_(0, 0.1)
        self.accuracy.update(loss.detach())
        self.collection(loss.detach())
        self.history.values.append(loss)
        self.history.count += 1
        self.history.inner["deep"][0].append(2)
        History.made.append(1)
        Busy.runs += 1
        self.history.rng.random()
        torch.rand(1, generator=self.generator)
        self.python.random(), self.draw(), self.bound()
        self.losses.append(loss)
        self.losses[0] = 7
        self.recent.append(3)
        self.options["a"]["b"] = 2
        self.options["new"] = x
        self.names.add("y")
        self.long.append(1)
        self.running.mul_(2), np.add(self.counts, 1, out=self.counts), self.tensors[0].add_(1)
        self.teacher[0].seen += 1
        self.new = x
        del self.maker
        self.net[0].requires_grad_(False)
        self.net[0].weight.requires_grad_(True)
        self.register_forward_hook(lambda *_: None)
        self.net.eval()
        self.extra = nn.Linear(1, 1)
        return loss

    def step(self, loss):
        loss.backward(retain_graph=True)
        self.optimizer.step()
        return loss


def state(model):
    """Everything that the test looks at."""
    return [
        *(
            weight_hash(model),
            [module.training for module in model.modules()],
            sorted(vars(model)),
            len(hooks_of(model)),
        ),
        *([parameter.requires_grad for parameter in model.parameters()], [p.grad for p in model.parameters()]),
        *(
            model.history.values[:],
            model.history.count,
            History.made[:],
            Busy.runs,
            model.losses[:],
            list(model.recent),
        ),
        *(str(model.options), sorted(model.names), len(model.long), model.generator.get_state().tolist()),
        *(
            model.history.rng.bit_generator.state,
            model.python.getstate(),
            str(model.history.inner),
            model.bound.__self__.getstate(),
        ),
        *(model.draw.keywords["generator"].get_state().tolist(), model.running.tolist(), model.counts.tolist()),
        *(model.tensors[0].tolist(), weight_hash(model.teacher[0]), model.teacher[0].seen),
        *(model.accuracy.update_count, float(model.accuracy.mean_value), model.collection["CatMetric"].value),
        *([id(value) for value in model.state_dict(keep_vars=True).values()], str(model.optimizer.state_dict())),
        *([value._version for value in model.state_dict(keep_vars=True).values()], list(dict(model.named_modules()))),
    ]


@pytest.fixture
def busy():
    torch.manual_seed(0)
    return Busy()


X = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))


def test_everything_is_as_before(busy):
    before = state(busy)
    with undisturbed(busy):
        busy.step(busy.change(X))
        inside = state(busy)
    assert state(busy) == before
    same = [number for number, (one, other) in enumerate(zip(inside, before, strict=True)) if one == other]
    assert same == [], "each of these must have changed"


def test_everything_is_as_before_after_an_exception(busy):
    before = state(busy)
    with pytest.raises(AttributeError, match="maker"), undisturbed(busy):
        busy.change(X), busy.change(X)
    assert state(busy) == before


def test_gradients_are_set_aside(busy):
    busy.net[0].weight.grad = gradient = torch.ones(4, 4)
    with undisturbed(busy):
        assert busy.net[0].weight.grad is None
        busy.net[0](X).sum().backward()
    assert busy.net[0].weight.grad is gradient
    assert torch.equal(gradient, torch.ones(4, 4))
    assert busy.net[0].bias.grad is None


def test_data_sets_are_left_alone():
    model = nn.Linear(1, 1)
    model.data = TensorDataset(torch.zeros(3))
    with undisturbed(model):
        model.data.note = 1
    assert model.data.note == 1


def gradients(function, model):
    """Gradients taken after the block, and those of an ordinary run on a copy."""
    ordinary = copy.deepcopy(model)
    expected = torch.autograd.grad(function(ordinary), ordinary.parameters(), allow_unused=True)
    before = weight_hash(model)
    with undisturbed(model):
        loss = function(model)
    assert weight_hash(model) == before
    return torch.autograd.grad(loss, model.parameters(), allow_unused=True), expected


def normalised_first(model):
    with torch.no_grad():
        model.weight.copy_(F.normalize(model.weight, dim=1))
    return F.conv1d(model(X).T[None], model.weight[:, :, None]).exp().sum()


def scaled_first(model):
    model.weight.data.mul_(3)
    return (model(X) * model.weight[0]).exp().sum()


def averaged_first(model):
    with torch.no_grad():
        model.mean.mul_(0.5).add_(X.mean(0))
    return (model(X) / model.mean * model.mean).square().sum()


@pytest.mark.parametrize("function", [normalised_first, scaled_first, averaged_first])
def test_a_graph_remembers_what_was_written_before_its_use(function):
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    model.register_buffer("mean", torch.ones(4))
    for one, other in zip(*gradients(function, model), strict=True):
        torch.testing.assert_close(one, other)


def test_a_graph_remembers_what_was_written_after_its_use():
    """As with manual optimization, where the gradient is taken before the write."""
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    expected = torch.autograd.grad((model(X) * model.weight[0]).exp().sum(), model.weight)
    with undisturbed(model):
        loss = (model(X) * model.weight[0]).exp().sum()
        with torch.no_grad():
            model.weight.clamp_(-0.1, 0.1)
    assert torch.equal(*torch.autograd.grad(loss, model.weight), *expected)


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.data.add_(1),
        lambda w: w.detach()[1:].zero_(),
        lambda w: torch._foreach_mul_([w.data, w.data[0]], 2.0),
        lambda w: torch.add(w.data, 1, out=w.data),
        lambda w: nn.init.normal_(w),
        lambda w: setattr(w, "data", torch.zeros(7)),
        lambda w: w.data.resize_(100).zero_(),
        lambda w: w.data.view(2, 8).T.copy_(torch.ones(8, 2)),
        lambda w: F.batch_norm(X, w.data[0], w.data[1], training=True),
        lambda w: F.embedding(torch.tensor([0, 1]), w.data, max_norm=0.1),
    ],
    ids=["data", "view", "foreach", "out", "random", "exchanged", "resized", "transposed", "batch_norm", "max_norm"],
)
def test_every_way_to_write(write):
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    before, values = weight_hash(model), model.weight.detach().clone()
    with undisturbed(model):
        write(model.weight)
        assert model.weight.shape != values.shape or not torch.equal(model.weight, values)
    assert weight_hash(model) == before


@pytest.mark.filterwarnings("ignore")
def test_a_module_of_torchscript():
    model = torch.jit.trace(nn.BatchNorm1d(4).train(), X)
    before = weight_hash(model)
    with undisturbed(model):
        model(X)
        assert weight_hash(model) != before
    assert weight_hash(model) == before


def test_embedding_with_max_norm_and_sparse_gradients():
    model = nn.Embedding(5, 3, max_norm=0.1, sparse=True)
    before = weight_hash(model)
    with undisturbed(model):
        loss = model(torch.tensor([1, 2])).sum()
    assert weight_hash(model) == before
    assert torch.autograd.grad(loss, model.weight)[0].is_sparse
