"""The optimizer and schedule of a model's ``configure_optimizers``, read without a Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import lightning.pytorch as L
import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from stride_lightning.retraining.modules import tree_of

#: A function that makes the optimizer of a model's parameters.
MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]

#: Optimizers with elementwise updates: they train stacked models as they would train each model alone.
TOGETHER = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)


class CannotBatch(Exception):
    """The reason why models cannot train together; the message is a clause that completes "because"."""


@dataclass
class Optimization:
    """An optimizer and its schedule, if any, which advances every ``frequency`` epochs or steps (the ``interval``)."""

    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler | None = None
    interval: str = "epoch"
    frequency: int = 1

    def advance(self, interval: str, count: int) -> None:
        """Advance the scheduler after ``count`` epochs, or after ``count`` steps of this epoch."""
        if self.scheduler is not None and interval == self.interval and count % self.frequency == 0:
            self.scheduler.step()

    @property
    def counts_steps(self) -> str | None:
        """Name of the optimizer or scheduler, if it depends on the number of steps of a model; else None."""
        groups = self.optimizer.param_groups
        if any("betas" in group or group.get("dampening") for group in groups):
            return type(self.optimizer).__name__
        return type(self.scheduler).__name__ if self.scheduler is not None and self.interval == "step" else None

    def describe(self) -> str:
        """All settings, to identify a run."""
        if self.scheduler is None:
            return repr(self.optimizer)
        state = {name: value for name, value in self.scheduler.state_dict().items() if _is_plain(value)}
        return f"{self.optimizer!r} {type(self.scheduler).__name__} {state} every {self.frequency} {self.interval}"


class Several:
    """Several optimizers as one, as a module that optimizes by hand may have them."""

    def __init__(self, optimizers: list[torch.optim.Optimizer]) -> None:
        self.optimizers = optimizers
        self.param_groups = [group for optimizer in optimizers for group in optimizer.param_groups]

    def zero_grad(self) -> None:
        """Clear the gradients of all."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def step(self) -> None:
        """One step of each; parameters without gradient stay."""
        for optimizer in self.optimizers:
            optimizer.step()

    def __repr__(self) -> str:
        return " and ".join(map(repr, self.optimizers))


def read_optimizer(model: nn.Module, make_optimizer: MakeOptimizer | None) -> torch.optim.Optimizer | Several:
    """The optimizer of a model's training without its schedule, at the initial learning rate.

    Raises:
        CannotBatch: If it needs a Trainer.
    """
    if make_optimizer is not None:
        return read_optimization(model, make_optimizer).optimizer
    optimizers, _ = _configured(model)
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = group.get("initial_lr", group["lr"])  # a schedule may have begun with a warm-up
    if not optimizers:
        raise CannotBatch("configure_optimizers returns no optimizer")
    return optimizers[0] if len(optimizers) == 1 else Several(optimizers)


def read_optimization(model: nn.Module, make_optimizer: MakeOptimizer | None) -> Optimization:
    """The optimizer for a model's training, and its scheduler if ``configure_optimizers`` returns one.

    Raises:
        CannotBatch: If they need a Trainer.
    """
    if make_optimizer is not None:
        optimizer = make_optimizer(model.parameters())
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"`optimizer` must return a torch optimizer, got {type(optimizer).__name__}.")
        return Optimization(optimizer)
    optimizers, schedules = _configured(model)
    if len(optimizers) != 1 or len(schedules) > 1:
        raise CannotBatch(f"configure_optimizers returns {len(optimizers)} optimizers and {len(schedules)} schedulers")
    if not schedules:
        return Optimization(optimizers[0])
    config = schedules[0] if isinstance(schedules[0], dict) else {"scheduler": schedules[0]}
    scheduler = config["scheduler"]
    if isinstance(scheduler, ReduceLROnPlateau) or not isinstance(scheduler, LRScheduler):
        raise CannotBatch(f"its {type(scheduler).__name__} needs a metric that only a Trainer monitors")
    return Optimization(optimizers[0], scheduler, config.get("interval", "epoch"), config.get("frequency", 1))


def _configured(model: nn.Module) -> tuple[list[torch.optim.Optimizer], list[Any]]:
    """Optimizers and schedulers of ``configure_optimizers``, from any form that Lightning accepts."""
    if tree_of(model) is None:
        raise TypeError(
            f"{type(model).__name__} is no LightningModule, so its optimizer is unknown. Pass `optimizer=`, such as "
            "functools.partial(torch.optim.SGD, lr=0.1)."
        )
    try:
        configured: Any = cast("L.LightningModule", model).configure_optimizers()
    except Exception as error:
        raise CannotBatch(f"configure_optimizers needs a Trainer ({type(error).__name__}: {error})") from error
    if isinstance(configured, tuple) and len(configured) == 2 and all(isinstance(x, list) for x in configured):
        return configured
    several = configured if isinstance(configured, list | tuple) else [configured] * (configured is not None)
    optimizers, schedules = [], []
    for each in several:
        is_config = isinstance(each, dict)
        optimizers.append(each["optimizer"] if is_config else each)
        if is_config and each.get("lr_scheduler") is not None:
            schedules.append(each["lr_scheduler"])
    return optimizers, schedules


def check_optimizer(make_optimizer: MakeOptimizer | None) -> None:
    """Refuse anything but a function, such as an optimizer itself."""
    is_made = isinstance(make_optimizer, torch.optim.Optimizer)
    if is_made or (make_optimizer is not None and not callable(make_optimizer)):
        instead = f"an instance of {type(make_optimizer).__name__}" if is_made else repr(make_optimizer)
        raise TypeError(
            f"`optimizer` must be a function that makes the optimizer of a model's parameters, got {instead}. Every "
            "model needs a new optimizer: pass a function such as functools.partial(torch.optim.SGD, lr=0.1)."
        )


def check_together(optimizer: Any, model: nn.Module) -> None:
    """Refuse, by :class:`CannotBatch`, an optimizer that cannot train many copies of its model at once."""
    if type(optimizer) not in TOGETHER:
        names = ", ".join(kind.__name__ for kind in TOGETHER)
        raise CannotBatch(f"{type(optimizer).__name__} is not one of the optimizers that train together ({names})")
    check_parameters(optimizer, model)


def check_parameters(optimizer: Any, model: nn.Module) -> None:
    """Refuse, by :class:`CannotBatch`, an optimizer of other parameters than the model's, or that runs the model."""
    if {id(p) for group in optimizer.param_groups for p in group["params"]} - {id(p) for p in model.parameters()}:
        raise CannotBatch("its optimizer has parameters that are not the model's")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise CannotBatch("LBFGS computes the loss several times in a step")


def _is_plain(value: object) -> bool:
    return isinstance(value, bool | int | float | str) or (
        isinstance(value, list | tuple) and all(_is_plain(item) for item in value)
    )
