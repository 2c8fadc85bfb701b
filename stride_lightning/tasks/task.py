"""Task: how to read a batch, and the form of every likelihood."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from stride_lightning.runtime.checks import RowError
from stride_lightning.tasks.parts import Parts, item_of

HOW_TO_PASS_TASK = (
    "Pass `task=`: Classification(), BinaryClassification(), Regression(), SequenceClassification(), "
    "CausalLanguageModeling(), or a subclass of one of them that overrides `inputs(batch)`, `targets(batch)` or "
    "`outputs(model, inputs)`."
)


class Task(ABC):
    """A likelihood in canonical form, and how to read a batch; nothing else in the library knows losses.

    The outputs ``o`` of the model are the natural parameters of an exponential family. Each target is encoded as
    a statistic ``t`` of the same shape, the family predicts its :meth:`mean`, and the gradient of the loss in the
    outputs is ``w (mean(o) - t) / dispersion``, with a weight ``w`` of the example that is 1 for most tasks. Targets
    may be *soft*: the mean of another prediction. Steering operators need no more. To read other batches, write a
    subclass of a task below that replaces two or three methods.

    Example:
        A LightningModule whose batches are dictionaries:

        >>> from stride_lightning import Classification
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
    #: Factor of the loss, for the unit of a module's own.
    scale: float = 1.0
    #: Whether training divides by the sum of a batch's weights: then they have mean 1 over the training set.
    is_normalised: bool = False
    #: Where the parts of a batch stand; None for the first two items of a tuple.
    parts: Parts | None = None
    _mean_weight: float = 1.0

    def with_scale(self, factor: float) -> Self:
        """The same task, with a loss so many times as large."""
        return self.changed(scale=self.scale * factor)

    def changed(self, **attributes: Any) -> Self:
        """The same task, with other attributes."""
        other = copy.copy(self)
        vars(other).update(attributes)
        return other

    def scaled_to(self, encoded: Tensor) -> Self:
        """The task for a training set with these encoded targets: weights that are normalised get the mean 1."""
        if not self.is_normalised:
            return self
        return self.with_mean_weight(self.example_weights(encoded))

    def with_mean_weight(self, weights: Tensor) -> Self:
        """The task for a training set whose examples have these weights, shape ``(n,)``: they get the mean 1."""
        return self.changed(_mean_weight=float(weights.double().mean()) or 1.0)

    @property
    def is_weighted(self) -> bool:
        """Whether examples have weights, so that statistics come with them (see :meth:`split`)."""
        return self.parts is not None and self.parts.weights is not None

    def inputs(self, batch: Any) -> Any:
        """The inputs that :meth:`outputs` hands to the model; by default the first item of the batch."""
        if self.parts is not None:
            return self.parts.arguments(batch)
        if not isinstance(batch, tuple | list) or len(batch) < 1:
            raise TypeError(f"Expected a batch of (inputs, targets), got {describe(batch)}. {HOW_TO_PASS_TASK}")
        return batch[0]

    def targets(self, batch: Any) -> Tensor | None:
        """The targets, or None for a batch without; by default the second item of the batch."""
        if self.parts is None:
            return batch[1] if isinstance(batch, tuple | list) and len(batch) > 1 else None
        targets = item_of(batch, self.parts.targets)
        if self.parts.weights is None:
            return targets
        weights = item_of(batch, self.parts.weights)
        return torch.cat([targets.reshape(len(targets), -1).to(weights), weights[:, None]], 1)

    def unpacked(self, targets: Tensor, width: int = 1) -> tuple[Tensor, Tensor | None]:
        """Targets of ``width`` numbers, and weights ``(B, 1)`` where :meth:`targets` has put them into a last column.

        Predictions stand for targets without weights; these are 1.
        """
        if self.parts is None or self.parts.weights is None:
            return targets, None
        if targets.numel() == width * len(targets):
            return targets, torch.ones(len(targets), 1, device=targets.device)
        weights = targets[:, -1:]
        if not bool((weights >= 0).all()):
            row = int((~(weights >= 0)[:, 0]).nonzero()[0])
            raise RowError(row, f"has the weight {float(weights[row]):g}. Give it a finite weight of 0 or more")
        return targets[:, :-1], weights

    def outputs(self, model: nn.Module, inputs: Any) -> Tensor:
        """Natural parameters (logits, or the predicted mean of a regression), shape ``(B, C)`` or ``(B,)``."""
        if self.parts is None:
            return model(inputs)
        returned = model(*inputs)
        return returned if self.parts.output is None else item_of(returned, self.parts.output)

    def check_batch(self, model: nn.Module, batch: Any) -> None:  # noqa: B027
        """Refuse, by a RowError, a batch that a model cannot take, before it runs; nothing is refused by default."""

    @abstractmethod
    def encode(self, targets: Tensor, num_outputs: int) -> Tensor:
        """The statistic that outputs are compared with, float of shape ``(B, C)`` (classes: one-hot).

        Weights are part of it; :meth:`split` takes the two apart.

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

    def split(self, encoded: Tensor, dim: int = -1) -> tuple[Tensor, Tensor | float]:
        """The weighted statistic ``w t`` and the weights ``w`` of encoded targets."""
        return encoded, 1.0

    def residual(self, mean: Tensor, encoded: Tensor, dim: int = -1) -> Tensor:
        """Gradient of the loss in the outputs, where the family predicts ``mean``."""
        statistic, weights = self.split(encoded, dim)
        predicted = weights * mean if isinstance(weights, Tensor) else mean
        return (predicted - statistic) / self.dispersion

    def output_weights(self, encoded: Tensor, dim: int = -1) -> Tensor | float:
        """Weight of each output's likelihood, and :meth:`curvature`, in its example's loss."""
        return self.split(encoded, dim)[1]

    def example_weights(self, encoded: Tensor) -> Tensor:
        """The weight of each example, shape ``(B,)``; a normalised loss divides by their sum over a batch."""
        weights = self.split(encoded)[1]
        return weights.mean(-1) if isinstance(weights, Tensor) else encoded.new_ones(len(encoded))

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
        """Scale ``s`` of the family: the gradient of the loss is ``w (mean - target) / s``."""
        return self._mean_weight / self.scale

    def settings(self) -> list[str]:
        """Settings other than the default, as ``repr`` shows them."""
        shown = [] if self.scale == 1 else [f"scale={self.scale:.6g}"]
        return shown + ([] if self.parts is None else [str(self.parts)])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self.settings())})"


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
