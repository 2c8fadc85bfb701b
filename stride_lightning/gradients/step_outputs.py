"""Outputs of a training step at the tap of its loss, and the slopes and second derivatives of the loss there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

from stride_lightning.model.capture import Outputs
from stride_lightning.model.tap import Key, Tap
from stride_lightning.tasks.training_step import TrainingStep


class StepInputs(NamedTuple):
    """A batch for ``training_step``."""

    batch: Any
    #: What seeds the random numbers of each example, int64 of shape ``(B,)``.
    keys: Tensor
    draw: int = 0


class SkippedStep(Exception):
    """``training_step`` returned None."""


class NoRows(ValueError):
    """The outputs of a batch are not one part for each of its examples."""


class StepOutputs(Outputs):
    """The outputs of a tap, as one row for each example.

    After a run :attr:`loss` is the loss of the batch, as a function of :attr:`points`.

    Args:
        model: A LightningModule.
        step: Its training step.
        tap: The tap of its loss.
        views_first: Names of modules whose outputs hold all examples once, then all of them again, and so on, where
            they have several rows for each example.
    """

    loss: Tensor
    points: list[Tensor]

    def __init__(self, model: nn.Module, step: TrainingStep, tap: Tap, views_first: Iterable[str] = ()) -> None:
        super().__init__(model)
        self.step, self.tap, self.views_first = step, tap, frozenset(views_first)
        self._needs_loss = True

    @contextmanager
    def without_loss(self) -> Iterator[None]:
        """Give outputs inside the block even where the loss behind them is missing, as of a single example it may."""
        self._needs_loss = False
        try:
            yield
        finally:
            self._needs_loss = True

    @contextmanager
    @override
    def again(self) -> Iterator[None]:
        with self.without_loss():  # that of the first run counts
            yield

    @override
    def forward(self, inputs: StepInputs) -> Tensor:
        outputs = self.run(inputs)
        rows = [self.rows(key, tensor, len(inputs.keys)) for key, tensor in outputs.items()]
        return torch.cat(rows, 1)

    def run(self, inputs: StepInputs) -> Mapping[Key, Tensor]:
        """The outputs of the tap as the modules return them."""
        outputs, loss = self._recorded(inputs, cut=False)
        if not self._needs_loss and outputs:
            return outputs
        # From copies, so that a slope at one output holds nothing that came through another.
        points, loss = self._recorded(inputs, cut=True) if self.tap.is_nested else (outputs, loss)
        if loss is None or not outputs:
            raise SkippedStep
        self.loss, self.points = loss, list(points.values())
        self._keys, self._size = list(points), len(inputs.keys)
        return outputs

    def _recorded(self, inputs: StepInputs, *, cut: bool) -> tuple[dict[Key, Tensor], Tensor | None]:
        """The outputs of the tap, and the loss of a run."""
        loss = None
        with self.tap.recorded(self.model, cut=cut) as recorded:
            try:
                loss = self.step(*inputs)
            except Exception:
                if self._needs_loss or not recorded:
                    raise
        return self.tap.among(recorded), loss

    def rows(self, key: Key, tensor: Tensor, num_examples: int) -> Tensor:
        """One row for each example, shape ``(B, C)``, of an output whose first axis counts examples, or parts of them.

        Raises:
            NoRows: If it does not.
        """
        if tensor.ndim == 0 or len(tensor) == 0 or len(tensor) % num_examples:
            raise NoRows(
                f"The output of {key[0]!r} has the shape {tuple(tensor.shape)}, not one part for each of "
                f"{num_examples} examples"
            )
        parts = len(tensor) // num_examples
        if parts > 1 and key[0] in self.views_first:
            tensor = tensor.unflatten(0, (parts, num_examples)).transpose(0, 1)
        return tensor.reshape(num_examples, -1)

    def slopes(self, *, create_graph: bool = False) -> Tensor:
        """Derivatives of the batch's loss with respect to each example's outputs, shape ``(B, C)``."""
        options: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}
        with torch.enable_grad():
            parts = torch.autograd.grad(self.loss, self.points, create_graph=create_graph, retain_graph=True, **options)
            named = zip(self._keys, parts, strict=True)
            return torch.cat([self.rows(key, part, self._size) for key, part in named], 1)

    def second_derivatives(self) -> Tensor:
        """Second derivatives with respect to each example's outputs, shape ``(B, C, C)``; 0 where there are none."""
        slopes = self.slopes(create_graph=True)
        if not slopes.requires_grad:
            return slopes.new_zeros(*slopes.shape, slopes.shape[1])
        options: dict[str, Any] = {"allow_unused": True, "materialize_grads": True, "retain_graph": True}
        columns = []
        for column in range(slopes.shape[1]):
            with torch.enable_grad():
                total = slopes[:, column].sum()
            parts = torch.autograd.grad(total, self.points, **options)
            named = zip(self._keys, parts, strict=True)
            columns.append(torch.cat([self.rows(key, part, self._size) for key, part in named], 1))
        return torch.stack(columns, 1).detach()

    @override
    def check(self, outputs: object, num_examples: int) -> None:
        """Rows were made one for each example."""
