"""The tap of a loss: cut there, no parameter keeps a gradient."""

import itertools

import lightning.pytorch as L
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from stride_lightning.model.tap import find_tap, recorded_outputs
from tests.helpers.gradient_models import check_same_condition, condition_of
from tests.helpers.tiny import random_tensor

X, OTHER = random_tensor(5, 4, seed=0), random_tensor(3, 4, seed=1)


def tap_of(model, loss):
    """The tap of a function of a model and a batch; cut there, the loss must not depend on a parameter."""
    model, before = model.double(), condition_of(model)
    tap = find_tap(model, lambda: loss(model, X), lambda: loss(model, OTHER))
    check_same_condition(before, model)
    if tap is not None and not (tap.penalised or tap.direct):
        with recorded_outputs(model, tap.modules) as whole:
            expected = loss(model, X)
        with tap.recorded(model, cut=True) as outputs:
            value = loss(model, X)
        parameters = [value for value in model.parameters() if value.requires_grad]
        gradients = torch.autograd.grad(value, parameters, allow_unused=True, retain_graph=True)
        assert all(gradient is None for gradient in gradients)
        torch.testing.assert_close(value, expected)
        points = tap.among(outputs)
        assert points.keys() == tap.among(whole).keys()
        slopes = torch.autograd.grad(value, [*points.values()])
        assert all(torch.isfinite(slope).all() for slope in slopes)
    return tap


def net(*sizes):
    layers = [nn.Linear(*pair) for pair in itertools.pairwise(sizes)]
    return nn.Sequential(*[part for layer in layers for part in (layer, nn.Tanh())][:-1])


def test_the_last_layer():
    tap = tap_of(net(4, 5, 3), lambda model, x: model(x).pow(4).mean())
    assert dict(tap.calls) == {("2", 0): None}
    assert not tap.is_nested


def test_two_heads():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.one, self.two = nn.Linear(4, 5), nn.Linear(5, 1), nn.Linear(5, 2)

    def loss(model, x):
        hidden = torch.tanh(model.body(x))
        return model.one(hidden).square().mean() + model.two(hidden).abs().mean()

    tap = tap_of(Two(), loss)
    assert set(tap.modules) == {"one", "two"}
    assert not tap.is_nested


class Autoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(4, 2), nn.Linear(2, 4)


def test_one_output_behind_another():
    def loss(model, x):
        code = model.encoder(x)
        return F.mse_loss(model.decoder(code), x) + 0.1 * code.abs().mean()

    tap = tap_of(Autoencoder(), loss)
    assert set(tap.modules) == {"encoder", "decoder"}
    assert tap.is_nested
    model = Autoencoder().double()
    with tap.recorded(model, cut=True) as outputs:
        value = loss(model, X)
    points = tap.among(outputs)
    (slope,) = torch.autograd.grad(value, points["encoder", 0, 0], retain_graph=True)
    code = points["encoder", 0, 0].detach().requires_grad_()
    # What flows on through the decoder is told by the decoder's own output.
    torch.testing.assert_close(slope, torch.autograd.grad(0.1 * code.abs().mean(), code)[0])


def test_an_inner_output_that_enters_no_loss_itself_is_no_part():
    tap = tap_of(Autoencoder(), lambda model, x: F.mse_loss(model.decoder(model.encoder(x)), x))
    assert tap.modules == ("decoder",)


def test_calls_in_a_loop_of_which_the_last_counts():
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.RNNCell(4, 4)

    def loss(model, x, *, every):
        state, states = torch.zeros_like(x), []
        for _ in range(3):
            state = model.cell(x, state)
            states.append(state)
        return sum(part.square().sum() for part in (states if every else states[-1:]))

    last = tap_of(Loop(), lambda model, x: loss(model, x, every=False))
    assert dict(last.calls) == {("cell", 0): frozenset({-1})}
    assert not last.is_nested
    every = tap_of(Loop(), lambda model, x: loss(model, x, every=True))
    assert dict(every.calls) == {("cell", 0): None}
    assert every.is_nested


def test_one_of_several_outputs_of_a_module():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(4, 3, batch_first=True)

    tap = tap_of(Recurrent(), lambda model, x: model.lstm(x[:, None])[1][0].square().mean())
    assert dict(tap.calls) == {("lstm", 1): None}


def test_an_operation_in_place_after_the_tap():
    tap = tap_of(net(4, 5), lambda model, x: torch.relu_(model(x)).square().mean())
    assert tap.modules == ("0",)


def test_a_penalty_on_weights():
    def loss(model, x):
        return model(x).abs().mean() + 0.1 * sum(weight.square().sum() for weight in model.parameters())

    tap = tap_of(net(4, 5, 3), loss)
    assert tap.modules == ("2",)
    assert tap.penalised == ("0.bias", "0.weight", "2.bias", "2.weight")


def test_a_weight_that_is_used_as_an_argument_is_used_by_itself():
    def loss(model, x):
        return F.linear(model(x), model[0].weight.T).square().mean()

    tap = tap_of(net(4, 5), loss)
    assert (tap.direct, tap.penalised) == (("0.weight",), ())


def test_a_penalty_that_depends_on_the_batch_is_none():
    tap = tap_of(net(4, 3), lambda model, x: model(x).abs().mean() + x.mean() * model[0].weight.sum())
    assert (tap.direct, tap.penalised) == (("0.weight",), ())


def test_a_frozen_head_is_the_tap_all_the_same():
    """Its outputs are those of the loss."""
    model = net(4, 5, 3)
    model[2].requires_grad_(False)
    assert tap_of(model, lambda model, x: model(x).square().mean()).modules == ("2",)


@pytest.mark.parametrize("loss", [lambda model, x: None, lambda model, x: x.sum()], ids=["skipped", "constant"])
def test_no_loss_has_no_tap(loss):
    assert find_tap(net(4, 3).double(), lambda: loss(None, X), lambda: loss(None, OTHER)) is None


def test_a_module_that_returns_a_dictionary():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.scale = nn.Linear(4, 3), nn.Parameter(torch.ones(3))

        def forward(self, x):
            return {"logits": self.net(x) * self.scale, "input": x}

    class Whole(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.inner = Named()

    tap = tap_of(Whole(), lambda model, x: model.inner(x)["logits"].abs().mean())
    assert tap.modules == ("inner",)


def test_hooks_are_gone_after_an_error():
    model = net(4, 3).double()
    before = condition_of(model)

    def fails():
        model(X)
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        find_tap(model, fails, fails)
    check_same_condition(before, model)
