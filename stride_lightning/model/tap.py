"""The tap of a loss: the outputs of modules with parameters after which no parameter is used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils import _pytree as pytree

from stride_lightning.model.layers import plain_name, uncompiled

#: An output of a module: the module's name, the number of the call, and the number of the tensor among its outputs.
Key = tuple[str, int, int]


@dataclass(frozen=True)
class Tap:
    """Outputs of modules after which a loss uses no parameters but some by themselves, outside of modules.

    Args:
        calls: By name of a module and number of an output: its calls that count, from the last backwards as -1, -2 and
            so on; None where all do.
        is_nested: Whether one output depends on another, as the reconstruction of a VAE on its latent statistics.
        penalised: Names of parameters of a penalty on weights, which the loss uses by themselves.
        direct: Names of other parameters that the loss uses by themselves, as a temperature that is learnt.
    """

    calls: Mapping[tuple[str, int], frozenset[int] | None]
    is_nested: bool
    penalised: tuple[str, ...] = ()
    direct: tuple[str, ...] = ()

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the modules."""
        return tuple(dict.fromkeys(name for name, _ in self.calls))

    @contextmanager
    def recorded(self, model: nn.Module, *, cut: bool = False) -> Iterator[dict[Key, Tensor]]:
        """What the modules give inside the block; :meth:`among` chooses the outputs of the tap.

        With ``cut``, whatever follows starts from detached copies, which are those recorded.
        """
        with recorded_outputs(model, self.modules, cut=cut) as outputs:
            yield outputs

    def among(self, outputs: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
        """The outputs of the tap, in the order of their calls."""
        last: dict[str, int] = {}
        for name, number, _ in outputs:
            last[name] = max(number, last.get(name, 0))
        chosen = {}
        for (name, number, index), tensor in outputs.items():
            calls = self.calls.get((name, index), frozenset())
            if calls is None or number - last[name] - 1 in calls:
                chosen[name, number, index] = tensor
        return chosen


@contextmanager
def recorded_outputs(model: nn.Module, names: Iterable[str], *, cut: bool = False) -> Iterator[dict[Key, Tensor]]:
    """Outputs with a gradient of named modules; with ``cut``, detached copies take their place."""
    outputs: dict[Key, Tensor] = {}
    calls: dict[str, int] = {}

    def hook(name: str, _: nn.Module, __: Any, result: Any) -> Any:
        number = calls[name] = calls.get(name, -1) + 1
        leaves, structure = pytree.tree_flatten(result)
        for index, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                outputs[name, number, index] = leaf.detach().requires_grad_() if cut else leaf
                # A copy goes on: an operation in place would change the tensor that is recorded.
                leaves[index] = outputs[name, number, index].clone()
        return pytree.tree_unflatten(leaves, structure)

    modules = {plain_name(name): module for name, module in model.named_modules()}
    with ExitStack() as hooks, uncompiled():
        for name in names:
            hooks.enter_context(modules[name].register_forward_hook(partial(hook, name)))
        yield outputs


def find_tap(model: nn.Module, run: Callable[[], Tensor | None], again: Callable[[], Tensor | None]) -> Tap | None:
    """The tap of a loss that two runs give for different batches; None if it has none.

    The graph of the loss is walked back from the loss, and every walk ends at the first output of a module that holds
    parameters itself. A parameter that is reached without passing one is used by itself: in a penalty on weights if its
    gradient there is the same for both batches.
    """
    names = [plain_name(name) for name, module in model.named_modules() if any(True for _ in module.parameters(False))]
    trainable = {id(value): plain_name(name) for name, value in model.named_parameters() if value.requires_grad}
    with recorded_outputs(model, names) as outputs:
        loss = run()
    if loss is None or not loss.requires_grad:
        return None
    keys = {tuple(get_gradient_edge(tensor))[:2]: key for key, tensor in outputs.items()}
    reached, direct = _walk([get_gradient_edge(loss)], keys, trainable)
    if not reached:
        return None
    is_nested = any(_depends(outputs[key], keys, reached) for key in reached)
    tap, names = Tap(_calls(reached, outputs), is_nested), tuple(sorted(direct))
    if not direct:
        return tap
    return replace(tap, **{"penalised" if _is_penalty(model, tap, direct, run, again) else "direct": names})


def _calls(reached: set[Key], outputs: Mapping[Key, Tensor]) -> dict[tuple[str, int], frozenset[int] | None]:
    calls: dict[tuple[str, int], frozenset[int] | None] = {}
    for name, _, index in sorted(reached):
        every = {number for other, number, i in outputs if (other, i) == (name, index)}
        counted = {number for other, number, i in reached if (other, i) == (name, index)}
        calls[name, index] = None if counted == every else frozenset(number - max(every) - 1 for number in counted)
    return calls


def _depends(tensor: Tensor, keys: dict[Any, Key], reached: set[Key]) -> bool:
    """Whether one of the outputs that were reached is a part of what a tensor was computed from."""
    others = {edge: key for edge, key in keys.items() if key in reached}
    return bool(_walk(_before(tensor), others, {})[0])


def _before(tensor: Tensor) -> list[GradientEdge]:
    """The edges that lead into the operation that made a tensor."""
    node = get_gradient_edge(tensor).node
    return [GradientEdge(before, number) for before, number in node.next_functions if before is not None]


def _walk(start: Iterable[GradientEdge], keys: dict[Any, Key], trainable: dict[int, str]) -> tuple[set[Key], set[str]]:
    """The recorded outputs at which walks back from some edges end, and parameters reached without passing one."""
    reached: set[Key] = set()
    direct: set[str] = set()
    stack: list[Any] = [tuple(edge)[:2] for edge in start]
    visited: set[Any] = set()  # nodes themselves: their addresses are used again
    while stack:
        node, number = stack.pop()
        if (node, number) in keys:
            reached.add(keys[node, number])
        elif node not in visited:
            visited.add(node)
            variable = getattr(node, "variable", None)
            if id(variable) in trainable:
                direct.add(trainable[id(variable)])
            stack.extend(following for following in node.next_functions if following[0] is not None)
    return reached, direct


def _is_penalty(model: nn.Module, tap: Tap, names: set[str], run: Callable[[], Any], again: Callable[[], Any]) -> bool:
    """Whether the gradient of some parameters after the tap is the same for two batches."""
    parameters = [value for name, value in model.named_parameters() if plain_name(name) in names]
    gradients = []
    for loss_of in (run, again):
        try:
            with tap.recorded(model, cut=True):
                loss = loss_of()
        except RuntimeError:  # a step that takes gradients itself finds none behind the tap
            return False
        if loss is None:
            return False
        gradients.append(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))
    largest = max(float(gradient.abs().max()) for gradient in gradients[0])
    gaps = [float((one - other).abs().max()) for one, other in zip(*gradients, strict=True)]
    return max(gaps) <= 1e-5 * largest
