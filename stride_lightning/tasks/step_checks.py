"""What the loss of a training step depends on besides the batch and the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from stride_lightning.tasks.moments import Moment
from stride_lightning.tasks.training_step import TrainingStep

_LOSS = "say what the loss is: pass `loss=fn` with fn(model, batch) -> (B,)"


def check_step(step: TrainingStep, batches: Sequence[tuple[Any, Tensor]]) -> list[str]:
    """Refuse a ``training_step`` that gives no loss of a batch; return what has to be said of its loss.

    It takes up to 7 runs of the first batch that the step does not skip. Batches of two different sizes also tell
    which random numbers belong to examples.

    Args:
        step: The step.
        batches: A few batches on the device, each with the numbers of its examples.

    Returns:
        Sentences for the log and the metadata, none if there is nothing special.

    Raises:
        ValueError: If the step skips all batches, gives a loss that is not finite or none at all, draws random numbers
            that no seed controls, or depends on the moment of training where that is unknown.
    """
    name = step.name
    losses = [step(batch, keys) for batch, keys in batches]
    trained = [number for number, loss in enumerate(losses) if loss is not None]
    if not trained:
        raise ValueError(
            f"{name} returned None for all of {len(losses)} batches, so nothing was trained on them. Return a loss."
        )
    (batch, keys), loss = batches[trained[0]], losses[trained[0]]
    assert loss is not None
    if not torch.isfinite(loss):
        raise ValueError(
            f"{name} returned {loss.item():g} as its loss of a batch. Check the batch and the weights for values that "
            f"are not finite, and the loss for a logarithm or a division by 0. Or {_LOSS}."
        )
    again = step(batch, keys)
    # Batches of two sizes tell which random numbers belong to examples: the first run may not have known it.
    if _differ(step, loss, again) and _differ(step, again, step(batch, keys)):
        raise ValueError(
            f"{name} gives another loss when it runs again on the same batch under the same seeds. It draws from a "
            "generator of its own that nothing seeds, or uses the time or a counter outside of the module. Draw with "
            f"torch's functions and its default generator, or {_LOSS}."
        )
    loss, notes = again, []
    if step.has_generators:
        notes.append(
            "its random numbers come from a generator that it holds, so they belong to the batch and not to examples"
        )
    if _differ(step, loss, _or_none(step.at(step.moment, batch_idx=1), batch, keys)):
        notes.append("it depends on batch_idx; it is read at batch_idx=0")
    if depends_on_moment(step, batch, keys):
        if step.moment is None:
            raise ValueError(
                f"{name} depends on the epoch or the step of training, which bare weights do not tell. Pass the module "
                f"with its Trainer, a checkpoint of Lightning (`ckpt_path=`), or {_LOSS}."
            )
        moment = f"epoch {step.moment.current_epoch}, step {step.moment.global_step}"
        notes.append(f"it changes during training; it is taken at the last step ({moment})")
    return notes


def depends_on_moment(step: TrainingStep, batch: Any, keys: Tensor) -> bool:
    """Whether a loss changes with the epoch or the step of training; compared at its moment and at three others."""
    moment = step.moment or Moment()
    epoch, number = moment.current_epoch, moment.global_step
    others = [(0, 0)] if epoch or number else []
    others += [(epoch + 1, number + 1), (2 * epoch + 10, 2 * number + 1000)]
    loss = step.at(moment)(batch, keys)
    return any(
        _differ(step, loss, _or_none(step.at(replace(moment, current_epoch=e, global_step=s)), batch, keys))
        for e, s in others
    )


def _or_none(step: TrainingStep, batch: Any, keys: Tensor) -> Tensor | None:
    """The loss; None where the step fails, as with a list that has an entry for each epoch of the training."""
    try:
        return step(batch, keys)
    except (LookupError, ValueError, TypeError, ArithmeticError, RuntimeError):
        return None


def _differ(step: TrainingStep, one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two losses of the same batch differ by more than rounding, in value or in gradient."""
    if one is None or other is None:
        return one is not other
    parameters = [parameter for parameter in step.model.parameters() if parameter.requires_grad]
    tolerance = 1e-6 if one.device.type == "cpu" else 1e-4
    options: dict[str, Any] = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    pairs = [(one.detach(), other.detach())]
    pairs += zip(*(torch.autograd.grad(loss, parameters, **options) for loss in (one, other)), strict=True)
    return any(not (a - b).norm() <= tolerance * (a.norm() + b.norm()) for a, b in pairs if a.numel())
