"""How a batch's loss is made of those of its examples: a mean, a sum, a mean with weights, or by coupling them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from stride_lightning.data.examples import Examples
from stride_lightning.model.layers import in_precision_of
from stride_lightning.retraining.batchability import tried_out
from stride_lightning.runtime.checks import first_line
from stride_lightning.tasks.own_loss import FunctionLoss, OwnLoss
from stride_lightning.tasks.training_step import Mode, Moment, TrainingStep

#: ``"weighted"``: a mean with weights of the examples, which a batch of one divides away.
Kind = Literal["mean", "sum", "weighted", "coupled"]

#: Examples on which the kind is tested.
NUM_PROBES = 12
#: Numbers that stand for a gradient.
_SKETCH = 2**16


@dataclass(frozen=True)
class LossKind:
    """The kind of a loss, the mode in which it is defined, and whether it draws random numbers."""

    kind: Kind
    mode: Mode
    is_random: bool


def kind_of_loss(
    task: OwnLoss, model: nn.Module, probes: Examples, device: torch.device, moment: Moment | None
) -> LossKind:
    """Compare gradients of batches of different sizes, at shifted weights; the model stays as it is.

    Where training mixes the examples of a batch and evaluation does not (mixup), eval mode is taken.

    Args:
        task: The loss.
        model: The model, on ``device``.
        probes: A few examples of all kinds.
        device: Where to compute.
        moment: The moment of training.

    Raises:
        ValueError: If the loss cannot be computed for the probes, or has no gradient there.
    """
    with tried_out(model):
        result = _kind_at_these_weights(task, model, probes, device, moment)
    # Shifted weights may be out of a loss's domain.
    result = result or _kind_at_these_weights(task, model, probes, device, moment)
    if result is None:
        raise ValueError(
            f"{task!r} of {type(model).__name__} gave no loss with a finite gradient for {len(probes)} training "
            "examples: nothing, a loss without gradient, or NaN. Pass `loss=fn` with fn(model, batch) -> (B,)."
        )
    return result


def _kind_at_these_weights(
    task: OwnLoss, model: nn.Module, probes: Examples, device: torch.device, moment: Moment | None
) -> LossKind | None:
    """The kind; None if there is no finite gradient at the present weights."""
    every, first = torch.arange(len(probes)), None
    modes: tuple[Mode, ...] = ("train", "eval")
    for mode in modes:
        step = task.of(model, moment, mode)

        def gradient_of(places: Tensor, *, of: Callable[..., Tensor | None] = gradient, **how: int) -> Tensor | None:
            (batch,) = probes.drawn([places], 0, device)
            return of(step, in_precision_of(model, batch), probes.positions[places], **how)  # noqa: B023

        try:
            whole = gradient_of(every)
        except Exception as error:
            if f"training_step of {type(model).__name__}" in str(error):  # it says already what is wrong
                raise
            raise ValueError(
                f"The loss of {type(model).__name__} cannot be computed: {task!r} failed on a batch of {len(probes)} "
                f"training examples ({type(error).__name__}: {first_line(error)}). Pass `loss=fn` with "
                "fn(model, batch) -> (B,), or the network inside it and `optimizer=`."
            ) from error
        if whole is None or not whole.any():
            return first
        other = gradient_of(every, draw=1)
        is_random = other is None or not torch.equal(whole, other)
        # Rows of a function are examples, and training is on their mean.
        kind = (
            "mean"
            if isinstance(task, FunctionLoss)
            else _kind(partial(gradient_of, of=gradient_or_none), whole, len(probes), device)
        )
        first = first or LossKind(kind, mode, is_random)
        if kind != "coupled":
            return LossKind(kind, mode, is_random)
    return first


def gradient(step: TrainingStep, batch: object, keys: Tensor, draw: int = 0) -> Tensor | None:
    """The gradient of a batch's loss in all parameters, or sums of it; None if there is none that is finite."""
    loss = step(batch, keys, draw)
    trained = [parameter for parameter in step.model.parameters() if parameter.requires_grad]
    if loss is None:  # a batch that is skipped has the loss 0
        return torch.zeros(min(_SKETCH, sum(parameter.numel() for parameter in trained)), dtype=torch.float64)
    if not loss.requires_grad or not torch.isfinite(loss):
        return None
    parts = torch.autograd.grad(loss, trained, materialize_grads=True)
    flat = _sketch(torch.cat([part.detach().flatten().float() for part in parts]))
    return flat if torch.isfinite(flat).all() else None


def gradient_or_none(step: TrainingStep, batch: object, keys: Tensor) -> Tensor | None:
    """The same; None too where the step fails: it takes no single example, or ignores all and divides by zero."""
    try:
        return gradient(step, batch, keys)
    except Exception:
        return None


def _sketch(flat: Tensor) -> Tensor:
    """At most ``_SKETCH`` numbers: sums with random signs, which keep linear relations; double on the CPU."""
    if len(flat) > _SKETCH:
        generator = torch.Generator(flat.device).manual_seed(0)
        signs = torch.randint(2, flat.shape, generator=generator, device=flat.device, dtype=torch.int8) * 2 - 1
        padded = torch.nn.functional.pad(flat * signs, (0, -len(flat) % _SKETCH))
        flat = padded.view(-1, _SKETCH).sum(0)
    return flat.cpu().double()


def weight_ratio(alone: Tensor | None, together: Tensor | None, partner: Tensor) -> tuple[float, Tensor]:
    """The weight of examples over that of a partner, from three gradients, and what the ratio leaves unexplained.

    With ``together = (a alone + p partner) / (a + p)`` the ratio is ``a / p``.

    Example:
        >>> one, other = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
        >>> ratio, rest = weight_ratio(one, (3 * one + other) / 4, other)
        >>> ratio, rest.abs().max().item()
        (3.0, 0.0)
    """
    if together is None:
        return float("nan"), partner
    if alone is None:  # no loss of its own: its weight is zero
        return 0.0, together - partner
    towards, gap = together - partner, alone - together
    norm = float(gap.square().sum())
    if norm <= 1e-16 * float(alone.square().sum()):  # a copy of the partner
        return 1.0, towards
    ratio = float(towards @ gap) / norm
    return ratio, towards - ratio * gap


def _kind(gradient_of: Callable[[Tensor], Tensor | None], whole: Tensor, num: int, device: torch.device) -> Kind:
    """The kind, from gradients of a batch of ``num`` examples, of half of them, of each alone and of pairs."""
    tolerance = 1e-4 if device.type == "cpu" else 1e-3  # convolutions on a GPU use TF32
    half = max(1, num // 2)
    part = gradient_of(torch.arange(half))
    alone = [gradient_of(torch.tensor([place])) for place in range(num)]
    known = [each for each in alone if each is not None and each.any()]
    if part is None or not known:
        return "coupled"
    largest = max(float(each.abs().max()) for each in (whole, *known))

    def equal(one: Tensor, other: Tensor) -> bool:
        return float((one - other).abs().max()) <= tolerance * largest

    if all(each is not None for each in alone):
        stacked = torch.stack(alone)  # type: ignore[arg-type]
        if equal(whole, stacked.mean(0)) and equal(part, stacked[:half].mean(0)):
            return "mean"
        if num > 2:
            # A penalty on weights is in the loss of every example, but only once in that of a batch.
            penalty = (stacked.sum(0) - whole) / (num - 1)
            if equal(part / half, (stacked[:half].sum(0) - (half - 1) * penalty) / half):
                return "sum"
    return "weighted" if _is_weighted(gradient_of, alone, (whole, part), equal) else "coupled"


def _is_weighted(
    gradient_of: Callable[[Tensor], Tensor | None],
    alone: Sequence[Tensor | None],
    batches: tuple[Tensor, Tensor],
    equal: Callable[[Tensor, Tensor], bool],
) -> bool:
    """Whether every batch's gradient is a mean with weights that pairs with one partner tell."""
    partner = next(place for place, each in enumerate(alone) if each is not None and each.any())
    weights, gradients = [], []
    for place, each in enumerate(alone):
        ratio = 1.0
        if place != partner:
            ratio, rest = weight_ratio(each, gradient_of(torch.tensor([place, partner])), alone[partner])  # type: ignore[arg-type]
            if not ratio > -1e-6 or not equal(rest / (1 + ratio), torch.zeros_like(rest)):
                return False
        weights.append(ratio)
        gradients.append(torch.zeros_like(batches[0]) if each is None else each)
    stacked, factors = torch.stack(gradients), torch.tensor(weights, dtype=torch.float64)
    for batch, size in zip(batches, (len(alone), max(1, len(alone) // 2)), strict=True):
        total = factors[:size].sum()
        if not total > 0 or not equal(batch, (factors[:size, None] * stacked[:size]).sum(0) / total):
            return False
    return True
