"""Per-example gradients of a model from one backward pass, block of parameters by block."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from stride_lightning.model.blocks import Block, Gradients, Outer
from stride_lightning.model.digests import state_tensors
from stride_lightning.model.layer_rules import Call, UnusualShape, gradients_through, output_tensors
from stride_lightning.model.layers import check_layers, cloned, find_module, plain_name, uncompiled
from stride_lightning.model.layout import Layout, Source

#: Name of the whole model, among the modules that are run again.
WHOLE = ""


class Outputs(nn.Module):
    """The outputs of a model, whose gradients are taken, as a module that can be run with other parameters."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Any) -> Tensor:
        """Outputs of shape ``(B, C)``, or ``(B, T, C)`` for tokens."""
        return self.model(inputs)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Whatever is needed to run once more inside the block, for gradients at the same outputs."""
        yield

    def check(self, outputs: object, num_examples: int) -> None:
        """Refuse outputs that are not one row of numbers per example, by a TypeError."""
        if not isinstance(outputs, Tensor) or outputs.ndim < 2 or len(outputs) != num_examples:
            what = f"shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
            raise TypeError(
                f"Expected outputs of shape ({num_examples}, C) from {type(self.model).__name__}, got {what}. Pass a "
                "`task` whose outputs() gives them."
            )


class Capture:
    """Per-example gradients of a model's outputs in its trainable parameters.

    Gradients in the matrices of Linear, convolution, embedding and transformers' Conv1D layers stay factors, from one
    backward pass over the batch. Any other parameter is read by running its module again under ``torch.vmap``. Where
    ``vmap`` cannot vectorise a module, or hooks do not see how a parameter is used, the whole model is run again. The
    gradients of a rule are compared with ordinary gradients of single examples before the rule is used.

    Args:
        outputs: Outputs of the model in eval mode, on its device, whose weights may be exchanged later.
        layers: As for :func:`chosen_parameters`.
        left_out: Names of parameters that are not read.
    """

    def __init__(self, outputs: Outputs, layers: Sequence[str] | None = None, left_out: Collection[str] = ()) -> None:
        self.outputs, self.model = outputs, outputs.model
        chosen = chosen_parameters(self.model, layers)
        self.parameters = {name: value for name, value in chosen.items() if name not in left_out}
        self.layouts: dict[str, Layout] = {}
        #: Whether the output of an embedding that is looked up once for all examples is repeated for each.
        self.repeats = True

    @property
    def num_parameters(self) -> int:
        """Number of values in all blocks."""
        return sum(parameter.numel() for parameter in self.parameters.values())

    def module(self, name: str) -> nn.Module:
        """The watched module of that name."""
        return self.outputs if name == WHOLE else find_module(self.model, name)

    @property
    def warning(self) -> str:
        """A warning that names the parameters whose gradients take long; empty if there are none."""
        slow = [name for name, layout in self.layouts.items() if not layout.sources[0].vectorized]
        if not slow:
            return ""
        shown = ", ".join(slow[:4]) + (f" and {len(slow) - 4} more" if len(slow) > 4 else "")
        return (
            f"Gradients in {shown} are taken one example at a time, because torch cannot vectorise them. This is slow. "
            "To leave them out, name the modules whose parameters count: `layers=[...]`."
        )

    def described(self) -> dict[str, Any]:
        """Number of parameters, and how many blocks are read in which way, for the metadata."""
        ways = Counter(layout.way for layout in self.layouts.values())
        return {"num_parameters": self.num_parameters, "blocks": dict(ways)}

    def effort(self, inputs: Any, num_examples: int) -> Effort:
        """What each example of a batch takes while its gradients are read."""
        weights = {tensor.untyped_storage().data_ptr() for tensor in state_tensors(self.model).values()}
        saved: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = 0 if storage.data_ptr() in weights else storage.nbytes()
            return tensor

        with self.watch() as backward:
            try:
                with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                    outputs = backward.run(cloned(inputs), num_examples)
            except RuntimeError:  # a model that uses torch.func allows no hooks: its blocks have to do
                outputs = backward.run(cloned(inputs), num_examples)
            blocks = backward.gradients(torch.ones_like(outputs))
        shapes = {name: (max(1, block.num_places), *block.shape) for name, block in blocks.items()}
        # Twice: gradients of activations come back, and what is made of a block is as large.
        return Effort(max(1, 2 * (sum(saved.values()) + blocks.num_bytes) // num_examples), shapes)

    @contextmanager
    def watch(self) -> Iterator[Backward]:
        """Run the model inside the block, then take gradients from what is yielded; hooks live in the block only.

        Example:
            >>> from stride_lightning.model.plan import plan_capture
            >>> x = torch.ones(5, 3)
            >>> capture = plan_capture(Outputs(nn.Linear(3, 2)), [x[:1], x[1:2]])
            >>> with capture.watch() as backward:
            ...     outputs = backward.run(x, len(x))
            ...     gradients = backward.gradients(torch.ones_like(outputs))
            >>> gradients["weight"].dense().shape  # the bias is joined to the matrix
            torch.Size([5, 8])
        """
        names = {source.module for layout in self.layouts.values() for source in layout.sources}
        with watching({name: self.module(name) for name in names}, repeats=self.repeats) as watch:
            yield Backward(self, watch)


@dataclass(frozen=True)
class Effort:
    """What one example takes while its gradients are read."""

    #: Bytes of its activations and blocks, and of as much again that is made of them.
    num_bytes: int
    #: Outer products that make up the matrix of each block, and its shape.
    shapes: Mapping[str, tuple[int, int, int]]

    @property
    def forward(self) -> int:
        """Multiplications of a forward pass, as far as layers with matrices do them; a backward pass takes twice."""
        return sum(places * rows * columns for places, rows, columns in self.shapes.values())


class Watch:
    """The calls of some modules during :meth:`run`."""

    def __init__(self, names: Iterable[str], *, repeats: bool) -> None:
        self.repeats, self._num_examples = repeats, 1
        self.calls: dict[str, list[Call]] = {name: [] for name in names}
        #: Names of the modules in the order in which calls ended.
        self.order: list[str] = []
        self._open = False

    def run(self, function: Callable[[], Tensor], num_examples: int = 1) -> Tensor:
        """Run a function and note the calls made in it, in place of those of the last run."""
        self._num_examples = num_examples
        for calls in (*self.calls.values(), self.order):
            calls.clear()
        self._open = True
        try:
            # Here only: generators hand their batches to code that needs no graph.
            with torch.enable_grad():
                return function()
        finally:
            self._open = False  # running a module again to read its parameters is not a call

    def hook(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> Any:
        """The forward hook of a module."""
        if not self._open:
            return outputs
        if self.repeats and isinstance(module, nn.Embedding) and len(outputs) == 1 < self._num_examples:
            # Positions, looked up once for all examples. Repeated, each example has a gradient in them.
            outputs = outputs.expand(self._num_examples, *outputs.shape[1:])
        if isinstance(outputs, Tensor) and outputs._is_view():
            outputs = outputs.clone()  # an operation in place would rewrite the history of a view
        tensors = output_tensors(outputs)
        # The edge, not the tensor: an operation in place after the module would change what the tensor is.
        edges = [get_gradient_edge(tensor) if tensor.requires_grad else None for tensor in tensors]
        self.calls[name].append(Call(args, kwargs, edges))
        self.order.append(name)
        return outputs


@contextmanager
def watching(modules: Mapping[str, nn.Module], *, repeats: bool = False) -> Iterator[Watch]:
    """Watch modules inside the block, in which compiled modules run eagerly.

    With ``repeats``, an embedding that is looked up once for all examples (of positions) is repeated for each of them.
    """
    watch = Watch(modules, repeats=repeats)
    with ExitStack() as hooks, uncompiled():
        for name, module in modules.items():
            hooks.enter_context(module.register_forward_hook(partial(watch.hook, name), with_kwargs=True))
        yield watch


class Backward:
    """The outputs of a batch, and gradients of any function of them."""

    def __init__(self, capture: Capture, watch: Watch) -> None:
        self._capture, self._watch, self._calls = capture, watch, watch.calls
        self._outputs: Tensor | None = None
        #: Gradients of parameters that are read by running a module again: by module, way and call.
        self._again: dict[tuple[str, bool, int], dict[str, Tensor]] = {}
        self._back: dict[str, list[list[Tensor | None]]] = {}

    def run(self, inputs: Any, num_examples: int) -> Tensor:
        """Run the model on a batch; outputs of shape ``(B, C)``, detached."""
        self._outputs = self._watch.run(lambda: self._capture.outputs(inputs), num_examples)
        self._capture.outputs.check(self._outputs, num_examples)
        return self._outputs.detach()

    def gradients(self, direction: Tensor, *, last: bool = True) -> Gradients:
        """Gradients of ``sum_c direction[i, c] outputs[i, c]`` of every example i; the ``last`` ones free the graph."""
        self.pull(direction, last=last)
        return Gradients({name: self.read(layout) for name, layout in self._capture.layouts.items()})

    def pull(self, direction: Tensor, *, last: bool = True) -> None:
        """Run backward, for :meth:`read`."""
        assert self._outputs is not None
        self._direction = direction
        self._again.clear()
        edges = [edge for calls in self._calls.values() for call in calls for edge in call.edges if edge is not None]
        options = {"retain_graph": not last, "allow_unused": True}
        gradients = iter(torch.autograd.grad(self._outputs, edges, direction, **options) if edges else ())
        self._back = {
            name: [[None if edge is None else next(gradients) for edge in call.edges] for call in calls]
            for name, calls in self._calls.items()
        }

    @torch.no_grad()
    def read(self, layout: Layout) -> Block:
        """Gradients in one block, from all calls of all modules that contribute."""
        outers: list[Outer] = []
        total: Tensor | None = None
        for source in layout.sources:
            calls = zip(self._calls[source.module], self._back[source.module], strict=True)
            for number, (call, back) in enumerate(calls):
                if all(gradient is None for gradient in back):
                    continue
                try:
                    if source.rule is None:
                        vectors = _at_least_single(self._run_again(layout, source, number))
                        total = vectors if total is None else total + vectors
                    else:
                        assert back[0] is not None
                        outer = source.rule.outer(call, back[0], len(self._direction))
                        left, right = _at_least_single(outer.left), _at_least_single(outer.right)
                        outers.append(Outer(left, right, outer.num_rows))
                except UnusualShape as error:
                    kind = type(self._capture.module(source.module)).__name__
                    raise UnusualShape(
                        f"In a batch of {len(self._direction)} examples the module {source.module!r} ({kind}) does not "
                        "see one part per example along its first axis, as it did for the first examples. Use "
                        "batch_size=1, or name the modules whose parameters count with `layers=[...]`."
                    ) from error
        if outers:
            return Block(None, tuple(outers))
        if total is None:
            total = _at_least_single(self._direction.new_zeros(len(self._direction), layout.num_parameters))
        return Block(total)

    def _run_again(self, layout: Layout, source: Source, number: int) -> Tensor:
        key = (source.module, source.vectorized, number)
        if key not in self._again or any(name not in self._again[key] for name in layout.parameters):
            # All parameters that are read off this module together: running it again is what takes time.
            names = [
                name
                for other in (layout, *self._capture.layouts.values())
                if any(s.rule is None and (s.module, s.vectorized) == key[:2] for s in other.sources)
                for name in other.parameters
            ]
            module = self._capture.module(source.module)
            inside = {id(parameter): name for name, parameter in module.named_parameters()}
            parameters = {name: self._capture.parameters[name] for name in names}  # once each
            with self._capture.outputs.again():
                gradients = gradients_through(
                    module,
                    self._calls[source.module][number],
                    self._back[source.module][number],
                    {inside[id(parameter)]: parameter.detach() for parameter in parameters.values()},
                    len(self._direction),
                    source.is_cut[number],
                    vectorized=source.vectorized,
                )
            self._again[key] = dict(zip(parameters, gradients.values(), strict=True))
        return layout.join({name: self._again[key][name] for name in layout.parameters})


def _at_least_single(values: Tensor) -> Tensor:
    """Gradients of a model in half precision are summed in single precision."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def chosen_parameters(model: nn.Module, layers: Sequence[str] | None) -> dict[str, nn.Parameter]:
    """The trainable parameters of some modules, or of all, by plain name; a tied one stands once.

    Raises:
        TypeError: If ``layers`` is a string.
        ValueError: If a name is not a submodule or nothing is trainable.
    """
    check_layers(layers)
    modules = [model] if layers is None else [find_module(model, name) for name in layers]
    chosen = {id(parameter) for module in modules for parameter in module.parameters() if parameter.requires_grad}
    named = {plain_name(name): parameter for name, parameter in model.named_parameters() if id(parameter) in chosen}
    if not named:
        where = type(model).__name__ if layers is None else f"{', '.join(map(repr, layers))}"
        raise ValueError(
            f"No parameter of {where} is trainable: gradients are taken in parameters with requires_grad=True. Set it "
            "for the parameters that were trained, or name other layers with `layers=[...]`."
        )
    return named
