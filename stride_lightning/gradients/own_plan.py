"""Planning how the gradients of a module's own loss are read, and finding out how a batch's loss adds up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stride_lightning.data.examples import Examples
from stride_lightning.gradients.kinds import KINDS, Kind
from stride_lightning.gradients.probes import (
    NUM_COMPARED_DRAWS,
    Probes,
    cut,
    find_views_first,
    is_random,
    kind_in_draws,
    kind_of_loss,
    runs,
    says_why,
    slopes_or_none,
    why_flat,
)
from stride_lightning.gradients.signs import count_directions
from stride_lightning.gradients.single import (
    LossOutputs,
    SingleCapture,
    gradient_of,
    kind_by_gradients,
    kind_on_average,
)
from stride_lightning.gradients.step_outputs import NoRows, StepInputs, StepOutputs
from stride_lightning.model.capture import Capture, Effort, Outputs
from stride_lightning.model.layers import plain_name
from stride_lightning.model.plan import PROBE_BYTES, plan_capture, probe_places
from stride_lightning.model.tap import find_tap
from stride_lightning.model.weights import moved
from stride_lightning.tasks.own_loss import FunctionLoss, OwnLoss
from stride_lightning.tasks.step_checks import check_step
from stride_lightning.tasks.training_step import Mode, Moment, TrainingStep

#: Names of the modules whose parameters count, from outputs and a batch of their inputs.
ChooseLayers = Callable[[Outputs, Any], Sequence[str] | None]

#: Examples whose gradients in all parameters tell the kind of a loss; fewer of a large model.
NUM_SINGLE = 16
#: Draws over which a random loss is averaged.
NUM_DRAWS = 8


@dataclass
class OwnPlan:
    """How the gradients of a module's own loss are read.

    Args:
        task: The loss.
        step: The loss as a function of batches.
        capture: Reads gradients of functions of the tap's outputs; of single examples where there is no tap.
        effort: What an example takes.
        kind: How a batch's loss is made of those of its examples.
        mode: The mode in which it is defined.
        num_draws: Draws over which a random loss is averaged; 1 for any other.
        partner: Place of the training example that stands in every batch of a weighted mean.
        is_padded: Whether outputs of an example are wider in batches with others.
        notes: What there is to say beside the kind.
    """

    task: OwnLoss
    step: TrainingStep
    capture: Capture
    effort: Effort
    kind: Kind
    mode: Mode
    num_draws: int
    partner: int
    is_padded: bool
    #: Why gradients of examples make the curvature (Fisher); empty where it is that of the loss at the tap's outputs.
    flat_because: str
    num_outputs: int  # along which curvature is taken
    notes: tuple[str, ...]
    #: Mean weight of the training examples in a weighted mean, where the partner's is 1.
    mean_weight: float = 1.0

    @property
    def is_curved(self) -> bool:
        """Whether the curvature is that of the loss at the tap's outputs."""
        return not self.flat_because

    @property
    def num_directions(self) -> int:
        """Gradients that make the curvature of an example."""
        return count_directions(self.num_outputs, 1)

    @property
    def has_rows(self) -> bool:
        """Whether the gradients of all examples of a batch are read at once."""
        return not isinstance(self.capture, SingleCapture)

    def described(self) -> str:
        """One line for the log and the metadata."""
        is_function = isinstance(self.task, FunctionLoss)  # which gives the losses of examples itself
        parts = [*([] if is_function and self.kind == "sum" else [KINDS[self.kind]]), *self.notes]
        if self.mode == "eval":
            parts.append("taken in eval mode, because training mixes the examples of a batch")
        if self.num_draws > 1:
            parts.append(f"a mean over {self.num_draws} draws of its random numbers")
        if not self.has_rows:
            parts.append("read one example at a time")
        if self.is_curved:
            parts.append(f"curvature: Gauss-Newton, at {self.num_outputs} outputs of an example")
        else:
            parts.append(f"curvature: empirical Fisher matrix, because {self.flat_because}")
        return "; ".join(parts)


def plan_own_loss(
    task: OwnLoss,
    model: nn.Module,
    train: Examples,
    device: torch.device,
    *,
    moment: Moment | None,
    choose_layers: ChooseLayers,
    like: Capture | None = None,
    mode: Mode = "train",
) -> OwnPlan:
    """Look at a module's own loss on a few training examples, and plan how its gradients are read.

    Args:
        task: The loss.
        model: In eval mode on ``device``.
        train: The training examples.
        device: Device of the computation.
        moment: The moment of training.
        choose_layers: Names of the modules whose parameters count, from the outputs and a batch.
        like: A capture with whose gradients those of the loss are compared.
        mode: The mode in which the loss is defined; where training mixes the examples of a batch, it is eval mode.

    Raises:
        ValueError: If no example has a loss, or it is of a kind that is not known.
    """
    probes, step = Probes(model, train, device), task.of(model, moment, mode)
    with says_why(step):
        probes.leave_out_skipped(step)
        every = range(len(probes))
        batches = [probes.batch(rows)[:2] for rows in (every, every[: max(1, len(every) // 2)])]
        notes = check_step(step, batches)
    plan = _first(task, model, probes, list(dict.fromkeys((mode, "eval"))), moment, choose_layers, like)
    return replace(plan, notes=(*plan.notes, *notes))


def _first(
    task: OwnLoss,
    model: nn.Module,
    probes: Probes,
    modes: Sequence[Mode],
    moment: Moment | None,
    choose_layers: ChooseLayers,
    like: Capture | None,
) -> OwnPlan:
    """The plan in the first mode in which examples do not depend on each other."""
    problem, coupled = None, None
    for planned in (_planned, _one_by_one, partial(_planned, reads_direct=False)):
        for mode in modes:
            try:
                plan = planned(task, model, probes, mode, moment, choose_layers, like)
            except NoRows as error:
                problem = problem or error
                continue
            if plan.kind != "coupled":
                return plan
            coupled = coupled or (plan if plan.has_rows else None)
        if coupled is not None:
            return coupled
    raise ValueError(
        f"{task.of(model, moment).name} does not tell the examples of a batch apart ({problem}), and its loss couples "
        "them: it is no mean and no sum of the losses of single examples. Pass `loss=`, a function of (model, batch) "
        "that returns the loss of each example, shape (B,)."
    )


def _planned(
    task: OwnLoss,
    model: nn.Module,
    probes: Probes,
    mode: Mode,
    moment: Moment | None,
    choose_layers: ChooseLayers,
    like: Capture | None,
    *,
    reads_direct: bool = True,
) -> OwnPlan:
    """The plan where rows of a batch are examples.

    Vectors that the loss uses by themselves, as a temperature that is learnt, are read one example at a time, or left
    out of a coupled loss.
    """
    step = task.of(model, moment, mode)
    every = list(range(len(probes)))
    whole, half = probes.batch(every), probes.batch(every[: max(1, len(every) // 2)])
    with says_why(step):
        tap = find_tap(model, lambda: step(*whole), lambda: step(*half))
    matrices = {plain_name(name) for name, value in model.named_parameters() if value.ndim > 1}
    if tap is None or (tap.direct and (reads_direct or matrices & {*tap.direct})):
        raise NoRows("the loss uses parameters outside of modules")
    outputs = StepOutputs(model, step, tap)
    alone = [probes.batch([row]) for row in every]
    slopes = [slopes_or_none(outputs, inputs) for inputs in alone]
    num_parameters = sum(value.numel() for value in model.parameters() if value.requires_grad)
    with outputs.without_loss():
        usable = [row for row in every if slopes[row] is not None or runs(outputs, alone[row])]
        if not usable:
            raise NoRows("no single example runs through the model")
        chosen = [usable[place] for place in probe_places(len(usable), max(1, num_parameters))]
        together, singles = probes.batch(chosen), [alone[row] for row in chosen]
        outputs.views_first = find_views_first(outputs, together, singles)
        try:
            widths = {outputs(inputs).shape[1] for inputs in (together, *singles)}
            if is_padded := len(widths) > 1:
                singles = [cut(together, slice(row, row + 1)) for row in range(len(chosen))]
                if len({outputs(inputs).shape[1] for inputs in (together, *singles)}) > 1:
                    raise ValueError("the outputs for an example change with the rest of its batch")
            capture = plan_capture(outputs, singles, together, choose_layers(outputs, together), like, tap.direct)
            effort = capture.effort(together, len(chosen))
        except (ValueError, TypeError, IndexError) as error:
            mixes = (
                "training draws random numbers that belong to the batch and not to single examples: it mixes examples, "
                "as mixup does, or draws from NumPy or a generator of its own"
            )
            raise NoRows(mixes if is_random(step, whole) else str(error)) from error
    sizes = (max(2, len(every) // 6), 2)
    parts = [probes.batch(every[:size]) for size in sizes]
    if is_padded:  # alike in all batches, for outputs of one width
        alone = [cut(whole, slice(row, row + 1)) for row in every]
        parts = [cut(whole, slice(0, size)) for size in sizes]
        slopes = [slopes_or_none(outputs, inputs) for inputs in alone]
    with says_why(step):
        kind = kind_of_loss(outputs, whole, parts, slopes)
        if kind is None:
            with moved(model):
                elsewhere = [slopes_or_none(outputs, inputs) for inputs in alone]
                kind = kind_of_loss(outputs, whole, parts, elsewhere) or "mean"
    notes = ("the penalty on weights belongs to no example",) if tap.penalised else ()
    if tap.direct:
        notes = (f"examples have no share in the gradient of {', '.join(tap.direct)}, which the loss uses by itself",)
    num_draws = NUM_DRAWS if is_random(step, whole) else 1
    if num_draws > 1 and not is_padded:
        with says_why(step):
            kind = kind_in_draws(outputs, probes, kind)
    largest = [0.0 if one is None else float(one.abs().max()) for one in slopes]
    partner = largest.index(max(largest))
    flat_because = why_flat(outputs, whole, kind, is_padded=is_padded)
    return OwnPlan(
        task,
        step,
        capture,
        effort,
        kind,
        mode,
        num_draws,
        probes.places[partner],
        is_padded,
        flat_because,
        1 if flat_because else max(widths),
        notes,
    )


def _one_by_one(
    task: OwnLoss,
    model: nn.Module,
    probes: Probes,
    mode: Mode,
    moment: Moment | None,
    choose_layers: ChooseLayers,
    like: Capture | None,
) -> OwnPlan:
    """The plan where rows of a batch cannot be told apart: every example in a batch of its own."""
    step = task.of(model, moment, mode)
    capture = SingleCapture(model, step, choose_layers(LossOutputs(model, step), probes.batch([0])), like)
    few = list(range(min(len(probes), max(2, min(NUM_SINGLE, PROBE_BYTES // (8 * capture.num_parameters))))))
    sizes = (len(few), max(1, len(few) // 2))
    with says_why(step):
        num_draws = NUM_DRAWS if is_random(step, probes.batch(few)) else 1
        draws = range(NUM_COMPARED_DRAWS if num_draws > 1 else 1)  # some may mix examples, others not
        alone = torch.stack(
            [torch.cat([_gradient_alone(capture, probes.batch([row], draw)) for row in few]) for draw in draws]
        )
        batches = [
            torch.stack([gradient_of(capture, probes.batch(few[:size], draw)).dense()[0] for draw in draws])
            for size in sizes
        ]
        kinds: set[Kind] = {kind_by_gradients(alone[draw], [batch[draw] for batch in batches], sizes) for draw in draws}
        kind: Kind = kinds.pop() if len(kinds) == 1 else "coupled"
        if kind == "coupled" and num_draws > 1:
            kind = kind_on_average(alone, batches, sizes)
        tap = find_tap(model, lambda: step(*probes.batch(few)), lambda: step(*probes.batch(few[: sizes[1]])))
    effort = capture.effort(probes.batch([0]), 1)
    partner = probes.places[int(alone.mean(0).norm(dim=1).argmax())]
    flat_because = "outputs of single examples cannot be told apart in a batch"
    notes = ("the penalty on weights is in the loss of every example",) if tap is not None and tap.penalised else ()
    return OwnPlan(task, step, capture, effort, kind, mode, num_draws, partner, False, flat_because, 1, notes)


def _gradient_alone(capture: SingleCapture, inputs: StepInputs) -> Tensor:
    """The gradient of an example's loss, shape ``(1, p)``; zero where it has none, or one that is not finite."""
    gradient = gradient_of(capture, inputs).dense()
    return gradient if torch.isfinite(gradient).all() else torch.zeros_like(gradient)
