"""Which loss stands for what a model was trained on: a likelihood, the module's own, or a function of the user's."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from stride_lightning.data.agreement import agree
from stride_lightning.data.examples import Examples
from stride_lightning.tasks.inference import check_task
from stride_lightning.tasks.likelihoods import Task
from stride_lightning.tasks.measures import check_function
from stride_lightning.tasks.own_loss import FunctionLoss, OwnLoss, RowFunction, name_of
from stride_lightning.tasks.training_step import Moment


class Objective(NamedTuple):
    """The loss that stands for training, and the reason in one line."""

    task: Task | OwnLoss
    reason: str


def check_objective(task: object, loss: object) -> None:
    """Refuse a task or a loss of a wrong type, and both together."""
    check_function(loss, "loss")
    if task is not None and loss is not None:
        raise ValueError("`task` and `loss` both say what training minimised. Give only one of them.")
    if not isinstance(task, OwnLoss):
        check_task(task)


def resolve_objective(
    model: nn.Module,
    examples: Examples,
    device: torch.device,
    *,
    task: Task | OwnLoss | None,
    loss: RowFunction | None,
    moment: Moment | None,
    batch_size: int,
) -> Objective:
    """The loss that stands for what a model was trained on.

    Args:
        model: In eval mode on ``device``.
        examples: The training examples.
        device: Where the model is.
        task: What the user says.
        loss: The user's own function; not together with ``task``.
        moment: The moment of training.
        batch_size: Most examples of a batch.
    """
    if task is not None:
        name = "the module's own loss" if isinstance(task, OwnLoss) else repr(task)
        return Objective(task, f"{name}, as `task` says")
    if loss is not None:
        return Objective(FunctionLoss(loss), f"{name_of(loss)}, as `loss` says")
    own = OwnLoss()
    step = own.of(model, moment) if hasattr(model, "training_step") else None
    agreement = agree(model, examples, device, step, batch_size=batch_size)
    if agreement.task is not None:
        return Objective(agreement.task, agreement.reason)
    return Objective(own, f"the module's own loss ({agreement.reason})")
