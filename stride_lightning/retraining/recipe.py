"""The recipe of a training: the fresh model, its optimizer, its batches, and the measure of queries."""

from __future__ import annotations

import copy
import hashlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypedDict

import lightning.pytorch as L
import torch
from torch import Tensor, nn

from stride_lightning.data.examples import first_look
from stride_lightning.data.objectives import check_objective, resolve_objective, says_rows_loss
from stride_lightning.data.reading import survey
from stride_lightning.data.sources import resolve_queries, resolve_train_data
from stride_lightning.model.weights import borrowed, weight_hash
from stride_lightning.retraining.batches import Batches
from stride_lightning.retraining.modules import build
from stride_lightning.retraining.optimizers import CannotBatch, MakeOptimizer, read_optimization
from stride_lightning.retraining.own_steps import OwnSteps
from stride_lightning.retraining.query_values import QueryValues, query_values, reader_of
from stride_lightning.runtime.checks import check_count, check_finite
from stride_lightning.runtime.randomness import seeded
from stride_lightning.tasks.likelihoods import Task
from stride_lightning.tasks.measures import check_function, functions_of, measure_info
from stride_lightning.tasks.moments import Moment
from stride_lightning.tasks.own_loss import OwnLoss, RowFunction


class Training(TypedDict, total=False):
    """Optional arguments of :func:`~stride_lightning.retrain` and :func:`~stride_lightning.retrain_without`.

    Args:
        batch_size: Examples of a batch, before those outside a subset are dropped.
        optimizer: Function that makes the optimizer of a model's parameters; by default ``configure_optimizers``.
        trainer_fn: Function that makes a fresh Trainer for each model, for other settings (precision, clipping); models
            then train one by one.
        task: The meaning of a batch; by default inferred. ``OwnLoss()`` is the loss that ``training_step`` computes.
        loss: What training minimised, where that is another loss than the module's: ``fn(model, batch) -> (B,)``. A
            module that is no LightningModule trains on its mean.
        measure: What is measured of the queries, ``fn(model, batch) -> (B,)`` with the module in eval mode; by default
            their loss. Positive scores raise it.
        train_indices: Positions in the dataset that models train on, if the sampler does not give them.
        device: Device of the training; by default the model's.
        memory_budget: Bytes for the models that train together; by default 32 MiB on a CPU, the size of its caches, and
            2 GiB on a GPU. See :class:`~stride_lightning.retraining.ensemble.Ensemble` for the formula. Training data
            of less than 256 MiB, one model per seed and the queries are held in addition.
        one_by_one: Train every model with a fresh Trainer, even if models could train together.
    """

    batch_size: int | None
    optimizer: MakeOptimizer | None
    trainer_fn: Callable[[], L.Trainer] | None
    task: Task | OwnLoss | None
    loss: RowFunction | None
    measure: RowFunction | None
    train_indices: Sequence[int] | Tensor | None
    device: str | torch.device | None
    memory_budget: int | None
    one_by_one: bool


class Recipe(Batches):
    """All settings of a training run, except for the subset and the seed.

    Models of one seed start from the same weights and see the same batches in the same order, except for the examples
    that are left out (common random numbers), so they differ only by their data.

    Arguments as in :func:`~stride_lightning.retrain` and :class:`Training`; all are checked.
    """

    def __init__(
        self,
        model_fn: Callable[[], nn.Module],
        queries: Any,
        *,
        train_data: Any,
        max_epochs: int,
        batch_size: int | None = None,
        optimizer: MakeOptimizer | None = None,
        trainer_fn: Callable[[], L.Trainer] | None = None,
        task: Task | OwnLoss | None = None,
        loss: RowFunction | None = None,
        measure: RowFunction | None = None,
        train_indices: Sequence[int] | Tensor | None = None,
        device: str | torch.device | None = None,
        memory_budget: int | None = None,
        one_by_one: bool = False,
    ) -> None:
        check_objective(task, loss)
        check_function(measure, "measure")
        max_epochs = check_count("max_epochs", max_epochs)
        model = _checked_model(model_fn)
        train = resolve_train_data(train_data, train_indices, model, has_rows_loss=says_rows_loss(task, loss))
        model.to(device)
        head = first_look(train, 64, next(model.parameters()).device)
        moment = Moment(max_epochs=max_epochs)  # of a model that has not trained
        with borrowed(model, None, None) as home, torch.no_grad():
            objective = resolve_objective(model, train, home, task=task, loss=loss, moment=moment, batch_size=64)
        how = {"batch_size": batch_size, "optimizer": optimizer, "memory_budget": memory_budget}
        super().__init__(model, train, head, objective.task, reason=objective.reason, **how)
        self.model_fn, self.queries, self.max_epochs = model_fn, resolve_queries(queries, model, train), max_epochs
        #: The data module of the training data, with validation data for every model; None if there is none.
        self.datamodule: Any = train.owners[0] if train.owners else None
        self.trainer_fn, self.loss, self.measure, self.one_by_one = trainer_fn, loss, measure, one_by_one
        #: Kind of each training example, as a number; None before :meth:`identity` has read the examples.
        self.train_kinds: Tensor | None = None
        self._query_values: QueryValues | None = None
        self._steps: OwnSteps | None = None
        self._initial: dict[int, nn.Module] = {}

    def fresh_model(self, seed: int) -> nn.Module:
        """A new model with the initial weights of a seed."""
        with seeded(seed):
            return build(self.model_fn).to(self.device)

    def initial_model(self, seed: int) -> nn.Module:
        """A copy of the model with the initial weights of a seed; the model is made only once."""
        if seed not in self._initial:
            self._initial[seed] = self.fresh_model(seed)
        return copy.deepcopy(self._initial[seed])

    def query_values(self, model: nn.Module) -> QueryValues:
        """What is measured of the queries, which are read once; lower is better."""
        if self._query_values is None:
            if isinstance(self.meaning, OwnLoss) and self.measure is None:
                self._steps = OwnSteps(self.meaning, model, self.train, self.loading.batch_size, self._last_moment)
            self._query_values = query_values(
                self.queries,
                self.meaning,
                model,
                measure=self.measure,
                num_outputs=self.num_outputs,
                steps=self._steps,
            )
        return self._query_values

    def check_queries(self, model: nn.Module) -> None:
        """Refuse queries whose loss is not finite even under an untrained model; the error names the first."""
        with self.queries.naming(0):
            check_finite(self.measured(model), "loss under an untrained model")

    def measured(self, model: nn.Module) -> Tensor:
        """The loss of all queries under a model, or minus the measure, shape ``(q,)``."""
        return self.query_values(model).of(model)

    @property
    def own_loss(self) -> dict[str, Any]:
        """How losses of the module's own were measured, for the metadata; nothing where they were not."""
        return {} if self._steps is None else self._steps.described()

    @property
    def _last_moment(self) -> Moment:
        """That of the last step of a training on all examples."""
        num_batches = len(self.order(0, 0))
        steps = self.max_epochs * num_batches
        return Moment(self.max_epochs - 1, steps - 1, self.max_epochs, num_batches, steps)

    def identity(self, seeds: Sequence[int]) -> dict[str, Any]:
        """Plain values that identify this recipe, for the comparison with a stored run."""
        models = [self.initial_model(seed) for seed in seeds]
        reader = reader_of(self.meaning)
        # With a model, targets that it cannot take are refused; a measure decides by itself what queries need.
        checked = models[0] if self.num_outputs else None
        surveyed = survey(self.train, reader, checked, self.num_outputs)
        checked = checked if self.measure is None else None
        self.train_kinds = surveyed.kinds
        return {
            **self.described(),
            "model": type(models[0]).__name__,
            "model_code": code_hash(models[0]),
            "initial_weights": [weight_hash(model) for model in models],
            "optimizer": self._describe_optimizer(models[0]),
            "trainer_fn": self.trainer_fn is not None,
            "max_epochs": self.max_epochs,
            "measure": measure_info(self.measure),
            **functions_of(loss=self.loss, measure=self.measure),
            "seeds": list(seeds),
            "data": surveyed.fingerprint,
            "query_data": survey(self.queries, reader, checked, self.num_outputs).fingerprint,
            "train_indices": None if self.train.is_whole else self.train.positions.tolist(),
        }

    def _describe_optimizer(self, model: nn.Module) -> str:
        try:
            return read_optimization(model, self.optimizer).describe()
        except CannotBatch as reason:
            return f"its Trainer's: {reason}"


def code_hash(model: nn.Module) -> str:
    """Hash of a model apart from its weights: of its code, of its layers' settings and of its plain attributes.

    Example:
        >>> code_hash(nn.Dropout(0.1)) == code_hash(nn.Dropout(0.2))
        False
    """
    try:
        code = inspect.getsource(type(model))
    except (OSError, TypeError):  # typed into an interpreter
        code = type(model).__qualname__
    settings = {name: value for name, value in vars(model).items() if isinstance(value, bool | int | float | str)}
    return hashlib.sha256(f"{code}{model!r}{sorted(settings.items())}".encode()).hexdigest()


def _checked_model(model_fn: Callable[[], nn.Module]) -> nn.Module:
    """A model from the function; an error unless the function makes a fresh one every time."""
    if isinstance(model_fn, nn.Module) or not callable(model_fn):
        raise TypeError(
            f"`model_fn` must be a function that makes a fresh, untrained model, got {type(model_fn).__name__}. Pass "
            "its class or a function, such as `lambda: MyModel(lr=0.1)`: retraining must not start from trained "
            "weights."
        )
    try:
        with seeded(0):
            model, again = build(model_fn), build(model_fn)
    except TypeError as error:
        raise TypeError(
            f"`model_fn` must work without arguments, but the call gave: {error}. Wrap it: `lambda: MyModel(lr=0.1)`."
        ) from error
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model_fn` must return a module, got {type(model).__name__}. Return the model itself.")
    if model is again or {id(p) for p in model.parameters()} & {id(p) for p in again.parameters()}:
        raise ValueError(
            "`model_fn` returned the same model, or the same parameters, twice. Every subset needs a fresh model: make "
            "it inside the function."
        )
    return model
