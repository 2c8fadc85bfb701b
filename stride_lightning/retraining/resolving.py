"""The loss that training minimised: a likelihood, the module's own, or a function of the user's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from stride_lightning.data.examples import Examples
from stride_lightning.model.weights import borrowed
from stride_lightning.tasks.inference import check_task, infer_task_of
from stride_lightning.tasks.likelihoods import Task
from stride_lightning.tasks.measures import check_function, function_identity
from stride_lightning.tasks.own_loss import FunctionLoss, OwnLoss, RowFunction


def check_loss(task: object, loss: object) -> None:
    """Refuse a task that is none, a loss that is no function, and both at once."""
    check_function(loss, "loss")
    if task is not None and loss is not None:
        raise ValueError("Give either `task` or `loss`: each says what training minimised.")
    if not isinstance(task, OwnLoss):
        check_task(task)


def resolved_task(
    model: nn.Module, train: Examples, head: Any, *, task: Task | OwnLoss | None, loss: RowFunction | None
) -> Task | OwnLoss:
    """The task that was given, or that fits the first batch; the module's own loss where none does."""
    if loss is not None:
        return FunctionLoss(loss)
    if isinstance(task, OwnLoss) and not hasattr(model, "training_step"):
        raise ValueError(
            f"{task!r} is what training_step computes, and {type(model).__name__} has none. Pass `loss=fn`."
        )
    if task is not None:
        return task
    with borrowed(model, None, None), torch.no_grad(), train.naming(0):
        try:
            return infer_task_of(head, model)
        except Exception:
            if not hasattr(model, "training_step"):
                raise
    return OwnLoss()


def functions_of(**functions: Callable[..., Any] | None) -> dict[str, Any]:
    """Module, name and source hash of the functions that were given, by argument, under one key; else nothing."""
    identities = {name: function_identity(function) for name, function in functions.items() if function is not None}
    return {"functions": identities} if identities else {}
