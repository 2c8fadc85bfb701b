"""A function of tensors as a flat list of operations, without Python, vmap or needless temporaries in between."""

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
from torch.fx import Graph, GraphModule, Node
from torch.fx.graph import CodeGen
from torch.utils._pytree import tree_flatten, tree_unflatten

from stride_lightning.runtime.randomness import preserved_random_state

_log = logging.getLogger(__name__)

#: The layout that arguments are traced and replayed in, whatever they come in: which views are possible depends on it.
LAYOUT = torch.contiguous_format
#: Operations ``aten.name`` with an in-place twin ``aten.name_``: an element of the result needs one of the operand.
POINTWISE = (
    *("add", "sub", "mul", "div", "neg", "abs", "reciprocal", "exp", "log", "sqrt", "rsqrt", "sin", "cos"),
    *("relu", "leaky_relu", "elu", "gelu", "silu", "tanh", "sigmoid", "clamp", "clamp_min", "clamp_max"),
)
#: Pointwise too; these can write the result, ``grad_input``, into either of their first two arguments.
POINTWISE_BACKWARD = (
    *("threshold_backward", "tanh_backward", "sigmoid_backward"),
    *("gelu_backward", "silu_backward", "leaky_relu_backward"),
)


def capture(function: Callable[..., Any], *arguments: Any) -> Callable[..., Any] | None:
    """Trace a function of pytrees of tensors, numbers and strings into a flat list of operations, to be called often.

    A training step of many models, ``vmap(grad_and_value(loss))``, spends up to a third of its time in Python and on
    new memory for every temporary. Its replay runs nothing but the operations, and writes a result into the memory of
    an operand where nothing needs the operand any more.

    The replay computes what the function computes for any other numbers in the arguments. Torch's random operations
    draw afresh, as the function would. All else stays as at capture: numbers, flags (such as ``training``) and modes
    (such as autocast) that the function reads, and which tensors it reads besides its arguments. No gradient flows
    through the replay, and nothing but the function's result comes out of it. Tracing calls the function up to three
    times, on copies of the arguments, with its side effects.

    Returns:
        A function with the same signature, for arguments of the same structure, shapes, dtypes, devices and numbers:
        others raise a ``ValueError``. It never changes its arguments. ``None`` where the function has to be called
        itself: it cannot be traced, changes a tensor that it was given or reads, draws Python's or NumPy's random
        numbers, or did not agree with its replay.

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
            # Copies, because the function may change them; each of its own, in case one tensor came twice.
            copies = [x.detach().clone(memory_format=LAYOUT) if isinstance(x, Tensor) else x for x in leaves]
            replay = _trace(function, copies, structure)
            for _ in range(2):  # A function that counts its calls may agree once.
                for device in devices:  # Other random numbers than before, in case some became constants.
                    torch.rand(1, device=device)
                expected = _outcome(function, tree_unflatten(copies, structure), devices)
                _check_equal(_outcome(replay, tree_unflatten(copies, structure), devices), expected)
            _check_equal(copies, leaves)
        except Exception:
            # Whatever it was, even an error of the function itself: the caller, who now calls it, will see.
            _log.debug("%s cannot be captured.", function, exc_info=True)
            return None
    return replay


def _trace(function: Callable[..., Any], leaves: list[Any], structure: Any) -> Callable[..., Any]:
    """Trace a function of the pytree of these leaves, rewrite the operations and wrap them."""
    from torch.fx.experimental.proxy_tensor import make_fx  # takes a second to import

    structures = []

    def flat(*tensors: Tensor) -> list[Any]:
        remaining = iter(tensors)
        filled = [next(remaining) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        outputs, output_structure = tree_flatten(function(*tree_unflatten(filled, structure)))
        structures.append(output_structure)
        return outputs

    # Fake tensors have no numbers: what depends on numbers fails instead of becoming a constant. Functionalizing turns
    # in-place operations into others, except for a copy into a changed argument.
    trace = make_fx(functionalize(flat), tracing_mode="fake", _allow_non_fake_inputs=True)
    traced = trace(*[leaf for leaf in leaves if isinstance(leaf, Tensor)])
    graph = traced.graph
    if unsafe := [node.format_node() for node in graph.nodes if not _is_pure(node)]:
        raise RuntimeError(f"The function may change tensors: {unsafe}")
    _merge_views(graph)
    _reuse_memory(graph)
    graph.set_codegen(CodeGen())  # The leaves come flat, in no need of make_fx's own flattening.
    graph.lint()
    run = GraphModule(traced, graph).forward
    expected = _signature(leaves)

    def replay(*arguments: Any) -> Any:
        leaves, given_structure = tree_flatten(arguments)
        if given_structure != structure:
            raise ValueError(f"Expected arguments of the captured structure {structure}; got {given_structure}.")
        if (given := _signature(leaves)) != expected:
            i = next(i for i in range(len(given)) if given[i] != expected[i])
            raise ValueError(f"Expected {expected[i]}, as captured, as leaf {i} of the arguments; got {given[i]}.")
        with torch.no_grad():
            outputs = run(*[x.contiguous(memory_format=LAYOUT) for x in leaves if isinstance(x, Tensor)])
        return tree_unflatten(outputs, structures[0])

    return replay


def _is_pure(node: Node) -> bool:
    """Whether a node is known to leave its inputs alone."""
    if node.op != "call_function" or node.target is operator.getitem:
        return node.op in ("placeholder", "get_attr", "call_function", "output")
    if not isinstance(node.target, OpOverload) or node.target._schema.is_mutable:
        return False
    # Batch normalisation in training changes running_mean, about which some of its schemas keep silent.
    return not (node.target._opname.endswith("batch_norm") and node.args[3] is not None and node.args[5])


def _is_view(node: Node) -> bool:
    """Whether an operation's result may be memory of its inputs, which all schemas but one say."""
    return isinstance(node.target, OpOverload) and (
        node.target is torch.ops.aten._unsafe_view.default
        or any(argument.alias_info is not None for argument in node.target._schema.arguments)
    )


def _merge_views(graph: Graph) -> None:
    """Take every view once: transposed twice, or viewed in its own shape, a tensor is itself."""
    roots: dict[Node, Node] = {}
    views: dict[Any, Node] = {}
    for node in list(graph.nodes):
        roots[node] = roots[node.all_input_nodes[0]] if _is_view(node) else node
        if isinstance(node.meta.get("val"), Tensor):
            same = views.setdefault((roots[node], _layout(node.meta["val"])), node)
            # What the function returns stays a tensor of its own.
            if same is not node and not any(user.op == "output" for user in node.users):
                node.replace_all_uses_with(same)
    graph.eliminate_dead_code()


def _reuse_memory(graph: Graph) -> None:
    """Let pointwise operations write their result into an operand that nothing needs any more.

    The operand's memory must be the graph's own, the operand all of it and laid out like the result, and nothing that
    may share it may be used later, or beside the operand in the same operation.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    sharing = _sharing(graph)
    for node in order:
        for operand in node.all_input_nodes:
            old, new = operand.meta.get("val"), node.meta.get("val")
            if not (isinstance(old, Tensor) and isinstance(new, Tensor) and _layout(old) == _layout(new)):
                continue
            whole = old.numel() * old.element_size() == old.untyped_storage().nbytes()
            graphs = all(other.op == "call_function" for other in sharing[operand])
            uses = [(order[user], other) for other in sharing[operand] for user in other.users]
            free = all(use < order[node] or (use == order[node] and other is operand) for use, other in uses)
            if whole and graphs and free and _overwrite(node, operand):
                break  # What shared the operand's memory has no use after this node: nobody need know.


def _overwrite(node: Node, operand: Node) -> bool:
    """Make an operation write into an operand of its result's layout, if it can."""
    if not isinstance(node.target, OpOverload) or node.target.namespace != "aten" or operand not in node.args[:2]:
        return False
    name, aten = node.target._opname, torch.ops.aten
    if name in POINTWISE_BACKWARD:
        node.target, node.kwargs = getattr(aten, name).grad_input, {**node.kwargs, "grad_input": operand}
        return True
    commutes = name in ("add", "mul") and not node.kwargs  # add has a factor for its second argument
    if name not in POINTWISE or not (operand is node.args[0] or commutes):
        return False
    others = [argument for argument in node.args[:2] if argument is not operand]
    node.args = (operand, *(others or node.args[1:2]), *node.args[2:])
    node.target = getattr(getattr(aten, f"{name}_"), node.target._overloadname)
    return True


def _sharing(graph: Graph) -> dict[Node, list[Node]]:
    """For every node the nodes that may share memory with it: by schema, without one, or as the fake tensors did."""
    sharing = {node: [node] for node in graph.nodes}
    owners: dict[int, Node] = {}
    for node in list(sharing)[:-1]:  # not the output
        sources = node.all_input_nodes if _is_view(node) or not isinstance(node.target, OpOverload) else []
        values = [value for value in tree_flatten(node.meta.get("val"))[0] if isinstance(value, Tensor)]
        for source in [*sources, *(owners.setdefault(value.untyped_storage()._cdata, node) for value in values)]:
            if sharing[source] is not sharing[node]:
                both = [*sharing[source], *sharing[node]]
                sharing.update(dict.fromkeys(both, both))
    return sharing


def _layout(value: Tensor) -> tuple[Any, ...]:
    kind = value.dtype, value.device, value.is_conj(), value.is_neg()
    return value.shape, value.stride(), value.storage_offset(), *kind


def _signature(leaves: Sequence[Any]) -> list[tuple[Any, ...]]:
    return [(x.shape, x.dtype, x.device) if isinstance(x, Tensor) else (type(x), x) for x in leaves]


@contextmanager
def _quietly() -> Iterator[None]:
    """Neither warnings nor torch's reports of what fake tensors alone cannot do."""
    reports = logging.getLogger("torch._subclasses.fake_tensor")
    disabled, reports.disabled = reports.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        reports.disabled = disabled


def _outcome(function: Callable[..., Any], arguments: Sequence[Any], devices: set[torch.device]) -> list[Any]:
    """What a function returns, and everyone's next random number, to show what it drew."""
    with preserved_random_state():
        result = function(*arguments)
        numpy = float(np.random.rand())  # noqa: NPY002 - the global generator is the one in question
        return [result, random.random(), numpy, *(torch.rand(1, device=device) for device in devices)]


def _check_equal(given: Any, expected: Any) -> None:
    """Compare pytrees, tensors to a tolerance that is relative to their largest entry."""
    (given, given_structure), (expected, structure) = tree_flatten(given), tree_flatten(expected)
    if given_structure != structure:
        raise ValueError(f"Expected {structure}; got {given_structure}.")
    for a, b in zip(given, expected, strict=True):
        if not isinstance(b, Tensor):
            if a != b:
                raise ValueError(f"Expected {b}; got {a}.")
            continue
        tolerance = largest = 0.0
        if b.numel() and (b.is_floating_point() or b.is_complex()):
            tolerance = torch.finfo(b.dtype).eps ** 0.8  # 3e-6 in 32 bits, 3e-13 in 64
            largest = float(b.abs().nan_to_num(0, 0, 0).max())
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * largest, equal_nan=True)
