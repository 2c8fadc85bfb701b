"""Training one model after the other, each with a fresh Trainer and fresh weights."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from stride_lightning.data.transfer import overridden_hook
from stride_lightning.model.layers import in_precision_of
from stride_lightning.retraining.modules import overridden, tree_of
from stride_lightning.retraining.recipe import Recipe
from stride_lightning.runtime.checks import first_line
from stride_lightning.runtime.randomness import seeded
from stride_lightning.tasks.own_loss import FunctionLoss


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence Lightning's messages, which every model would repeat."""
    trees = ("lightning.pytorch", "pytorch_lightning")
    loggers = [logging.getLogger(name) for tree in trees for name in (tree, f"{tree}.utilities.rank_zero")]
    levels = {logger: logger.level for logger in loggers}
    try:
        for logger in levels:
            logger.setLevel(logging.WARNING)
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


@_quiet()
def train_alone(recipe: Recipe, mask: Tensor, seed: int) -> Tensor:
    """Train one model on a subset with a fresh Trainer and measure the queries, shape ``(q,)``, on the CPU.

    Weights and batches are those of :class:`~stride_lightning.retraining.together.Together`: the batches of the whole
    training set, without the examples outside the subset, whose ``mask`` is bool of shape ``(n,)``. Batches without
    any example are left out, and with BatchNorm those with a single one too.
    """
    model = recipe.fresh_model(seed)
    validation = _validation(recipe, model)
    tree = tree_of(model) or L
    if recipe.trainer_fn is None:
        trainer = _lean_trainer(tree, recipe.max_epochs, recipe.device, validates=validation is not None)
    else:
        trainer = recipe.trainer_fn()
        tree = tree_of(trainer) or L
    module: Any = model if tree_of(model) else _of_tree(_Plain, tree.LightningModule)(model, recipe)
    if recipe.optimizer is not None:  # the model is fresh, so it may be changed
        make_optimizer = recipe.optimizer
        module.configure_optimizers = lambda: make_optimizer(model.parameters())
    if trainer.global_step or trainer.current_epoch:
        raise ValueError(
            "`trainer_fn` returned a Trainer that has trained before, so it would not train another model. Make the "
            "Trainer inside the function."
        )
    if trainer.max_epochs != recipe.max_epochs:
        raise ValueError(
            f"`trainer_fn` makes a Trainer for {trainer.max_epochs} epochs, but `max_epochs` is {recipe.max_epochs}. "
            "Make it with the same max_epochs."
        )
    # The number of batches without an example of the subset changes with the epoch, but Lightning counts them once.
    trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined]
    # BatchNorm refuses a batch of a single example, which has no statistics.
    normalises = any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in model.modules())
    with seeded(seed), warnings.catch_warnings():
        # The data module has all three hooks of a transfer; they call the user's, including the model's.
        warnings.filterwarnings("ignore", "You have overridden `.*` in both `LightningModule` and")
        warnings.filterwarnings("ignore", "You defined a `validation_step` but have no `val_dataloader`")
        data = _of_tree(_SubsetData, tree.LightningDataModule)(recipe, mask, seed, smallest=2 if normalises else 1)
        if validation is not None:
            data.val_dataloader = validation
        try:
            trainer.fit(module, datamodule=data)
        except Exception as error:
            if "conditioned on metric" not in str(error):
                raise
            raise ValueError(
                f"{type(model).__name__} needs a metric that its training does not log ({first_line(error)}). Pass "
                "validation data: a LightningDataModule with a val_dataloader as `train_data`, or a val_dataloader of "
                "the model. Or pass `optimizer=`, which trains without a schedule."
            ) from error
    return recipe.measured(model).float().cpu()


def _validation(recipe: Recipe, model: nn.Module) -> Callable[[], Any] | None:
    """The function that makes the validation loader; None if the model has no validation step or there are no data."""
    hooks = [overridden_hook(owner, "val_dataloader") for owner in (recipe.datamodule, model)]
    return next(filter(None, hooks), None) if overridden(model, ["validation_step"]) else None


def _lean_trainer(tree: Any, max_epochs: int, device: torch.device, *, validates: bool) -> Any:
    return tree.Trainer(
        max_epochs=max_epochs,
        accelerator={"cuda": "gpu"}.get(device.type, device.type),
        devices=1 if device.index is None else [device.index],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=1.0 if validates else 0,
        num_sanity_val_steps=0,
    )


def _of_tree(kind: type, base: type) -> Any:
    """A class with a base class of an import tree."""
    return type(kind.__name__, (kind, base), {})


class _Plain:
    """A LightningModule that trains a plain module on the task's loss, or on the mean of the user's function."""

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        super().__init__()
        self.model, self.recipe = model, recipe

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if isinstance(self.recipe.meaning, FunctionLoss):
            return self.recipe.meaning.fn(self.model, in_precision_of(self.model, batch)).mean()
        return self.recipe.losses(self.model, self.recipe.prepared(self.model, batch)).mean()


class _SubsetData:
    """A data module: the batches in their order, without the examples outside a subset; the user's hooks move them."""

    trainer: Any

    def __init__(self, recipe: Recipe, mask: Tensor, seed: int, smallest: int) -> None:
        super().__init__()
        self.recipe, self.mask, self.seed, self.smallest = recipe, mask, seed, smallest

    def train_dataloader(self) -> DataLoader[Any]:
        """The batches of an epoch; the Trainer calls this in every epoch."""
        examples, epoch = self.recipe.train, 0 if self.trainer is None else self.trainer.current_epoch
        members = [places[self.mask[places]] for places in self.recipe.order(self.seed, epoch)]
        return DataLoader(
            examples.dataset,
            batch_sampler=[examples.positions[batch].tolist() for batch in members if len(batch) >= self.smallest],
            collate_fn=examples.collate_fn,
            num_workers=examples.num_workers,
            worker_init_fn=examples.worker_init_fn,
        )

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return self.recipe.train.transfer(batch, device)  # all three hooks at once

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch
