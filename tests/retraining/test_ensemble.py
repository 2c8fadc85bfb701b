"""Stacked models against each model on its own."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from stride_lightning.retraining import ensemble as module
from stride_lightning.retraining.ensemble import Ensemble, bytes_per_model, chunk_size, trained_parameters
from tests.retraining import cases
from tests.retraining.cases import frozen, mlp, points

NUM_MODELS, NUM_STEPS = 4, 7
NETWORKS = {name: cases.NETWORKS[name][:2] for name in ("classes", "conv", "tokens", "tied", "frozen")}
OPTIMIZERS = cases.OPTIMIZERS | {
    "ascent": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.5, maximize=True),
    "adam decay": lambda p: torch.optim.Adam(p, lr=0.05, betas=(0.8, 0.95), weight_decay=0.01),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.05, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1),
    "foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "for loop": lambda p: torch.optim.Adam(p, lr=0.05, foreach=False),
    "groups": lambda p: torch.optim.SGD(
        [{"params": p[:1], "lr": 0.01}, {"params": p[1:], "weight_decay": 0.1, "momentum": 0.7}], lr=0.3
    ),
    "not all": lambda p: torch.optim.Adam(p[1:], lr=0.05),
}

CASES = [("classes", optimizer, False) for optimizer in OPTIMIZERS]
CASES += [(network, optimizer, False) for network in [*NETWORKS][1:] for optimizer in ("momentum", "adamw")]
CASES += [(network, "momentum", True) for network in NETWORKS]


def losses(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def weighted(call, shared, single):
    return (call(shared) * single).sum() / single.sum().clamp(min=1)


def build(network, data, dtype):
    torch.manual_seed(3)
    model = network().to(dtype)
    tensors = [x.to(dtype) if x.is_floating_point() else x for x in data().tensors]
    return model, [[x[8 * (i % 3) : 8 * (i % 3) + 8] for x in tensors] for i in range(NUM_STEPS)]


def shares():
    generator = torch.Generator().manual_seed(1)
    return torch.rand(NUM_STEPS, NUM_MODELS, 8, generator=generator, dtype=torch.float64) + 0.1


def stacked(model, optimizer, batches, weights, skips=None, **options):
    together = Ensemble(model, optimizer, NUM_MODELS, losses, weighted, **options)
    objectives = [
        together.step(batch, single.to(next(model.parameters()).dtype), skip=None if skips is None else skips[i])
        for i, (batch, single) in enumerate(zip(batches, weights, strict=True))
    ]
    return together, torch.stack(objectives)


def each_alone(model, make_optimizer, batches, weights, skips=None):
    """The same without vmap, without stacking: (models, objectives)."""
    models, objectives = [copy.deepcopy(model) for _ in range(NUM_MODELS)], torch.zeros(len(batches), NUM_MODELS)
    objectives = objectives.to(next(model.parameters()).dtype)
    for k, one in enumerate(models):
        optimizer = make_optimizer(list(one.parameters()))
        for i, batch in enumerate(batches):
            if skips is not None and skips[i, k]:
                continue
            optimizer.zero_grad()
            share = weights[i, k].to(next(model.parameters()).dtype)
            loss = (losses(one, batch) * share).sum() / share.sum()
            loss.backward()
            optimizer.step()
            objectives[i, k] = loss.detach()
    return models, objectives


def assert_same_weights(together, models, **tolerance):
    for k, one in enumerate(models):
        for name, value in one.named_parameters():
            stacked = together.parameters[name][k] if name in together.parameters else together.fixed[name]
            torch.testing.assert_close(stacked, value.detach(), **tolerance)


@pytest.mark.parametrize(("network", "optimizer", "traced"), CASES)
def test_every_copy_trains_as_it_would_alone(network, optimizer, traced):
    model, batches = build(*NETWORKS[network], torch.float64)
    before, make = copy.deepcopy(model.state_dict()), OPTIMIZERS[optimizer]
    kernels = {}
    options = {"num_steps": module.CAPTURE_STEPS if traced else 0, "kernels": kernels}
    together, objectives = stacked(model, make(list(model.parameters())), batches, shares(), **options)
    models, expected = each_alone(model, make, batches, shares())
    torch.testing.assert_close(objectives, expected, rtol=1e-10, atol=1e-10)
    assert_same_weights(together, models, rtol=1e-10, atol=1e-10)
    evaluated, alone = together.evaluate(losses, batches[0]), torch.stack([losses(one, batches[0]) for one in models])
    torch.testing.assert_close(evaluated, alone, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert len(kernels) == traced  # one shape of batch
    assert all(kernel is not None for kernel in kernels.values())


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_single_precision(optimizer):
    model, batches = build(mlp, points, torch.float32)
    make = OPTIMIZERS[optimizer]
    together, _ = stacked(model, make(list(model.parameters())), batches, shares())
    assert_same_weights(together, each_alone(model, make, batches, shares())[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "ascent", "groups"])
@pytest.mark.parametrize("first", [False, True], ids=["later", "from the start"])
def test_copies_that_skip_a_step(optimizer, first):
    """The momentum of a copy that skips its first step begins with its second."""
    model, batches = build(mlp, points, torch.float64)
    skips = torch.rand(NUM_STEPS, NUM_MODELS, generator=torch.Generator().manual_seed(2)) < 0.4
    skips[0], skips[1], skips[4] = torch.arange(NUM_MODELS) < 2 * first, torch.arange(NUM_MODELS) < 1 * first, True
    make, weights = OPTIMIZERS[optimizer], shares()
    weights[skips] = 0  # as without any example: no gradient, but weight decay and momentum all the same
    together, _ = stacked(model, make(list(model.parameters())), batches, weights, skips)
    assert_same_weights(together, each_alone(model, make, batches, weights, skips)[0], rtol=1e-10, atol=1e-10)


def test_a_schedule_goes_on_working():
    model, batches = build(mlp, points, torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step < 2))
    together = Ensemble(model, optimizer, NUM_MODELS, losses, weighted)
    seen = []
    for batch, single in zip(batches[:4], shares(), strict=False):
        together.step(batch, single)
        schedule.step()
        seen.append(together.parameters["0.weight"].clone())
    assert not seen[0].equal(seen[1])
    assert seen[1].equal(seen[2])


def test_a_kernel_that_holds_another_models_tensor_is_not_used():
    """A tensor that is neither parameter nor buffer is traced as it is; for the next model it is another."""

    class Hidden(nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.layer, self.factor = nn.Linear(4, 3), [torch.tensor(factor)]

        def forward(self, x):
            return self.layer(x) * self.factor[0]

    kernels, weights = {}, []
    for factor in (1.0, -2.0):
        for shared in (kernels, {}):
            model, batches = build(lambda: Hidden(factor), points, torch.float64)  # noqa: B023
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            together, _ = stacked(model, optimizer, batches, shares(), kernels=shared, num_steps=module.CAPTURE_STEPS)
            weights.append(together.parameters["layer.weight"])
    torch.testing.assert_close(weights[0], weights[1])
    torch.testing.assert_close(weights[2], weights[3])
    assert not weights[0].allclose(weights[2])


def test_which_parameters_are_trained():
    network = frozen()
    optimizer = torch.optim.SGD([*network[0].parameters(), network[2].bias], lr=0.1)
    assert set(trained_parameters(network, optimizer)) == {"0.bias", "2.bias"}


def test_bytes_of_a_copy():
    """Weights of 4 x 100 and 100 x 3 in 32 bits; what the backward pass keeps are the inputs of layers and of tanh."""
    model = nn.Sequential(nn.Linear(4, 100, bias=False), nn.Tanh(), nn.Linear(100, 3, bias=False))
    batch = torch.zeros(50, 4), torch.zeros(50, dtype=torch.long)
    weights = 4 * 700

    def needs(optimizer):
        return bytes_per_model(model, optimizer, lambda model, batch: model(batch[0]).sum(1), batch)

    plain = needs(torch.optim.SGD(model.parameters(), lr=0.1))
    assert plain == 2 * weights + 2 * 4 * (50 * 4 + 50 * 100)
    assert needs(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)) == plain + weights
    assert needs(torch.optim.Adam(model.parameters())) == plain + 2 * weights


@pytest.mark.parametrize(
    ("num_models", "each", "budget", "size"),
    [(100, 1, 1000, 100), (100, 10, 500, 50), (100, 10, 330, 25), (100, 10, 9, 1), (1, 10, 1000, 1), (7, 10, 40, 4)],
)
def test_chunks_keep_to_the_budget_and_are_even(num_models, each, budget, size):
    assert chunk_size(num_models, each, torch.device("cpu"), budget) == size
    assert size == 1 or size * each <= budget
