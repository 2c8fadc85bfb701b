"""Training on from a final model with and without chosen examples."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from stride_lightning.data.examples import Examples, first_batch
from stride_lightning.data.reading import check_finite, encoded_batch
from stride_lightning.model.layers import in_precision_of
from stride_lightning.model.weights import borrowed
from stride_lightning.retraining.batchability import (
    check_vectorises,
    draws_random_numbers,
    loss_factor,
    vectorised_attention,
)
from stride_lightning.retraining.ensemble import Ensemble, bytes_per_model, chunk_size, keep_freed_memory
from stride_lightning.retraining.optimizers import CannotBatch, MakeOptimizer, Optimization, read_optimization
from stride_lightning.retraining.recipe import batch_order
from stride_lightning.retraining.step_losses import check_additive, check_step, detached_copy, step_loss, train_mode
from stride_lightning.runtime.parallel import num_workers
from stride_lightning.runtime.randomness import mix, seed_torch, seeded
from stride_lightning.tasks.likelihoods import Task, columns

#: Examples on which it is checked that a batch's loss is the mean of those of its examples, and those they are of.
_NUM_CHECKED, _NUM_CANDIDATES, _NUM_TEXTS = 16, 64, 1024


@dataclass
class LeavingOut:
    """Trains a model on, several copies at once, each without an example of its own.

    Example i is left out of every batch by subtracting its share of the training loss: the objective is
    ``mean over the batch of l_b - l_i / n``. All copies of a seed see the same batches and the same dropout.

    Args:
        model: The final model. It is copied, never changed.
        task: What a batch means.
        train: Training data.
        num_outputs: Outputs of the model for one example.
        batch_size, shuffle, drop_last: How batches are made.
        optimizer: Makes the optimizer; by default the model's ``configure_optimizers``, at its initial learning rate.
        memory_budget: Bytes that copies trained together may take.

    BatchNorm layers keep their statistics; weights of half precision are trained in float32. Losses of queries are
    measured in double precision where the device has it. Where ``torch.func`` cannot vectorise the model, copies train
    one by one; :attr:`one_by_one_because` says why.

    Raises:
        TypeError, ValueError: If the model optimizes by hand, if its optimizer or ``training_step`` cannot be used
            without a Trainer, or if the loss of a batch is not the mean of the losses of its examples.
    """

    model: nn.Module
    task: Task
    train: Examples
    num_outputs: int
    batch_size: int
    shuffle: bool = True
    drop_last: bool = False
    optimizer: MakeOptimizer | None = None
    memory_budget: int | None = None
    #: Why copies train one by one, where they do.
    one_by_one_because: str | None = field(default=None, init=False)
    _kernels: dict[Hashable, Any] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if not getattr(self.model, "automatic_optimization", True):
            raise ValueError(
                f"{type(self.model).__name__} optimizes by hand (automatic_optimization=False), so it has no loss to "
                "take an example's share from. Pass further_train() the network inside it, and `optimizer=`."
            )
        self.model = model = detached_copy(self.model)
        if any(p.is_floating_point() and p.element_size() < 4 for p in model.parameters()):
            model.float()  # one example's share of a step is below the rounding of half precision
        self._device, self._factor = next(model.parameters()).device, 1.0
        batch = first_batch(self.train, self.batch_size, self._device)
        with self.train.naming(0):
            prepared = self._prepared(batch)
        optimization = self._optimization(model)
        try:
            mixed, num_batches = self._mixed_batch(), len(self._order(0, 0))
            kinds = in_precision_of(model, mixed), self._prepared(mixed)
            with (
                torch.enable_grad(),
                vectorised_attention(),
            ):  # gradients are compared too; of a copy, as a step may keep its loss
                self._factor = loss_factor(copy.deepcopy(model), self.task, *kinds, num_batches=num_batches)
            with vectorised_attention():
                check_vectorises(model, self.task, prepared, train_mode)
                self._check_single_examples(prepared)
        except CannotBatch as reason:
            self.one_by_one_because = str(reason)
        #: Whether the loss is what ``training_step`` returns, because it is not the task's.
        self._is_step = self.one_by_one_because is not None and isinstance(model, L.LightningModule)
        if self._is_step:
            check_step(copy.deepcopy(model), in_precision_of(model, batch))
            check_additive(copy.deepcopy(model), self._mixed_examples(_NUM_CHECKED), self._device)
        self._in_double = self._device.type != "mps" and _takes_double(self.task, prepared[1])
        self._is_random = self.train.is_random or draws_random_numbers(model, self.task, prepared[0], train_mode)
        with vectorised_attention():
            self._bytes = bytes_per_model(model, optimization.optimizer, self._task_loss, prepared)
        keep_freed_memory()
        self.train.hold()

    @property
    def num_threads(self) -> int:
        """Chunks that may train at once."""
        return 1 if self._is_random or self.one_by_one_because else num_workers(self._device)

    def chunk_size(self, num_left_out: int) -> int:
        """Examples that are left out at once; one more copy leaves out none."""
        if self.one_by_one_because:
            return num_left_out
        return max(1, chunk_size(num_left_out + 1, self._bytes, self._device, self.memory_budget) - 1)

    def identity(self) -> dict[str, Any]:
        """Plain values that decide what training on gives, beside weights and data."""
        return {
            "optimizer": self._optimization(self.model).describe(with_schedule=False),
            "batch_size": self.batch_size,
            "shuffle": self.shuffle,
            "drop_last": self.drop_last,
            "task": repr(self.task),
        }

    def effects(
        self,
        left_out: Tensor,
        queries: Sequence[tuple[Any, Tensor]],
        epochs: Sequence[int],
        seed: int,
        tick: Callable[[int], Any] = lambda models: None,
    ) -> Tensor:
        """What leaving out each example does to the loss of each query.

        Args:
            left_out: Places of the examples in the reading order of the training data, shape ``(m,)``.
            queries: Inputs and encoded targets, batch by batch.
            epochs: After which epochs the queries are measured, ascending.
            seed: Decides the order of batches and dropout.
            tick: Told after every epoch how many models went through it.

        Returns:
            Loss without the example minus loss with it, positive is helpful, shape ``(len(epochs), m, q)``.
        """
        queries = [in_precision_of(self.model, batch) for batch in queries]
        # The copy that leaves out nothing is in every chunk: differences then hold no rounding of other shapes.
        shares = torch.full((len(left_out) + 1,), 1 / len(self.train), dtype=torch.float64)
        shares[0] = 0
        own = torch.cat([left_out[:1], left_out])
        if self.one_by_one_because:
            values = [
                self._train(own[i : i + 1], shares[i : i + 1], queries, epochs, seed, tick, alone=True)
                for i in range(len(own))
            ]
            losses = torch.cat(values, 1)
        else:
            losses = self._train(own, shares, queries, epochs, seed, tick, alone=False)
        # Of losses close to zero only double precision tells the differences; single precision can hold them.
        kept = torch.promote_types(next(self.model.parameters()).dtype, torch.float32)
        return (losses[:, 1:] - losses[:, :1]).to(kept).cpu()

    def check_queries(self, queries: Examples, batches: Sequence[tuple[Any, Tensor]]) -> None:
        """Refuse queries whose loss is not finite before any further training.

        Args:
            queries: Where they come from.
            batches: Their inputs and encoded targets, batch by batch.

        Raises:
            ValueError: Naming the first.
        """
        with borrowed(self.model, None, None), torch.no_grad(), seeded(0):
            losses = torch.cat(
                [self._query_losses(self.model, in_precision_of(self.model, batch)) for batch in batches]
            )
        with queries.naming(0):
            check_finite(losses, "loss before any further training")

    def _train(
        self,
        own: Tensor,
        shares: Tensor,
        queries: Sequence[tuple[Any, Tensor]],
        epochs: Sequence[int],
        seed: int,
        tick: Callable[[int], Any],
        *,
        alone: bool,
    ) -> Tensor:
        """Losses of the queries after the given epochs, shape ``(len(epochs), m, q)``."""
        model = copy.deepcopy(self.model)
        train_mode(model)
        optimization = self._optimization(model)
        shares = shares.to(self._device, next(model.parameters()).dtype)
        trained = self._single(model, optimization) if alone else self._ensemble(model, optimization, len(own), epochs)
        found, steps, examples = [], 0, None
        for epoch in range(epochs[-1]):
            if examples is None or self.train.is_random:
                examples = self._examples(own, mix(seed, epoch), alone=alone)
            order = self._order(seed, epoch)
            for places, batch in zip(order, self.train.drawn(order, mix(seed, epoch), self._device), strict=True):
                with self.train.naming(places):
                    shown = self._shown(batch)
                if self._is_random:
                    seed_torch(mix(seed, epoch, steps))
                trained.step(shown, (examples, shares))
                steps += 1
            tick(len(own))
            if epoch + 1 in epochs:
                model.eval()
                found.append(torch.cat([trained.evaluate(self._query_losses, batch) for batch in queries], 1))
                train_mode(model)
        return torch.stack(found)

    def _ensemble(
        self, model: nn.Module, optimization: Optimization, num_models: int, epochs: Sequence[int]
    ) -> Ensemble:
        num_steps = epochs[-1] * len(self._order(0, 0))
        optimizer, loss, objective = optimization.optimizer, self._task_loss, _without_share
        return Ensemble(model, optimizer, num_models, loss, objective, kernels=self._kernels, num_steps=num_steps)

    def _single(self, model: nn.Module, optimization: Optimization) -> _Single:
        return _Single(model, optimization.optimizer, step_loss if self._is_step else self._task_loss)

    def _examples(self, own: Tensor, seed: int, *, alone: bool) -> Any:
        """The examples that are left out: a batch of one, or one such batch for each copy, stacked."""
        (batch,) = self.train.drawn([own], seed, self._device)
        shown = self._shown(batch)
        return shown if alone else _stacked(shown)

    def _order(self, seed: int, epoch: int) -> list[Tensor]:
        return batch_order(len(self.train), self.batch_size, self.shuffle, self.drop_last, seed, epoch)

    def _shown(self, batch: Any) -> Any:
        """What the training loss is computed of: inputs and encoded targets, or the batch for ``training_step``."""
        return in_precision_of(self.model, batch) if self._is_step else self._prepared(batch)

    def _prepared(self, batch: Any) -> tuple[Any, Tensor]:
        return encoded_batch(self.model, self.task, batch, self.num_outputs)

    def _optimization(self, model: nn.Module) -> Optimization:
        try:
            optimization = read_optimization(model, self.optimizer)
        except CannotBatch as reason:
            raise ValueError(
                f"The model's own optimizer cannot be used for training on, because {reason}. Pass `optimizer=`, such "
                "as functools.partial(torch.optim.SGD, lr=0.01)."
            ) from reason
        for group in optimization.optimizer.param_groups:
            group["lr"] = group.get("initial_lr", group["lr"])  # a schedule may have begun with a warm-up
        return optimization

    def _losses(self, model: nn.Module, batch: tuple[Any, Tensor]) -> Tensor:
        outputs = columns(self.task.outputs(model, batch[0]))
        return self.task.loss(outputs, batch[1])

    def _query_losses(self, model: nn.Module, batch: tuple[Any, Tensor]) -> Tensor:
        outputs, encoded = columns(self.task.outputs(model, batch[0])), batch[1]
        return (
            self.task.loss(outputs.double(), encoded.double()) if self._in_double else self.task.loss(outputs, encoded)
        )

    def _task_loss(self, model: nn.Module, batch: tuple[Any, Tensor]) -> Tensor:
        return self._factor * self._losses(model, batch).mean()

    def _check_single_examples(self, prepared: tuple[Any, Tensor]) -> None:
        """Make one step of two copies: with the weights, each copy's own example is vectorised.

        Raises:
            CannotBatch: With the reason torch gives.
        """
        part = self._part([0, len(self.train) - 1])
        model = copy.deepcopy(self.model)
        train_mode(model)
        optimizer = self._optimization(model).optimizer
        try:
            with seeded(0), torch.enable_grad():
                (batch,) = part.drawn([torch.arange(2)], 0, self._device)
                shares = torch.full((2,), 1 / len(self.train)).to(prepared[1])
                two = Ensemble(model, optimizer, 2, self._task_loss, _without_share)
                two.step(prepared, (_stacked(self._prepared(batch)), shares))
        except Exception as error:
            detail = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
            if self.task.has_tokens and "attention_mask" in prepared[0]:
                detail += ". Batches without attention_mask, of texts that need no padding, may be vectorised"
            raise CannotBatch(f"torch.func cannot vectorise single examples: {detail}") from error

    def _mixed_batch(self) -> Any:
        """A batch of examples of all kinds, of the size of a training batch."""
        part = self._mixed_examples(self.batch_size)
        with seeded(0):
            (batch,) = part.drawn([torch.arange(len(part))], 0, self._device)
        return batch

    def _mixed_examples(self, size: int) -> Examples:
        """Some examples from all over the training data, with as many values of the target as there are."""
        num, candidates = len(self.train), _NUM_TEXTS if self.task.has_tokens else _NUM_CANDIDATES
        places = torch.linspace(0, num - 1, min(max(candidates, size), num), dtype=torch.float64).long()
        places = places[torch.randperm(len(places), generator=torch.Generator().manual_seed(0))]
        part = self._part(places.tolist())
        with seeded(0):
            (batch,) = part.drawn([torch.arange(len(part))], 0, self._device)
        with part.naming(0):
            encoded = self._prepared(batch)[1].cpu()
        if self.task.has_tokens:  # texts differ by how many of them count
            encoded = encoded[..., 1].sum(1, keepdim=True)
        _, kind = encoded.unique(dim=0, return_inverse=True)
        earlier = F.one_hot(kind).cumsum(0).gather(1, kind[:, None])[:, 0]  # of the same target, with itself
        return self._part(places[earlier.argsort(stable=True)[:size]].tolist())

    def _part(self, places: list[int]) -> Examples:
        """Some training examples, read in this process."""
        _ = self.train.is_random  # asked of all examples, not of these
        part = self.train.subset(places)
        part.num_workers = 0
        return part


class _Single:
    """One copy, trained without vectorising: stands where an :class:`Ensemble` of one would."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable[[nn.Module, Any], Tensor]
    ) -> None:
        self.model, self.optimizer, self.loss = model, optimizer, loss

    def step(self, shared: Any, own: tuple[Any, Tensor]) -> None:
        examples, shares = own
        self.optimizer.zero_grad()
        with torch.enable_grad():
            (self.loss(self.model, shared) - shares[0] * self.loss(self.model, examples)).backward()
        self.optimizer.step()

    @torch.no_grad()
    def evaluate(self, function: Callable[[nn.Module, Any], Tensor], batch: Any) -> Tensor:
        return function(self.model, batch)[None]


def _stacked(shown: Any) -> Any:
    """A batch as batches of one, one for each copy."""
    return pytree.tree_map(lambda value: value[:, None], shown)


def _takes_double(task: Task, encoded: Tensor) -> bool:
    """Whether a task's loss can be computed in double precision; weights that one holds may not let it."""
    try:
        task.loss(torch.zeros_like(encoded, dtype=torch.float64), encoded.double())
    except Exception:
        return False
    return True


def _without_share(call: Callable[[Any], Tensor], shared: Any, own: tuple[Any, Tensor]) -> Tensor:
    """A batch's mean loss, less the share of the example that is left out."""
    example, share = own
    return call(shared) - share * call(example)
