"""A model's state by name, what of it is frozen, and whether other weights fit it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from stride_lightning.model.layers import plain_name


def whole_state(model: nn.Module) -> dict[str, Any]:
    """All that a model's checkpoints may hold, by name; also what its own ``state_dict()`` leaves out, as adapters do.

    A ``state_dict()`` with names of its own is taken as it is.
    """
    whole, saved = nn.Module.state_dict(model), model.state_dict()
    return whole if saved.keys() <= whole.keys() else saved


def frozen_names(model: nn.Module) -> set[str]:
    """Plain names of parameters that do not train, and of the buffers of modules in which none does."""
    parameters = {plain_name(name): value for name, value in model.named_parameters(remove_duplicate=False)}
    frozen = {name for name, value in parameters.items() if not value.requires_grad}
    trains = _owners(parameters.keys() - frozen)
    owners = _owners(parameters)
    for name, _ in model.named_buffers(remove_duplicate=False):
        owner = plain_name(name)
        while owner and owner not in owners:  # up to the first module with parameters
            owner = owner.rpartition(".")[0]
        if owner in owners and owner not in trains:
            frozen.add(plain_name(name))
    return frozen


def _owners(names: Collection[str]) -> set[str]:
    """The modules that hold parameters of these names, at any depth."""
    parts = [name.split(".") for name in names]
    return {".".join(part[:depth]) for part in parts for depth in range(len(part))}


def left_to(model: nn.Module, state: Mapping[str, Any]) -> list[str]:
    """Plain names of a model's tensors that a state leaves as they are."""
    given = {plain_name(name) for name in state}
    ours = {plain_name(name): value for name, value in whole_state(model).items()}
    return sorted(name for name, value in ours.items() if isinstance(value, Tensor) and name not in given)


def check_fits(
    model: nn.Module, state: Mapping[str, Any], where: str = "", *, whole: bool = True, rest: Collection[str] = ()
) -> dict[str, Any]:
    """The weights under the names that the model has for them, not loaded; both sides may or may not be compiled.

    What is frozen may be missing: adapters are saved without their base.

    Args:
        model: The model.
        state: Weights by name.
        where: Start of a message.
        whole: Refuse weights that lack what the model trains.
        rest: Plain names of weights that may be missing although the model trains them.

    Raises:
        ValueError: If they are of another architecture, naming the parameters after ``where``.

    Example:
        >>> sorted(check_fits(nn.Linear(2, 1), nn.Linear(2, 1).state_dict()))
        ['bias', 'weight']
    """
    names = {plain_name(name): name for name in whole_state(model)}
    ours = {plain_name(name): value for name, value in whole_state(model).items()}
    # Records hold tensors alone. Other state (`get_extra_state`) stays as the model has it.
    extra = {name: value for name, value in ours.items() if not isinstance(value, Tensor)}
    given = extra | {plain_name(name): value for name, value in state.items()}
    unexpected = sorted(given.keys() - names.keys())
    missing = sorted(names.keys() - given.keys() - frozen_names(model) - set(rest)) if whole else []
    wrong = []
    for name in sorted(names.keys() & given.keys()):
        shapes = [tuple(value.shape) for value in (given[name], ours[name]) if isinstance(value, Tensor)]
        if len(set(shapes)) == 2:
            wrong.append(f"{name} is {shapes[0]}, the model has {shapes[1]}")
    if missing or unexpected or wrong:
        parts = [
            f"missing: {', '.join(missing[:5])}" if missing else "",
            f"not in the model: {', '.join(unexpected[:5])}" if unexpected else "",
            f"other shape: {'; '.join(wrong[:3])}" if wrong else "",
        ]
        raise ValueError(
            f"{where}The checkpoint's weights do not fit {type(model).__name__} "
            f"({' | '.join(filter(None, parts))}). Build the model with the settings it was trained with, and if it "
            "makes its layers in configure_model() or setup(), call that first. Weights that were frozen in training "
            "may be missing if requires_grad is False on them."
        )
    return {names[name]: value for name, value in given.items()}


def load_state(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Load what :func:`check_fits` returns; weights that are not in it stay."""
    if whole_state(model).keys() <= state.keys():
        model.load_state_dict(state)
    else:
        model.load_state_dict(state, strict=False)
