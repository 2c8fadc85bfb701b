"""Manual optimization without training: which losses a ``training_step`` hands over, for which optimizer."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor, nn


class ManualOptimization:
    """Takes the place of a module's optimizers and schedulers, trains nothing, and notes the losses.

    Args:
        model: A LightningModule.
        trainer: The Trainer that it is attached to, if any; else its ``configure_optimizers`` is called.
    """

    def __init__(self, model: nn.Module, trainer: Any) -> None:
        self._model, self._trainer = model, trainer
        self._made: tuple[list[Any], list[Any]] | None = None
        #: Losses in the order in which they were handed over, and the optimizer that was toggled then.
        self._handed: list[tuple[Tensor, int | None]] = []
        #: How many of them there were when the gradients of an optimizer were cleared last, by its number.
        self._num_cleared: dict[int, int] = {}
        #: Losses that the steps of an optimizer used, by its number.
        self._used: dict[int, list[Tensor]] = {}
        self._toggled: int | None = None

    def methods(self) -> dict[str, Callable[..., Any]]:
        """What takes the place of a LightningModule's methods."""
        return {
            "optimizers": self.optimizers,
            "lr_schedulers": self.lr_schedulers,
            "manual_backward": self.manual_backward,
            "toggle_optimizer": self.toggle,
            "untoggle_optimizer": self.untoggle,
            "toggled_optimizer": self.toggled,
            **dict.fromkeys(("clip_gradients", "configure_gradient_clipping", "lr_scheduler_step"), inert),
        }

    def optimizers(self, use_pl_optimizer: bool = True) -> Any:
        """One optimizer, or a list."""
        optimizers = self._objects()[0]
        return optimizers[0] if len(optimizers) == 1 else optimizers

    def lr_schedulers(self) -> Any:
        """One scheduler, a list, or None."""
        schedulers = self._objects()[1]
        return None if not schedulers else schedulers[0] if len(schedulers) == 1 else schedulers

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Note a loss."""
        weights = args[0] if args else kwargs.get("gradient")
        self._handed.append((loss if weights is None else (loss * weights).sum(), self._toggled))

    def toggle(self, optimizer: Any) -> None:
        """From now on losses are for this optimizer alone."""
        self._toggled = next((number for number, each in enumerate(self._objects()[0]) if each is optimizer), None)

    def untoggle(self, optimizer: Any = None) -> None:
        """From now on losses are for all optimizers."""
        self._toggled = None

    @contextmanager
    def toggled(self, optimizer: Any, *_: Any, **__: Any) -> Iterator[None]:
        """Inside the block losses are for this optimizer alone."""
        self.toggle(optimizer)
        yield
        self.untoggle()

    def cleared(self, number: int) -> None:
        """Note that the gradients of an optimizer were cleared."""
        self._num_cleared[number] = len(self._handed)

    def stepped(self, number: int) -> None:
        """Note a step of an optimizer."""
        self._used.setdefault(number, []).extend(self._waiting(number))

    def _waiting(self, number: int) -> list[Tensor]:
        """Losses of an optimizer since its gradients were cleared."""
        handed = self._handed[self._num_cleared.get(number, 0) :]
        return [loss for loss, toggled in handed if toggled in (None, number)]

    def loss(self, optimizer_idx: int | None) -> Tensor:
        """The loss that was handed over, for one optimizer where they differ.

        Raises:
            ValueError: If there is none, or several and no optimizer is chosen.
        """
        name = type(self._model).__name__
        if not self._handed:
            raise ValueError(
                f"The training_step of {name} optimizes manually and hands no loss to self.manual_backward. Call "
                "self.manual_backward(loss) there, or say what the loss is: pass `loss=fn` with fn(model, batch) -> "
                "(B,)."
            )
        numbers = range(max(1, len(self._objects()[0])))
        # An optimizer that accumulates gradients does not step at every batch.
        losses = {number: self._used.get(number) or self._waiting(number) for number in numbers}
        losses = {number: values for number, values in losses.items() if values}
        different = {tuple(map(id, values)) for values in losses.values()}
        if optimizer_idx is None and len(different) == 1:
            optimizer_idx = next(iter(losses))
        if optimizer_idx not in losses:
            shown = "; ".join(
                f"{self._described(number)}: {sum(float(each.detach()) for each in values):.4g}"
                for number, values in losses.items()
            )
            choice = "" if optimizer_idx is None else f" OwnLoss(optimizer_idx={optimizer_idx}) is none of them."
            raise ValueError(
                f"The training_step of {name} hands {len(different)} losses to manual_backward, one for each optimizer "
                f"({shown}).{choice} Choose one with task=OwnLoss(optimizer_idx={next(iter(losses))}), or pass "
                "`loss=fn` with fn(model, batch) -> (B,)."
            )
        return functools.reduce(operator.add, losses[optimizer_idx])

    def _objects(self) -> tuple[list[Any], list[Any]]:
        if self._made is None:
            optimizers, schedulers = list(getattr(self._trainer, "optimizers", ())), []
            if optimizers:
                schedulers = [config.scheduler for config in self._trainer.lr_scheduler_configs]
            else:
                optimizers, schedulers = configured(self._model)
            self._made = (
                [InertOptimizer(each, number, self) for number, each in enumerate(optimizers)],
                [Inert(each) for each in schedulers],
            )
        return self._made

    def _described(self, number: int) -> str:
        """An optimizer for messages: its number, its class, and the children of the module that it trains."""
        optimizers = self._objects()[0]
        if not optimizers:
            return "no optimizer"
        held = {id(parameter) for group in optimizers[number].param_groups for parameter in group["params"]}
        names = {name.partition(".")[0]: None for name, value in self._model.named_parameters() if id(value) in held}
        kind = type(vars(optimizers[number])["_real"]).__name__
        return f"optimizer {number} ({kind} of {', '.join(names)})"


def configured(model: nn.Module) -> tuple[list[Any], list[Any]]:
    """Optimizers and schedulers that ``configure_optimizers`` of a LightningModule makes."""
    made: Any = model.configure_optimizers()  # pyright: ignore[reportCallIssue]
    if made is None:
        return [], []
    if isinstance(made, tuple | list) and len(made) == 2 and all(isinstance(each, list) for each in made):
        optimizers, schedulers = made
    else:
        parts = made if isinstance(made, tuple | list) else [made]
        optimizers = [part["optimizer"] if isinstance(part, dict) else part for part in parts]
        schedulers = [part["lr_scheduler"] for part in parts if isinstance(part, dict) and part.get("lr_scheduler")]
    return list(optimizers), [each["scheduler"] if isinstance(each, dict) else each for each in schedulers]


def inert(*_: Any, **__: Any) -> None:
    """Does nothing."""


class Inert:
    """An object whose attributes can be read, and whose methods do nothing."""

    def __init__(self, real: Any) -> None:
        vars(self)["_real"] = real

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._real, name)
        if name.startswith(("get_", "state_dict")):
            return value
        if callable(value):
            return inert
        # Copies, which a step may write into.
        value = [dict(each) if isinstance(each, dict) else each for each in value] if isinstance(value, list) else value
        return vars(self).setdefault(name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        pass


class InertOptimizer(Inert):
    """An optimizer that does nothing, but tells the :class:`ManualOptimization` of it; it runs closures."""

    def __init__(self, real: Any, number: int, manual: ManualOptimization) -> None:
        super().__init__(real)
        vars(self).update(_number=number, _manual=manual)

    @property
    def optimizer(self) -> InertOptimizer:
        """What Lightning wraps."""
        return self

    def step(self, *args: Any, closure: Callable[[], Any] | None = None, **_: Any) -> Any:
        """Run the closure, which hands over a loss."""
        closure = closure or next((each for each in args if callable(each)), None)
        result = None if closure is None else closure()
        self._manual.stepped(self._number)
        return result

    def zero_grad(self, *_: Any, **__: Any) -> None:
        """Forget the losses so far."""
        self._manual.cleared(self._number)

    def toggle_model(self, *_: Any, **__: Any) -> AbstractContextManager[None]:
        """Inside the block losses are for this optimizer alone."""
        return self._manual.toggled(self)
