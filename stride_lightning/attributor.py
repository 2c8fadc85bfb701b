"""Attributor: the base of every method."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from stride_lightning.data.collating import MissingExample
from stride_lightning.data.examples import Examples
from stride_lightning.data.objectives import Objective, check_objective, check_rows, resolve_objective, says_rows_loss
from stride_lightning.data.seen import marked_seen
from stride_lightning.data.sources import check_same_on_ranks, resolve_queries, resolve_train_data
from stride_lightning.model.checkpoints import load_checkpoint, resolve_ckpt_path, warn_of_frozen, weights_in
from stride_lightning.model.weights import alone_with, attached_trainer, borrowed, rank_zero_state, weight_hash
from stride_lightning.results.attribution import Attribution
from stride_lightning.results.top_attribution import TopAttribution
from stride_lightning.runtime.checks import check_count
from stride_lightning.runtime.distributed import leaving_together, world_size
from stride_lightning.runtime.metering import Meter
from stride_lightning.runtime.progress import announce, call, track
from stride_lightning.runtime.versions import versions
from stride_lightning.tasks.likelihoods import Task
from stride_lightning.tasks.measures import check_function, measure_info
from stride_lightning.tasks.moments import moment_of
from stride_lightning.tasks.own_loss import OwnLoss, RowFunction, name_of

logger = logging.getLogger(__name__)


class Attributor(ABC):
    """A method: fit it to a model and its training data, then attribute queries, as often as you like.

    A new method is a subclass with a name, its options as keyword arguments, and the two abstract methods
    :meth:`fit_model` and :meth:`score_queries`. They read ``train_data``, ``task`` and ``weights`` (the hash of the
    attributed weights), and add their choices to ``metadata``.

    Args:
        seed: Seed of all random numbers.
        batch_size: Examples per forward pass.
        show_progress: Show a bar with the phase of a call and the time left.
    """

    #: Name of the method, as :func:`attribute` takes it.
    method: ClassVar[str]
    #: Unit of the scores.
    unit: ClassVar[str] = "nats of query loss, to first order"
    #: Whether all queries of a call share long work, such as training; self-influence then takes them in a single call.
    asks_at_once: ClassVar[bool] = False
    #: Number of queries after the fit, if known; for the estimate of the time left.
    expected_queries: int = 0
    #: Queries that are known before the fit: a measure is tried on them before long work.
    known_queries: Examples | None = None
    #: Whether a measure must have a gradient in the model's parameters.
    needs_gradients: ClassVar[bool] = True
    #: All methods by name; a subclass with a name registers itself.
    registry: ClassVar[dict[str, type[Attributor]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "method" in vars(cls):
            Attributor.registry[cls.method] = cls

    def __init__(self, *, seed: int = 0, batch_size: int = 256, show_progress: bool = True, **unknown: Any) -> None:
        if unknown:
            name = type(self).__name__
            raise TypeError(f"{name} has no option {', '.join(sorted(unknown))}. help({name}) shows its options.")
        self.seed, self.batch_size = check_count("seed", seed, 0), check_count("batch_size", batch_size)
        self.show_progress, self._is_fitted = show_progress, False
        self.metadata: dict[str, Any] = {}
        self.model: nn.Module | None = None
        #: As in ``torch.load``, for every checkpoint that is read.
        self.weights_only: bool | None = None

    def fit(
        self,
        model: nn.Module,
        train_data: Any,
        task: Task | OwnLoss | None = None,
        *,
        loss: RowFunction | None = None,
        measure: RowFunction | None = None,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
        record: str | Path | None = None,
        train_indices: Sequence[int] | Tensor | None = None,
        device: str | torch.device | None = None,
    ) -> Self:
        """Do all work that does not depend on the queries; arguments as in :func:`attribute`."""
        if not isinstance(model, nn.Module):
            raise TypeError(f"`model` must be a module (an instance of torch.nn.Module), got {model!r}.")
        check_objective(task, loss)
        check_function(measure, "measure")
        with Meter() as meter, call(show=self.show_progress), leaving_together(), alone_with(model):
            path = None if ckpt_path is None else resolve_ckpt_path(ckpt_path, model)
            checkpoint = None if path is None else load_checkpoint(path, weights_only)
            self.weights_only = weights_only
            self.model, self._device = model, None if device is None else torch.device(device)
            self._is_fitted = False  # a failed fit leaves no mixture with an earlier one
            self._checkpoint_state, note = (None, "") if checkpoint is None else weights_in(checkpoint, model)
            announce(f"{note}.", show=self.show_progress and bool(note))
            if checkpoint is not None:
                warn_of_frozen(checkpoint, model)
            examples = resolve_train_data(
                train_data, train_indices, model, has_rows_loss=says_rows_loss(task, loss), show=self.show_progress
            )
            examples = marked_seen(examples, model, checkpoint)
            check_same_on_ranks(examples)
            how = {"task": task, "loss": loss, "measure": measure, "record": record}
            try:
                self._fit_to(examples, model, checkpoint, **how)
            except MissingExample:
                if world_size() > 1:  # other ranks read other examples
                    raise
                rest = examples.without_missing(show=self.show_progress)
                if len(rest) == len(examples):  # a query is missing
                    raise
                self._fit_to(rest, model, checkpoint, **how)
            self.metadata |= {"ckpt_path": None if ckpt_path is None else str(ckpt_path), "frozen": note or None}
        logger.info("%s: the loss of an example is %s", self.method, self.metadata["loss"])
        self.metadata |= {"seconds": {"fit": meter.seconds}, "peak_memory_bytes": meter.peak_memory}
        self._is_fitted = True
        return self

    def _fit_to(
        self,
        examples: Examples,
        model: nn.Module,
        checkpoint: Any,
        *,
        task: Task | OwnLoss | None,
        loss: RowFunction | None,
        measure: RowFunction | None,
        record: str | Path | None,
    ) -> None:
        self.train_data = examples
        with torch.inference_mode(False), borrowed(model, self._state(), self._device) as where, torch.no_grad():
            self.weights, self.moment = weight_hash(model), moment_of(model, checkpoint)
            if measure is not None and self.known_queries is not None:
                self._check_measure(measure, model, self.known_queries, where)
            chosen: dict[str, Any] = {"task": task, "loss": loss, "moment": self.moment}
            objective = resolve_objective(model, examples, where, batch_size=self.batch_size, **chosen)
            self.task, self.measure = self.checked_task(objective, model), measure
            self.metadata = {
                "method": self.method,
                "unit": self._unit_of(measure),
                "task": repr(self.task),
                "loss": objective.reason,
                "measure": measure_info(measure),
                "weights": self.weights,
                "seed": self.seed,
                "num_train": len(examples),
                "notes": list(examples.notes),
                "step": _step(checkpoint, model),
                "device": str(where),
                "mode": "eval (dropout off, normalisation statistics fixed)",
                "versions": versions(),
            }
            self.fit_model(model, where, record, checkpoint)
        for note in examples.notes:
            announce(note, show=self.show_progress)

    def attribute(self, queries: Any, *, target: str = "label") -> Attribution | TopAttribution:
        """Scores of every training example for the queries; call :meth:`fit` before."""
        self.check_fitted("attribute(queries)")
        if target not in ("label", "predicted"):
            raise ValueError(f"`target` must be 'label' or 'predicted', got {target!r}.")
        if target == "predicted" and (self.measure is not None or isinstance(self.task, OwnLoss)):
            what = "measure=" if self.measure is not None else "a loss of the module's own"
            raise ValueError(
                f"target='predicted' needs the loss of a likelihood, and the queries are explained by {what}. Give "
                "the queries their targets, or pass `measure=`, a function of (model, batch) that returns what is to "
                "be explained of each query."
            )
        with Meter() as meter, call(show=self.show_progress), leaving_together():
            examples = resolve_queries(queries, self.model, self.train_data, show=self.show_progress)
            check_same_on_ranks(examples)
            with self.borrowed_model() as (model, where):
                if self.measure is not None and self.known_queries is None:
                    self._check_measure(self.measure, model, examples, where)
                attribution = self.score_queries(model, examples, where, target)
        scored = self.scored_examples()
        shape = getattr(attribution, "num_queries", None), getattr(attribution, "num_train", None)
        if shape != (len(examples), len(scored)):
            raise TypeError(
                f"{type(self).__name__}.score_queries() must return an Attribution of {len(examples)} queries and "
                f"{len(scored)} training examples, got {attribution!r}."
            )
        fitting = self.metadata["seconds"]["fit"]
        peaks = [peak for peak in (self.metadata["peak_memory_bytes"], meter.peak_memory) if peak is not None]
        attribution.metadata = (
            self.metadata
            | attribution.metadata
            | {
                "target": target,
                "num_queries": len(examples),
                "seconds": {"fit": fitting, "attribute": meter.seconds, "total": fitting + meter.seconds},
                "peak_memory_bytes": max(peaks) if peaks else None,
            }
        )
        attribution.queries, attribution.train_data, attribution.train_indices = examples, scored, scored.positions
        attribution.train_info = scored.info() | attribution.train_info
        attribution.query_info = examples.info() | attribution.query_info
        return attribution

    def self_influence(self) -> Tensor:
        """Score of every training example for itself, as :func:`self_influence` returns it; call :meth:`fit` before."""
        self.check_fitted("self_influence()")
        if self.measure is not None:
            raise ValueError("self_influence() tells effects on losses. Call fit() without `measure`.")
        with call(show=self.show_progress), leaving_together(), self.borrowed_model() as (model, where):
            return self.score_training_data(model, where).float()

    def check_fitted(self, call: str) -> None:
        """Refuse a call before :meth:`fit`."""
        if not self._is_fitted:
            raise RuntimeError(f"Call fit(model, train_data) before {call}.")

    @contextmanager
    def borrowed_model(self) -> Iterator[tuple[nn.Module, torch.device]]:
        """The model with the fitted weights, and its device; afterwards the caller's model is as before."""
        assert self.model is not None
        with (
            alone_with(self.model),
            torch.inference_mode(False),
            borrowed(self.model, self._state(), self._device) as where,
            torch.no_grad(),
        ):
            if weight_hash(self.model) != self.weights:
                raise ValueError(
                    "The model's weights have changed since fit(). Call fit() again, or give fit() a `ckpt_path=`: its "
                    "weights stay fixed."
                )
            yield self.model, where

    def _check_measure(self, measure: RowFunction, model: nn.Module, queries: Examples, device: torch.device) -> None:
        check_rows(measure, "measure", model, queries, device, differentiable=self.needs_gradients)

    def take_over(self, other: Attributor) -> None:
        """Use the model, data and task that another attributor was fitted to, as a part of it."""
        self.model, self._device, self._checkpoint_state = other.model, other._device, other._checkpoint_state
        self.train_data, self.task, self.weights = other.train_data, other.task, other.weights
        self.measure, self.moment = other.measure, other.moment

    def scored_examples(self) -> Examples:
        """The example of each column of the scores; all training examples unless a method scores only some."""
        return self.train_data

    def checked_task(self, objective: Objective, model: nn.Module) -> Task | OwnLoss:
        """What stands for training; a method that takes no loss of the module's own refuses it here."""
        return objective.task

    def _unit_of(self, measure: RowFunction | None) -> str:
        """Unit of the scores, for the loss or the measure that is explained."""
        of_loss = "nats of query loss"
        if measure is None:
            return (
                self.unit if isinstance(self.task, Task) else self.unit.replace(of_loss, "query loss in its own unit")
            )
        of_measure = self.unit.replace(of_loss, name_of(measure))
        return of_measure.replace("log-odds of the query's target", name_of(measure))

    @abstractmethod
    def fit_model(self, model: nn.Module, device: torch.device, record: str | Path | None, checkpoint: Any) -> None:
        """Fit to ``self.train_data``, with the model in eval mode on ``device``; add choices to ``self.metadata``."""

    @abstractmethod
    def score_queries(
        self, model: nn.Module, queries: Examples, device: torch.device, target: str
    ) -> Attribution | TopAttribution:
        """Scores for the queries, on the CPU; their ``metadata`` holds the choices for these queries."""

    def score_training_data(self, model: nn.Module, device: torch.device) -> Tensor:
        """Scores of the scored examples for themselves, on the CPU: by attributing the training data, part by part."""
        diagonals: list[tuple[Tensor, Tensor]] = []
        parts = torch.arange(len(self.train_data)).split(len(self.train_data) if self.asks_at_once else self.batch_size)
        for part in track(parts, "Self-influence", show=self.show_progress):
            queries = self.train_data.subset(part.tolist())
            scores = self.score_queries(model, queries, device, "label").scores
            # Columns may stand for only some training examples, in another order.
            rows, columns = (queries.positions[:, None] == self.scored_examples().positions).nonzero(as_tuple=True)
            diagonals.append((columns, scores[rows, columns]))
        columns, influence = (torch.cat(pieces) for pieces in zip(*diagonals, strict=True))
        return influence[columns.argsort()]

    def _state(self) -> Mapping[str, Any] | None:
        """Weights to load during a call: the checkpoint's, or rank 0's so that all ranks agree; None to load none."""
        assert self.model is not None
        return rank_zero_state(self.model) if self._checkpoint_state is None else self._checkpoint_state


def _step(checkpoint: Any, model: nn.Module) -> int | None:
    live = getattr(attached_trainer(model), "global_step", None)
    step = live if checkpoint is None else checkpoint.get("global_step")
    return None if step is None else int(step)
