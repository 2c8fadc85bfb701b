"""How models are trained: what makes a fresh one, its optimizer, the order of batches, and what is measured."""

from __future__ import annotations

import copy
import hashlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import lightning.pytorch as L
import torch
from torch import Tensor, nn

from stride_lightning.data.examples import Examples, first_look
from stride_lightning.data.loading import check_loading
from stride_lightning.data.reading import Reading, check_finite, count_outputs, encoded_batch, survey
from stride_lightning.data.sources import resolve_queries, resolve_train_data
from stride_lightning.model.weights import borrowed, weight_hash
from stride_lightning.retraining.optimizers import CannotBatch, MakeOptimizer, read_optimization
from stride_lightning.runtime.randomness import mix, seeded
from stride_lightning.tasks.inference import check_task, infer_task_of
from stride_lightning.tasks.likelihoods import Task, columns

Measure = Literal["loss", "margin"]


@dataclass
class Recipe:
    """Everything that decides what a training run gives, but for the subset and the seed.

    Models of one seed start from the same weights and see the same batches in the same order, but for the examples
    that are left out (common random numbers), so that they differ by their data alone.

    Args:
        model_fn: Makes a fresh model; called under the seed.
        train: Training data.
        queries: Queries that are measured.
        task: What a batch means.
        num_outputs: Outputs of the model for one example.
        max_epochs: Passes over the training data.
        batch_size: Examples of a batch, before those left out are dropped.
        shuffle: Draw a new order in every epoch.
        drop_last: Drop the last batch of an epoch if it is smaller.
        optimizer: Makes the optimizer; by default the model's ``configure_optimizers``.
        trainer_fn: Makes a fresh Trainer; models are then trained one by one.
        measure: ``"loss"``, or ``"margin"``: the log-odds of the target, with the sign of a loss.
        device: Where to train; the model's own device when None.
        memory_budget: Bytes that models trained together may take.
        one_by_one: Train every model with a Trainer of its own, whether it could train with others or not.
    """

    model_fn: Callable[[], nn.Module]
    train: Examples
    queries: Examples
    task: Task
    num_outputs: int
    max_epochs: int
    batch_size: int
    shuffle: bool = True
    drop_last: bool = False
    optimizer: MakeOptimizer | None = None
    trainer_fn: Callable[[], L.Trainer] | None = None
    measure: Measure = "loss"
    device: torch.device | None = None
    memory_budget: int | None = None
    one_by_one: bool = False
    #: What kinds of training examples there are, a number for each; known once :meth:`identity` has read them.
    train_kinds: Tensor | None = field(default=None, init=False)
    _query_batches: list[tuple[Any, Tensor]] = field(default_factory=list, init=False)
    _initial: dict[int, nn.Module] = field(default_factory=dict, init=False)

    def fresh_model(self, seed: int) -> nn.Module:
        """A new model with the initial weights of a seed."""
        with seeded(seed):
            model = self.model_fn()
        return model if self.device is None else model.to(self.device)

    def initial_model(self, seed: int) -> nn.Module:
        """A copy of a model with the initial weights of a seed, made without drawing random numbers again."""
        if seed not in self._initial:
            self._initial[seed] = self.fresh_model(seed)
        return copy.deepcopy(self._initial[seed])

    def order(self, seed: int, epoch: int) -> list[Tensor]:
        """Places of the examples of every batch of an epoch; the same for all models of a seed.

        Example:
            >>> from torch.utils.data import TensorDataset
            >>> data = Examples(TensorDataset(torch.zeros(5)))
            >>> recipe = Recipe(nn.Identity, data, data, None, 1, max_epochs=1, batch_size=2, shuffle=False)
            >>> recipe.order(seed=0, epoch=0)
            [tensor([0, 1]), tensor([2, 3]), tensor([4])]
        """
        return batch_order(len(self.train), self.batch_size, self.shuffle, self.drop_last, seed, epoch)

    def query_batches(self, model: nn.Module, device: torch.device) -> list[tuple[Any, Tensor]]:
        """Inputs and encoded targets of the queries on a device, read once."""
        if not self._query_batches:
            reading = Reading(self.queries, self.task, model, batch_size=256, device=device)
            self._query_batches = reading.encoded(self.num_outputs)
        return self._query_batches

    def prepared(self, model: nn.Module, batch: Any) -> tuple[Any, Tensor]:
        """Inputs of a batch, and its encoded targets of shape ``(B, C)``, in the model's precision."""
        return encoded_batch(model, self.task, batch, self.num_outputs)

    def check_queries(self, model: nn.Module) -> None:
        """Refuse queries whose loss is no number even under an untrained model.

        Raises:
            ValueError: Naming the first.
        """
        device = next(model.parameters()).device
        with borrowed(model, None, None), torch.no_grad():
            values = [
                self.value(columns(self.task.outputs(model, inputs)), encoded)
                for inputs, encoded in self.query_batches(model, device)
            ]
        with self.queries.naming(0):
            check_finite(torch.cat(values), "loss under an untrained model")

    def value(self, outputs: Tensor, encoded: Tensor) -> Tensor:
        """What is measured of queries: lower is better, shape ``(b,)``."""
        if outputs.device.type != "mps":  # which has no float64; elsewhere small losses keep their digits
            outputs, encoded = outputs.double(), encoded.double()
        if self.measure == "margin":
            return -self.task.margin(outputs, encoded)
        return self.task.loss(outputs, encoded)

    def identity(self, seeds: Sequence[int]) -> dict[str, Any]:
        """Plain values that tell this recipe from others, to compare a stored run with."""
        models = [self.initial_model(seed) for seed in seeds]
        found = survey(self.train, self.task, models[0], self.num_outputs)
        self.train_kinds = found.kinds
        return {
            "model": type(models[0]).__name__,
            "model_code": code_hash(models[0]),
            "initial_weights": [weight_hash(model) for model in models],
            "optimizer": _described_optimizer(models[0], self.optimizer),
            "trainer_fn": self.trainer_fn is not None,
            "max_epochs": self.max_epochs,
            "batch_size": self.batch_size,
            "shuffle": self.shuffle,
            "drop_last": self.drop_last,
            "measure": self.measure,
            "task": repr(self.task),
            "seeds": list(seeds),
            "data": found.fingerprint,
            "query_data": survey(self.queries, self.task, models[0], self.num_outputs).fingerprint,
            "train_indices": None if self.train.is_whole else self.train.positions.tolist(),
        }


def make_recipe(
    model_fn: Callable[[], nn.Module],
    queries: Any,
    *,
    train_data: Any,
    max_epochs: int,
    batch_size: int | None = None,
    optimizer: MakeOptimizer | None = None,
    trainer_fn: Callable[[], L.Trainer] | None = None,
    task: Task | None = None,
    measure: str = "loss",
    train_indices: Sequence[int] | Tensor | None = None,
    device: str | torch.device | None = None,
    memory_budget: int | None = None,
    one_by_one: bool = False,
) -> Recipe:
    """A recipe from what a user passes, checked; arguments as in :func:`~stride_lightning.retrain`."""
    if isinstance(model_fn, nn.Module) or not callable(model_fn):
        raise TypeError(
            f"`model_fn` must be a function that makes a fresh, untrained model, got {type(model_fn).__name__}. Pass "
            "its class or a function, such as `lambda: MyModel(lr=0.1)`: retraining must not start from trained "
            "weights."
        )
    check_task(task)
    if optimizer is not None and (isinstance(optimizer, torch.optim.Optimizer) or not callable(optimizer)):
        raise TypeError(
            f"`optimizer` must be a function of a model's parameters, got {type(optimizer).__name__}. Pass "
            "functools.partial(torch.optim.SGD, lr=0.1): every model needs an optimizer of its own."
        )
    if measure not in get_args(Measure):
        raise ValueError(f"`measure` must be one of {get_args(Measure)}, got {measure!r}.")
    if not isinstance(max_epochs, int) or max_epochs < 1:
        raise ValueError(f"`max_epochs` must be an integer of at least 1, got {max_epochs!r}.")
    try:
        with seeded(0):
            model, again = model_fn(), model_fn()
    except TypeError as error:
        raise TypeError(
            f"`model_fn` must work without arguments; calling it gave: {error}. Wrap it: `lambda: MyModel(lr=0.1)`."
        ) from error
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model_fn` must return a module, got {type(model).__name__}.")
    if model is again or {id(p) for p in model.parameters()} & {id(p) for p in again.parameters()}:
        raise ValueError(
            "`model_fn` returned the same model, or the same parameters, twice: every subset must start from a fresh "
            "model. Build the model inside the function."
        )
    train = resolve_train_data(train_data, train_indices, model)
    loading = check_loading(train.loading, batch_size)
    where = next(model.parameters()).device if device is None else torch.device(device)
    model.to(where)
    head = first_look(train, 64, where)
    if task is None:
        with borrowed(model, None, None), torch.no_grad(), train.naming(0):
            task = infer_task_of(head, model)
    with train.naming(0):
        num_outputs = count_outputs(model, task, head)
    if measure == "margin":
        task.margin(torch.zeros(1, num_outputs), torch.eye(1, num_outputs))  # refuses a task without margins now
    return Recipe(
        model_fn,
        train,
        resolve_queries(queries, model),
        task,
        num_outputs,
        max_epochs,
        loading.batch_size,
        shuffle=loading.shuffle,
        drop_last=loading.drop_last,
        optimizer=optimizer,
        trainer_fn=trainer_fn,
        measure=measure,  # type: ignore[arg-type]
        device=None if device is None else torch.device(device),
        memory_budget=memory_budget,
        one_by_one=one_by_one,
    )


def batch_order(
    num_examples: int, batch_size: int, shuffle: bool, drop_last: bool, seed: int, epoch: int
) -> list[Tensor]:
    """Places of the examples of every batch of an epoch."""
    places = torch.arange(num_examples)
    if shuffle:
        places = torch.randperm(num_examples, generator=torch.Generator().manual_seed(mix(seed, epoch)))
    batches = list(places.split(batch_size))
    return batches[:-1] if drop_last and len(batches) > 1 and len(batches[-1]) < batch_size else batches


def code_hash(model: nn.Module) -> str:
    """What tells one model from another beside its weights: its code, the settings of its layers and its own.

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


def _described_optimizer(model: nn.Module, optimizer: MakeOptimizer | None) -> str:
    try:
        return read_optimization(model, optimizer, any_kind=True).describe()
    except CannotBatch as reason:
        return f"its Trainer's: {reason}"
