"""The front door: attribute() and self_influence(), and what every method is built on."""

from __future__ import annotations

import inspect
import platform
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stride_lightning import __version__
from stride_lightning.attribution import Attribution
from stride_lightning.data import Examples, first_look, resolve_queries, resolve_train_data
from stride_lightning.distributed import rank
from stride_lightning.metering import Meter
from stride_lightning.progress import track
from stride_lightning.task_inference import check_task, infer_task
from stride_lightning.tasks import Task
from stride_lightning.weights import (
    attached_trainer,
    borrowed,
    in_precision_of,
    load_checkpoint,
    rank_zero_state,
    resolve_ckpt_path,
    weight_hash,
)


def attribute(
    model: nn.Module,
    queries: Any,
    *,
    train_data: Any,
    method: str = "stride",
    ckpt_path: str | Path | None = None,
    record: str | Path | None = None,
    task: Task | None = None,
    target: str = "label",
    train_indices: Sequence[int] | Tensor | None = None,
    batch_size: int = 256,
    device: str | torch.device | None = None,
    seed: int = 0,
    show_progress: bool = True,
    **options: Any,
) -> Attribution:
    """Which training examples made the model do this?

    In a distributed run every rank may call it: the work is shared and all return the same result. The caller's
    weights, mode, hooks and device are as before afterwards.

    Args:
        model: A LightningModule or any other module; it is evaluated in eval mode (dropout off, BatchNorm fixed).
        queries: What to explain: a Dataset, a DataLoader, or a LightningDataModule (its test data, else its
            validation data).
        train_data: What the model was trained on: a Dataset, a DataLoader or a LightningDataModule.
        method: Name of the method; see ``Attributor.methods()``.
        ckpt_path: Checkpoint whose weights are attributed, or ``"best"`` or ``"last"`` of the model's trainer. By
            default the weights as they are.
        record: A record that a callback wrote, or the folder that holds records. By default the callback's state in
            the checkpoint or the attached trainer says where records are, and the one of these weights is used; if
            there is none, everything is computed on the spot and the metadata says so.
        task: What a batch means; inferred from the first batch by default.
        target: ``"label"``, or ``"predicted"`` for queries without labels.
        train_indices: Positions in the dataset that were trained on, where the sampler does not tell.
        batch_size: Examples per forward pass; changes nothing but rounding.
        device: Where to compute; the model's device by default.
        seed: Seed of everything random that is not read from a record.
        show_progress: Show progress bars, and a cost estimate before long work.
        **options: Options of the method, such as ``num_subsets``, ``layers``, ``basis``, ``recovery``.

    Returns:
        Scores of shape ``(num_queries, num_train)`` and all that can be done with them; positive is helpful. Their unit
        is the method's: see its class.

    Raises:
        TypeError: If an option is unknown or the data are not map-style.
        ValueError: If record, weights and data do not belong together, or something is not finite.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
        >>> data = TensorDataset(x, (x[:, 0] > 0).long())
        >>> model = nn.Linear(4, 2)
        >>> attribution = attribute(model, data, train_data=data, num_subsets=20, show_progress=False)
        >>> attribution.scores.shape
        torch.Size([60, 60])

    Reference: arXiv:2606.05165 (STRIDE).
    """
    attributor = Attributor.create(method, seed=seed, batch_size=batch_size, show_progress=show_progress, **options)
    attributor.fit(
        model,
        train_data,
        task=task,
        ckpt_path=ckpt_path,
        record=record,
        train_indices=train_indices,
        device=device,
    )
    return attributor.attribute(queries, target=target)


def self_influence(
    model: nn.Module,
    *,
    train_data: Any,
    method: str = "stride",
    ckpt_path: str | Path | None = None,
    record: str | Path | None = None,
    task: Task | None = None,
    train_indices: Sequence[int] | Tensor | None = None,
    batch_size: int = 256,
    device: str | torch.device | None = None,
    seed: int = 0,
    show_progress: bool = True,
    **options: Any,
) -> Tensor:
    """How much did training on each example help the model with that very example?

    Where this is high, the model has memorised the example: it owes its answer to this one more than to others. Sorted
    from high to low, mislabelled and unusual examples come first, which makes it a way to find wrong labels;
    :func:`~stride_lightning.metrics.mislabel_detection` says how well. Arguments as in :func:`attribute`.

    Returns:
        float32, shape ``(num_train,)``, in the unit of the method: the score of each training example for itself, the
        diagonal of the attribution of the training data to themselves; in the order of ``train_indices``, by default
        that of the dataset. A method that scores only some examples (``left_out``) gives those, in that order. What a
        method chooses over all queries of a call, such as the penalty of a lasso, it chooses for each ``batch_size``
        of them.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
        >>> data = TensorDataset(x, (x[:, 0] > 0).long())
        >>> self_influence(nn.Linear(4, 2), train_data=data, num_subsets=20, show_progress=False).shape
        torch.Size([60])

    Reference: arXiv:2002.08484 (TracIn), section 4.1.
    """
    attributor = Attributor.create(method, seed=seed, batch_size=batch_size, show_progress=show_progress, **options)
    attributor.fit(
        model,
        train_data,
        task=task,
        ckpt_path=ckpt_path,
        record=record,
        train_indices=train_indices,
        device=device,
    )
    return attributor.self_influence()


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


def infer_task_of(batch: Any, model: nn.Module) -> Task:
    """The built-in task that fits a batch, its inputs read in the precision of the model."""
    if isinstance(batch, tuple | list) and len(batch) > 0:
        batch = (in_precision_of(model, batch[0]), *batch[1:])
    return infer_task(batch, model)


def versions() -> dict[str, str]:
    """Versions of what numbers may depend on."""
    packages = ("torch", "lightning", "numpy", "scipy")
    own = {"stride-lightning": __version__, "python": platform.python_version()}
    return own | {name: version(name) for name in packages}


def announce(message: str, *, show: bool) -> None:
    """Say something before long work, on rank 0 only."""
    if show and rank() == 0:
        print(message, file=sys.stderr, flush=True)


def _step(checkpoint: Any, model: nn.Module) -> int | None:
    if checkpoint is not None:
        step = checkpoint.get("global_step")
        return None if step is None else int(step)
    trainer = attached_trainer(model)
    return None if trainer is None else int(trainer.global_step)
