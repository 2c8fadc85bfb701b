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

#: Standard errors of a mean over draws that a difference may have, and the largest such error, relative to the mean.
_NUM_ERRORS, _MAX_ERROR = 2.5, 0.25


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
    alone: Tensor, batches: Sequence[Tensor], sizes: Sequence[int], tolerances: Sequence[float] = ()
) -> Kind:
    """The kind of a loss from gradients in all parameters.

    Args:
        alone: Those of examples in batches of their own, shape ``(n, p)``; zero where an example has no loss.
        batches: Those of batches that hold the first of these examples, the first batch all of them.
        sizes: Numbers of examples of the batches.
        tolerances: Lengths of the differences that chance explains, for each batch; none but rounding by default.
    """
    alone, batches = alone.double(), [batch.double() for batch in batches]

    def agree(weights: Sequence[Tensor]) -> bool:
        gaps = [batch - weight @ alone[: len(weight)] for batch, weight in zip(batches, weights, strict=True)]
        if tolerances:
            return all(float(gap.norm()) <= most for gap, most in zip(gaps, tolerances, strict=True))
        return all(bool(gap.abs().max() <= 1e-3 * batch.abs().max()) for gap, batch in zip(gaps, batches, strict=True))

    ones = [alone.new_ones(size) for size in sizes]
    if agree([one / len(one) for one in ones]):
        return "mean"
    if agree(ones):
        return "sum"
    shares = torch.linalg.lstsq(alone @ alone.T, alone @ batches[0], driver="gelsd").solution
    rounding = max([1e-3, *(most / float(batches[0].norm()) for most in tolerances[:1])])
    is_mean = bool((shares >= -rounding).all()) and abs(float(shares.sum()) - 1) <= rounding
    return "weighted" if is_mean and agree([shares[:size] / shares[:size].sum() for size in sizes]) else "coupled"


def kind_on_average(alone: Tensor, batches: Sequence[Tensor], sizes: Sequence[int]) -> Kind:
    """The kind of a random loss that is coupled in single draws, by means over draws.

    A step that draws a sample of its batch, such as windows of series, has a kind only on average.

    Args:
        alone: Gradients of examples in batches of their own in each draw, shape ``(d, n, p)``.
        batches: For each batch, its gradients ``(d, p)``; the batches are those of :func:`kind_by_gradients`.
        sizes: Numbers of examples of the batches.
    """
    means, errors = [batch.mean(0) for batch in batches], [_error(batch) for batch in batches]
    singles = [_error(alone[:, row]) for row in range(alone.shape[1])]
    if any(error > _MAX_ERROR * float(mean.norm()) for mean, error in zip(means, errors, strict=True)):
        return "coupled"  # as far as so few draws tell
    if sum(error**2 for error in singles) / len(singles) < max(errors) ** 2 / 16:
        return "coupled"  # alone, an example is hardly random: draws mix it with others, as mixup does
    squares = [sum(error**2 for error in singles[:size]) / size**2 for size in sizes]
    tolerances = [_NUM_ERRORS * (error**2 + square) ** 0.5 for error, square in zip(errors, squares, strict=True)]
    return kind_by_gradients(alone.mean(0), means, sizes, tolerances)


def _error(draws: Tensor) -> float:
    """The standard error of the mean over draws ``(d, p)``, as the length of a vector."""
    return float((draws.double().var(0).sum() / len(draws)).sqrt())


def weight_by_gradients(together: Tensor, alone: Tensor, partner: Tensor) -> float:
    """The weight of an example where its partner's is 1, from their gradients in a batch of both and alone."""
    apart = (alone - partner).double()
    if apart.norm() <= 1e-6 * partner.double().norm():  # the partner itself
        return 1.0
    share = float((together - partner).double() @ apart / apart.square().sum())
    return share / max(1 - share, 1e-6)


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
