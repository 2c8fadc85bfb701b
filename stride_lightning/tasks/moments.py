"""The moment of training at which a loss is taken."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import nn

from stride_lightning.model.weights import attached_trainer


@dataclass(frozen=True)
class Moment:
    """What a Trainer says of the last step that was trained at a module's weights; None where it does not say it."""

    current_epoch: int = 0
    global_step: int = 0
    max_epochs: int | None = None
    num_training_batches: int | None = None
    estimated_stepping_batches: int | None = None


#: The names under which a Trainer says it.
MOMENT_NAMES = frozenset(field.name for field in fields(Moment))


def moment_of(model: nn.Module, checkpoint: Mapping[str, Any] | None) -> Moment | None:
    """The moment of the last step that was trained at a model's weights; None where nothing says it.

    Args:
        model: A LightningModule, which may be attached to a Trainer.
        checkpoint: What a Trainer saved, or the info of a record; None for the weights that the model has.

    Example:
        >>> moment = moment_of(nn.Linear(2, 1), {"epoch": 3, "global_step": 80})
        >>> moment.current_epoch, moment.global_step
        (3, 79)
    """
    trainer = attached_trainer(model)
    if checkpoint is None:
        if trainer is None or not trainer.global_step:
            return None
        epoch, steps = _last_epoch(trainer.fit_loop.epoch_progress.current.ready), trainer.global_step
    elif "moment" in checkpoint:
        return Moment(**checkpoint["moment"])
    else:
        steps = checkpoint.get("global_step", checkpoint.get("step"))
        if steps is None or "epoch" not in checkpoint:
            return None
        loops = checkpoint.get("loops") or {}
        progress = loops.get("fit_loop", {}).get("epoch_progress", {}).get("current", {})
        epoch = _last_epoch(progress["ready"]) if "ready" in progress else checkpoint["epoch"]
    return Moment(epoch, max(0, int(steps) - 1), **_lengths(trainer))


def first_moment(model: nn.Module) -> Moment:
    """The moment before the first step of a fit."""
    return replace(Moment(), **_lengths(attached_trainer(model)))


def _last_epoch(num_begun: int) -> int:
    """The epoch that began last. After a fit, ``current_epoch`` is the one that never came."""
    return max(0, num_begun - 1)


def _lengths(trainer: Any) -> dict[str, int | None]:
    if trainer is None:
        return {}
    known = {"max_epochs": trainer.max_epochs}
    # A Trainer that has not read its loader yet would do it now.
    if trainer.train_dataloader is not None:
        known["num_training_batches"] = _whole(trainer.num_training_batches)
        known["estimated_stepping_batches"] = _whole(trainer.estimated_stepping_batches)
    return known


def _whole(number: float) -> int | None:
    return int(number) if number < float("inf") else None
