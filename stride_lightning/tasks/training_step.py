"""The loss that a module's own ``training_step`` gives on a batch; afterwards the module is as before."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from typing_extensions import Self

from stride_lightning.model.undisturbed import undisturbed
from stride_lightning.runtime.checkpointing import without_checkpointing
from stride_lightning.runtime.randomness import mix, seeded
from stride_lightning.runtime.row_draws import DrawnShapes, RowDraws
from stride_lightning.tasks.manual_optimization import ManualOptimization
from stride_lightning.tasks.moments import Moment, moment_of
from stride_lightning.tasks.stand_ins import device_of, put_in_place

__all__ = ["Mode", "Moment", "TrainingStep", "moment_of", "training_mode"]

#: The mode in which a loss is defined: training, or eval where training mixes the examples of a batch. Training that
#: goes on (``"fit"``) has dropout too.
Mode = Literal["train", "eval", "fit"]


class TrainingStep:
    """The loss of a batch, as the module's ``training_step`` returns it, or hands it to ``manual_backward``.

    Args:
        model: A LightningModule.
        moment: The moment of training; None where it is unknown.
        mode: Training mode keeps ``training=True``, with dropout and normalisation layers in eval mode.
        optimizer_idx: Which of the losses handed to ``manual_backward`` counts.
    """

    def __init__(
        self, model: nn.Module, moment: Moment | None = None, mode: Mode = "train", optimizer_idx: int | None = None
    ) -> None:
        self.model, self.moment, self.mode, self.optimizer_idx = model, moment, mode, optimizer_idx
        self._shapes = DrawnShapes()
        #: Another number shows whether a loss depends on it.
        self._batch_idx = 0

    @property
    def name(self) -> str:
        """What errors call the step."""
        return f"The training_step of {type(self.model).__name__}"

    @property
    def has_generators(self) -> bool:
        """Whether the step has passed generators of its own to torch's random functions."""
        return self._shapes.has_generators

    def at(self, moment: Moment | None, batch_idx: int = 0) -> Self:
        """The same step at another moment of training."""
        other = copy.copy(self)
        other.moment, other._batch_idx = moment, batch_idx
        return other

    def __call__(self, batch: Any, keys: Tensor | None = None, draw: int = 0) -> Tensor | None:
        """The loss, a scalar with its graph; None where ``training_step`` skips the batch.

        Args:
            batch: A batch on the device, as the loader's ``collate_fn`` makes it; it stays as it is.
            keys: A number for each example, int64 of shape ``(B,)``, from which its random draws are seeded.
            draw: Number of the draw.

        Raises:
            ValueError: If what the step gives is no loss, or depends on what only a Trainer has. It names the cause.
        """
        watchers = () if keys is None else (RowDraws(keys, draw, self._shapes),)
        with (
            torch.inference_mode(False),
            seeded(mix(draw)),
            undisturbed(self.model, batch, watchers=watchers),
            without_checkpointing(),
            torch.autocast(device_of(self.model).type, enabled=False),
            torch.enable_grad(),
        ):
            if self.mode == "eval":
                self.model.eval()
            else:
                training_mode(self.model, dropout=self.mode == "fit")
            trainer, self._manual = put_in_place(self.model, self.moment)
            try:
                return self._loss(batch)
            except Exception as error:
                if trainer.missing is None:
                    raise
                raise ValueError(trainer.missing) from error

    def _loss(self, batch: Any) -> Tensor | None:
        training_step: Callable[..., Any] = self.model.training_step  # pyright: ignore[reportAssignmentType]
        result = training_step(*_arguments(training_step, batch, self._batch_idx))
        if any(parameter.is_leaf and parameter.grad is not None for parameter in self.model.parameters()):
            raise ValueError(
                f"The training_step of {type(self.model).__name__} calls backward() itself, so its loss cannot be "
                "read. Call self.manual_backward(loss) with automatic_optimization=False, or say what the loss "
                "is: pass `loss=fn` with fn(model, batch) -> (B,)."
            )
        if not getattr(self.model, "automatic_optimization", True):
            return _checked(self.model, self._manual.loss(self.optimizer_idx))
        if isinstance(result, dict) and result.get("loss") is None:
            raise ValueError(
                f"The training_step of {type(self.model).__name__} returned a dictionary without a 'loss' (its keys: "
                f"{', '.join(map(str, result)) or 'none'}). Lightning needs that key. To skip a batch, return None."
            )
        loss = result["loss"] if isinstance(result, dict) else result
        return None if loss is None else _checked(self.model, loss)

    #: Set while a step runs.
    _manual: ManualOptimization


def _arguments(training_step: Callable[..., Any], batch: Any, batch_idx: int) -> tuple[Any, ...]:
    """The positional arguments of a ``training_step``: the batch, ``batch_idx`` and a number of the loader, 0."""
    function = getattr(training_step, "__func__", training_step)
    count = _num_arguments(function, is_bound=function is not training_step)
    return (batch, batch_idx, *[0] * (count - 2))[:count]


@lru_cache(64)
def _num_arguments(function: Callable[..., Any], *, is_bound: bool) -> int:
    parameters = [*inspect.signature(function).parameters.values()][is_bound:]
    if any(each.name == "dataloader_iter" for each in parameters):
        raise ValueError(
            "The training_step takes `dataloader_iter` and draws its batches itself, so it has no loss of a batch. Say "
            "what the loss is: pass `loss=fn` with fn(model, batch) -> (B,)."
        )
    positional = [each for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    if any(each.kind == each.VAR_POSITIONAL for each in parameters):
        return 2
    # Lightning passes the first two; others must have defaults, or are of an older Lightning.
    return sum(number < 2 or each.default is each.empty for number, each in enumerate(positional))


def _checked(model: nn.Module, loss: Any) -> Tensor:
    """A loss as a scalar; refused where it is none that a Trainer could minimise."""
    name = f"The training_step of {type(model).__name__}"
    if not isinstance(loss, Tensor):
        hint = " Return the tensor, without .item() or float()." if isinstance(loss, int | float) else ""
        raise ValueError(f"{name} returned {type(loss).__name__}, expected a loss: a tensor with one number.{hint}")
    if loss.numel() != 1:
        raise ValueError(
            f"{name} returned a tensor of shape {tuple(loss.shape)}, expected a loss: one number. Take the mean."
        )
    loss = loss.reshape(()) if loss.ndim else loss
    if not (loss.requires_grad or is_functorch_wrapped_tensor(loss)):
        raise ValueError(
            f"{name} returned a loss without gradient. Compute it without .detach(), .item() and torch.no_grad(), and "
            "leave requires_grad of the parameters that are trained at True."
        )
    return loss


def training_mode(model: nn.Module, *, dropout: bool = False) -> None:
    """Training mode, except for normalisation layers with running statistics and, by default, dropout layers.

    Dropout inside other layers of torch and transformers is a part of these. Callers put the attributes back.
    """
    model.train()
    for module in model.modules():
        attributes = vars(module)
        if not dropout and isinstance(module, nn.modules.dropout._DropoutNd):
            # Attention layers read the rate of a dropout layer, but not its mode.
            attributes.update(training=False, p=0.0)
        elif attributes.get("track_running_stats") or isinstance(module, nn.modules.batchnorm._BatchNorm):
            attributes["training"] = False
        elif not dropout and _has_inner_dropout(type(module)):
            rates = [name for name, value in attributes.items() if "dropout" in name and isinstance(value, float)]
            attributes.update(dict.fromkeys(rates, 0.0))


@cache
def _has_inner_dropout(cls: type) -> bool:
    """Whether modules of a class drop by rates that they hold as numbers."""
    return issubclass(cls, nn.RNNBase | nn.MultiheadAttention) or cls.__module__.partition(".")[0] == "transformers"
