"""ResidualsAttributor: methods whose residuals and curvature may be those of a readout of the network's features."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn
from typing_extensions import override

from stride_lightning.gradients.attributor import GradientAttributor
from stride_lightning.readout.network import NetworkReadout
from stride_lightning.tasks.own_loss import OwnLoss

#: Whose outputs residuals and curvature are taken at.
Residuals = Literal["model", "readout"]


class ResidualsAttributor(GradientAttributor):
    r"""Gradients and curvature with the residuals of the model, or of a readout that is refit on its features.

    A network that has memorised its data has training residuals near zero, and scores made of them are noise. The
    readout does not memorise. With ``residuals="readout"`` its natural parameters take the place of the model's outputs
    wherever the loss is differentiated, while the Jacobian J stays that of the network:

    .. math:: g = J' (p_\mathrm{readout} - y), \qquad
              H = J' (\mathrm{diag}(p_\mathrm{readout}) - p_\mathrm{readout} p_\mathrm{readout}') J

    Scores are then about the readout's loss. With ``target="predicted"`` targets are still the network's answers.
    With several ``checkpoints`` each has a readout. Memory: ``4 C (n + q)`` bytes beside the readout's.

    Args:
        residuals: ``"model"``, or ``"readout"`` for tasks with one row of outputs per example.
        kwargs: Arguments of :class:`GradientAttributor`.

    Raises:
        ValueError: If ``residuals`` is neither, or the task is one of tokens and ``residuals`` is ``"readout"``.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> from stride_lightning import attribute
        >>> x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
        >>> data, model = TensorDataset(x, (x[:, 0] > 0).long()), nn.Linear(4, 2)
        >>> options = {"method": "ekfac", "residuals": "readout", "show_progress": False}
        >>> attribute(model, data, train_data=data, **options).label
        'ekfac, readout residuals'
    """

    def __init__(self, *, residuals: Residuals = "model", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if residuals not in get_args(Residuals):
            raise ValueError(f"`residuals` must be 'model' or 'readout', got {residuals!r}.")
        self.residuals: Residuals = residuals

    @override
    def options(self) -> dict[str, Any]:
        return {**super().options(), "residuals": self.residuals}

    @override
    def fit_model(self, model: nn.Module, device: torch.device, record: str | Path | None, checkpoint: Any) -> None:
        if self.residuals == "readout":
            if isinstance(self.task, OwnLoss):
                raise ValueError(
                    f"residuals='readout' needs a likelihood, and the model was trained on {self.metadata['loss']}. "
                    "Leave out `residuals`."
                )
            if self.task.has_tokens:
                raise ValueError(
                    "residuals='readout' needs one row of outputs per example, and a task of "
                    f"{self.task.name} has one per token. Leave out `residuals`."
                )
            self.metadata["label"] = f"{self.method}, readout residuals"
        super().fit_model(model, device, record, checkpoint)

    @override
    def fit_readout(self, model: nn.Module) -> NetworkReadout | None:
        if self.residuals == "model":
            return None
        options: dict[str, Any] = {"device": self.reader.device, "show_progress": self.show_progress}
        return NetworkReadout.fit(model, self.task, self.train_data, batch_size=self.chunk_size, **options)
