"""The learning rates of the last steps of optimizers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stride_lightning.model.layers import plain_name


class LearningRates:
    """Notes the learning rate of every parameter group right after each step of its optimizer.

    A callback comes too late for that: schedulers may have moved on. The cost per step does not grow with the number of
    parameters; only :meth:`by_name` looks at them. Optimizers without learning rates are refused.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        >>> rates = LearningRates()
        >>> rates.watch([optimizer])
        >>> _ = optimizer.step()
        >>> optimizer.param_groups[0]["lr"] = 0.1
        >>> rates.by_name(model)
        {'weight': 0.5, 'bias': 0.5}
        >>> rates.unwatch()
    """

    def __init__(self) -> None:
        self._optimizers: Sequence[torch.optim.Optimizer] = []
        self._noted: dict[int, list[Any]] = {}  # by the optimizer's place; the one that stepped last stands last
        self._handles: list[RemovableHandle] = []
        #: Steps that optimizers took since the last call of :meth:`watch`; those that a GradScaler skips are none.
        self.num_steps = 0

    def watch(self, optimizers: Sequence[Any]) -> None:
        """Note rates from now on. Until an optimizer steps, the restored ones count, or else its present ones."""
        _check(optimizers)
        self.unwatch()
        noted = {index: _rates_of(optimizer) for index, optimizer in enumerate(optimizers)}
        for index, rates in self._noted.items():
            if len(rates) == len(noted.get(index, [])):
                noted.pop(index)
                noted[index] = rates
        self._optimizers, self._noted, self.num_steps = optimizers, noted, 0
        # After the step, since the module may still set rates in hooks that run before it. Lightning's own hook would
        # not do: it is not called where a module steps the bare optimizer.
        hooks = (partial(self._note, noted, index) for index in range(len(optimizers)))
        self._handles = [each.register_step_post_hook(hook) for each, hook in zip(optimizers, hooks, strict=True)]

    def _note(self, noted: dict[int, list[Any]], index: int, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self.num_steps += 1
        noted.pop(index, None)  # so that it stands last
        noted[index] = _rates_of(optimizer)

    def unwatch(self) -> None:
        """Remove the hooks from the optimizers."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def by_group(self) -> list[float]:
        """Rates of all groups of all optimizers, in order."""
        return [float(rate) for _, rates in sorted(self._noted.items()) for rate in rates]

    def by_name(self, model: nn.Module) -> dict[str, float]:
        """Rate of every trainable parameter that an optimizer holds; if several hold it, that of the last to step."""
        names = {id(p): plain_name(name) for name, p in model.named_parameters() if p.requires_grad}
        by_id: dict[int, float] = {}
        for index, rates in self._noted.items():
            optimizer = self._optimizers[index]
            rates = [*rates, *_rates_of(optimizer)[len(rates) :]]  # with groups that were added since the step
            for group, rate in zip(optimizer.param_groups, rates, strict=False):
                by_id |= {id(parameter): float(rate) for parameter in group["params"]}
        return {name: by_id[key] for key, name in names.items() if key in by_id}

    def state(self) -> list[Any]:
        """Plain values for a checkpoint."""
        return [[index, [float(rate) for rate in rates]] for index, rates in self._noted.items()]

    def restore(self, state: list[Any]) -> None:
        """Take up what :meth:`state` gave; an empty list forgets all rates."""
        self._noted = {index: list(rates) for index, rates in state}


def _check(optimizers: Sequence[Any]) -> None:
    if not any(getattr(optimizer, "param_groups", True) for optimizer in optimizers):  # Lightning has a stand-in
        raise ValueError(
            "The model has no optimizer, so there are no learning rates. Return one in configure_optimizers()."
        )
    for optimizer in optimizers:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"Optimizers must be torch.optim.Optimizer, got {type(optimizer).__name__}.")
        if any("lr" not in group for group in optimizer.param_groups):
            raise ValueError(
                f"A parameter group of {type(optimizer).__name__} has no 'lr'. TracIn needs it: give every group one."
            )


def _rates_of(optimizer: torch.optim.Optimizer) -> list[Any]:
    # Reading a tensor would wait for the device at every step. It is cloned, because schedulers change it in place.
    # A deleted rate must not raise in the optimizer's step: it is NaN, which is refused when a record is due.
    rates = [group.get("lr", math.nan) for group in optimizer.param_groups]
    return [rate.clone() if isinstance(rate, Tensor) else rate for rate in rates]
