import itertools
import logging
import random
import time
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

from stride_lightning.retraining import capture as module
from stride_lightning.retraining.capture import capture

MODELS, BATCH = 3, 5


class Attention(nn.Module):
    def __init__(self, fused):
        super().__init__()
        self.fused, self.qkv, self.out, self.norm = fused, nn.Linear(8, 24), nn.Linear(8, 8), nn.LayerNorm(8)
        self.register_buffer("mask", torch.ones(4, 4).tril().bool())

    def forward(self, x):
        query, key, value = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 4)).movedim(-2, -4).unbind(-2)
        if self.fused:
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=self.mask)
        else:
            scores = (query @ key.mT / 2).masked_fill(~self.mask, -1e9)
            mixed = scores.softmax(-1) @ value
        return (x + self.out(mixed.movedim(-3, -2).flatten(-2))).flatten(1)


class MultiHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return x.flatten(1) + self.attention(x, x, x, need_weights=False)[0].flatten(1)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        hidden = self.first(x)
        gate = hidden.sigmoid()
        return hidden.tanh() * gate + hidden.neg() + self.second(hidden.relu()) + hidden + x


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.inner = nn.Embedding(7, 8), nn.Linear(8, 8)
        self.out = nn.Linear(8, 7, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens):
        return self.out(self.inner(self.embed(tokens)).tanh().mean(1))


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(inplace=True), nn.Linear(6, 2))

    def forward(self, x):
        out = self.net(x)
        doubled = out * 2
        out += 1
        out[:, 0] *= 3
        return out + doubled


def tokens():
    return torch.randint(7, (BATCH, 4))


def rows(*shape):
    return lambda: torch.randn(BATCH, *shape)


NETWORKS = {
    "mlp": lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2)),
    "activations": lambda: nn.Sequential(
        *(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Sigmoid(), nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 8)),
        *(nn.LeakyReLU(), nn.Linear(8, 8), nn.ELU(), nn.Linear(8, 2), nn.Softplus()),
    ),
    "conv": lambda: nn.Sequential(
        *(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 3, 3), nn.GroupNorm(1, 3)),
        *(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4)),
    ),
    "norm": lambda: nn.Sequential(
        nn.Linear(8, 16), nn.LayerNorm(16), nn.GELU("tanh"), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 3)
    ),
    "attention": lambda: Attention(False),
    "fused attention": lambda: Attention(True),
    "multi-head": MultiHead,
    "residual": Residual,
    "tied": Tied,
    "in-place": InPlace,
    "dropout": lambda: nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.ReLU(), nn.Linear(16, 3)),
}
INPUTS = {"conv": rows(2, 8, 8), "tied": tokens}
INPUTS |= dict.fromkeys(["attention", "fused attention", "multi-head"], rows(4, 8))


def squared(outputs, targets):
    return (outputs - targets[:, None]).square().mean(1)


def cross_entropy(outputs, targets):
    return F.cross_entropy(outputs, targets.abs().long() % outputs.shape[1], reduction="none")


def training_step(net, loss, randomness="same"):
    def weighted(parameters, x, y, weights):
        return (loss(functional_call(net, parameters, (x,)), y) * weights).sum() / weights.sum()

    return vmap(grad_and_value(weighted), in_dims=(0, None, None, 0), randomness=randomness)


def arguments_for(net, make, dtype=torch.float32):
    parameters = {
        name: torch.randn(MODELS, *value.shape) / max(value.shape[-1], 4) ** 0.5
        for name, value in net.named_parameters()
    }
    tensors = parameters, make(), 3 * torch.randn(BATCH), torch.rand(MODELS, BATCH) + 0.1
    return tree_map(lambda x: x.to(dtype) if x.is_floating_point() else x, tensors)


def captured(function, *arguments):
    replay = capture(function, *arguments)
    assert replay is not None
    return replay


def assert_same(function, replay, arguments, seed=0):
    """The replay gives what the function gives, and its arguments stay bit for bit."""
    copies = tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, arguments)
    torch.manual_seed(seed)
    replayed = replay(*arguments)
    torch.manual_seed(seed)
    torch.testing.assert_close(replayed, function(*copies), rtol=1e-6, atol=1e-6)
    for x, y in zip(tree_leaves(arguments), tree_leaves(copies), strict=True):
        assert x is y or torch.equal(x, y)


@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented the batching rule")
@pytest.mark.parametrize("loss", [squared, cross_entropy])
@pytest.mark.parametrize("name", NETWORKS)
def test_replay_is_the_training_step_of_any_numbers(name, loss):
    torch.manual_seed(0)
    net, make = NETWORKS[name](), INPUTS.get(name, rows(8))
    step = training_step(net, loss)
    replay = captured(step, *arguments_for(net, make))
    for seed in range(5):
        assert_same(step, replay, arguments_for(net, make), seed)


def test_float64():
    torch.manual_seed(0)
    net = Residual().double()
    step = training_step(net, squared)
    replay = captured(step, *arguments_for(net, rows(8), torch.float64))
    arguments = arguments_for(net, rows(8), torch.float64)
    torch.testing.assert_close(replay(*arguments), step(*arguments), rtol=1e-14, atol=1e-14)


FUNCTIONS = {
    "expanded": lambda x: (x[:, :1] * 2).expand(3, 3).add(x),
    "returned twice": lambda x: (y := x * 2, z := y.relu(), z.sigmoid(), y),
    "addend with a factor": lambda x: torch.add(x, x * 2, alpha=3),
    "broadcast": lambda x: (x.sum(0) * 2).relu() + x,
    "other dtype": lambda x: ((x * 2).long() + 1) * 0.5,
    "complex parts": lambda x: (y := torch.complex(x, x + 1), y.conj() * y, torch.view_as_real(y).neg())[1:],
    "input itself": lambda x: (x, x.t(), x.detach()),
    "intermediate and a view of it": lambda x: (y := x.exp(), y.t(), y + 1),
    "changed in place": lambda x: (y := x * 2, v := y.t(), y.relu_(), v.add_(1), y * v)[-1],
    "constant": lambda x: (torch.tensor([1.0, 2, 3]).neg() + x, torch.tensor([5.0])),
    "closed-over tensor": lambda x: (CONSTANT.neg() + x, CONSTANT.view(-1).exp()),
    "numbers": lambda x: x * x.sum().item(),
    "numbers as a shape": lambda x: x[x > 0],
    "a shape as a number": lambda x: x * x[x > 0].numel(),
    "all kinds of results": lambda x: {"loss": (x * 2).sum(), "none": None, "number": 3.5, "empty": []},
}
CONSTANT = torch.arange(9.0).view(3, 3)


@pytest.mark.parametrize("case", FUNCTIONS)
def test_replay_is_the_function_of_any_numbers(case):
    torch.manual_seed(0)
    constant = CONSTANT.clone()
    replay = captured(FUNCTIONS[case], torch.randn(3, 3))
    for _ in range(3):
        assert_same(FUNCTIONS[case], replay, (torch.randn(3, 3),))
    assert torch.equal(CONSTANT, constant)


def test_results_keep_no_memory_but_their_own():
    replay = captured(lambda x: (x * 2)[0].relu(), torch.ones(100, 3))
    assert replay(torch.ones(100, 3)).untyped_storage().nbytes() == 12


def test_results_are_tensors_of_their_own():
    x = torch.ones(3, 3)
    results = captured(lambda x: (x.view(3, 3), y := x.exp(), y.view(3, 3)), x)(x)
    assert len({id(value) for value in (x, *results)}) == 4


def test_results_are_the_callers_own():
    """Neither a later replay nor a change to a result touches what was returned before."""
    replay = captured(lambda x: ((y := x.exp()).t(), y.sum(), x * 1, x + 0), torch.ones(3, 3))
    first = replay(torch.zeros(3, 3))
    copies = [value.clone() for value in first]
    for value in replay(x := torch.ones(3, 3)):
        value.zero_()
    assert torch.equal(x, torch.ones(3, 3))
    assert all(torch.equal(value, old) for value, old in zip(first, copies, strict=True))
    torch.testing.assert_close(replay(x)[1], x.exp().sum())


def test_dropout_draws_afresh_from_the_default_generator():
    net = nn.Sequential(nn.Linear(8, 32), nn.Dropout(0.5), nn.Linear(32, 2))
    step = training_step(net, squared)
    arguments = arguments_for(net, rows(8))
    replay = captured(step, *arguments)
    torch.manual_seed(3)
    replayed = [replay(*arguments)[1] for _ in range(3)] + [torch.rand(2)]
    torch.manual_seed(3)
    expected = [step(*arguments)[1] for _ in range(3)] + [torch.rand(2)]
    torch.testing.assert_close(replayed, expected)
    assert not torch.equal(replayed[0], replayed[1])


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x + torch.rand(3),
        lambda x: x + torch.randn_like(x) + torch.randint(9, (3,)),
        lambda x: x[torch.randperm(3)],
        lambda x: (torch.rand(5), x + torch.rand(3))[1],
        lambda x: (torch.rand(5), x + 1)[1],
        lambda x: F.dropout(x, 0.5) + torch.bernoulli(torch.full((3,), 0.5)) + torch.empty(3).uniform_(),
        lambda x: F.rrelu(x - 1, training=True) + F.feature_alpha_dropout(x[None, :, None], 0.5, True)[0, :, 0],
        lambda x: x * torch.multinomial(torch.ones(5), 3) + torch.normal(x, x.abs()),
    ],
)
def test_torch_randomness_is_the_functions_own_or_not_captured(function):
    x = torch.ones(3)
    replay = capture(function, x)
    if replay is None:
        return
    torch.manual_seed(11)
    replayed = replay(x), replay(x), torch.rand(1)
    torch.manual_seed(11)
    torch.testing.assert_close(replayed, (function(x), function(x), torch.rand(1)))


def random_states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002


def counting(factor):
    """Multiplies by what the factor is in its first call, second call, and so on."""
    calls = itertools.count()
    return lambda x: x * factor(next(calls))


def sown(x):
    torch.manual_seed(0)
    return x + torch.rand(3)


BATCH_NORM = nn.BatchNorm1d(1)
GENERATOR = np.random.default_rng(0)
CHANGED = torch.ones(3)
REFUSED = {
    "python random": lambda x: x * random.random(),
    "python random, hardly": lambda x: x + 1e-30 * random.random(),
    "numpy random": lambda x: x * np.random.rand(),  # noqa: NPY002
    "numpy generator": lambda x: x * float(GENERATOR.random()),
    "seeding": sown,
    "time": lambda x: x * (time.perf_counter_ns() % 997),
    "numbers decide": lambda x: x if x.sum() > 0 else -x,
    "numpy": lambda x: x + torch.from_numpy(np.sin(x.numpy())),
    "counter": counting(lambda call: call + 1),
    "changes after tracing": counting(lambda call: 1 + (call >= 1)),
    "changes after one check": counting(lambda call: 1 + (call >= 2)),
    "changes an argument": lambda x: x.add_(1),
    "changes a view of an argument": lambda x: (x[:1].zero_(), x + 1)[1],
    "changes a closed-over tensor": lambda x: x + CHANGED.add_(1),
    "changes batch statistics": lambda x: BATCH_NORM(x[:, None]),
    "changes given batch statistics": lambda x: F.batch_norm(x[:, None], x[:1], x[1:2], training=True),
    "fails": lambda x: x @ torch.ones(4),
    "returns what it cannot": lambda x: (x, object()),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_replayed_is_refused(case, caplog):
    statistics = BATCH_NORM.running_mean.clone(), BATCH_NORM.running_var.clone()
    x = torch.arange(1.0, 4)
    random.seed(5), np.random.seed(5)  # noqa: NPY002
    states = random_states()
    assert capture(REFUSED[case], x) is None
    assert states == random_states()
    assert torch.equal(x, torch.arange(1.0, 4))
    torch.testing.assert_close((BATCH_NORM.running_mean, BATCH_NORM.running_var), statistics, rtol=0, atol=0)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    "case", ["changes an argument", "changes a view of an argument", "changes given batch statistics"]
)
def test_changes_are_seen_in_the_trace(case):
    with pytest.raises(RuntimeError, match="may change tensors"):
        module._trace(REFUSED[case], *module.tree_flatten((torch.arange(1.0, 4),)))


def test_changes_that_no_schema_tells_of_are_noticed(monkeypatch):
    monkeypatch.setattr(module, "_is_pure", lambda node: True)
    for case in ("changes given batch statistics", "changes an argument"):
        x = torch.arange(1.0, 4)
        assert capture(REFUSED[case], x) is None
        assert torch.equal(x, torch.arange(1.0, 4))


def test_leaves_that_are_no_tensors_or_numbers_are_refused():
    assert capture(lambda x, y: x, torch.ones(2), object()) is None
    assert capture(lambda x, y: x, torch.ones(2), np.ones(2)) is None


@pytest.mark.parametrize("scale", [1, 1e-9])
def test_a_wrong_trace_is_noticed(scale, monkeypatch, caplog):
    monkeypatch.setattr(module, "_trace", lambda *_: lambda x: 1.001 * x)
    with caplog.at_level(logging.DEBUG, module.__name__):
        assert capture(lambda x: x + 0, scale * torch.ones(3, 3)) is None
    assert "Tensor-likes are not close" in caplog.text


def test_other_arguments_raise():
    replay = captured(lambda x, options: x["a"] * options[0], {"a": torch.ones(2, 3)}, (2, None, "name"))
    assert torch.equal(replay({"a": torch.ones(2, 3)}, (2, None, "name")), torch.full((2, 3), 2.0))
    for x, options in [
        ({"a": torch.ones(3, 2)}, (2, None, "name")),
        ({"a": torch.ones(1, 3)}, (2, None, "name")),
        ({"a": torch.ones(2, 3, dtype=torch.float64)}, (2, None, "name")),
        ({"a": torch.ones(2, 3, device="meta")}, (2, None, "name")),
        ({"a": torch.ones(2, 3)}, (3, None, "name")),
        ({"a": torch.ones(2, 3)}, (2.0, None, "name")),
        ({"a": torch.ones(2, 3)}, (2, None, torch.ones(1))),
        ({"a": 1.0}, (2, None, "name")),
        ({"b": torch.ones(2, 3)}, (2, None, "name")),
        ({"a": torch.ones(2, 3)}, (2, None)),
    ]:
        with pytest.raises(ValueError, match="Expected"):
            replay(x, options)
    with pytest.raises(ValueError, match=r"Expected \(torch.Size\(\[2, 3\]\).* got \(torch.Size\(\[4, 3\]\)"):
        replay({"a": torch.ones(4, 3)}, (2, None, "name"))
    with pytest.raises(ValueError, match="structure"):
        replay({"a": torch.ones(2, 3)})


def test_arguments_of_any_layout_and_identity():
    """One tensor given twice, or laid out another way, is no other function later."""

    def function(x, y):
        return (x.reshape(-1) * 2).view(2, 2) + y.t(), x.t() - y, x.transpose(0, 1).transpose(0, 1)

    one, two = torch.tensor([[1.0, 2], [3, 4]]), torch.tensor([[5.0, 6], [7, 9]])
    for example in [(one, one), (one, two), (one.t(), two), (torch.ones(1, 1).expand(2, 2), one[:1].expand(2, 2))]:
        replay = captured(function, *example)
        for x, y in [(one, one), (one, two), (two.t(), one), (one[:, :1].expand(2, 2), two.t())]:
            torch.testing.assert_close(replay(x, y), function(x, y))


def test_closed_over_tensors_are_read_at_every_call():
    scale = torch.tensor([2.0, 3])
    replay = captured(lambda x: x * scale, torch.ones(2))
    scale.mul_(10)
    assert replay(torch.ones(2)).tolist() == [20, 30]


def test_parameters_that_require_a_gradient():
    """No gradient is recorded, whether or not the arguments require one."""
    parameter = nn.Parameter(torch.ones(3))
    replay = captured(vmap(grad_and_value(lambda w: (w * w).sum())), parameter[None].detach())
    gradient, value = replay(parameter[None])
    assert not gradient.requires_grad
    assert not value.requires_grad
    assert gradient.tolist() == [[2, 2, 2]]


def test_random_states_and_warnings_are_left_alone():
    def warns(x):
        warnings.warn("Mind the gap.", stacklevel=2)
        return x + torch.rand(3) + (x - 1).nan_to_num()

    states = random_states()
    captured(warns, torch.ones(3))
    assert states == random_states()
    assert torch.is_grad_enabled()


def test_numbers_that_are_not_finite():
    replay = captured(lambda x: (x.log() * 2, x / x), torch.tensor([0.0, -1, 1]))
    torch.testing.assert_close(
        replay(torch.tensor([1.0, 0, -1]))[0], torch.tensor([0, -torch.inf, torch.nan]), equal_nan=True
    )
