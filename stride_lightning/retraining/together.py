"""Training models on different subsets together."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from stride_lightning.model.layers import in_precision_of
from stride_lightning.retraining.batchability import (
    check_hooks,
    check_separate,
    check_vectorises,
    draws_random_numbers,
    loss_factor,
    mixed_places,
    vectorised_attention,
)
from stride_lightning.retraining.ensemble import Ensemble, bytes_per_model, chunk_size, keep_freed_memory
from stride_lightning.retraining.optimizers import CannotBatch, read_optimization
from stride_lightning.retraining.recipe import Recipe
from stride_lightning.runtime.parallel import num_workers


class Together:
    """Trains models of one recipe on different subsets at once.

    The loss of a batch is the mean over those of its examples that are in a model's subset; a model makes no step
    where a batch has none of them.

    Args:
        recipe: How models are trained.
        seed: A seed whose model is tried out.

    Raises:
        CannotBatch: If models of this recipe cannot train together, saying why.
    """

    def __init__(self, recipe: Recipe, seed: int) -> None:
        if recipe.trainer_fn is not None:
            raise CannotBatch("`trainer_fn` was given")
        if recipe.one_by_one:
            raise CannotBatch("one_by_one=True was asked for")
        self.recipe, model = recipe, recipe.fresh_model(seed)  # a copy would have lost hooks on its parameters
        check_hooks(model)
        self.optimization = read_optimization(model, recipe.optimizer)
        device = next(model.parameters()).device
        places = mixed_places(recipe.train_kinds, len(recipe.train), recipe.loading.batch_size)
        (batch,) = recipe.train.drawn([places], 0, device)
        prepared = recipe.prepared(model, batch)
        with vectorised_attention():
            check_separate(model, recipe.task, prepared[0], len(prepared[1]))
            check_vectorises(model, recipe.task, prepared)
            num_batches = len(recipe.order(seed, 0))
            self.factor = loss_factor(
                model, recipe.task, in_precision_of(model, batch), prepared, num_batches=num_batches
            )
        #: Whether training draws random numbers beside the order: then one thread at a time may train.
        self.is_random = recipe.train.is_random or draws_random_numbers(model, recipe.task, prepared[0])
        recipe.query_batches(model, device)
        recipe.train.hold()
        with vectorised_attention():
            self._bytes = bytes_per_model(model, self.optimization.optimizer, self._losses, prepared)
        self._device = device
        self._kernels: dict[Hashable, Any] = {}
        keep_freed_memory()

    def chunk_size(self, num_models: int) -> int:
        """Models that train at once within the memory budget."""
        return chunk_size(num_models, self._bytes, self._device, self.recipe.memory_budget)

    @property
    def num_threads(self) -> int:
        """Chunks that may train at once."""
        return 1 if self.is_random else num_workers(self._device)

    def check_steps(self, masks: Tensor, seeds: list[int]) -> None:
        """Refuse plans under which a model would skip a step and cannot.

        Raises:
            CannotBatch: If a batch holds no example of some subset and the optimizer or scheduler counts steps.
        """
        name = self.optimization.counts_steps
        if name is None:
            return
        for seed in seeds:
            for epoch in range(self.recipe.max_epochs):
                if any((~masks[:, batch].any(1)).any() for batch in self.recipe.order(seed, epoch)):
                    raise CannotBatch(f"some batches hold no example of some subsets, and {name} counts its steps")

    def train(self, masks: Tensor, seed: int, tick: Callable[[int], Any] = lambda models: None) -> Tensor:
        """Train one model on each subset and measure the queries.

        Args:
            masks: Which examples each model sees, bool of shape ``(m, n)``.
            seed: Decides the initial weights, the order of batches and dropout.
            tick: Told after every epoch how many models went through it.

        Returns:
            What is measured of every query under every model, shape ``(m, q)``, on the CPU.
        """
        recipe, model = self.recipe, self.recipe.initial_model(seed)
        optimization = read_optimization(model, recipe.optimizer)
        masks, weights_dtype = masks.to(self._device), next(model.parameters()).dtype
        num_steps = recipe.max_epochs * len(recipe.order(seed, 0))
        options = {"kernels": self._kernels, "num_steps": num_steps}
        ensemble = Ensemble(model, optimization.optimizer, len(masks), self._losses, _mean_of_members, **options)
        for epoch in range(recipe.max_epochs):
            batches = recipe.epoch(
                seed, epoch, self._device, lambda batch: recipe.prepared(model, batch), is_random=self.is_random
            )
            for number, (places, prepared) in enumerate(batches):
                members = masks[:, places.to(self._device)]
                ensemble.step(prepared, members.to(weights_dtype), skip=~members.any(1))
                optimization.advance("step", number + 1)
            optimization.advance("epoch", epoch + 1)
            tick(len(masks))
        model.eval()
        queries = recipe.query_batches(model, self._device)
        return torch.cat([ensemble.evaluate(recipe.values, batch) for batch in queries], 1).float().cpu()

    def _losses(self, model: nn.Module, batch: tuple[Any, Tensor]) -> Tensor:
        """Training loss of every example, shape ``(B,)``."""
        return self.factor * self.recipe.losses(model, batch)


def _mean_of_members(call: Callable[[Any], Tensor], shared: Any, own: Tensor) -> Tensor:
    """Mean loss over the examples of a batch that are in a model's subset."""
    return (call(shared) * own).sum() / own.sum().clamp(min=1)
