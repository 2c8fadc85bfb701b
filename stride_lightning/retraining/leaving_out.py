"""Further training of a final model with and without chosen examples."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from typing_extensions import override

from stride_lightning.data.examples import Examples, first_batch
from stride_lightning.data.reading import survey
from stride_lightning.retraining.batchability import GRADIENT_HOOKS, OtherLoss, vectorised_attention
from stride_lightning.retraining.batches import Batches
from stride_lightning.retraining.ensemble import Ensemble, Single
from stride_lightning.retraining.modules import overridden
from stride_lightning.retraining.optimizers import CannotBatch, check_parameters, check_together, read_optimizer
from stride_lightning.retraining.own_steps import OwnSteps
from stride_lightning.retraining.query_values import QueryValues, query_values, reader_of
from stride_lightning.retraining.step_losses import detached_copy, train_mode
from stride_lightning.runtime.checks import check_finite, first_line
from stride_lightning.runtime.randomness import mix, seeded
from stride_lightning.tasks.likelihoods import Task
from stride_lightning.tasks.measures import functions_of, measure_info
from stride_lightning.tasks.moments import Moment
from stride_lightning.tasks.own_loss import FunctionLoss, OwnLoss, RowFunction

#: Examples among which those of the check of the loss are chosen (texts: more).
_NUM_CANDIDATES, _NUM_TEXTS = 64, 1024


class LeavingOut(Batches):
    """Trains a model further, several copies at once, each without another example.

    Example i is left out of every batch by subtracting its share of the training loss: the objective is
    ``mean over the batch of l_b - l_i / n``. All copies of a seed see the same batches and the same dropout. Where no
    likelihood gives the loss, :class:`~stride_lightning.retraining.own_steps.OwnSteps` says what ``l_i`` is.

    The final model is copied, never changed. The statistics of its normalisation layers do not change; weights of half
    precision are trained in float32. The model's optimizer starts at its initial learning rate. Losses of queries are
    measured in double precision if the device has it. If ``torch.func`` cannot vectorise the model, copies train one by
    one, and :attr:`one_by_one_because` is the reason.

    Args:
        model: The final model, on its device.
        train: The training data.
        head: The first batch.
        task: The likelihood, or the loss of the module's own.
        measure: What is measured of the queries, by default their loss.
        moment: The moment of training at which a loss of the module's own is taken.
        warn: Whether a warning names hooks that are not called.
        **how: As in :class:`Batches`.

    Raises:
        ValueError: If the model's optimizer needs a Trainer, or its loss cannot be computed.
    """

    def __init__(
        self,
        model: nn.Module,
        train: Examples,
        head: Any,
        task: Task | OwnLoss,
        *,
        measure: RowFunction | None = None,
        moment: Moment | None = None,
        warn: bool = True,
        **how: Any,
    ) -> None:
        super().__init__(model, train, head, task, **how)
        self.measure = measure
        if warn and (hooks := overridden(model, GRADIENT_HOOKS)):
            warnings.warn(
                f"{type(model).__name__} overrides {', '.join(hooks)}. Further training does not call these hooks, so "
                "effects are those of training without them. What changes the loss belongs in training_step.",
                stacklevel=3,
            )
        self.model = model = detached_copy(model)
        if any(p.is_floating_point() and p.element_size() < 4 for p in model.parameters()):
            model.float()  # in half precision one example's share of a step is below the rounding
        optimizer = self._make_optimizer(model)
        #: Steps on a loss of the module's own; None where the task's loss is trained on.
        self.steps: OwnSteps | None = None
        try:
            if not isinstance(task, Task):
                raise OtherLoss(f"it trains on {self.reason}")
            sample = self._try_out(model, optimizer)
        except OtherLoss as reason:
            self.one_by_one_because = str(reason)
            own_loss = OwnLoss() if isinstance(task, Task) else task
            self.steps = OwnSteps(own_loss, model, train, self.loading.batch_size, moment)
            self.train.hold()
            return
        self.get_ready(model, optimizer, self._task_loss, sample)

    def _try_out(self, model: nn.Module, optimizer: Any) -> tuple[Any, Tensor]:
        """Try whether copies can train together on the task's loss; returns a batch of it.

        Raises:
            OtherLoss: If the task's loss is not the one that the model trains on.
        """
        batch = first_batch(self.train, self.loading.batch_size, self.device)
        with self.train.naming(0):
            sample = self.prepared(model, batch)
        try:
            self.try_out(model, sample, self._drawn(self._mixed_examples(self.loading.batch_size)))
            check_together(optimizer, model)
            self._check_single_examples(sample)
        except OtherLoss:
            raise
        except CannotBatch as reason:
            self.one_by_one_because = str(reason)
        return sample

    @override
    def set_mode(self, model: nn.Module) -> None:
        train_mode(model)

    @override
    def chunk_size(self, num_models: int) -> int:
        """Number of examples that are left out at once; one more copy leaves out none."""
        return num_models if self.one_by_one_because else max(1, super().chunk_size(num_models + 1) - 1)

    def identity(self) -> dict[str, Any]:
        """Plain values that determine further training, apart from weights and data."""
        loss = self.meaning.fn if isinstance(self.meaning, FunctionLoss) else None
        return {
            **self.described(),
            **({} if self.steps is None else self.steps.described()),
            "measure": measure_info(self.measure),
            **functions_of(loss=loss, measure=self.measure),
            "optimizer": repr(self._make_optimizer(self.model)),
        }

    def fingerprint(self) -> dict[str, Any]:
        """That of the training data, every example of which must be one that the task takes."""
        model = self.model if self.num_outputs else None
        return survey(self.train, reader_of(self.meaning), model, self.num_outputs).fingerprint

    def query_values(self, queries: Examples, target: str = "label") -> QueryValues:
        """Read the queries, for what is measured of them."""
        return query_values(
            queries,
            self.meaning,
            self.model,
            measure=self.measure,
            num_outputs=self.num_outputs,
            steps=self.steps,
            target=target,
        )

    def effects(
        self,
        left_out: Tensor,
        queries: QueryValues,
        epochs: Sequence[int],
        seed: int,
        tick: Callable[[int], Any] = lambda models: None,
    ) -> Tensor:
        """Loss of each query without an example minus loss with it, positive is helpful: ``(len(epochs), m, q)``.

        With a measure, it is the value with the example minus that without it. ``left_out`` holds places of the
        examples, shape ``(m,)``. Queries are measured after the given epochs (ascending). After every epoch ``tick``
        gets the number of models.
        """
        # Every chunk has a copy that leaves out nothing, so differences have no rounding of other shapes.
        shares = torch.full((len(left_out) + 1,), 1 / len(self.train), dtype=torch.float64)
        shares[0] = 0
        examples = torch.cat([left_out[:1], left_out])
        size = 1 if self.one_by_one_because else len(examples)
        parts = zip(examples.split(size), shares.split(size), strict=True)
        train = self._train if self.steps is None else self._train_alone
        losses = torch.cat([train(*part, queries, epochs, seed, tick) for part in parts], 1)
        # Differences of losses close to zero need double precision; single precision can store them.
        stored_dtype = torch.promote_types(next(self.model.parameters()).dtype, torch.float32)
        return (losses[:, 1:] - losses[:, :1]).to(stored_dtype).cpu()

    def check_queries(self, queries: Examples, values: QueryValues) -> None:
        """Refuse queries whose loss is not finite before any further training; the error names the first."""
        with seeded(0), queries.naming(0):
            check_finite(values.of(self.model), "loss before any further training")

    def _train(
        self,
        left_out: Tensor,
        shares: Tensor,
        queries: QueryValues,
        epochs: Sequence[int],
        seed: int,
        tick: Callable[[int], Any],
    ) -> Tensor:
        """Losses of the queries after the given epochs, shape ``(len(epochs), m, q)``."""
        model, alone = detached_copy(self.model), self.one_by_one_because is not None
        train_mode(model)
        optimizer = self._make_optimizer(model)
        shares = shares.to(self.device, next(model.parameters()).dtype)
        if alone:
            trained = Single(model, optimizer, self._task_loss, _without_share)
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
                parts = [trained.evaluate(queries.of_batch, b, vectorise=queries.vectorises) for b in queries.batches]
                losses.append(torch.cat(parts, 1))
                train_mode(model)
        return torch.stack(losses)

    def _train_alone(
        self,
        left_out: Tensor,
        shares: Tensor,
        queries: QueryValues,
        epochs: Sequence[int],
        seed: int,
        tick: Callable[[int], Any],
    ) -> Tensor:
        """The same for one copy, on a loss of the module's own."""
        assert self.steps is not None
        steps, model, place, is_left_out = self.steps, detached_copy(self.model), int(left_out[0]), float(shares[0]) > 0
        optimizer, losses, parts = self._make_optimizer(model), [], []
        for epoch in range(epochs[-1]):
            if is_left_out and (epoch == 0 or self.train.is_random or steps.kind == "coupled"):
                parts = steps.parts(place, mix(seed, epoch))
            for number, (places, batch) in enumerate(self.epoch(seed, epoch, lambda batch: batch)):
                with torch.enable_grad():
                    draw = mix(seed, epoch, number)
                    loss = steps.of_batch(model, batch, places, draw)
                    if loss is None or not loss.requires_grad:
                        continue  # as Lightning skips it
                    if is_left_out:
                        loss = loss - steps.share(len(places)) * steps.of_example(model, parts, draw, dropout=True)
                    optimizer.zero_grad()
                    loss.backward()
                optimizer.step()
            tick(1)
            if epoch + 1 in epochs:
                losses.append(queries.of(model)[None])
        return torch.stack(losses)

    def _shown(self, batch: Any) -> Any:
        """Input of the training loss: inputs and encoded targets."""
        return self.prepared(self.model, batch)

    def _make_optimizer(self, model: nn.Module) -> Any:
        try:
            optimizer = read_optimizer(model, self.optimizer)
            check_parameters(optimizer, model)
        except CannotBatch as reason:
            raise ValueError(
                f"Further training cannot use the model's optimizer, because {reason}. Pass `optimizer=`, such as "
                "functools.partial(torch.optim.SGD, lr=0.01)."
            ) from reason
        return optimizer

    def _task_loss(self, model: nn.Module, batch: tuple[Any, Tensor]) -> Tensor:
        return self.factor * self.losses(model, batch).mean()

    def _check_single_examples(self, sample: tuple[Any, Tensor]) -> None:
        """Make one step of two copies, which tests whether the examples left out can be vectorised too."""
        part = self._part([0, len(self.train) - 1])
        model = detached_copy(self.model)
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


def _without_share(call: Callable[[Any], Tensor], shared: Any, single: tuple[Any, Tensor]) -> Tensor:
    """A batch's mean loss, minus the share of the example that is left out."""
    example, share = single
    return call(shared) - share * call(example)
