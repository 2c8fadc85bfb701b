"""Further training of a final model with and without chosen examples."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from typing_extensions import override

from stride_lightning.data.examples import Examples, first_batch
from stride_lightning.model.layers import in_precision_of
from stride_lightning.model.weights import borrowed
from stride_lightning.retraining.batchability import GRADIENT_HOOKS, loss_of_step, vectorised_attention
from stride_lightning.retraining.batches import Batches
from stride_lightning.retraining.ensemble import Ensemble, Single
from stride_lightning.retraining.modules import overridden, tree_of
from stride_lightning.retraining.optimizers import CannotBatch, check_together, read_optimization
from stride_lightning.retraining.step_losses import check_additive, check_step, detached_copy, train_mode
from stride_lightning.runtime.checks import check_finite, first_line
from stride_lightning.runtime.randomness import mix, seeded
from stride_lightning.tasks.likelihoods import Task, columns

#: Numbers of examples: those of the check for additive losses, and those among which it chooses them (texts: more).
_NUM_CHECKED, _NUM_CANDIDATES, _NUM_TEXTS = 16, 64, 1024


class LeavingOut(Batches):
    """Trains a model further, several copies at once, each without another example.

    Example i is left out of every batch by subtracting its share of the training loss: the objective is
    ``mean over the batch of l_b - l_i / n``. All copies of a seed see the same batches and the same dropout.

    The final model is copied, never changed. The statistics of its BatchNorm layers do not change; weights of half
    precision are trained in float32. The model's optimizer starts at its initial learning rate. Losses of queries are
    measured in double precision if the device has it. If ``torch.func`` cannot vectorise the model, copies train one by
    one, and :attr:`one_by_one_because` is the reason.

    Args as in :class:`Batches`; ``warn`` decides whether a warning names hooks that are not called.

    Raises:
        ValueError: If the model uses manual optimization, its optimizer or ``training_step`` needs a Trainer, or its
            loss of a batch is not the mean of the losses of the examples.
    """

    def __init__(
        self, model: nn.Module, train: Examples, head: Any, task: Task, *, warn: bool = True, **how: Any
    ) -> None:
        super().__init__(model, train, head, task, **how)
        if warn and (hooks := overridden(model, GRADIENT_HOOKS)):
            warnings.warn(
                f"{type(model).__name__} overrides {', '.join(hooks)}. Further training does not call these hooks, so "
                "effects are those of training without them. What changes the loss belongs in training_step.",
                stacklevel=3,
            )
        if not getattr(model, "automatic_optimization", True):
            raise ValueError(
                f"{type(model).__name__} uses manual optimization (automatic_optimization=False), so it returns no "
                "loss to subtract an example's share from. Pass further_train() the network inside it, and "
                "`optimizer=`."
            )
        self.model = model = detached_copy(model)
        if any(p.is_floating_point() and p.element_size() < 4 for p in model.parameters()):
            model.float()  # in half precision one example's share of a step is below the rounding
        batch = first_batch(train, self.loading.batch_size, self.device)
        with train.naming(0):
            sample = self.prepared(model, batch)
        optimizer = self._make_optimizer(model)
        try:
            self.try_out(model, sample, self._drawn(self._mixed_examples(self.loading.batch_size)))
            self._check_single_examples(sample)
        except CannotBatch as reason:
            self.one_by_one_because = str(reason)
        #: Whether ``training_step`` gives the loss, because it differs from the task's.
        self._is_step = self.one_by_one_because is not None and tree_of(model) is not None
        if self._is_step:
            check_step(copy.deepcopy(model), in_precision_of(model, batch))
            check_additive(copy.deepcopy(model), self._mixed_examples(_NUM_CHECKED), self.device)
        self._in_double = self.device.type != "mps" and _takes_double(task, sample[1])
        self.get_ready(model, optimizer, self._task_loss, sample)

    @override
    def set_mode(self, model: nn.Module) -> None:
        train_mode(model)

    @override
    def chunk_size(self, num_models: int) -> int:
        """Number of examples that are left out at once; one more copy leaves out none."""
        return num_models if self.one_by_one_because else max(1, super().chunk_size(num_models + 1) - 1)

    def identity(self) -> dict[str, Any]:
        """Plain values that determine further training, apart from weights and data."""
        return {**self.described(), "optimizer": repr(self._make_optimizer(self.model))}

    def effects(
        self,
        left_out: Tensor,
        queries: Sequence[tuple[Any, Tensor]],
        epochs: Sequence[int],
        seed: int,
        tick: Callable[[int], Any] = lambda models: None,
    ) -> Tensor:
        """Loss of each query without an example minus loss with it, positive is helpful: ``(len(epochs), m, q)``.

        ``left_out`` holds places of the examples, shape ``(m,)``; queries are inputs and encoded targets, batch by
        batch. They are measured after the given epochs (ascending). After every epoch ``tick`` gets the number of
        models.
        """
        queries = [in_precision_of(self.model, batch) for batch in queries]
        # Every chunk has a copy that leaves out nothing, so differences have no rounding of other shapes.
        shares = torch.full((len(left_out) + 1,), 1 / len(self.train), dtype=torch.float64)
        shares[0] = 0
        examples = torch.cat([left_out[:1], left_out])
        size = 1 if self.one_by_one_because else len(examples)
        parts = zip(examples.split(size), shares.split(size), strict=True)
        losses = torch.cat([self._train(*part, queries, epochs, seed, tick) for part in parts], 1)
        # Differences of losses close to zero need double precision; single precision can store them.
        stored_dtype = torch.promote_types(next(self.model.parameters()).dtype, torch.float32)
        return (losses[:, 1:] - losses[:, :1]).to(stored_dtype).cpu()

    def check_queries(self, queries: Examples, batches: Sequence[tuple[Any, Tensor]]) -> None:
        """Refuse queries whose loss is not finite before any further training; the error names the first."""
        batches = [in_precision_of(self.model, batch) for batch in batches]
        with borrowed(self.model, None, None), torch.no_grad(), seeded(0), queries.naming(0):
            losses = torch.cat([self._query_losses(self.model, batch) for batch in batches])
            check_finite(losses, "loss before any further training")

    def _train(
        self,
        left_out: Tensor,
        shares: Tensor,
        queries: Sequence[tuple[Any, Tensor]],
        epochs: Sequence[int],
        seed: int,
        tick: Callable[[int], Any],
    ) -> Tensor:
        """Losses of the queries after the given epochs, shape ``(len(epochs), m, q)``."""
        model, alone = copy.deepcopy(self.model), self.one_by_one_because is not None
        train_mode(model)
        optimizer = self._make_optimizer(model)
        shares = shares.to(self.device, next(model.parameters()).dtype)
        if alone:
            trained = Single(model, optimizer, loss_of_step if self._is_step else self._task_loss, _without_share)
        else:
            options = {"kernels": self.kernels, "num_steps": epochs[-1] * len(self.order(0, 0))}
            trained = Ensemble(model, optimizer, len(left_out), self._task_loss, _without_share, **options)
        losses, examples = [], None
        for epoch in range(epochs[-1]):
            if examples is None or self.train.is_random:
                (batch,) = self.train.drawn([left_out], mix(seed, epoch), self.device)
                examples = self._shown(batch) if alone else _stacked(self._shown(batch))
            for _, shown in self.epoch(seed, epoch, self._shown):
                trained.step(shown, (examples, shares[0] if alone else shares))
            tick(len(left_out))
            if epoch + 1 in epochs:
                model.eval()
                losses.append(torch.cat([trained.evaluate(self._query_losses, batch) for batch in queries], 1))
                train_mode(model)
        return torch.stack(losses)

    def _shown(self, batch: Any) -> Any:
        """Input of the training loss: inputs and encoded targets, or the batch for ``training_step``."""
        return in_precision_of(self.model, batch) if self._is_step else self.prepared(self.model, batch)

    def _make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        try:
            optimizer = read_optimization(model, self.optimizer).optimizer
            check_together(optimizer, model)
        except CannotBatch as reason:
            raise ValueError(
                f"Further training cannot use the model's optimizer, because {reason}. Pass `optimizer=`, such as "
                "functools.partial(torch.optim.SGD, lr=0.01)."
            ) from reason
        for group in optimizer.param_groups:
            group["lr"] = group.get("initial_lr", group["lr"])  # a schedule may have begun with a warm-up
        return optimizer

    def _query_losses(self, model: nn.Module, batch: tuple[Any, Tensor]) -> Tensor:
        outputs, encoded = columns(self.task.outputs(model, batch[0])), batch[1]
        if self._in_double:
            outputs, encoded = outputs.double(), encoded.double()
        return self.task.loss(outputs, encoded)

    def _task_loss(self, model: nn.Module, batch: tuple[Any, Tensor]) -> Tensor:
        return self.factor * self.losses(model, batch).mean()

    def _check_single_examples(self, sample: tuple[Any, Tensor]) -> None:
        """Make one step of two copies, which tests whether the examples left out can be vectorised too."""
        part = self._part([0, len(self.train) - 1])
        model = copy.deepcopy(self.model)
        train_mode(model)
        optimizer = self._make_optimizer(model)
        try:
            with seeded(0), torch.enable_grad(), vectorised_attention():
                examples = _stacked(self.prepared(self.model, self._drawn(part)))
                shares = torch.full((2,), 1 / len(self.train)).to(sample[1])
                Ensemble(model, optimizer, 2, self._task_loss, _without_share).step(sample, (examples, shares))
        except Exception as error:
            detail = first_line(error)
            if self.task.has_tokens and "attention_mask" in sample[0]:
                detail += ". Batches without attention_mask may work, if the texts need no padding"
            raise CannotBatch(f"torch.func cannot vectorise single examples: {detail}") from error

    def _mixed_examples(self, size: int) -> Examples:
        """Examples from all parts of the training data, with as many different targets as possible."""
        num, candidates = len(self.train), _NUM_TEXTS if self.task.has_tokens else _NUM_CANDIDATES
        places = torch.linspace(0, num - 1, min(max(candidates, size), num), dtype=torch.float64).long()
        places = places[torch.randperm(len(places), generator=torch.Generator().manual_seed(0))]
        part = self._part(places.tolist())
        with part.naming(0):
            encoded = self.prepared(self.model, self._drawn(part))[1].cpu()
        if self.task.has_tokens:  # texts differ by the number of tokens that count
            encoded = encoded[..., 1].sum(1, keepdim=True)
        _, kind = encoded.unique(dim=0, return_inverse=True)
        earlier = F.one_hot(kind).cumsum(0).gather(1, kind[:, None])[:, 0]  # examples of this target up to this one
        return self._part(places[earlier.argsort(stable=True)[:size]].tolist())

    def _drawn(self, part: Examples) -> Any:
        """All examples of a part as one batch."""
        with seeded(0):
            (batch,) = part.drawn([torch.arange(len(part))], 0, self.device)
        return batch

    def _part(self, places: list[int]) -> Examples:
        """A part of the training examples, read in this process."""
        _ = self.train.is_random  # tested on all examples before, not on this part
        part = self.train.subset(places)
        part.num_workers = 0
        return part


def _stacked(shown: Any) -> Any:
    """A batch as batches of one example, one for each copy."""
    return pytree.tree_map(lambda value: value[:, None], shown)


def _takes_double(task: Task, encoded: Tensor) -> bool:
    """Whether a task's loss works in double precision; a task with weights may fail."""
    try:
        task.loss(torch.zeros_like(encoded, dtype=torch.float64), encoded.double())
    except Exception:
        return False
    return True


def _without_share(call: Callable[[Any], Tensor], shared: Any, single: tuple[Any, Tensor]) -> Tensor:
    """A batch's mean loss, minus the share of the example that is left out."""
    example, share = single
    return call(shared) - share * call(example)
