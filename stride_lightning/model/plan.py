"""Choosing how each parameter's gradient is read, and checking it against ordinary gradients of single examples."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from stride_lightning.model.capture import WHOLE, Backward, Capture, Outputs, Watch, watching
from stride_lightning.model.layer_rules import lengths, rule_for
from stride_lightning.model.layers import cloned, find_module, is_of_checkpointing, plain_name
from stride_lightning.model.layout import Layout, Source
from stride_lightning.runtime.checks import check_finite

#: Examples on which rules are checked: so many, or fewer if their gradients take more bytes, but two at least.
NUM_PROBES, PROBE_BYTES = 8, 2**28

#: By parameter: the modules that hold it, and its name there.
Owners = dict[str, list[tuple[str, str]]]

_BY_ITSELF = (
    "In eval mode every example must be evaluated by itself: no BatchNorm without running statistics, no random "
    "numbers, no padding that changes outputs. Or name the modules whose parameters count with `layers=[...]`."
)


def plan_capture(
    outputs: Outputs,
    examples: Sequence[Any],
    together: Any = None,
    layers: Sequence[str] | None = None,
    like: Capture | None = None,
    left_out: Collection[str] = (),
) -> Capture:
    """Choose how to read the gradient of every trainable parameter.

    There are four ways: the rule of the parameter's layer; running the nearest module that runs in the forward pass
    again, vectorised; running the whole model again, vectorised; and the whole model, example by example. Each
    parameter gets the first whose gradients equal those of single examples.

    Args:
        outputs: Outputs of the model in eval mode.
        examples: Inputs of a few single examples, as batches of one.
        together: The same examples as one batch; by default they are concatenated.
        layers: As for :func:`~stride_lightning.model.capture.chosen_parameters`.
        left_out: Names of parameters that are not read.
        like: A capture with whose gradients those of this one are compared; they get the same blocks.

    Raises:
        ValueError: If no way gives the right gradients, as where examples of a batch influence each other.
        RowError: If the outputs for an example are not finite.
    """
    if together is None:
        together = pytree.tree_map(lambda *parts: torch.cat(parts), *examples)
    capture = Capture(outputs, layers, left_out)
    probe = _Probe(capture, examples, together)
    owners = _owners(capture)
    layouts = {} if like is None else like.layouts
    groups = _groups(capture, owners, probe.ran) if like is None else [one.parameters for one in layouts.values()]
    axes = {name: layout.bias_axis for name, layout in layouts.items()}
    pending = {group[0]: _candidates(capture, owners, group, probe.ran, axes.get(group[0])) for group in groups}
    chosen: dict[str, Layout] = {}
    while pending:
        tried = {name: next(candidates, None) for name, candidates in pending.items()}
        probe.check_any_left(tried)
        right = probe.agreeing({name: layout for name, layout in tried.items() if layout is not None})
        chosen |= right
        pending = {name: candidates for name, candidates in pending.items() if name not in right}
    capture.layouts = {name: chosen[name] for name in capture.parameters if name in chosen}
    return capture


def probe_places(num_train: int, num_parameters: int) -> list[int]:
    """Places of the examples on which rules are checked, spread over the data.

    Example:
        >>> probe_places(100, 1000), probe_places(3, 10**9)
        ([0, 14, 28, 42, 56, 70, 84, 99], [0, 2])
    """
    count = min(num_train, max(2, min(NUM_PROBES, PROBE_BYTES // (4 * num_parameters))))
    return sorted({place * (num_train - 1) // max(1, count - 1) for place in range(count)})


class _Probe:
    """A few examples, and the gradients of random functions of their outputs, one example at a time."""

    def __init__(self, capture: Capture, examples: Sequence[Any], together: Any) -> None:
        self._capture, self._together, self._size = capture, together, len(examples)
        self._reasons: dict[str, str] = {}
        modules = {plain_name(name): module for name, module in capture.model.named_modules() if name}
        parameters = list(capture.parameters.values())
        directions, outputs, gradients = [], [], []
        with watching({WHOLE: capture.outputs, **modules}) as watch:
            for place, example in enumerate(examples):
                outputs.append(self._outputs(watch, example, place))
                # A random function, because the loss of an example that is sure has no gradient to compare.
                generator = torch.Generator().manual_seed(place)
                direction = torch.randn(outputs[-1].shape, generator=generator, dtype=torch.float64)
                directions.append(direction.to(outputs[-1]))
                gradients.append(self._gradients(outputs[-1], parameters, directions[-1]))
            #: Modules that run in the forward pass.
            self.ran = {name for name, calls in watch.calls.items() if calls}
            self._lengths_of_one = {name: [lengths(call) for call in calls] for name, calls in watch.calls.items()}
        self._directions, self._outputs_of_each = torch.cat(directions), torch.cat(outputs).detach()
        self._expected = {
            name: torch.stack([gradient.to_dense() if gradient.is_sparse else gradient for gradient in of_each])
            for name, of_each in zip(capture.parameters, zip(*gradients, strict=True), strict=True)
        }
        self._largest = max(float(expected.abs().max()) for expected in self._expected.values())

    def _gradients(self, outputs: Tensor, parameters: Sequence[Tensor], direction: Tensor) -> Sequence[Tensor]:
        try:
            return torch.autograd.grad(outputs, parameters, direction, allow_unused=True, materialize_grads=True)
        except RuntimeError as error:
            if not is_of_checkpointing(error):
                raise
            raise ValueError(
                f"{type(self._capture.model).__name__} runs activation checkpointing with use_reentrant=True, through "
                "which torch gives no gradients of single layers. Write checkpoint(..., use_reentrant=False), or "
                "checkpoint only `if self.training`: attribution runs in eval mode. Or name modules after the "
                "checkpointed part with `layers=[...]`."
            ) from error

    def _outputs(self, watch: Watch, example: Any, place: int) -> Tensor:
        try:
            outputs = watch.run(lambda: self._capture.outputs(cloned(example)))
        except ValueError as error:  # as BatchNorm without running statistics does
            raise ValueError(
                f"The model cannot evaluate a single example: {str(error).rstrip('.')}. {_BY_ITSELF}"
            ) from error
        check_finite(outputs, "outputs", row=place)
        if not outputs.requires_grad:
            raise ValueError(
                f"The outputs of {type(self._capture.model).__name__} do not depend on "
                f"{', '.join(list(self._capture.parameters)[:5])} (are they detached, or computed without gradients?), "
                "so there is nothing to compare examples by. Name modules that they depend on with `layers=[...]`."
            )
        return outputs

    def agreeing(self, tried: dict[str, Layout]) -> dict[str, Layout]:
        """The layouts whose gradients are those of single examples."""
        sources = [source for layout in tried.values() for source in layout.sources]
        right = {}
        modules = {source.module: self._capture.module(source.module) for source in sources}
        with watching(modules, repeats=self._capture.repeats) as watch:
            backward = Backward(self._capture, watch)
            try:
                outputs = backward.run(cloned(self._together), self._size)
            except Exception:
                if not self._capture.repeats:
                    raise
                self._capture.repeats = False  # the model does not take positions repeated for every example
                return self.agreeing(tried)
            if not _close(outputs, self._outputs_of_each, float(self._outputs_of_each.abs().max())):
                self._reasons |= dict.fromkeys(tried, "the outputs for an example change with the rest of its batch")
                return {}
            for source in sources:
                # A task that runs the model once per example makes more calls: `read` below finds that they do not fit.
                calls = zip(self._lengths_of_one[source.module], watch.calls[source.module], strict=False)
                source.is_cut = [
                    [one == 1 and both == self._size for one, both in zip(alone, lengths(call), strict=True)]
                    for alone, call in calls
                ]
            backward.pull(self._directions)
            for name, layout in tried.items():
                try:
                    gradients = layout.split(backward.read(layout).dense())
                except Exception as error:  # a module that is run in an unusual way may raise anything
                    self._reasons[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                    continue
                if all(self._is_right(*item) for item in gradients.items()):
                    right[name] = layout
                else:
                    self._reasons[name] = "gradients of a batch are not those of its examples"
        return right

    def _is_right(self, parameter: str, gradients: Tensor) -> bool:
        expected = self._expected[parameter]
        return _close(gradients, expected, max(float(expected.abs().max()), 1e-3 * self._largest))

    def check_any_left(self, tried: dict[str, Layout | None]) -> None:
        """Refuse parameters whose gradients no way reads."""
        lost = [name for name, layout in tried.items() if layout is None]
        if lost:
            owners = dict.fromkeys(type(find_module(self._capture.model, n.rpartition(".")[0])).__name__ for n in lost)
            shown = ", ".join(lost[:5]) + (f" and {len(lost) - 5} more" if len(lost) > 5 else "")
            raise ValueError(
                f"No way gives the gradients of single examples in {shown} (of {', '.join(owners)}): "
                f"{self._reasons[lost[0]]}. {_BY_ITSELF}"
            )


def _close(values: Tensor, expected: Tensor, scale: float) -> bool:
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-3}.get(expected.dtype, 0.1)
    return bool((values - expected).abs().max() <= tolerance * scale)


def _groups(capture: Capture, owners: Owners, ran: set[str]) -> list[tuple[str, ...]]:
    """Parameters that make up a block: a matrix with the bias of its layer, or one alone."""
    names = {id(parameter): name for name, parameter in capture.parameters.items()}
    biases: dict[str, str] = {}
    for name in capture.parameters:
        (module_name, name_there), *others = owners[name]
        module = find_module(capture.model, module_name)
        bias = names.get(id(getattr(module, "bias", None)))
        has_rule = name_there == "weight" and not others and module_name in ran and rule_for(module) is not None
        if has_rule and bias is not None and len(owners[bias]) == 1:
            biases[name] = bias
    alone = [name for name in capture.parameters if name not in biases.values()]
    return [(name, biases[name]) if name in biases else (name,) for name in alone]


def _candidates(
    capture: Capture, owners: Owners, group: tuple[str, ...], ran: set[str], bias_axis: int | None
) -> Iterator[Layout]:
    """Ways to read the gradients of a group; ``bias_axis`` fixes where a bias is joined."""
    shapes = tuple(capture.parameters[name].shape for name in group)
    held = owners[group[0]]
    modules = {name: find_module(capture.model, name) for name, _ in held if name in ran}
    kinds = [rule_for(module) for module in modules.values()]
    rules = [kind(module, len(group) == 2) for kind, module in zip(kinds, modules.values(), strict=True) if kind]
    fits = bool(rules) and (len(group) == 1 or bias_axis in (None, rules[0].bias_axis))
    axis = 1 if bias_axis is None else bias_axis
    if fits and len(rules) == len(kinds) and all(name == "weight" for _, name in held):
        yield Layout(group, shapes, rules[0].bias_axis, [*map(Source, modules, rules)])
    nearest = list(dict.fromkeys(_nearest(module, ran) for module, _ in held))
    if nearest != [WHOLE]:
        yield Layout(group, shapes, axis, [Source(name, None) for name in nearest])
    yield Layout(group, shapes, axis, [Source(WHOLE, None)])
    yield Layout(group, shapes, axis, [Source(WHOLE, None, vectorized=False)])


def _owners(capture: Capture) -> Owners:
    names = {id(parameter): name for name, parameter in capture.parameters.items()}
    owners: Owners = {name: [] for name in capture.parameters}
    for module_name, module in capture.model.named_modules():
        for name, parameter in module._parameters.items():
            if id(parameter) in names:
                owners[names[id(parameter)]].append((plain_name(module_name), name))
    return owners


def _nearest(module: str, ran: set[str]) -> str:
    """The module itself or the nearest above it that runs in the forward pass."""
    while module and module not in ran:
        module = module.rpartition(".")[0]
    return module or WHOLE


def last_layer(outputs: Outputs, inputs: Any) -> str:
    """The last module in the forward pass that holds trainable parameters directly."""
    capture = Capture(outputs)
    owners = {name for held in _owners(capture).values() for name, _ in held}
    with watching({name: find_module(outputs.model, name) for name in owners}) as watch:
        watch.run(lambda: outputs(cloned(inputs)))
    if not watch.order:
        raise ValueError(
            f"No layer of {type(outputs.model).__name__} that has parameters runs in its forward pass. Name one: "
            "`layers=[...]`."
        )
    return watch.order[-1]
