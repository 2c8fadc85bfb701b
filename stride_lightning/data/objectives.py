"""Which loss stands for what a model was trained on: a likelihood, the module's own, or a function of the user's."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import nn

from stride_lightning.data.agreement import agree
from stride_lightning.data.examples import Examples, first_batch
from stride_lightning.model.layers import in_precision_of
from stride_lightning.tasks.inference import check_task
from stride_lightning.tasks.likelihoods import Task
from stride_lightning.tasks.measures import Argument, check_function, check_rows_function
from stride_lightning.tasks.own_loss import FunctionLoss, OwnLoss, RowFunction, name_of
from stride_lightning.tasks.training_step import Moment

#: Examples on which functions of the user's are tried.
_NUM_TRIED = 4


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


def says_rows_loss(task: Task | OwnLoss | None, loss: RowFunction | None) -> bool:
    """Whether the user says what the loss of a single example is, without a look at ``training_step``."""
    return loss is not None or isinstance(task, Task)


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
    if isinstance(task, OwnLoss):
        return Objective(task, "the module's own loss, as `task` says")
    if loss is not None:
        check_rows(loss, "loss", model, examples, device)
        return Objective(FunctionLoss(loss), f"{name_of(loss)}, as `loss` says")
    own_loss = OwnLoss()
    step = own_loss.of(model, moment) if _has_training_step(model) else None
    if task is not None:
        if step is not None and agree(model, examples, device, step, batch_size=batch_size, only=task).is_other:
            warnings.warn(
                f"The training_step of {type(model).__name__} minimises another loss than {task!r}, which `task` "
                "says: their gradients differ by more than a factor. Scores are about the loss of the task. Leave "
                "out `task` for the loss that training_step computes.",
                stacklevel=2,
            )
        return Objective(task, f"{task!r}, as `task` says")
    agreement = agree(model, examples, device, step, batch_size=batch_size)
    if agreement.task is not None:
        return Objective(agreement.task, agreement.reason)
    return Objective(own_loss, f"the module's own loss ({agreement.reason})")


def _has_training_step(model: nn.Module) -> bool:
    """Whether a class of the user's defines ``training_step``."""
    step = getattr(model, "training_step", None)
    return step is not None and not step.__qualname__.startswith("LightningModule.")


def check_rows(
    function: RowFunction,
    argument: Argument,
    model: nn.Module,
    examples: Examples,
    device: torch.device,
    *,
    differentiable: bool = True,
) -> None:
    """Try a function of the user's on a few examples: as a batch, and each alone.

    Raises:
        ValueError: If its rows are not numbers of single examples; see
            :func:`~stride_lightning.tasks.measures.check_rows_function`.
    """
    few = examples.subset(range(min(_NUM_TRIED, len(examples))))
    parts = [few, *(few.subset([place]) for place in range(len(few)))]
    whole, *pieces = (in_precision_of(model, first_batch(part, len(part), device)) for part in parts)
    check_rows_function(function, model, whole, pieces, argument=argument, differentiable=differentiable)
