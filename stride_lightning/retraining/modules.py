"""LightningModules of both import trees, ``lightning.pytorch`` and ``pytorch_lightning``, built as a Trainer does."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from types import ModuleType

import lightning.pytorch as L
from torch import nn

from stride_lightning.runtime.checks import first_line


def tree_of(owner: object) -> ModuleType | None:
    """The import tree of a LightningModule or a Trainer; None for any other object.

    The classes of the two trees are different, and a Trainer takes modules and data modules of its own tree only.

    Example:
        >>> tree_of(L.LightningModule()).__name__, tree_of(nn.Linear(2, 1))
        ('lightning.pytorch', None)
    """
    trees = [L, sys.modules.get("pytorch_lightning")]
    kinds = [(tree, (tree.LightningModule, tree.Trainer)) for tree in trees if tree is not None]
    return next((tree for tree, classes in kinds if isinstance(owner, classes)), None)


def overridden(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Those of the named hooks that a LightningModule overrides."""
    model = getattr(model, "_orig_mod", model)
    if not hasattr(model, "automatic_optimization"):
        return []
    lightnings = ("lightning", "pytorch_lightning")
    return [name for name in names if getattr(model, name).__module__.split(".")[0] not in lightnings]


def build(model_fn: Callable[[], nn.Module]) -> nn.Module:
    """A fresh model, after ``configure_model`` and ``setup``, which may make layers.

    Raises:
        ValueError: If it has no parameters after these.
    """
    model = model_fn()
    problem = ""
    for name, arguments in (("configure_model", ()), ("setup", ("fit",))):
        if isinstance(model, nn.Module) and overridden(model, [name]):
            try:
                getattr(model, name)(*arguments)
            except Exception as error:  # most likely it needs a Trainer, which calls it later
                problem = f" Its {name}() raised {type(error).__name__} without one: {first_line(error).rstrip('.')}."
    if isinstance(model, nn.Module) and next(model.parameters(), None) is None:
        raise ValueError(
            f"{type(model).__name__} has no parameters before a Trainer runs it.{problem} Make its layers in __init__, "
            "in configure_model, or in a setup that needs no Trainer."
        )
    return model
