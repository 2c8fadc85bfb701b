"""The outputs that a task reads off a model, for gradients to be taken of."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from stride_lightning.model.capture import Outputs
from stride_lightning.tasks.inference import check_outputs
from stride_lightning.tasks.likelihoods import Task, columns


class TaskOutputs(Outputs):
    """Outputs of a model as a task reads them, of shape ``(B, C)``, or ``(B, T, C)`` for tokens."""

    def __init__(self, model: nn.Module, task: Task) -> None:
        super().__init__(model)
        self._task = [task]  # in a list: a task may be a module, and is not part of the model

    @override
    def forward(self, inputs: Any) -> Tensor:
        return columns(self._task[0].outputs(self.model, inputs))

    @override
    def check(self, outputs: object, num_examples: int) -> None:
        check_outputs(outputs, num_examples, self._task[0])
