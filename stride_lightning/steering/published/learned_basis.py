"""A basis of low rank that is learned together with the steering operators, as published."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stride_lightning.steering.basis import Observation
from stride_lightning.steering.operators import steer
from stride_lightning.steering.published.fitting import PublishedOperators, unexplained
from stride_lightning.steering.subsets import Design
from stride_lightning.tasks.likelihoods import Task


class LearnedBasis(PublishedOperators):
    """Operators ``o + phi B a_k`` on top of the frozen model's outputs ``o``, with a basis ``B`` that all share.

    Three losses are minimised: *fidelity*, the loss on the subset; *stability*, the divergence from the frozen model
    outside it; and *linearity*, the part of the K responses to an example that a ridge on a sketch ``M R`` of the
    design does not explain. The sketch has fewer columns than there are subsets: with as many, it would explain any
    responses.

    ``observed`` is the evaluation pass over the training set, options are those of :class:`PublishedOperators`. Small
    batches drown the effect of an operator in noise, since it sees a share of a batch only.

    Reference: arXiv:2606.05165 (STRIDE).
    """

    def __init__(self, design: Design, task: Task, observed: Observation, **options: Any) -> None:
        super().__init__(design, **options)
        self.task, self.observed, self.predicted = task, observed, task.mean(observed.outputs)
        generator = torch.Generator().manual_seed(self.seed)
        num_features, num_outputs = observed.features.shape[1], observed.outputs.shape[1]
        shape = (num_outputs, self.rank, design.num_subsets)
        self.start(num_features, shape, generator, observed.features, size=self.rank)
        self.unexplained = unexplained(design, generator).to(observed.features)
        self.sizes = design.sizes.to(observed.features)

    def fit(self, *, show_progress: bool = True) -> Tensor:
        """Fit basis and operators; gives the operators on the features, shape ``(C, r, K)``."""
        self.run_trainer(self.observed.features.device, show_progress=show_progress)
        return (self.basis @ self.operators).detach()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Fidelity, stability and linearity of all operators on a batch of places."""
        (places,) = batch
        observed, task = self.observed, self.task
        outputs, predicted = observed.outputs[places], self.predicted[places]
        members = self.design.rows(places.cpu()).to(outputs)  # (B, K)
        steered = steer(outputs, observed.features[places] @ self.basis, self.operators, anchored=True)  # (C, B, K)
        loss = task.loss(steered, observed.encoded[places].T[:, :, None], dim=0)  # (B, K)
        drift = task.loss(steered, predicted.T[:, :, None], dim=0) - task.loss(outputs, predicted)[:, None]
        share = self.design.num_train / len(places)
        outside = (self.design.num_train - self.sizes).clamp(min=1)
        fidelity = share * (members * loss / self.sizes.clamp(min=1)).sum(0).mean()
        stability = share * ((1 - members) * drift / outside).sum(0).mean()
        response = observed.losses[places, None] - loss
        response = response - response.mean(1, keepdim=True)
        nonlinearity = (response @ self.unexplained).square().sum() / response.square().sum().clamp(min=1e-12)
        return fidelity + self.stability * stability + nonlinearity
