"""The loss of an example where no likelihood says it: the module's own, or a function of the user's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn
from typing_extensions import override

from stride_lightning.tasks.training_step import Mode, Moment, TrainingStep

#: ``fn(model, batch)`` returns a number for each example, shape ``(B,)``.
RowFunction = Callable[[nn.Module, Any], Tensor]


class OwnLoss:
    """The loss that the module's own ``training_step`` computes.

    Args:
        optimizer_idx: With manual optimization, which of the losses handed to ``manual_backward`` counts.
    """

    name: ClassVar[str] = "own loss"
    #: Examples have one loss each, whatever they are made of.
    has_tokens: ClassVar[bool] = False

    def __init__(self, *, optimizer_idx: int | None = None) -> None:
        self.optimizer_idx = optimizer_idx

    def of(self, model: nn.Module, moment: Moment | None = None, mode: Mode = "train") -> TrainingStep:
        """The loss as a function of batches, for a model."""
        return TrainingStep(model, moment, mode, self.optimizer_idx)

    def __repr__(self) -> str:
        return "OwnLoss()" if self.optimizer_idx is None else f"OwnLoss(optimizer_idx={self.optimizer_idx})"


class FunctionLoss(OwnLoss):
    """The loss that a function of the user's computes, ``fn(model, batch) -> (B,)``."""

    name: ClassVar[str] = "loss function"

    def __init__(self, fn: RowFunction) -> None:
        super().__init__()
        self.fn = fn

    @override
    def of(self, model: nn.Module, moment: Moment | None = None, mode: Mode = "train") -> TrainingStep:
        return FunctionStep(model, self.fn, moment, mode)

    def __repr__(self) -> str:
        return f"loss={name_of(self.fn)}"


class Lowered(FunctionLoss):
    """A function whose value is to be raised, as a loss: its value with the other sign."""

    @override
    def of(self, model: nn.Module, moment: Moment | None = None, mode: Mode = "train") -> TrainingStep:
        return FunctionStep(model, self.fn, moment, mode, sign=-1)


class FunctionStep(TrainingStep):
    """The sum of a function's values over the examples of a batch."""

    def __init__(
        self, model: nn.Module, fn: RowFunction, moment: Moment | None = None, mode: Mode = "train", sign: int = 1
    ) -> None:
        super().__init__(model, moment, mode)
        self.fn, self.sign = fn, sign

    @property
    @override
    def name(self) -> str:
        return f"The function {name_of(self.fn)}"

    @override
    def _loss(self, batch: Any) -> Tensor:
        values = self.fn(self.model, batch)
        if not isinstance(values, Tensor) or values.ndim != 1:
            shape = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(
                f"{name_of(self.fn)}(model, batch) must return a tensor with one number per example, shape (B,), got "
                f"{shape}."
            )
        return self.sign * values.sum()


def name_of(function: Callable[..., Any]) -> str:
    """A function's name, for messages and views."""
    return getattr(function, "__name__", type(function).__name__)
