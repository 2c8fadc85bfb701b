"""Gradients of a loss one example at a time, where the examples of a batch cannot be told apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from stride_lightning.gradients.kinds import Kind
from stride_lightning.gradients.step_outputs import SkippedStep, StepInputs
from stride_lightning.model.blocks import Block, Gradients
from stride_lightning.model.capture import WHOLE, Backward, Capture, Outputs, watching
from stride_lightning.model.layout import Layout, Source
from stride_lightning.tasks.training_step import TrainingStep


class LossOutputs(Outputs):
    """The loss of a batch of one example, as its only output, shape ``(1, 1)``."""

    def __init__(self, model: nn.Module, step: TrainingStep) -> None:
        super().__init__(model)
        self.step = step

    @override
    def forward(self, inputs: StepInputs) -> Tensor:
        loss = self.step(*inputs)
        if loss is None:
            raise SkippedStep
        return loss.reshape(1, 1)

    @override
    def check(self, outputs: object, num_examples: int) -> None:
        """The loss is a scalar."""


class SingleCapture(Capture):
    """Gradients of the loss of a batch in all parameters, as vectors, in the blocks of another capture if given."""

    def __init__(
        self,
        model: nn.Module,
        step: TrainingStep,
        layers: Sequence[str] | None = None,
        like: Capture | None = None,
    ) -> None:
        super().__init__(LossOutputs(model, step), layers)
        single = {name: Layout((name,), (value.shape,), 1, []) for name, value in self.parameters.items()}
        layouts = single if like is None else like.layouts
        source = [Source(WHOLE, None, vectorized=False)]
        self.layouts = {name: replace(layout, sources=source) for name, layout in layouts.items()}

    @contextmanager
    @override
    def watch(self) -> Iterator[Backward]:
        with watching({}) as watch:
            yield SingleBackward(self, watch)


class SingleBackward(Backward):
    """The loss of a batch of one example, and its gradient."""

    @override
    def pull(self, direction: Tensor, *, last: bool = True) -> None:
        assert self._outputs is not None
        options: dict[str, Any] = {"retain_graph": not last, "allow_unused": True, "materialize_grads": True}
        parameters = self._capture.parameters
        gradients = torch.autograd.grad(self._outputs, [*parameters.values()], direction, **options)
        self._gradients = dict(zip(parameters, gradients, strict=True))

    @override
    def read(self, layout: Layout) -> Block:
        gradients = {name: self._gradients[name] for name in layout.parameters}
        return Block(layout.join({n: (g.to_dense() if g.is_sparse else g)[None] for n, g in gradients.items()}))


def kind_by_gradients(
    capture: SingleCapture, batches: Sequence[StepInputs], singles: Sequence[StepInputs]
) -> Kind | None:
    """The kind of a loss from gradients in all parameters: a mean, a sum, or None for any other.

    The batches hold the first of the single examples.
    """
    alone = torch.cat([gradient_of(capture, inputs).dense() for inputs in singles]).double()
    for kind in ("mean", "sum"):
        is_right = True
        for inputs in batches:
            part = alone[: len(inputs.keys)]
            expected = part.mean(0) if kind == "mean" else part.sum(0)
            gap = (gradient_of(capture, inputs).dense()[0].double() - expected).abs().max()
            is_right &= bool(gap <= 1e-3 * expected.abs().max())
        if is_right:
            return kind
    return None


def gradient_of(capture: Capture, inputs: StepInputs) -> Gradients:
    """The gradient of the loss of a batch; zero where ``training_step`` skips it."""
    with capture.watch() as backward:
        try:
            outputs = backward.run(inputs, 1)
        except SkippedStep:
            return zero_gradients(capture, 1)
        return backward.gradients(torch.ones_like(outputs))


def zero_gradients(capture: Capture, num_examples: int) -> Gradients:
    """Gradients of zero."""
    like = next(iter(capture.parameters.values()))
    sizes = {name: layout.num_parameters for name, layout in capture.layouts.items()}
    return Gradients({name: Block(like.new_zeros(num_examples, size)) for name, size in sizes.items()})
