"""A function of tensors as a flat list of operations, without the cost of Python and vmap."""

from __future__ import annotations

import logging
import operator
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.func import functionalize
from torch.fx import GraphModule, Node
from torch.fx.graph import CodeGen
from torch.utils._pytree import tree_flatten, tree_unflatten

from stride_lightning.runtime.randomness import preserved_random_state

_log = logging.getLogger(__name__)

#: Memory layout of arguments in tracing and replay; it decides which views are possible.
LAYOUT = torch.contiguous_format


def capture(function: Callable[..., Any], *arguments: Any) -> Callable[..., Any] | None:
    """Trace a function of pytrees of tensors, numbers and strings into a flat list of operations, for many calls.

    A training step of many models, ``vmap(grad_and_value(loss))``, spends about a sixth of its time in Python. Its
    replay runs only the operations.

    The replay gives the function's result for other values in the tensors. Torch's random operations draw new numbers.
    All else is fixed at the capture: numbers, flags (such as ``training``) and modes (such as autocast) that the
    function reads, and the tensors that it reads besides its arguments. No gradient flows through the replay, and it
    has no effect but its result. Tracing calls the function up to three times, on copies of the arguments, with its
    side effects.

    Returns:
        A function with the same signature, for arguments of the same structure, shapes, dtypes, devices and numbers;
        others raise a ``ValueError``. It never changes its arguments. ``None`` if there can be no replay: the function
        cannot be traced, changes an argument or another tensor, draws random numbers of Python or NumPy, or differs
        from its replay.

    Example:
        >>> step = capture(lambda weight, batch: {"loss": (batch @ weight).relu().sum()}, torch.ones(2), torch.eye(2))
        >>> step(torch.ones(2), 3 * torch.eye(2))
        {'loss': tensor(6.)}
        >>> capture(lambda x: x if x.sum() > 0 else -x, torch.ones(2)) is None
        True
    """
    leaves, structure = tree_flatten(arguments)
    if not all(isinstance(leaf, Tensor | bool | int | float | complex | str | None) for leaf in leaves):
        return None
    devices = {torch.device("cpu"), *(leaf.device for leaf in leaves if isinstance(leaf, Tensor))}
    with _quietly(), preserved_random_state(), torch.no_grad():
        try:
            # Copies, because the function may change them; two leaves get two copies even if they are the same tensor.
            copies = [x.detach().clone(memory_format=LAYOUT) if isinstance(x, Tensor) else x for x in leaves]
            replay = _trace(function, copies, structure)
            for _ in range(2):  # a function that counts its calls may agree once
                for device in devices:  # new random numbers, in case the old ones became constants
                    torch.rand(1, device=device)
                expected = _outcome(function, tree_unflatten(copies, structure), devices)
                _check_equal(_outcome(replay, tree_unflatten(copies, structure), devices), expected)
            _check_equal(copies, leaves)
        except Exception:
            # This includes errors of the function: the caller calls it next and sees them.
            _log.debug("%s cannot be captured.", function, exc_info=True)
            return None
    return replay


def _trace(function: Callable[..., Any], leaves: list[Any], structure: Any) -> Callable[..., Any]:
    """Trace a function of the pytree of these leaves, and wrap the operations."""
    from torch.fx.experimental.proxy_tensor import make_fx  # takes a second to import

    structures = []

    def flat(*tensors: Tensor) -> list[Any]:
        remaining = iter(tensors)
        filled = [next(remaining) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        outputs, output_structure = tree_flatten(function(*tree_unflatten(filled, structure)))
        structures.append(output_structure)
        return outputs

    # Fake tensors have no values, so code that depends on values fails and does not become a constant. Functionalizing
    # replaces in-place operations, except for a copy into a changed argument.
    trace = make_fx(functionalize(flat), tracing_mode="fake", _allow_non_fake_inputs=True)
    traced = trace(*[leaf for leaf in leaves if isinstance(leaf, Tensor)])
    graph = traced.graph
    if unsafe := [node.format_node() for node in graph.nodes if not _is_pure(node)]:
        raise RuntimeError(f"The function may change tensors: {unsafe}")
    graph.eliminate_dead_code()
    graph.set_codegen(CodeGen())  # the leaves are flat already; make_fx would flatten them again
    graph.lint()
    run = GraphModule(traced, graph).forward
    expected = _signature(leaves)

    def replay(*arguments: Any) -> Any:
        leaves, actual_structure = tree_flatten(arguments)
        if actual_structure != structure:
            raise ValueError(f"Expected arguments of the captured structure {structure}, got {actual_structure}.")
        if (actual := _signature(leaves)) != expected:
            i = next(i for i in range(len(actual)) if actual[i] != expected[i])
            raise ValueError(f"Expected {expected[i]} as leaf {i} of the arguments, as captured, got {actual[i]}.")
        with torch.no_grad():
            outputs = run(*[x.contiguous(memory_format=LAYOUT) for x in leaves if isinstance(x, Tensor)])
        return tree_unflatten(outputs, structures[0])

    return replay


def _is_pure(node: Node) -> bool:
    """Whether a node certainly does not change its inputs."""
    if node.op != "call_function" or node.target is operator.getitem:
        return node.op in ("placeholder", "get_attr", "call_function", "output")
    if not isinstance(node.target, OpOverload) or node.target._schema.is_mutable:
        return False
    # Batch normalisation in training changes running_mean, but some of its schemas do not say so.
    return not (node.target._opname.endswith("batch_norm") and node.args[3] is not None and node.args[5])


def _signature(leaves: Sequence[Any]) -> list[tuple[Any, ...]]:
    return [(x.shape, x.dtype, x.device) if isinstance(x, Tensor) else (type(x), x) for x in leaves]


@contextmanager
def _quietly() -> Iterator[None]:
    """Suppress warnings, and torch's reports about fake tensors."""
    reports = logging.getLogger("torch._subclasses.fake_tensor")
    disabled, reports.disabled = reports.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        reports.disabled = disabled


def _outcome(function: Callable[..., Any], arguments: Sequence[Any], devices: set[torch.device]) -> list[Any]:
    """The result of a function, and the next number of every generator, which shows whether the function drew."""
    with preserved_random_state():
        result = function(*arguments)
        numpy = float(np.random.rand())  # noqa: NPY002 - the global generator is the one in question
        return [result, random.random(), numpy, *(torch.rand(1, device=device) for device in devices)]


def _check_equal(actual: Any, expected: Any) -> None:
    """Compare pytrees; the tolerance of a tensor is relative to its largest entry."""
    (actual, actual_structure), (expected, structure) = tree_flatten(actual), tree_flatten(expected)
    if actual_structure != structure:
        raise ValueError(f"Expected {structure}, got {actual_structure}.")
    for a, b in zip(actual, expected, strict=True):
        if not isinstance(b, Tensor):
            if a != b:
                raise ValueError(f"Expected {b}, got {a}.")
            continue
        tolerance = largest = 0.0
        if b.numel() and (b.is_floating_point() or b.is_complex()):
            tolerance = torch.finfo(b.dtype).eps ** 0.8  # 3e-6 in 32 bits, 3e-13 in 64
            largest = float(b.abs().nan_to_num(0, 0, 0).max())
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * largest, equal_nan=True)
