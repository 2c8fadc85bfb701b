"""The loss that a module's own ``training_step`` gives on a batch; afterwards the module is as before."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stride_lightning.model.weights import borrowed
from stride_lightning.runtime.row_draws import row_draws

#: The mode in which a loss is defined: training, or eval where training mixes the examples of a batch. Training that
#: goes on (``"fit"``) has dropout too.
Mode = Literal["train", "eval", "fit"]


@dataclass(frozen=True)
class Moment:
    """The moment of training at which a loss is taken, as a Trainer tells it."""

    current_epoch: int = 0
    global_step: int = 0
    max_epochs: int | None = None
    num_training_batches: int | None = None
    estimated_stepping_batches: int | None = None


def moment_of(model: nn.Module, checkpoint: Any) -> Moment | None:
    """The moment of the last step trained at a model's weights; None where nothing says it."""
    return None


class TrainingStep:
    """The loss of a batch, as the module's ``training_step`` returns it.

    Args:
        model: A LightningModule.
        moment: The moment of training; None where it is unknown.
        mode: Training mode keeps ``training=True``, with dropout and normalisation layers in eval mode. In mode
            ``"fit"`` there is dropout.
        optimizer_idx: Which of the losses handed to ``manual_backward`` counts.
    """

    def __init__(
        self, model: nn.Module, moment: Moment | None = None, mode: Mode = "train", optimizer_idx: int | None = None
    ) -> None:
        self.model, self.moment, self.mode, self.optimizer_idx = model, moment, mode, optimizer_idx

    def __call__(self, batch: Any, keys: Tensor | None = None, draw: int = 0) -> Tensor | None:
        """The loss, a scalar with its graph; None where ``training_step`` skips the batch.

        Args:
            batch: A batch on the device, as the loader's ``collate_fn`` makes it.
            keys: A number for each example, int64 of shape ``(B,)``, from which its random draws are seeded.
            draw: Number of the draw.
        """
        with self._ready(), row_draws(keys, draw), torch.enable_grad():
            return self._loss(batch)

    def _loss(self, batch: Any) -> Tensor | None:
        training_step: Callable[..., Any] = self.model.training_step  # pyright: ignore[reportAssignmentType]
        wanted = len(inspect.signature(training_step).parameters)
        result = training_step(*(batch, 0, 0)[:wanted])
        loss = result.get("loss") if isinstance(result, dict) else result
        if loss is None:
            return None
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise ValueError(
                f"training_step of {type(self.model).__name__} returned {type(loss).__name__}, expected a scalar loss."
            )
        return loss.reshape(())

    @contextmanager
    def _ready(self) -> Iterator[None]:
        with borrowed(self.model, None, None):
            if self.mode != "eval":
                training_mode(self.model, dropout=self.mode == "fit")
            yield


def training_mode(model: nn.Module, *, dropout: bool = False) -> None:
    """Training mode, except for normalisation layers with running statistics and, by default, dropout layers."""
    model.train()
    for module in model.modules():
        has_statistics = getattr(module, "track_running_stats", False) or isinstance(
            module, nn.modules.batchnorm._BatchNorm
        )
        if has_statistics or (not dropout and isinstance(module, nn.modules.dropout._DropoutNd)):
            module.training = False
