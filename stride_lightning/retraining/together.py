"""Training models on different subsets together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stride_lightning.retraining.batchability import check_hooks, check_separate, mixed_places, vectorised_attention
from stride_lightning.retraining.ensemble import Ensemble
from stride_lightning.retraining.optimizers import CannotBatch, check_together, read_optimization
from stride_lightning.retraining.recipe import Recipe
from stride_lightning.tasks.likelihoods import Task


class Together:
    """Trains models of one recipe on different subsets at once.

    A model's loss of a batch is the mean over the examples in the model's subset; without such examples the model makes
    no step.

    Raises:
        CannotBatch: If models of this recipe cannot train together, with the reason; the model of ``seed`` is tested.
    """

    def __init__(self, recipe: Recipe, seed: int) -> None:
        if recipe.trainer_fn is not None:
            raise CannotBatch("`trainer_fn` was given")
        if recipe.one_by_one:
            raise CannotBatch("one_by_one=True was given")
        self.recipe, model = recipe, recipe.fresh_model(seed)  # a copy would lose hooks on its parameters
        check_hooks(model)
        self.optimization = read_optimization(model, recipe.optimizer)
        check_together(self.optimization.optimizer, model)
        if not isinstance(recipe.meaning, Task):
            raise CannotBatch(f"it trains on {recipe.reason}")
        places = mixed_places(recipe.train_kinds, len(recipe.train), recipe.loading.batch_size)
        (batch,) = recipe.train.drawn([places], 0, recipe.device)
        sample = recipe.prepared(model, batch)
        with vectorised_attention():
            check_separate(model, recipe.task, sample[0], len(sample[1]))
        recipe.try_out(model, sample, batch)
        recipe.get_ready(model, self.optimization.optimizer, self._losses, sample)
        recipe.query_values(model)  # read them now, before several threads need them

    def check_steps(self, masks: Tensor, seeds: list[int]) -> None:
        """Refuse, by :class:`CannotBatch`, skipped steps if the optimizer or schedule depends on their number."""
        name = self.optimization.counts_steps
        epochs = range(self.recipe.max_epochs if name is not None else 0)
        orders = (self.recipe.order(seed, epoch) for seed in seeds for epoch in epochs)
        if any((~masks[:, places].any(1)).any() for order in orders for places in order):
            raise CannotBatch(
                f"some batches have no example of some subsets, and {name} depends on its number of steps"
            )

    def train(self, masks: Tensor, seed: int, tick: Callable[[int], Any] = lambda models: None) -> Tensor:
        """Train one model on each subset; returns the measure of every query, shape ``(m, q)``, on the CPU.

        Masks are bool of shape ``(m, n)``. After every epoch ``tick`` gets the number of models.
        """
        recipe, model = self.recipe, self.recipe.initial_model(seed)
        optimization = read_optimization(model, recipe.optimizer)
        masks, weights_dtype = masks.to(recipe.device), next(model.parameters()).dtype
        num_steps = recipe.max_epochs * len(recipe.order(seed, 0))
        options = {"kernels": recipe.kernels, "num_steps": num_steps}
        ensemble = Ensemble(model, optimization.optimizer, len(masks), self._losses, _mean_of_members, **options)
        for epoch in range(recipe.max_epochs):
            batches = recipe.epoch(seed, epoch, lambda batch: recipe.prepared(model, batch))
            for number, (places, prepared) in enumerate(batches):
                members = masks[:, places.to(recipe.device)]
                ensemble.step(prepared, members.to(weights_dtype), skip=~members.any(1))
                optimization.advance("step", number + 1)
            optimization.advance("epoch", epoch + 1)
            tick(len(masks))
        model.eval()
        values = recipe.query_values(model)
        losses = [ensemble.evaluate(values.of_batch, part, vectorise=values.vectorises) for part in values.batches]
        return torch.cat(losses, 1).float().cpu()

    def _losses(self, model: nn.Module, batch: tuple[Any, Tensor]) -> Tensor:
        """Training loss of every example, shape ``(B,)``."""
        return self.recipe.factor * self.recipe.losses(model, batch)


def _mean_of_members(call: Callable[[Any], Tensor], shared: Any, weights: Tensor) -> Tensor:
    """Mean loss over the examples of a batch that are in a model's subset."""
    return (call(shared) * weights).sum() / weights.sum().clamp(min=1)
