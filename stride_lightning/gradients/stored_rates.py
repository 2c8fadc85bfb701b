"""The learning rate of every parameter, from what a plain Lightning checkpoint stores of its optimizers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from stride_lightning.model.layers import plain_name
from stride_lightning.runtime.randomness import preserved_random_state


def stored_rates(checkpoint: Mapping[str, Any], model: nn.Module, where: str) -> dict[str, float] | None:
    """Learning rates by plain parameter name, as they were when the checkpoint was saved.

    A scheduler may have moved them on since the last optimizer step. Parameters are told by the names that torch
    stores if the optimizer was made with named parameters; else, if all groups have one rate, it is that of every
    trainable parameter; else by their order in the optimizers that ``configure_optimizers`` makes for the model.

    Returns:
        None where the file, which messages call ``where``, stores no optimizer.

    Raises:
        ValueError: If rates differ and it cannot be told whose they are.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        >>> stored_rates({"optimizer_states": [optimizer.state_dict()]}, model, "run.ckpt")
        {'weight': 0.5, 'bias': 0.5}
    """
    by_optimizer = [list(state["param_groups"]) for state in checkpoint.get("optimizer_states") or []]
    groups = [group for of_one in by_optimizer for group in of_one]
    if not groups or any(group.get("lr") is None for group in groups):
        return None
    if (named := _by_stored_names(groups, model)) is not None:
        return named
    rates = [float(group["lr"]) for group in groups]
    alike = len(set(rates)) == 1
    trainable = [plain_name(name) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if alike and sum(len(group["params"]) for group in groups) == len(trainable):
        return dict.fromkeys(trainable, rates[0])
    by_order = _by_order(by_optimizer, model)
    if isinstance(by_order, dict):
        return by_order
    if alike:
        warnings.warn(
            f"{where}: its optimizers hold other parameters than {type(model).__name__} has trainable ones, and "
            f"which cannot be told because {by_order}. Its learning rate {rates[0]:g} is taken for all.",
            stacklevel=2,
        )
        return dict.fromkeys(trainable, rates[0])
    raise ValueError(
        f"{where} has several learning rates ({', '.join(f'{rate:g}' for rate in rates)}), and which parameters they "
        f"are of cannot be told because {by_order}. Use the records of TracInCallback, which name them, or make the "
        "optimizer with model.named_parameters(), so that the checkpoint does."
    )


def _by_stored_names(groups: Sequence[Mapping[str, Any]], model: nn.Module) -> dict[str, float] | None:
    """By the names in the groups, if they are the model's; a user may have named a part's parameters."""
    known = {plain_name(name) for name, _ in model.named_parameters()}
    rates = {}
    for group in groups:
        names = [plain_name(name) for name in group.get("param_names") or []]
        if len(names) != len(group["params"]) or not known.issuperset(names):
            return None
        rates |= dict.fromkeys(names, float(group["lr"]))
    return rates


def _by_order(groups: Sequence[Sequence[Mapping[str, Any]]], model: Any) -> dict[str, float] | str:
    """By the order of parameters in freshly configured optimizers, or why that cannot be told."""
    if not hasattr(model, "configure_optimizers"):
        return f"{type(model).__name__} has no configure_optimizers"
    try:
        with preserved_random_state():
            optimizers = _optimizers_of(model.configure_optimizers())
    except Exception as error:
        return f"configure_optimizers() gave {type(error).__name__}: {error}"
    stored = [[len(group["params"]) for group in of_one] for of_one in groups]
    made = [[len(group["params"]) for group in optimizer.param_groups] for optimizer in optimizers]
    if stored != made:
        return f"configure_optimizers() makes groups of {made} parameters (by optimizer), the file has {stored}"
    names = {id(parameter): plain_name(name) for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: float(group["lr"])
        for of_one, optimizer in zip(groups, optimizers, strict=True)
        for group, fresh in zip(of_one, optimizer.param_groups, strict=True)
        for parameter in fresh["params"]
        if id(parameter) in names
    }


def _optimizers_of(configured: Any) -> list[torch.optim.Optimizer]:
    """The optimizers in any form that Lightning lets ``configure_optimizers`` return."""
    if isinstance(configured, torch.optim.Optimizer):
        return [configured]
    if isinstance(configured, dict):
        return [configured["optimizer"]]
    if isinstance(configured, tuple) and len(configured) == 2 and all(isinstance(part, list) for part in configured):
        configured = configured[0]
    return [optimizer for part in configured or [] for optimizer in _optimizers_of(part)]
