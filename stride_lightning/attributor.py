"""Attributor: what every method is built on."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stride_lightning.data.examples import Examples, first_look
from stride_lightning.data.sources import resolve_queries, resolve_train_data
from stride_lightning.model.weights import (
    attached_trainer,
    borrowed,
    load_checkpoint,
    rank_zero_state,
    resolve_ckpt_path,
    weight_hash,
)
from stride_lightning.results.attribution import Attribution
from stride_lightning.runtime.metering import Meter
from stride_lightning.runtime.progress import track
from stride_lightning.runtime.versions import versions
from stride_lightning.tasks.inference import check_task, infer_task_of
from stride_lightning.tasks.likelihoods import Task


class Attributor(ABC):
    """A method: fit it to a model and its training data, then ask it about queries, as often as you like.

    A new method is a subclass with a name, its options as keyword arguments, and the two abstract methods.

    Args:
        seed: Seed of everything random.
        batch_size: Examples per forward pass.
        show_progress: Show progress bars and cost estimates.
    """

    #: Name by which :func:`attribute` finds the method.
    method: ClassVar[str]
    #: Unit of the scores.
    unit: ClassVar[str] = "nats of query loss, to first order"
    #: Whether all queries of a call share work too long to do again, such as training: then they are asked at once.
    _shares_work: ClassVar[bool] = False
    _registry: ClassVar[dict[str, type[Attributor]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "method" in vars(cls):
            Attributor._registry[cls.method] = cls

    def __init__(self, *, seed: int = 0, batch_size: int = 256, show_progress: bool = True) -> None:
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"`batch_size` must be an integer of at least 1, got {batch_size!r}.")
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise ValueError(f"`seed` must be an integer of at least 0, got {seed!r}.")
        self.seed, self.batch_size, self.show_progress = seed, batch_size, show_progress
        self.metadata: dict[str, Any] = {}
        self._model: nn.Module | None = None

    @staticmethod
    def methods() -> list[str]:
        """Names of all methods."""
        # The methods of the package register themselves when imported; they import this file, so only now.
        import stride_lightning.gradients.presets
        import stride_lightning.information.attributor
        import stride_lightning.retraining.attributors
        import stride_lightning.steering.attributor  # noqa: F401

        return sorted(Attributor._registry)

    @staticmethod
    def class_of(method: str) -> type[Attributor]:
        """The class of a method; wrong names are refused with the right ones."""
        if method not in Attributor.methods():
            raise ValueError(f"Unknown method {method!r}. Known: {', '.join(Attributor.methods())}.")
        return Attributor._registry[method]

    @staticmethod
    def create(method: str, **options: Any) -> Attributor:
        """The attributor of that name with these options; wrong names are refused with the right ones."""
        cls = Attributor.class_of(method)
        known = _options(cls)
        unknown = sorted(options.keys() - known)
        if unknown:
            own = sorted(known - _options(Attributor))
            raise TypeError(
                f"Unknown option{'s' if len(unknown) > 1 else ''} {', '.join(unknown)} for method {method!r}. "
                f"Its options are: {', '.join(own)}."
            )
        return cls(**options)

    def fit(
        self,
        model: nn.Module,
        train_data: Any,
        task: Task | None = None,
        *,
        ckpt_path: str | Path | None = None,
        record: str | Path | None = None,
        train_indices: Sequence[int] | Tensor | None = None,
        device: str | torch.device | None = None,
    ) -> Attributor:
        """Do everything that does not depend on the queries; arguments as in :func:`attribute`."""
        if not isinstance(model, nn.Module):
            raise TypeError(f"`model` must be a module, got {model!r}.")
        check_task(task)
        meter = Meter()
        checkpoint = None if ckpt_path is None else load_checkpoint(resolve_ckpt_path(ckpt_path, model))
        self._model, self._device = model, None if device is None else torch.device(device)
        self._checkpoint_state = None if checkpoint is None else checkpoint.get("state_dict", checkpoint)
        self._train = resolve_train_data(train_data, train_indices, model)
        with torch.inference_mode(False), borrowed(model, self._state(), self._device) as where, torch.no_grad():
            self._weights = weight_hash(model)
            head = None if task is not None else first_look(self._train, self.batch_size, where)
            with self._train.naming(0):
                self._task = infer_task_of(head, model) if task is None else task
            self.metadata = {
                "method": self.method,
                "unit": self.unit,
                "task": repr(self._task),
                "weights": self._weights,
                "ckpt_path": None if ckpt_path is None else str(ckpt_path),
                "seed": self.seed,
                "num_train": len(self._train),
                "step": _step(checkpoint, model),
                "device": str(where),
                "mode": "eval (dropout off, normalisation statistics fixed)",
                "versions": versions(),
            }
            self._fit(model, where, record, checkpoint)
        self.metadata["seconds"] = {"fit": meter.seconds}
        self.metadata["peak_memory_bytes"] = meter.peak_memory
        return self

    def attribute(self, queries: Any, *, target: str = "label") -> Attribution:
        """Scores of every training example for the queries; needs :meth:`fit` once before."""
        self._check_fitted("attribute(queries)")
        if target not in ("label", "predicted"):
            raise ValueError(f"`target` must be 'label' or 'predicted', got {target!r}.")
        meter = Meter()
        asked = resolve_queries(queries, self._model)
        with self._borrowed_model() as (model, where):
            attribution = self._attribute(model, asked, where, target)
        fitting = self.metadata["seconds"]["fit"]
        attribution.metadata = {
            **self.metadata,
            **attribution.metadata,
            "target": target,
            "num_queries": len(asked),
            "seconds": {"fit": fitting, "attribute": meter.seconds, "total": fitting + meter.seconds},
            "peak_memory_bytes": max(self.metadata["peak_memory_bytes"], meter.peak_memory),
        }
        scored = self._scored_examples()
        attribution.train_indices = _positions(scored)
        attribution.train_data, attribution.queries = scored, asked
        return attribution

    def self_influence(self) -> Tensor:
        """Score of every training example for its own loss; needs :meth:`fit` once before.

        Returns:
            float32, shape ``(num_train,)``, as :func:`self_influence` describes it.
        """
        self._check_fitted("self_influence()")
        with self._borrowed_model() as (model, where):
            return self._self_influence(model, where).float()

    def _check_fitted(self, call: str) -> None:
        if self._model is None:
            raise RuntimeError(f"Call fit(model, train_data) before {call}.")

    @contextmanager
    def _borrowed_model(self) -> Iterator[tuple[nn.Module, torch.device]]:
        """The model as it was fitted, and its device; afterwards the caller's model is as it was."""
        assert self._model is not None
        with torch.inference_mode(False), borrowed(self._model, self._state(), self._device) as where, torch.no_grad():
            if weight_hash(self._model) != self._weights:
                raise ValueError(
                    "The model's weights have changed since fit(). Call fit() again, or attribute a checkpoint with "
                    "ckpt_path=, which is remembered."
                )
            yield self._model, where

    def take_over(self, other: Attributor) -> None:
        """Work on what another attributor was fitted to, as part of it."""
        self._model, self._device, self._checkpoint_state = other._model, other._device, other._checkpoint_state
        self._train, self._task, self._weights = other._train, other._task, other._weights

    def _scored_examples(self) -> Examples:
        """The examples that columns of the scores stand for; all training examples unless a method scores a few."""
        return self._train

    @abstractmethod
    def _fit(self, model: nn.Module, device: torch.device, record: str | Path | None, checkpoint: Any) -> None:
        """Fit to ``self._train``, the model in eval mode on ``device``; add choices to ``self.metadata``."""

    @abstractmethod
    def _attribute(self, model: nn.Module, queries: Examples, device: torch.device, target: str) -> Attribution:
        """Scores for the queries, on the CPU; ``metadata`` holds what was chosen for them."""

    def _self_influence(self, model: nn.Module, device: torch.device) -> Tensor:
        """Scores of the scored examples for themselves, on the CPU; by asking about the training data, part by part."""
        found: list[tuple[Tensor, Tensor]] = []
        parts = torch.arange(len(self._train)).split(len(self._train) if self._shares_work else self.batch_size)
        for part in track(parts, "Self-influence", show=self.show_progress):
            asked = self._train.subset(part.tolist())
            scores = self._attribute(model, asked, device, "label").scores
            # Columns may be some of the training examples, in an order of their own.
            rows, columns = (_positions(asked)[:, None] == _positions(self._scored_examples())).nonzero(as_tuple=True)
            found.append((columns, scores[rows, columns]))
        columns, influence = (torch.cat(pieces) for pieces in zip(*found, strict=True))
        return influence[columns.argsort()]

    def _state(self) -> Mapping[str, Any] | None:
        """Weights to load for the time of a call: the checkpoint's, or what makes all ranks agree; None for none."""
        assert self._model is not None
        return rank_zero_state(self._model) if self._checkpoint_state is None else self._checkpoint_state


def _positions(examples: Examples) -> Tensor:
    return torch.arange(len(examples)) if examples.positions is None else examples.positions


def _options(cls: type[Attributor]) -> set[str]:
    """Names of the keyword arguments of a method, those it hands on to its base classes as ``**kwargs`` too."""
    names: set[str] = set()
    for base in cls.__mro__:
        if "__init__" in vars(base):
            parameters = list(inspect.signature(base.__init__).parameters.values())[1:]
            names |= {parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD}
            if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters):
                break
    return names


def _step(checkpoint: Any, model: nn.Module) -> int | None:
    if checkpoint is not None:
        step = checkpoint.get("global_step")
        return None if step is None else int(step)
    trainer = attached_trainer(model)
    return None if trainer is None else int(trainer.global_step)
