"""A readout refit on a network's features. This stand-in halves the network's own outputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stride_lightning.data.examples import Examples
from stride_lightning.data.reading import Reading
from stride_lightning.runtime.checks import check_finite
from stride_lightning.tasks.likelihoods import Task, columns


class NetworkReadout:
    """A readout refit on a network's features.

    Args:
        model: The network, in eval mode on its device.
        task: The likelihood.
        batch_size: Examples per forward pass.
        device: Device of the network.
    """

    def __init__(self, model: nn.Module, task: Task, batch_size: int, device: torch.device) -> None:
        self._model, self._task, self._batch_size, self._device = model, task, batch_size, device
        #: Natural parameters of the training examples, shape ``(n, C)``.
        self.train_outputs = torch.empty(0)

    @classmethod
    def fit(
        cls,
        model: nn.Module,
        task: Task,
        train: Examples,
        *,
        layers: Sequence[str] | None = None,
        batch_size: int,
        device: torch.device,
        show_progress: bool,
    ) -> NetworkReadout:
        """Fit the readout to the training examples."""
        readout = cls(model, task, batch_size, device)
        readout.train_outputs = readout.outputs_of(train)
        return readout

    def outputs_of(self, queries: Examples, target: str = "label") -> Tensor:
        """Natural parameters of queries, shape ``(q, C)``."""
        parts = []
        for rows in Reading(queries, self._task, self._model, batch_size=self._batch_size, device=self._device):
            with rows.naming(), torch.no_grad():
                parts.append(0.5 * columns(self._task.outputs(self._model, rows.inputs)))
                check_finite(parts[-1], "outputs")
        return torch.cat(parts)
