"""The loss of a ``training_step`` without a Trainer, and whether it is a mean over examples."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import lightning.pytorch as L
import torch
from torch import Tensor, nn

from stride_lightning.data.examples import Examples
from stride_lightning.model.layers import in_precision_of
from stride_lightning.retraining.batchability import loss_of_step, switch_dropout_off, tried_out, without_trainer
from stride_lightning.retraining.modules import tree_of
from stride_lightning.runtime.randomness import seeded


def check_step(model: nn.Module, batch: Any) -> None:
    """Refuse a ``training_step`` that needs a Trainer."""
    try:
        with without_trainer(cast("L.LightningModule", model)), seeded(0), torch.enable_grad():
            if not loss_of_step(model, batch).requires_grad:
                raise ValueError("it returned a loss without gradient")
    except Exception as error:
        raise ValueError(
            f"Further training cannot call the training_step of {type(model).__name__} without a Trainer "
            f"({type(error).__name__}: {error}). Pass further_train() the network inside it, and `optimizer=`."
        ) from error


def check_additive(model: nn.Module, examples: Examples, device: torch.device) -> None:
    """Refuse a loss in which an example has no share: a batch's loss must be the mean of its examples' losses.

    ``examples`` are a few of all kinds, for the test.
    """
    train_mode(model)
    switch_dropout_off(model)
    places, eps = torch.arange(len(examples)), torch.finfo(next(model.parameters()).dtype).eps
    tolerance = max(1e-4 if device.type == "cpu" else 1e-3, 8 * eps)  # convolutions on a GPU use TF32

    def losses(batches: Sequence[Tensor], seed: int) -> Tensor:
        values = []
        with seeded(seed), torch.enable_grad():
            for batch in examples.drawn(batches, 0, device):
                with seeded(seed):
                    values.append(loss_of_step(model, in_precision_of(model, batch)).detach().cpu().double())
        return torch.stack(values)

    def draws() -> bool:
        return not losses([places], 0).equal(losses([places], 1))

    def is_additive() -> bool:
        whole, *single = losses([places, *places.split(1)], 0)
        gap, largest = (whole - torch.stack(single).mean()).abs(), torch.stack([whole, *single]).abs().max()
        return not gap > tolerance * largest  # losses that are not finite pass; other checks refuse them

    try:
        with without_trainer(cast("L.LightningModule", model)):
            if draws():  # functional dropout
                model.eval()
                if draws():
                    return
            with tried_out(model):
                fits = is_additive()
            fits = fits or is_additive()
    except Exception as error:
        raise ValueError(
            f"Further training cannot use the training_step of {type(model).__name__}, because it fails on a single "
            f"example ({type(error).__name__}: {error}). Pass further_train() the network inside it, and `optimizer=`."
        ) from error
    if not fits:
        raise ValueError(
            f"{type(model).__name__}.training_step must return the mean of its examples' losses, but it returns "
            "another loss (does it have class weights, or a mean over all tokens of texts of different lengths?). So "
            "an example has no share of it. Define a mean over examples, for instance by a Task of your own with a "
            "weight for each example. Or pass further_train() the network inside it, and `optimizer=`."
        )


def detached_copy(model: nn.Module) -> nn.Module:
    """A copy without its Trainer, which holds the data, the loggers and the optimizer; it logs nothing."""
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
    return copied


def _unheard(*_: Any, **__: Any) -> None:
    """Takes the place of ``self.log``."""


def train_mode(model: nn.Module) -> None:
    """Training mode, except for BatchNorm: one example's share has no statistics."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
