"""Functions given as loss= and measure=: what is refused, their identity, and the direction of a measure."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stride_lightning.tasks.measures import (
    check_function,
    check_rows_function,
    function_identity,
    in_words,
    measure_info,
    measure_of,
)

X = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 1, 0, 1])


def margin(model: nn.Module, batch: Any) -> Tensor:
    outputs = model(batch[0])
    return outputs[:, 1] - outputs[:, 0]


def scaled(factor: float) -> Callable[[nn.Module, Any], Tensor]:
    def value(model: nn.Module, batch: Any) -> Tensor:
        return factor * margin(model, batch)

    return value


class Scaled:
    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        return self.factor * margin(model, batch)


def check(function: Any, model: nn.Module | None = None, **how: Any) -> None:
    model = nn.Linear(3, 2) if model is None else model
    pieces = list(zip(X.split(1), Y.split(1), strict=True))
    check_rows_function(function, model, (X, Y), pieces, **{"argument": "measure", **how})


def test_a_function_of_single_examples_passes() -> None:
    check(margin)
    check(margin, argument="loss")


def test_a_function_that_draws_random_numbers_passes() -> None:
    check(lambda model, batch: margin(model, batch) * torch.rand(len(batch[0])), argument="loss")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        pytest.param(lambda model, batch: margin(model, batch).mean(), "one number per example, shape (5,)", id="mean"),
        pytest.param(lambda model, batch: model(batch[0]), "got float32 tensor of shape (5, 2)", id="two columns"),
        pytest.param(lambda model, batch: [1.0] * 5, "got list of 5 item(s)", id="list"),
        pytest.param(lambda model, batch: margin(model, batch).softmax(0), "rows depend on each other", id="softmax"),
        pytest.param(lambda model, batch: margin(model, batch).log(), "is not finite for", id="not finite"),
        pytest.param(lambda model, batch: margin(model, batch).detach(), "has no gradient", id="detached"),
        pytest.param(lambda model, batch: batch[2], "failed on a batch of 5 example(s)", id="fails"),
        pytest.param(
            lambda model, batch: (margin(model, batch) * 0).sqrt(), "a gradient that is not finite", id="root of zero"
        ),
    ],
)
def test_the_error_names_the_function(function: Any, message: str) -> None:
    function.__name__ = "my_value"
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        check(function)
    assert str(error.value).startswith("`measure` my_value(model, batch)")


def test_values_without_gradient_pass_where_none_is_needed() -> None:
    check(lambda model, batch: margin(model, batch).detach(), differentiable=False)


def test_a_measure_is_checked_in_eval_mode_and_a_loss_in_training_mode() -> None:
    modes = []

    def value(model: nn.Module, batch: Any) -> Tensor:
        modes.append((model.training, model[0].training))
        return margin(model, batch)

    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    check(value, model)
    assert set(modes) == {(False, False)}
    modes.clear()
    check(value, model, argument="loss")
    assert set(modes) == {(True, False)}  # BatchNorm with running statistics mixes no examples
    assert model.training
    assert model[0].training


@pytest.mark.parametrize("argument", ["loss", "measure"])
@pytest.mark.parametrize(
    "value", ["margin", nn.Linear(2, 1), nn.Linear, 3, lambda model: model], ids=["text", "module", "class", "3", "one"]
)
def test_anything_but_a_function_of_two_arguments_is_refused(argument: Any, value: Any) -> None:
    with pytest.raises(TypeError, match=re.escape(f"`{argument}` must be a function fn(model, batch)")):
        check_function(value, argument)


def test_functions_and_none_pass() -> None:
    for value in (None, margin, Scaled(1.0), functools.partial(margin), scaled(2.0)):
        check_function(value, "measure")


def test_identity_tells_functions_apart() -> None:
    functions = [margin, scaled(1.0), scaled(2.0), Scaled(1.0), Scaled(2.0), functools.partial(scaled, 2.0)]
    identities = [tuple(function_identity(function).values()) for function in functions]
    assert len(set(identities)) == len(functions)
    assert function_identity(scaled(2.0)) == function_identity(scaled(2.0))
    assert function_identity(margin)["module"] == __name__
    assert function_identity(margin)["name"] == "margin"
    assert function_identity(scaled(1.0))["name"] == "scaled.<locals>.value"


def test_identity_of_code_without_source_follows_the_code() -> None:
    def made(text: str) -> Callable[..., Any]:
        return eval(text)

    one, same, other = made("lambda m, b: m(b) + 1"), made("lambda m, b: m(b) + 1"), made("lambda m, b: m(b) + 2")
    assert function_identity(one) == function_identity(same)
    assert function_identity(one) != function_identity(other)


def test_direction_and_words() -> None:
    assert measure_info(None) == {"name": "loss", "direction": "lowers"}
    assert measure_info(margin) == {"name": "margin", "direction": "raises"}
    assert in_words(measure_info(margin)) == "raises margin"
    assert measure_of({}) == measure_info(None)
    assert measure_of({"measure": measure_info(margin)}) == measure_info(margin)
