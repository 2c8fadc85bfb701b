"""NetworkReadout: a readout refit on a network's features, from data sets on both sides."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from stride_lightning.data.examples import Examples, first_batch
from stride_lightning.model.layers import in_precision_of
from stride_lightning.readout.features import (
    FIRST_EXAMPLES,
    FeatureMap,
    Observation,
    choose_layers,
    fit_features,
    observe,
)
from stride_lightning.readout.readout import Points, Readout
from stride_lightning.tasks.likelihoods import Task


@dataclass(frozen=True)
class NetworkReadout:
    """A :class:`~stride_lightning.readout.readout.Readout` and the network whose features it reads.

    Args:
        model: The network, in eval mode on the device.
        task: The likelihood.
        features: The map from what enters the network's layers to features.
        readout: The readout.
        how: ``batch_size``, ``device`` and ``show_progress`` of passes.
    """

    model: nn.Module
    task: Task
    features: FeatureMap
    readout: Readout
    how: dict[str, Any]

    @classmethod
    def fit(
        cls,
        model: nn.Module,
        task: Task,
        train: Examples,
        *,
        batch_size: int,
        device: torch.device,
        show_progress: bool,
    ) -> NetworkReadout:
        """Refit a readout on the features of a network, from one pass over its training set.

        Args:
            model: In eval mode on ``device``.
            task: The likelihood.
            train: The training set.
            batch_size: Examples per forward pass.
            device: Holds features and all that is computed from them.
            show_progress: Show a progress bar.
        """
        how: dict[str, Any] = {"batch_size": batch_size, "device": device, "show_progress": show_progress}
        size = min(batch_size, FIRST_EXAMPLES, len(train))
        layers = default_layers(model, task, task.inputs(first_batch(train, size, device)), size)
        features, observed = fit_features(model, task, train, layers, **how)
        readout = Readout.fit(observed, task, show_progress=show_progress)
        return cls(model, readout.problem.task, features, readout, how)

    @property
    def train_outputs(self) -> Tensor:
        """Natural parameters of the training examples, shape ``(n, C)``."""
        return self.readout.outputs(self.readout.problem.features)

    def observe(self, queries: Examples, target: str = "label") -> tuple[Observation, Points]:
        """An evaluation pass over queries, and the queries as the readout sees them."""
        observed = observe(self.model, self.task, queries, self.features, target=target, **self.how)
        return observed, self.readout.points(observed)

    def without_training(self) -> NetworkReadout:
        """The same without the training examples, for outputs of queries only."""
        problem = self.readout.problem
        nothing = {"features": problem.features.new_empty(0, problem.shape[0]), "encoded": problem.encoded[:0]}
        return replace(self, readout=replace(self.readout, problem=replace(problem, **nothing)))

    def outputs_of(self, queries: Examples, target: str = "label") -> Tensor:
        """Natural parameters of queries, shape ``(q, C)``."""
        return self.readout.outputs(self.observe(queries, target)[1].features)


def default_layers(model: nn.Module, task: Task, inputs: Any, size: int) -> list[str]:
    """The input features and the input of each layer with a weight matrix, eight at most."""
    inputs = in_precision_of(model, inputs)
    return choose_layers(model, lambda: task.outputs(model, inputs), size)
