"""What a batch means: inputs, outputs, targets and the loss of every example."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

_HOW_TO_PASS_TASK = (
    "Pass `task=`: Classification(), BinaryClassification(), Regression(), or a subclass of one of them that overrides "
    "`inputs(batch)`, `targets(batch)` or `outputs(model, inputs)`."
)


class Task(ABC):
    """The only place that knows losses: a likelihood in canonical form, and how to read a batch.

    The outputs ``o`` of the model are the natural parameters of an exponential family. Each target is encoded as
    a statistic ``t`` of the same shape, the family predicts its :meth:`mean`, and the gradient of the loss with
    respect to the outputs is ``(mean(o) - t) / dispersion``. Targets may be *soft*: the mean of another prediction.
    That is all that steering operators need, so a model of your own is a subclass of one of the tasks below with
    two or three methods replaced.

    Example:
        A LightningModule whose batches are dictionaries:

        >>> class MyTask(Classification):
        ...     def inputs(self, batch):
        ...         return batch["image"]
        ...     def targets(self, batch):
        ...         return batch["label"]
    """

    #: Name that stands in records and metadata.
    name: str

    # ---- reading a batch ------------------------------------------------------------------------------------

    def inputs(self, batch: Any) -> Any:
        """What :meth:`outputs` hands to the model; by default the first item of a ``(inputs, targets)`` batch."""
        if not isinstance(batch, tuple | list) or len(batch) < 1:
            raise TypeError(f"Expected a batch of (inputs, targets), got {_describe(batch)}. {_HOW_TO_PASS_TASK}")
        return batch[0]

    def targets(self, batch: Any) -> Tensor | None:
        """The targets, or None for a batch without; by default the second item of the batch."""
        return batch[1] if isinstance(batch, tuple | list) and len(batch) > 1 else None

    def outputs(self, model: nn.Module, inputs: Any) -> Tensor:
        """Natural parameters (logits, or the predicted mean of a regression), shape ``(B, C)`` or ``(B,)``."""
        return model(inputs)

    # ---- the likelihood -------------------------------------------------------------------------------------

    @abstractmethod
    def encode(self, targets: Tensor, num_outputs: int) -> Tensor:
        """The statistic that outputs are compared with, float of shape ``(B, C)`` (classes: one-hot).

        Raises:
            ValueError: If the targets do not fit the task.
        """

    def decode(self, encoded: Tensor) -> Tensor:
        """The targets again, to show beside scores; by default the statistic itself."""
        return encoded[:, 0] if encoded.shape[1] == 1 else encoded

    @abstractmethod
    def mean(self, outputs: Tensor, dim: int = -1) -> Tensor:
        """Predicted mean of the statistic; classes lie along ``dim``."""

    @abstractmethod
    def loss(self, outputs: Tensor, encoded: Tensor, dim: int = -1) -> Tensor:
        """Negative log-likelihood in nats of (soft) encoded targets, ``dim`` summed away."""

    @abstractmethod
    def curvature(self, mean: Tensor, direction: Tensor, dim: int = -1) -> Tensor:
        """Second derivative of the loss in the outputs where the family predicts ``mean``, times a direction."""

    @abstractmethod
    def curvature_diagonal(self, mean: Tensor) -> Tensor:
        """Diagonal of that second derivative, the shape of ``mean``."""

    def curvature_root(self, mean: Tensor, direction: Tensor) -> Tensor:
        """A root ``R`` of that second derivative, ``R R'``, times a direction; shapes ``(B, C)``."""
        identity = torch.eye(mean.shape[1], dtype=mean.dtype, device=mean.device)
        matrix = torch.stack([self.curvature(mean, unit.expand_as(mean)) for unit in identity], 2)  # (B, C, C)
        values, vectors = torch.linalg.eigh(matrix)
        return (vectors @ (values.clamp(min=0).sqrt() * direction)[..., None])[..., 0]

    @abstractmethod
    def predict(self, outputs: Tensor) -> Tensor:
        """Most likely targets, for queries without labels (``target="predicted"``)."""

    def margin(self, outputs: Tensor, encoded: Tensor) -> Tensor:
        """Log-odds of the target, ``log p - log(1 - p)``, shape ``(B,)``; classifications have one.

        Raises:
            ValueError: If the task has no such thing.

        Reference: arXiv:2303.14186 (TRAK), equation 4.
        """
        raise ValueError(f"A {self.name} has no margin; only classifications do. Use the loss.")

    @property
    def dispersion(self) -> float:
        """Scale ``s`` of the family: the gradient of the loss is ``(mean - target) / s``."""
        return 1.0

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class Classification(Task):
    """Integer targets, one output per class, softmax cross-entropy.

    Example:
        >>> task = Classification()
        >>> task.loss(torch.zeros(1, 4), task.encode(torch.tensor([2]), 4))  # log 4
        tensor([1.3863])
    """

    name = "classification"

    @override
    def encode(self, targets: Tensor, num_outputs: int) -> Tensor:
        if targets.ndim != 1 or targets.is_floating_point():
            raise ValueError(f"Classification expects integer targets of shape (B,), got {_describe(targets)}.")
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= num_outputs:
            raise ValueError(
                f"Class targets must lie in 0..{num_outputs - 1} for a model with {num_outputs} outputs; "
                f"got values from {low} to {high}. Examples to be ignored (such as -100) must be left out of the data "
                f"set, or handled by your own task. {_HOW_TO_PASS_TASK}"
            )
        return F.one_hot(targets.long(), num_outputs).float()

    @override
    def decode(self, encoded: Tensor) -> Tensor:
        return encoded.argmax(-1)

    @override
    def mean(self, outputs: Tensor, dim: int = -1) -> Tensor:
        return outputs.softmax(dim)

    @override
    def loss(self, outputs: Tensor, encoded: Tensor, dim: int = -1) -> Tensor:
        return -(encoded * outputs.log_softmax(dim)).sum(dim)

    @override
    def margin(self, outputs: Tensor, encoded: Tensor) -> Tensor:
        target = encoded.bool()
        return outputs.masked_fill(~target, -torch.inf).logsumexp(-1) - outputs.masked_fill(
            target, -torch.inf
        ).logsumexp(-1)

    @override
    def curvature(self, mean: Tensor, direction: Tensor, dim: int = -1) -> Tensor:
        weighted = mean * direction
        return weighted - mean * weighted.sum(dim, keepdim=True)

    @override
    def curvature_diagonal(self, mean: Tensor) -> Tensor:
        return mean * (1 - mean)

    @override
    def curvature_root(self, mean: Tensor, direction: Tensor) -> Tensor:
        # One column per class c, sqrt(p_c) (e_c - p): the gradient at the label c, weighted by its probability.
        weighted = mean.sqrt() * direction
        return weighted - mean * weighted.sum(1, keepdim=True)

    @override
    def predict(self, outputs: Tensor) -> Tensor:
        return outputs.argmax(-1)


class BinaryClassification(Task):
    """Targets 0 or 1, one logit per example (or several independent ones), logistic loss.

    Example:
        >>> task = BinaryClassification()
        >>> task.loss(torch.zeros(1, 1), task.encode(torch.tensor([1]), 1))  # log 2
        tensor([0.6931])
    """

    name = "binary classification"

    @override
    def encode(self, targets: Tensor, num_outputs: int) -> Tensor:
        encoded = _as_columns(targets, num_outputs)
        if not ((encoded == 0) | (encoded == 1)).all():
            raise ValueError(f"Binary targets must be 0 or 1, got values {_some_values(targets)}.")
        return encoded

    @override
    def mean(self, outputs: Tensor, dim: int = -1) -> Tensor:
        return outputs.sigmoid()

    @override
    def loss(self, outputs: Tensor, encoded: Tensor, dim: int = -1) -> Tensor:
        return (F.softplus(outputs) - encoded * outputs).sum(dim)

    @override
    def margin(self, outputs: Tensor, encoded: Tensor) -> Tensor:
        if outputs.shape[-1] != 1:
            raise ValueError("Several independent logits have no one margin. Use the loss.")
        return ((2 * encoded - 1) * outputs)[:, 0]

    @override
    def curvature(self, mean: Tensor, direction: Tensor, dim: int = -1) -> Tensor:
        return mean * (1 - mean) * direction

    @override
    def curvature_diagonal(self, mean: Tensor) -> Tensor:
        return mean * (1 - mean)

    @override
    def curvature_root(self, mean: Tensor, direction: Tensor) -> Tensor:
        return self.curvature_diagonal(mean).sqrt() * direction

    @override
    def predict(self, outputs: Tensor) -> Tensor:
        return (outputs > 0).long()


class Regression(Task):
    """Real targets with Gaussian noise: the loss is ``|o - y|^2 / (2 noise_std^2)``, its constant left out.

    Args:
        noise_std: Standard deviation of the noise, in units of the target. It scales all scores by
            ``1 / noise_std^2`` and changes no ranking; at 1 the unit of a score is half a squared error.

    Example:
        >>> task = Regression(noise_std=0.5)
        >>> task.loss(torch.tensor([[2.0]]), task.encode(torch.tensor([1.0]), 1))
        tensor([2.])
    """

    name = "regression"

    def __init__(self, noise_std: float = 1.0) -> None:
        if not (math.isfinite(noise_std) and noise_std > 0):
            raise ValueError(f"`noise_std` must be a positive number, got {noise_std}.")
        self.noise_std = float(noise_std)

    @property
    @override
    def dispersion(self) -> float:
        return self.noise_std**2

    @override
    def encode(self, targets: Tensor, num_outputs: int) -> Tensor:
        return _as_columns(targets, num_outputs)

    @override
    def mean(self, outputs: Tensor, dim: int = -1) -> Tensor:
        return outputs

    @override
    def loss(self, outputs: Tensor, encoded: Tensor, dim: int = -1) -> Tensor:
        return (outputs - encoded).square().sum(dim) / (2 * self.dispersion)

    @override
    def curvature(self, mean: Tensor, direction: Tensor, dim: int = -1) -> Tensor:
        return direction / self.dispersion

    @override
    def curvature_diagonal(self, mean: Tensor) -> Tensor:
        return torch.full_like(mean, 1 / self.dispersion)

    @override
    def curvature_root(self, mean: Tensor, direction: Tensor) -> Tensor:
        return direction / self.noise_std

    @override
    def predict(self, outputs: Tensor) -> Tensor:
        raise ValueError(
            "target='predicted' says nothing for a regression: the loss of a prediction against itself is zero "
            "whatever the training data. Give the queries targets, for instance the value asked about."
        )

    def __repr__(self) -> str:
        return f"Regression(noise_std={self.noise_std:g})"


def infer_task(batch: Any, model: nn.Module) -> Task:
    """The built-in task that fits the first batch, or an error that says how to pass one.

    Integer targets of shape ``(B,)`` and two or more outputs are a classification; integers 0 and 1 with a single
    output are binary; float targets of the outputs' shape are a regression.

    Args:
        batch: The first batch, on the model's device.
        model: The model in eval mode.

    Raises:
        TypeError: If the batch or the outputs have a form no built-in task reads.
        ValueError: If the task cannot be told from targets and outputs.
    """
    check_forward(model)
    reader = Classification()
    targets = reader.targets(batch)
    inputs = reader.inputs(batch)
    if not isinstance(targets, Tensor) or targets.ndim == 0:
        raise TypeError(f"The task cannot be told from a batch of {_describe(batch)}. {_HOW_TO_PASS_TASK}")
    with torch.no_grad():
        outputs = reader.outputs(model, inputs)
    check_outputs(outputs, len(targets))
    num_outputs = 1 if outputs.ndim == 1 else outputs.shape[1]
    both = f"targets {_describe(targets)} and outputs {_describe(outputs)}"
    if not targets.is_floating_point():
        if int(targets.min()) < 0:
            raise ValueError(
                f"Integer targets hold the negative value {int(targets.min())}, as an ignore_index does. Leave such "
                f"examples out, or say what they mean. {_HOW_TO_PASS_TASK}"
            )
        if num_outputs >= 2 and targets.ndim == 1:
            return _check_logits(outputs, Classification(), targets)
        if num_outputs == 1 and targets.numel() == len(targets) and int(targets.max()) <= 1:
            if ((outputs >= 0) & (outputs <= 1)).all():
                warnings.warn(
                    "The model's outputs all lie between 0 and 1 and are read as logits. If they are probabilities "
                    "(after a sigmoid), the scores would be wrong: pass a task whose `outputs` returns logits. "
                    + _HOW_TO_PASS_TASK,
                    stacklevel=2,
                )
            return BinaryClassification()
        raise ValueError(f"The task cannot be told from {both}. {_HOW_TO_PASS_TASK}")
    if targets.numel() != outputs.numel():
        raise ValueError(
            f"The task cannot be told from {both}: float targets need one output each. {_HOW_TO_PASS_TASK}"
        )
    if ((targets == 0) | (targets == 1)).all():
        raise ValueError(
            f"All float targets of the first batch are 0 or 1 ({both}): regression and (one-hot or binary) "
            f"classification look the same here. {_HOW_TO_PASS_TASK}"
        )
    if num_outputs >= 2 and (targets >= 0).all() and torch.allclose(targets.sum(1), targets.new_ones(())):
        raise ValueError(f"Float targets that sum to 1 look like soft labels ({both}). {_HOW_TO_PASS_TASK}")
    return Regression()


def check_forward(model: nn.Module) -> None:
    """Refuse a module without a ``forward`` of its own, with a hint how to attribute it all the same."""
    model = getattr(model, "_orig_mod", model)
    if type(model).forward.__qualname__ in ("_forward_unimplemented", "LightningModule.forward"):
        raise ValueError(
            f"{type(model).__name__} defines no `forward`, so its outputs cannot be computed from a batch. Pass a task "
            f"whose `outputs(model, inputs)` calls the right method. {_HOW_TO_PASS_TASK}"
        )


def check_task(task: object) -> None:
    """Refuse what is not an instance of a task."""
    if task is not None and not isinstance(task, Task):
        came = f"the class {task.__name__}; make an instance" if isinstance(task, type) else repr(task)
        raise TypeError(f"`task` must be an instance of Task, got {came}. {_HOW_TO_PASS_TASK}")


def check_outputs(outputs: object, batch_size: int) -> None:
    """Refuse outputs that are not one row of numbers per example."""
    if not isinstance(outputs, Tensor) or outputs.ndim not in (1, 2) or len(outputs) != batch_size:
        raise TypeError(
            f"The model's outputs must be a tensor of shape (B,) or (B, C) with B={batch_size} rows, got "
            f"{_describe(outputs)}. {_HOW_TO_PASS_TASK}"
        )


def _check_logits(outputs: Tensor, task: Task, targets: Tensor) -> Task:
    if (outputs >= 0).all() and torch.allclose(outputs.sum(1), outputs.new_ones(()), atol=1e-3):
        raise ValueError(
            "The model's outputs look like probabilities (non-negative rows that sum to 1), not logits. Pass a task "
            "whose `outputs(model, inputs)` returns their logarithm or the layer before the softmax. "
            + _HOW_TO_PASS_TASK
        )
    task.encode(targets, outputs.shape[1])
    return task


def _as_columns(targets: Tensor, num_outputs: int) -> Tensor:
    if targets.numel() != len(targets) * num_outputs:
        raise ValueError(f"Expected {num_outputs} target(s) per example, got {_describe(targets)}.")
    columns = targets.reshape(len(targets), num_outputs)
    return columns if columns.is_floating_point() else columns.float()


def _some_values(tensor: Tensor) -> str:
    values = tensor.unique()
    return ", ".join(f"{value:g}" for value in values[:5].tolist()) + (", ..." if len(values) > 5 else "")


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    if isinstance(value, dict):
        return f"dict with keys {sorted(map(str, value))}"
    if isinstance(value, tuple | list):
        return f"{type(value).__name__} of {len(value)} item(s)"
    return type(value).__name__
