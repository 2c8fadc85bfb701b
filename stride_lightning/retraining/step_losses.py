"""A model without its Trainer, and the mode in which it is trained further."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from stride_lightning.model.weights import attached_trainer
from stride_lightning.retraining.modules import tree_of
from stride_lightning.tasks.stand_ins import put_on_copy


def detached_copy(model: nn.Module) -> nn.Module:
    """A copy without its Trainer, which holds the data, the loggers and the optimizer; it logs nothing.

    A stand-in says what the Trainer says, and changes nothing of it.
    """
    trainer = attached_trainer(model)
    attached: list[tuple[Any, Any]] = [(module, module._trainer) for module in model.modules() if tree_of(module)]
    try:
        for module, _ in attached:
            module._trainer = None
        copied = copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}). Does it store a loss or "
            "outputs of a training step, or an open file? Detach or delete them when training ends."
        ) from error
    finally:
        for module, trainer in attached:
            module._trainer = trainer
    for module in copied.modules():
        if tree_of(module):
            vars(module).update(log=_unheard, log_dict=_unheard)
    put_on_copy(copied, trainer)
    return copied


def _unheard(*_: Any, **__: Any) -> None:
    """Takes the place of ``self.log``."""


def train_mode(model: nn.Module) -> None:
    """Training mode, except for BatchNorm: one example's share has no statistics."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
