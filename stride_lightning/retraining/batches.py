"""Training data in the batches, and in the order, of a run of training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from stride_lightning.data.examples import Examples
from stride_lightning.data.loading import check_loading
from stride_lightning.data.reading import count_outputs, encoded_batch
from stride_lightning.retraining.optimizers import MakeOptimizer
from stride_lightning.runtime.randomness import mix, seed_torch
from stride_lightning.tasks.likelihoods import Task, columns


class Batches:
    """Training data in the batches that a run of training makes of them.

    Args:
        model: A model that takes them.
        train: Training data.
        head: Its first batch.
        task: What a batch means.
        batch_size: Examples of a batch; by default as the training DataLoader makes them.
        optimizer: Makes the optimizer; by default the model's ``configure_optimizers``.
        memory_budget: Bytes that models trained together may take.

    Raises:
        ValueError: If the model cannot take the batches, or it is not known how they are made.
    """

    def __init__(
        self,
        model: nn.Module,
        train: Examples,
        head: Any,
        task: Task,
        *,
        batch_size: int | None = None,
        optimizer: MakeOptimizer | None = None,
        memory_budget: int | None = None,
    ) -> None:
        self.train, self.task, self.loading = train, task, check_loading(train.loading, batch_size)
        self.optimizer, self.memory_budget = optimizer, memory_budget
        with train.naming(0):
            self.num_outputs = count_outputs(model, task, head)

    def order(self, seed: int, epoch: int) -> list[Tensor]:
        """Places of the examples of every batch of an epoch; the same for all models of a seed."""
        how = self.loading
        return batch_order(len(self.train), how.batch_size, how.shuffle, how.drop_last, seed, epoch)

    def epoch(
        self, seed: int, epoch: int, device: torch.device, prepare: Callable[[Any], Any], *, is_random: bool
    ) -> Iterator[tuple[Tensor, Any]]:
        """The batches of an epoch, each with the places of its examples.

        Args:
            seed: Decides the order, random augmentation and dropout.
            epoch: Number of the epoch.
            device: Where the batches go.
            prepare: Makes of a batch what the training loss is computed of.
            is_random: Whether a step draws random numbers: then it is seeded, whatever was drawn before.
        """
        order = self.order(seed, epoch)
        drawn = self.train.drawn(order, mix(seed, epoch), device)
        for number, (places, batch) in enumerate(zip(order, drawn, strict=True)):
            with self.train.naming(places):
                prepared = prepare(batch)
            if is_random:
                seed_torch(mix(seed, epoch, epoch * len(order) + number))
            yield places, prepared

    def prepared(self, model: nn.Module, batch: Any) -> tuple[Any, Tensor]:
        """Inputs of a batch, and its encoded targets of shape ``(B, C)``, in the model's precision."""
        return encoded_batch(model, self.task, batch, self.num_outputs)

    def described(self) -> dict[str, Any]:
        """Plain values that tell these batches from others, beside the data."""
        how = self.loading
        made = {"batch_size": how.batch_size, "shuffle": how.shuffle, "drop_last": how.drop_last}
        return {**made, "task": repr(self.task)}

    def losses(self, model: nn.Module, batch: tuple[Any, Tensor]) -> Tensor:
        """The task's loss of every example of a batch as :meth:`prepared` gives it, shape ``(B,)``."""
        return self.task.loss(columns(self.task.outputs(model, batch[0])), batch[1])


def batch_order(
    num_examples: int, batch_size: int, shuffle: bool, drop_last: bool, seed: int, epoch: int
) -> list[Tensor]:
    """Places of the examples of every batch of an epoch.

    Example:
        >>> batch_order(5, batch_size=2, shuffle=False, drop_last=False, seed=0, epoch=0)
        [tensor([0, 1]), tensor([2, 3]), tensor([4])]
    """
    places = torch.arange(num_examples)
    if shuffle:
        places = torch.randperm(num_examples, generator=torch.Generator().manual_seed(mix(seed, epoch)))
    batches = list(places.split(batch_size))
    return batches[:-1] if drop_last and len(batches) > 1 and len(batches[-1]) < batch_size else batches
