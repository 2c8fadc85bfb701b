"""The learning rate of every parameter, from the optimizer states of a plain Lightning checkpoint."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from stride_lightning.model.layers import plain_name
from stride_lightning.runtime.randomness import preserved_random_state


def stored_rates(checkpoint: Mapping[str, Any], model: nn.Module, where: str) -> dict[str, float] | None:
    """Learning rates by plain parameter name, as the checkpoint stores them; messages call the file ``where``.

    A scheduler may have changed them since the last optimizer step. If the optimizer was given named parameters, torch
    stores their names. Else, if all groups have the same rate, every trainable parameter has it. Else parameters are
    identified by their order in the optimizers that ``configure_optimizers`` makes for the model.

    Returns:
        The rates; None if the file stores no optimizer.

    Raises:
        ValueError: If rates differ and their parameters cannot be identified.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        >>> stored_rates({"optimizer_states": [optimizer.state_dict()]}, model, "run.ckpt")
        {'weight': 0.5, 'bias': 0.5}
    """
    by_optimizer = [list(state["param_groups"]) for state in checkpoint.get("optimizer_states") or []]
    groups = [group for groups_of_one in by_optimizer for group in groups_of_one]
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
            f"The optimizers in {where} hold other parameters than the trainable ones of {type(model).__name__}, and "
            f"their names are unknown because {by_order}. All parameters get its learning rate {rates[0]:g}. Give "
            "records of TracInCallback, which store the names.",
            stacklevel=2,
        )
        return dict.fromkeys(trainable, rates[0])
    raise ValueError(
        f"{where} has several learning rates ({', '.join(f'{rate:g}' for rate in rates)}), and their parameters are "
        f"unknown because {by_order}. Use records of TracInCallback, which store the names, or give the optimizer "
        "model.named_parameters() in training, so that the checkpoint stores them."
    )


def _by_stored_names(groups: Sequence[Mapping[str, Any]], model: nn.Module) -> dict[str, float] | None:
    """Rates by the names in the groups, or None if one is not a name of the model, such as a name in a part of it."""
    known = {plain_name(name) for name, _ in model.named_parameters()}
    rates = {}
    for group in groups:
        names = [plain_name(name) for name in group.get("param_names") or []]
        if len(names) != len(group["params"]) or not known.issuperset(names):
            return None
        rates |= dict.fromkeys(names, float(group["lr"]))
    return rates


def _by_order(groups: Sequence[Sequence[Mapping[str, Any]]], model: Any) -> dict[str, float] | str:
    """Rates by the order of parameters in freshly configured optimizers, or the reason why there is no such order."""
    if not hasattr(model, "configure_optimizers"):
        return f"{type(model).__name__} has no configure_optimizers"
    try:
        with preserved_random_state():
            optimizers = _optimizers_of(model.configure_optimizers())
    except Exception as error:
        return f"configure_optimizers() gave {type(error).__name__}: {error}"
    stored = [[len(group["params"]) for group in groups_of_one] for groups_of_one in groups]
    made = [[len(group["params"]) for group in optimizer.param_groups] for optimizer in optimizers]
    if stored != made:
        return f"configure_optimizers() makes groups of {made} parameters (by optimizer), but the file has {stored}"
    names = {id(parameter): plain_name(name) for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: float(group["lr"])
        for groups_of_one, optimizer in zip(groups, optimizers, strict=True)
        for group, fresh in zip(groups_of_one, optimizer.param_groups, strict=True)
        for parameter in fresh["params"]
        if id(parameter) in names
    }


def _optimizers_of(configured: Any) -> list[torch.optim.Optimizer]:
    """All optimizers, from any form that ``configure_optimizers`` may return."""
    if isinstance(configured, torch.optim.Optimizer):
        return [configured]
    if isinstance(configured, dict):
        return [configured["optimizer"]]
    if isinstance(configured, tuple) and len(configured) == 2 and all(isinstance(part, list) for part in configured):
        configured = configured[0]
    return [optimizer for part in configured or [] for optimizer in _optimizers_of(part)]
