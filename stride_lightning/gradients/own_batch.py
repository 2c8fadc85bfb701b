"""A batch of examples whose loss is the module's own: gradients of their losses, margins and curvature."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, reduce
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from stride_lightning.gradients.kinds import shares_of
from stride_lightning.gradients.own_plan import OwnPlan
from stride_lightning.gradients.signs import NUM_DIRECTIONS, is_exact, random_signs
from stride_lightning.gradients.single import zero_gradients
from stride_lightning.gradients.step_outputs import SkippedStep, StepInputs, StepOutputs
from stride_lightning.model.blocks import Gradients
from stride_lightning.model.capture import Backward


class Run(NamedTuple):
    """One run of ``training_step`` on a batch, in which the examples that are read come first."""

    inputs: StepInputs
    partner: Tensor | None  # slopes of the last example in a batch of its own, where it is a partner
    weight: float | None  # of a single example in a weighted mean, where the partner's is 1; 0: it may have no loss
    refuse: Callable[[Sequence[int]], NoReturn]  # rows among which something is not finite


class Slopes(NamedTuple):
    """Slopes of the losses of all examples of a run at their outputs, and the factor that made them of the batch's."""

    values: Tensor  # (B', C)
    factor: float
    loss: float  # of the batch


@dataclass
class OwnBatch:
    """Examples, and gradients of their losses, as means over runs of ``training_step``.

    Args:
        places, positions: Of the examples.
        runs: The runs.
        plan: How gradients are read.
    """

    places: slice | Tensor
    positions: Tensor
    runs: Sequence[Run]
    plan: OwnPlan
    _backward: Backward
    _slopes: list[Slopes | None] = field(default_factory=list)  # of a single run
    _frees_graph: bool = True

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def shares_inputs(self) -> bool:
        """Whether all gradients of :meth:`curvature` are of one run, with the same inputs of layers."""
        return len(self.runs) == 1

    @property
    def is_exact(self) -> bool:
        """Whether :meth:`curvature` gives a gradient for each output, or for the loss itself."""
        return is_exact(self.plan.num_outputs)

    @property
    def is_skipped(self) -> bool:
        """Whether ``training_step`` skips the batch, or gives its example no weight."""
        return self._forward(self.runs[0]) is None

    @property
    def num_directions(self) -> int:
        """Largest number of gradients of :meth:`curvature`."""
        return len(self.runs) * self.plan.num_directions

    def loss(self) -> Gradients:
        """Gradients of each example's loss."""
        parts = []
        for run in self.runs:
            slopes = self._forward(run)
            parts.append(self._zero if slopes is None else self._pulled(slopes.values / len(self.runs)))
        return reduce(Gradients.plus, parts)

    @cached_property
    def losses(self) -> Tensor:
        """Mean loss of the examples of the batch, once for each, shape ``(B,)``."""
        values = [0.0 if slopes is None else slopes.loss for slopes in map(self._forward, self.runs)]
        if self.plan.kind == "sum":
            values = [value / len(self) for value in values]
        return torch.full((len(self),), sum(values) / len(values), dtype=torch.float64)

    def sum_of_weights(self) -> float:
        """Sum of the weights of the examples in a weighted mean, where the partner's is 1."""
        if self.runs[0].weight is not None:
            return self.runs[0].weight
        slopes = self._forward(self.runs[0])
        return 0.0 if slopes is None else slopes.factor * self.plan.mean_weight - 1

    def margin(self, *, last: bool = True) -> Gradients:
        """Gradients of the outputs towards a lower loss, of unit length at the tap; of minus a random loss."""
        self._frees_graph = last
        return self._margin[0]

    @property
    def margin_weights(self) -> Tensor:
        """Factors that turn :meth:`margin` into gradients of minus the loss; shape ``(B,)``."""
        return self._margin[1]

    @property
    def margin_curvature(self) -> Tensor:
        """Second derivative of each example's loss along :meth:`margin`; shape ``(B,)``."""
        return self._margin[2]

    def check_margin(self) -> None:
        """Refuse to take a margin for log-odds."""
        raise ValueError("A loss of the module's own has no margin; only classifications do.")

    def curvature(self, seed: int, *, last: bool = True) -> Iterator[Gradients]:
        """Gradients whose outer products sum to the Gauss-Newton matrix of each example's loss.

        They are those of :class:`~stride_lightning.gradients.features.Batch`, with the second derivatives of the loss
        at its tap. Where these vanish, the gradient of the loss takes their place, which makes the empirical Fisher
        matrix. Runs that ``training_step`` skips have none.
        """
        for run in self.runs:
            slopes = self._forward(run)
            if slopes is None:
                continue
            roots = curvature_roots(self.plan, slopes) / len(self.runs) ** 0.5
            for column in range(self.plan.num_directions):
                direction = roots[..., 0]
                if self.plan.is_curved and self.is_exact:
                    direction = roots[..., column]
                elif self.plan.is_curved:
                    signs = random_signs(self.positions, column, roots.shape[2], seed, roots) / NUM_DIRECTIONS**0.5
                    direction = torch.zeros_like(slopes.values)
                    direction[: len(self)] = (roots[: len(self)] @ signs[..., None])[..., 0]
                is_last = column == self.plan.num_directions - 1
                yield self._pulled(direction, last=is_last and (last or len(self.runs) > 1))

    @cached_property
    def _margin(self) -> tuple[Gradients, Tensor, Tensor]:
        like = next(iter(self.plan.capture.parameters.values()))
        ones = torch.ones(len(self), dtype=like.dtype, device=like.device)
        if len(self.runs) > 1:
            return self.loss().scaled(-ones), ones, ones
        slopes = self._forward(self.runs[0])
        if slopes is None:
            return self._zero, 0 * ones, 0 * ones
        size = slopes.values.norm(dim=1)
        unit = -slopes.values / size.clamp(min=torch.finfo(size.dtype).tiny)[:, None]
        curved = (curvature_roots(self.plan, slopes) * unit[..., None]).sum(1).square().sum(1)
        return self._pulled(unit, last=self._frees_graph), size[: len(self)], curved[: len(self)]

    def _forward(self, run: Run) -> Slopes | None:
        """Run forward, once where there is a single run; None where ``training_step`` skips the batch."""
        if run.weight == 0:
            return None
        if len(self.runs) == 1 and self._slopes:
            return self._slopes[0]
        try:
            slopes = slopes_of(self.plan, run, self._backward.run(run.inputs, len(run.inputs.keys)))
        except SkippedStep:
            slopes = None
        self._slopes = [slopes]
        return slopes

    def _pulled(self, direction: Tensor, *, last: bool = True) -> Gradients:
        return self._backward.gradients(direction, last=last).rows(slice(0, len(self)))

    @property
    def _zero(self) -> Gradients:
        return zero_gradients(self.plan.capture, len(self))


def slopes_of(plan: OwnPlan, run: Run, outputs: Tensor) -> Slopes:
    """The slopes of the losses of single examples, after a run.

    Raises:
        ValueError: If they are not finite, naming the examples.
    """
    at_tap, size = plan.capture.outputs, len(run.inputs.keys)
    has_rows = isinstance(at_tap, StepOutputs)
    values, loss = (at_tap.slopes(), at_tap.loss.detach()) if has_rows else (torch.ones_like(outputs), outputs)
    loss, is_wrong = float(loss), ~(torch.isfinite(values).all(1) & torch.isfinite(outputs).all(1))
    if is_wrong.any():
        run.refuse(is_wrong.nonzero().flatten().tolist())
    if not math.isfinite(loss):
        run.refuse(range(size))
    if not has_rows:
        factor = 1.0 if run.weight is None else run.weight / plan.mean_weight
        return Slopes(factor * values, factor, loss)
    factor = {"sum": 1.0}.get(plan.kind, float(size))
    if run.partner is not None:
        share = _share(values[-1], run.partner[0])
        if share <= 0:
            raise ValueError(
                "The weights of a weighted mean cannot be told, because the loss of the training example that "
                f"is compared with others (place {plan.partner}) has no gradient at these weights. Pass `loss=`."
            )
        factor = 1 / (share * plan.mean_weight)
    return Slopes(values * factor, factor, loss)


def _share(together: Tensor, alone: Tensor) -> float:
    """The share of an example in a batch: its slopes there over those alone, which may have less padding."""
    if len(together) == len(alone):
        return float(shares_of(together[None].double(), alone[None].double()))
    return float(together.double().norm() / alone.double().norm())


def curvature_roots(plan: OwnPlan, slopes: Slopes) -> Tensor:
    """Roots ``R`` with ``R R'`` the curvature of each example's loss at its outputs, shape ``(B', C, K)``."""
    at_tap = plan.capture.outputs
    if not plan.is_curved or not isinstance(at_tap, StepOutputs):
        return slopes.values[..., None]
    second = at_tap.second_derivatives().double() * slopes.factor
    values, vectors = torch.linalg.eigh((second + second.transpose(1, 2)) / 2)
    return (vectors * values.clamp(min=0).sqrt()[:, None, :]).to(slopes.values)
