"""Batches of a training run in their order, and whether copies of a model can train on them together."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from stride_lightning.data.examples import Examples
from stride_lightning.data.loading import check_loading
from stride_lightning.data.reading import Reading, count_outputs, encoded_batch
from stride_lightning.model.layers import in_precision_of
from stride_lightning.retraining.batchability import (
    check_vectorises,
    draws_random_numbers,
    loss_factor,
    vectorised_attention,
)
from stride_lightning.retraining.ensemble import BatchFunction, bytes_per_model, chunk_size, keep_freed_memory
from stride_lightning.retraining.optimizers import MakeOptimizer, check_optimizer
from stride_lightning.runtime.parallel import num_workers
from stride_lightning.runtime.randomness import mix, seed_torch
from stride_lightning.tasks.likelihoods import Task, columns
from stride_lightning.tasks.own_loss import OwnLoss


class Batches:
    """The batches of a training run.

    The model is on the device of the training; ``head`` is the first batch; ``reason`` says which loss it is and why.
    The options are those of :func:`~stride_lightning.retrain`.
    """

    #: The reason why models train one by one; None if they train together.
    one_by_one_because: str | None = None
    #: Factor between the task's loss and the training loss.
    factor = 1.0
    #: Whether training draws random numbers beside the order: then only one thread may train at a time.
    is_random = False

    def __init__(
        self,
        model: nn.Module,
        train: Examples,
        head: Any,
        task: Task | OwnLoss,
        *,
        reason: str = "",
        batch_size: int | None = None,
        optimizer: MakeOptimizer | None = None,
        memory_budget: int | None = None,
    ) -> None:
        check_optimizer(optimizer)
        self.train, self.loading = train, check_loading(train.loading, batch_size)
        #: The likelihood, or the loss of the module's own where none says it.
        self.meaning: Task | OwnLoss = task
        self.reason = reason or repr(task)
        self.optimizer, self.memory_budget = optimizer, memory_budget
        self.device = next(model.parameters()).device
        #: Traced steps, for all models of this kind.
        self.kernels: dict[Hashable, Any] = {}
        self.num_outputs = 0
        if isinstance(task, Task):
            with train.naming(0):
                self.num_outputs = count_outputs(model, task, head)
            if task.is_normalised:
                reading = Reading(train, task, model, batch_size=256, device=self.device)
                weights = [task.example_weights(rows.encoded(self.num_outputs)[1]) for rows in reading]
                self.meaning = task.with_mean_weight(torch.cat(weights))

    @property
    def task(self) -> Task:
        """The likelihood, for those who have checked that there is one."""
        assert isinstance(self.meaning, Task)
        return self.meaning

    def set_mode(self, model: nn.Module) -> None:
        """Set the modes in which a model trains; by default its present ones, as a Trainer leaves them."""

    def try_out(self, model: nn.Module, sample: tuple[Any, Tensor], mixed: Any) -> None:
        """Try whether copies of a model can train together, and set the factor of the task's loss.

        ``sample`` is a batch from :meth:`prepared`; every kind of example occurs in the batch ``mixed``.

        Raises:
            CannotBatch: If copies cannot train together, with the reason.
        """
        with vectorised_attention():
            batch, prepared = in_precision_of(model, mixed), self.prepared(model, mixed)
            # On a copy, since a step may store its loss in the model.
            self.factor = loss_factor(copy.deepcopy(model), self.task, batch, prepared, len(self.order(0, 0)))
            check_vectorises(model, self.task, sample, self.set_mode)

    def get_ready(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, loss_fn: BatchFunction, sample: tuple[Any, Tensor]
    ) -> None:
        """Measure a copy's memory and whether its training is random, and hold small data in memory."""
        self.is_random = self.train.is_random or draws_random_numbers(model, self.task, sample[0], self.set_mode)
        if self.one_by_one_because is None:
            with vectorised_attention():
                self._bytes_each = bytes_per_model(model, optimizer, loss_fn, sample)
        self.train.hold()
        keep_freed_memory()

    @property
    def num_threads(self) -> int:
        """Number of chunks of models that train at once."""
        return 1 if self.is_random or self.one_by_one_because else num_workers(self.device)

    def chunk_size(self, num_models: int) -> int:
        """Number of models that train at once within the memory budget."""
        if self.one_by_one_because:
            return 1
        return chunk_size(num_models, self._bytes_each, self.device, self.memory_budget)

    def order(self, seed: int, epoch: int) -> list[Tensor]:
        """Places of the examples in every batch of an epoch; the same for all models of a seed."""
        how = self.loading
        return batch_order(len(self.train), how.batch_size, how.shuffle, how.drop_last, seed, epoch)

    def epoch(self, seed: int, epoch: int, prepare: Callable[[Any], Any]) -> Iterator[tuple[Tensor, Any]]:
        """The batches of an epoch, each with the places of its examples.

        The seed determines the order, random augmentation and dropout; ``prepare`` turns a batch into the input of the
        training loss.
        """
        order = self.order(seed, epoch)
        drawn = self.train.drawn(order, mix(seed, epoch), self.device)
        for number, (places, batch) in enumerate(zip(order, drawn, strict=True)):
            with self.train.naming(places):
                prepared = prepare(batch)
            if self.is_random:  # the same random numbers, independent of earlier draws
                seed_torch(mix(seed, epoch, epoch * len(order) + number))
            yield places, prepared

    def prepared(self, model: nn.Module, batch: Any) -> tuple[Any, Tensor]:
        """Inputs of a batch, and its encoded targets of shape ``(B, C)``, in the model's precision."""
        return encoded_batch(model, self.task, batch, self.num_outputs)

    def described(self) -> dict[str, Any]:
        """Plain values that identify these batches, apart from the data."""
        how = self.loading
        made = {"batch_size": how.batch_size, "shuffle": how.shuffle, "drop_last": how.drop_last}
        return {**made, "task": repr(self.meaning)}

    def losses(self, model: nn.Module, batch: tuple[Any, Tensor]) -> Tensor:
        """The task's loss of every example of a batch from :meth:`prepared`, shape ``(B,)``."""
        return self.task.loss(columns(self.task.outputs(model, batch[0])), batch[1])


def batch_order(
    num_examples: int, batch_size: int, shuffle: bool, drop_last: bool, seed: int, epoch: int
) -> list[Tensor]:
    """Places of the examples in every batch of an epoch."""
    places = torch.arange(num_examples)
    if shuffle:
        places = torch.randperm(num_examples, generator=torch.Generator().manual_seed(mix(seed, epoch)))
    batches = list(places.split(batch_size))
    return batches[:-1] if drop_last and len(batches) > 1 and len(batches[-1]) < batch_size else batches
