"""A basis of low rank that is learned together with the steering operators, as published."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stride_lightning.readout.features import Observation
from stride_lightning.readout.problem import BLOCK_BYTES
from stride_lightning.steering.published.fitting import PublishedOperators, unexplained
from stride_lightning.steering.subsets import Design
from stride_lightning.tasks.likelihoods import Task


class LearnedBasis(PublishedOperators):
    """Operators ``o + phi B a_k`` on top of the frozen model's outputs ``o``, with a basis ``B`` that all share.

    Three losses are minimised: *fidelity*, the loss on the subset; *stability*, the divergence from the frozen model
    outside it; and *linearity*, the part of the K responses to an example that a ridge on a sketch ``M R`` of the
    design does not explain. The sketch has fewer columns than there are subsets: with as many, it would explain any
    responses.

    ``observed`` is the evaluation pass over the training set and ``features`` are its coordinates, shape ``(n, m)``;
    options are those of :class:`PublishedOperators`. Small batches drown the effect of an operator in noise, since it
    sees a share of a batch only.

    Reference: arXiv:2606.05165 (STRIDE).
    """

    def __init__(self, design: Design, task: Task, observed: Observation, features: Tensor, **options: Any) -> None:
        super().__init__(design, **options)
        self.task, self.observed, self.features = task, observed, features
        self.predicted = task.mean(observed.outputs)
        generator = torch.Generator().manual_seed(self.seed)
        num_features, num_outputs = features.shape[1], observed.outputs.shape[1]
        shape = (num_outputs, self.rank, design.num_subsets)
        self.start(num_features, shape, generator, features, size=self.rank)
        self.unexplained = unexplained(design, generator).to(features)
        self.sizes = design.sizes.to(features)

    def fit(self, *, show_progress: bool = True) -> Tensor:
        """Fit basis and operators; returns the operators on the features, shape ``(m, C, K)``."""
        self.run_trainer(self.features.device, show_progress=show_progress)
        return (self.basis @ self.operators).detach().transpose(0, 1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Fidelity, stability and linearity of all operators on a batch of places."""
        (places,) = batch
        observed, task = self.observed, self.task
        outputs, predicted = observed.outputs[places], self.predicted[places]
        members = self.design.rows(places.cpu()).to(outputs)  # (B, K)
        steered = outputs.T[:, :, None] + self.features[places] @ self.basis @ self.operators  # (C, B, K)
        loss = task.loss(steered, observed.encoded[places].to(outputs).T[:, :, None], dim=0)  # (B, K)
        drift = task.loss(steered, predicted.T[:, :, None], dim=0) - task.loss(outputs, predicted)[:, None]
        share = self.design.num_train / len(places)
        outside = (self.design.num_train - self.sizes).clamp(min=1)
        fidelity = share * (members * loss / self.sizes.clamp(min=1)).sum(0).mean()
        stability = share * ((1 - members) * drift / outside).sum(0).mean()
        response = observed.losses[places, None] - loss
        response = response - response.mean(1, keepdim=True)
        nonlinearity = (response @ self.unexplained).square().sum() / response.square().sum().clamp(min=1e-12)
        return fidelity + self.stability * stability + nonlinearity


def steered_losses(task: Task, observed: Observation, features: Tensor, operators: Tensor) -> Tensor:
    """Losses of examples under operators ``(m, C, K)`` on top of the network's outputs, shape ``(B, K)``.

    ``features`` are coordinates ``(B, m)``; examples are taken in blocks.
    """
    losses = features.new_empty(len(observed), operators.shape[2])
    block = max(1, BLOCK_BYTES // (features.element_size() * operators.shape[1] * operators.shape[2]))
    for start in range(0, len(observed), block):
        rows = slice(start, start + block)
        moved = (features[rows] @ operators.flatten(1)).unflatten(1, operators.shape[1:])
        encoded = observed.encoded[rows].to(moved)[..., None]
        losses[rows] = task.loss(observed.outputs[rows][..., None] + moved, encoded, dim=1)
    return losses
