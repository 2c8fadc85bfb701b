"""Functions of the user's that say what training minimised (``loss=``) or what is explained (``measure=``)."""

from __future__ import annotations

import functools
import hashlib
import inspect
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stride_lightning.model.weights import borrowed
from stride_lightning.runtime.checks import first_line
from stride_lightning.runtime.randomness import seeded
from stride_lightning.tasks.likelihoods import describe
from stride_lightning.tasks.own_loss import RowFunction, name_of
from stride_lightning.tasks.training_step import Mode, training_mode

#: The argument that a function was given as.
Argument = Literal["loss", "measure"]
#: What is explained of a query where no function says it: its loss.
OF_LOSS = {"name": "loss", "direction": "lowers"}
#: What a loss is called in sentences.
OF_QUERY = "the query's loss"


def measure_info(measure: RowFunction | None) -> dict[str, str]:
    """Name and direction of what is explained of a query, for the metadata of results.

    A positive score lowers a query's loss. It raises the value of a function.

    Example:
        >>> measure_info(None)
        {'name': 'loss', 'direction': 'lowers'}
        >>> def margin(model, batch): ...
        >>> measure_info(margin)
        {'name': 'margin', 'direction': 'raises'}
    """
    return dict(OF_LOSS) if measure is None else {"name": name_of(measure), "direction": "raises"}


def measure_of(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Name and direction of what a result explains; results without an entry explain losses."""
    measure = metadata.get("measure", "loss")
    if isinstance(measure, str):  # stored by an earlier version
        return dict(OF_LOSS) if measure == "loss" else {"name": measure, "direction": "raises"}
    return measure


def in_words(measure: Mapping[str, str]) -> str:
    """What a positive score does to a query.

    Example:
        >>> in_words({"name": "margin", "direction": "raises"})
        'raises margin'
    """
    return f"{measure['direction']} {measure['name']}"


def effect_of(measure: Mapping[str, str], *, helpful: bool = True) -> str:
    """What training on a helpful or a harmful example does to a query.

    Example:
        >>> effect_of(measure_info(None)), effect_of({"name": "margin", "direction": "raises"}, helpful=False)
        ("lowers the query's loss", 'lowers margin')
    """
    direction = measure["direction"] if helpful else {"lowers": "raises", "raises": "lowers"}[measure["direction"]]
    return f"{direction} {measure['name'] if measure != OF_LOSS else OF_QUERY}"


def harm_of(measure: Mapping[str, str]) -> str:
    """What happens to a query when helpful examples are removed.

    Example:
        >>> harm_of({"name": "loss", "direction": "lowers"}), harm_of({"name": "margin", "direction": "raises"})
        ('rise of the loss', 'fall of margin')
    """
    return "rise of the loss" if measure["direction"] == "lowers" else f"fall of {measure['name']}"


def function_identity(function: Callable[..., Any]) -> dict[str, str]:
    """Module, qualified name and hash of the source of a function, by which records tell functions apart.

    Where there is no source, as in an interpreter, the hash is of the code. Numbers and strings that a function is
    bound to (by ``functools.partial``, in a closure, as attributes of an object) enter the hash.

    Example:
        >>> sorted(function_identity(measure_info))
        ['module', 'name', 'source']
    """
    bound: list[str] = []
    while isinstance(function, functools.partial):
        bound += [_plain(value) for value in function.args]
        bound += [f"{name}={_plain(value)}" for name, value in sorted(function.keywords.items())]
        function = function.func
    target: Any = function
    if not hasattr(target, "__qualname__"):  # an object with __call__
        bound += [f"{name}={_plain(value)}" for name, value in sorted(getattr(target, "__dict__", {}).items())]
        target = type(target)
    else:
        cells = getattr(target, "__closure__", None) or ()
        bound += [_plain(cell.cell_contents) for cell in cells if _is_filled(cell)]
    parts = [_source(target), *bound]
    return {
        "module": str(target.__module__),
        "name": target.__qualname__,
        "source": hashlib.sha256("\n".join(parts).encode()).hexdigest(),
    }


def functions_of(**functions: Callable[..., Any] | None) -> dict[str, Any]:
    """The identities of the functions that were given, by argument, under the key ``"functions"``; else nothing.

    Example:
        >>> functions_of(loss=None, measure=None)
        {}
    """
    identities = {name: function_identity(function) for name, function in functions.items() if function is not None}
    return {"functions": identities} if identities else {}


def _source(target: Any) -> str:
    try:
        return textwrap.dedent(inspect.getsource(target))
    except (OSError, TypeError):
        code = getattr(target, "__code__", None)
        return "" if code is None else f"{code.co_code.hex()}{[_plain(value) for value in code.co_consts]}"


def _plain(value: object) -> str:
    """A value where it is a plain one, else its type; never an address, which differs from process to process."""
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_plain, value))}]"
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    return type(value).__qualname__


def _is_filled(cell: Any) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


def check_function(function: object, argument: Argument) -> None:
    """Refuse a ``loss=`` or ``measure=`` that is no function of a model and a batch; None passes.

    Raises:
        TypeError: Naming the argument and the form that is expected.
    """
    if function is None:
        return
    expected = f"`{argument}` must be a function fn(model, batch) that returns one number per example, shape (B,)"
    if isinstance(function, nn.Module | type) or not callable(function):
        given = repr(function) if isinstance(function, str) else describe(function)
        default = "its training_step" if argument == "loss" else "the loss"
        raise TypeError(f"{expected}, got {given}. Leave it out for {default}.")
    try:
        inspect.signature(function).bind(None, None)
    except TypeError as error:
        raise TypeError(f"{expected}, but {name_of(function)} cannot be called with two arguments: {error}.") from error
    except ValueError:  # built in, without a signature
        return


def check_rows_function(
    function: RowFunction,
    model: nn.Module,
    batch: Any,
    pieces: Sequence[Any],
    *,
    argument: Argument,
    mode: Mode | None = None,
    differentiable: bool = True,
) -> None:
    """Refuse a function whose rows are not numbers of examples: what each example alone gives.

    Args:
        function: ``fn(model, batch) -> (B,)``.
        model: The model, on the device of the batches and in their precision; afterwards as before.
        batch: A batch of several examples, as the loader's ``collate_fn`` makes it.
        pieces: The same examples in the same order, each as a batch of one.
        argument: The argument that the function was given as, for messages.
        mode: Mode of the module; by default that of training for ``loss`` and eval mode for ``measure``.
        differentiable: Whether the values must have a gradient in the model's parameters.

    Raises:
        ValueError: If the function fails, the shape is not ``(B,)``, rows depend on each other, or a value or gradient
            is not finite. The message names the function and says what to do.

    Example:
        >>> def margin(model, batch):
        ...     return model(batch[0])[:, 1] - model(batch[0])[:, 0]
        >>> x = torch.randn(3, 2)
        >>> check_rows_function(margin, nn.Linear(2, 2), (x,), [(row,) for row in x.split(1)], argument="measure")
    """
    mode = mode or ("train" if argument == "loss" else "eval")
    name = f"`{argument}` {name_of(function)}(model, batch)"
    with borrowed(model, None, None), torch.enable_grad():
        if mode == "train":
            training_mode(model)

        def values_of(part: Any, size: int, seed: int = 0) -> Tensor:
            with seeded(seed):
                try:
                    values = function(model, part)
                except Exception as error:
                    raise ValueError(
                        f"{name} failed on a batch of {size} example(s), {describe(part)}: {type(error).__name__}: "
                        f"{first_line(error)}"
                    ) from error
            if not isinstance(values, Tensor) or values.shape != (size,):
                raise ValueError(
                    f"{name} must return one number per example, shape ({size},) for these {size} example(s), got "
                    f"{describe(values)}. Sum or average over everything but the examples: values.flatten(1).mean(1)."
                )
            return values

        whole = values_of(batch, len(pieces))
        if bad := (~torch.isfinite(whole)).nonzero().flatten().tolist():
            raise ValueError(
                f"{name} is not finite for {len(bad)} of {len(pieces)} examples: {whole[bad[0]].item():g} in row "
                f"{bad[0]}. Clamp what it divides by or takes the logarithm of, or leave these examples out."
            )
        if differentiable:
            _check_gradient(whole, model, name)
        is_random = not torch.equal(whole.detach(), values_of(batch, len(pieces), seed=1).detach())
        if is_random:  # rows of other batches draw other numbers
            return
        alone = torch.cat([values_of(piece, 1) for piece in pieces]).detach()
    gap, largest = (whole.detach() - alone).abs(), torch.maximum(whole.detach().abs(), alone.abs()).max()
    tolerance = max(1e-4 if whole.device.type == "cpu" else 1e-3, 8 * torch.finfo(whole.dtype).eps)
    if not gap.max() <= tolerance * largest:
        row = int(gap.argmax())
        raise ValueError(
            f"{name} gives row {row} the value {whole[row].item():.5g} in a batch of {len(pieces)} and "
            f"{alone[row].item():.5g} alone, so its rows depend on each other. A value may use its own example only: "
            "no mean, softmax or normalisation over the batch, no BatchNorm in training mode."
        )


def _check_gradient(values: Tensor, model: nn.Module, name: str) -> None:
    """Refuse values without a gradient in any parameter, or with one that is not finite."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients: list[Tensor] = []
    if values.requires_grad:
        gradients = [g for g in torch.autograd.grad(values.sum(), trained, allow_unused=True) if g is not None]
    if not gradients:
        raise ValueError(
            f"{name} has no gradient in the model's parameters. Compute its values from the model's outputs without "
            ".detach(), .item(), argmax or torch.no_grad()."
        )
    if not all(torch.isfinite(gradient).all() for gradient in gradients):
        raise ValueError(
            f"{name} has a gradient that is not finite. Clamp what it divides by, or takes the root or logarithm of."
        )
