"""Likelihoods: the inputs, outputs, targets and losses of the examples of a batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from stride_lightning.runtime.checks import RowError, check_positive

HOW_TO_PASS_TASK = (
    "Pass `task=`: Classification(), BinaryClassification(), Regression(), SequenceClassification(), "
    "CausalLanguageModeling(), or a subclass of one of them that overrides `inputs(batch)`, `targets(batch)` or "
    "`outputs(model, inputs)`."
)


class Task(ABC):
    """A likelihood in canonical form, and how to read a batch; nothing else in the library knows losses.

    The outputs ``o`` of the model are the natural parameters of an exponential family. Each target is encoded as
    a statistic ``t`` of the same shape, the family predicts its :meth:`mean`, and the gradient of the loss in the
    outputs is ``(mean(o) - t) / dispersion``. Targets may be *soft*: the mean of another prediction. Steering operators
    need no more. To read other batches, write a subclass of a task below that replaces two or three methods.

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
    #: Whether an example is a sequence, with outputs of shape ``(B, T, C)`` and a target for each of its tokens.
    has_tokens: ClassVar[bool] = False
    #: Whether examples of different lengths are padded to be a batch.
    has_padding: ClassVar[bool] = False

    def inputs(self, batch: Any) -> Any:
        """The inputs that :meth:`outputs` hands to the model; by default the first item of the batch."""
        if not isinstance(batch, tuple | list) or len(batch) < 1:
            raise TypeError(f"Expected a batch of (inputs, targets), got {describe(batch)}. {HOW_TO_PASS_TASK}")
        return batch[0]

    def targets(self, batch: Any) -> Tensor | None:
        """The targets, or None for a batch without; by default the second item of the batch."""
        return batch[1] if isinstance(batch, tuple | list) and len(batch) > 1 else None

    def outputs(self, model: nn.Module, inputs: Any) -> Tensor:
        """Natural parameters (logits, or the predicted mean of a regression), shape ``(B, C)`` or ``(B,)``."""
        return model(inputs)

    def check_batch(self, model: nn.Module, batch: Any) -> None:  # noqa: B027
        """Refuse, by a RowError, a batch that a model cannot take, before it runs; nothing is refused by default."""

    @abstractmethod
    def encode(self, targets: Tensor, num_outputs: int) -> Tensor:
        """The statistic that outputs are compared with, float of shape ``(B, C)`` (classes: one-hot).

        Raises:
            ValueError: If the targets do not fit the task.
        """

    def decode(self, encoded: Tensor) -> Tensor | None:
        """The targets again, to show beside scores, or None; by default the statistic itself."""
        return encoded[:, 0] if encoded.shape[1] == 1 else encoded

    def shown(self, encoded: Tensor) -> Tensor | None:
        """The targets of :meth:`decode`, on the CPU."""
        targets = self.decode(encoded)
        return None if targets is None else targets.cpu()

    @abstractmethod
    def constant(self, encoded: Tensor) -> Tensor:
        """Outputs of the best constant prediction of targets ``(n, C)``, shape ``(C,)``.

        Frequencies are smoothed by one more example, spread evenly over all classes.
        """

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

    def output_weights(self, encoded: Tensor) -> Tensor | float:
        """Weight of each output's likelihood, and :meth:`curvature`, in its example's loss; 1 unless of tokens."""
        return 1.0

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
        """Log-odds of the target, ``log p - log(1 - p)``, shape ``(B,)``; a ValueError where the task has none.

        Reference: arXiv:2303.14186 (TRAK), equation 4.
        """
        raise ValueError(f"A {self.name} has no margin; only classifications do.")

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
            raise ValueError(f"Classification expects integer targets of shape (B,), got {describe(targets)}.")
        check_rows(
            (targets >= 0) & (targets < num_outputs),
            targets,
            f"and a model with {num_outputs} outputs takes 0..{num_outputs - 1}. Leave out examples that training "
            "ignores (such as those labelled -100): torch.utils.data.Subset(dataset, positions). Or say what the "
            f"target means. {HOW_TO_PASS_TASK}",
        )
        return F.one_hot(targets.long(), num_outputs).float()

    @override
    def decode(self, encoded: Tensor) -> Tensor | None:
        return encoded.argmax(-1)

    @override
    def constant(self, encoded: Tensor) -> Tensor:
        return ((encoded.sum(0) + 1 / encoded.shape[1]) / (len(encoded) + 1)).log()

    @override
    def mean(self, outputs: Tensor, dim: int = -1) -> Tensor:
        return outputs.softmax(dim)

    @override
    def loss(self, outputs: Tensor, encoded: Tensor, dim: int = -1) -> Tensor:
        return -(encoded * outputs.log_softmax(dim)).sum(dim)

    @override
    def margin(self, outputs: Tensor, encoded: Tensor) -> Tensor:
        is_target = encoded.bool()
        others = outputs.masked_fill(is_target, -torch.inf).logsumexp(-1)
        return outputs.masked_fill(~is_target, -torch.inf).logsumexp(-1) - others

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
        return weighted - mean * weighted.sum(-1, keepdim=True)

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
        check_rows((encoded == 0) | (encoded == 1), encoded, f"and a binary target must be 0 or 1. {HOW_TO_PASS_TASK}")
        return encoded

    @override
    def constant(self, encoded: Tensor) -> Tensor:
        return ((encoded.sum(0) + 1 / 2) / (len(encoded) + 1)).logit()

    @override
    def mean(self, outputs: Tensor, dim: int = -1) -> Tensor:
        return outputs.sigmoid()

    @override
    def loss(self, outputs: Tensor, encoded: Tensor, dim: int = -1) -> Tensor:
        return (F.softplus(outputs) - encoded * outputs).sum(dim)

    @override
    def margin(self, outputs: Tensor, encoded: Tensor) -> Tensor:
        if outputs.shape[-1] != 1:
            raise ValueError("Several independent logits have no one margin.")
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
        self.noise_std = check_positive("noise_std", noise_std)

    @property
    @override
    def dispersion(self) -> float:
        return self.noise_std**2

    @override
    def encode(self, targets: Tensor, num_outputs: int) -> Tensor:
        return _as_columns(targets, num_outputs)

    @override
    def constant(self, encoded: Tensor) -> Tensor:
        return encoded.mean(0)

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
            "target='predicted' says nothing for a regression: the loss of a prediction against itself is zero, "
            "whatever the training data are. Give each query a target, such as the value that surprised you."
        )

    def __repr__(self) -> str:
        return f"Regression(noise_std={self.noise_std:g})"


def _as_columns(targets: Tensor, num_outputs: int) -> Tensor:
    if targets.numel() != len(targets) * num_outputs:
        raise ValueError(f"Expected {num_outputs} target(s) per example, got {describe(targets)}.")
    columns = targets.reshape(len(targets), num_outputs)
    return columns if columns.is_floating_point() else columns.float()


def check_rows(fits: Tensor, targets: Tensor, problem: str) -> None:
    """Refuse, by a RowError, rows of targets that do not fit; both have shape ``(B,)`` or ``(B, C)``."""
    fits, targets = fits.reshape(len(fits), -1), targets.reshape(len(targets), -1)
    wrong = (~fits.all(1)).nonzero().flatten().tolist()
    if wrong:
        value = float(targets[wrong[0]][~fits[wrong[0]]][0])
        raise RowError(wrong[0], f"has the target {value:g}, {problem.removesuffix('.')}", wrong[1:])


def columns(outputs: Tensor) -> Tensor:
    """Outputs with classes along the last axis: those of shape ``(B,)`` become ``(B, 1)``."""
    return outputs[:, None] if outputs.ndim == 1 else outputs


def describe(value: object) -> str:
    """A value in words, for an error message."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"dict with keys {sorted(map(str, value))}"
    if isinstance(value, tuple | list):
        return f"{type(value).__name__} of {len(value)} item(s)"
    return type(value).__name__
