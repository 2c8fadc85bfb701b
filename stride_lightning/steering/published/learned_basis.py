"""A basis of low rank that is learned together with the steering operators, as published."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from stride_lightning.steering.basis import Observation
from stride_lightning.steering.operators import steer
from stride_lightning.steering.published.fitting import fit_by_trainer, unexplained
from stride_lightning.steering.subsets import Design
from stride_lightning.tasks.likelihoods import Task


class LearnedBasis(L.LightningModule):
    """Operators ``o + phi B a_k`` on top of the frozen model's outputs ``o``, with a basis ``B`` that all share.

    Three losses are minimised: *fidelity*, the loss on the subset; *stability*, the divergence from the frozen model
    outside it; and *linearity*, the part of the K responses to an example that a ridge on a sketch ``M R`` of the
    design does not explain. The sketch has fewer columns than there are subsets: with as many, it would explain any
    responses.

    Args:
        design: Which example is in which subset.
        task: The likelihood.
        observed: The evaluation pass over the training set.
        rank: Rank of the basis.
        stability: Weight of the stability loss.
        learning_rate: Of Adam.
        max_steps: Optimizer steps.
        seed: Of initialisation, sketch and batch order.

    Reference: arXiv:2606.05165 (STRIDE).
    """

    def __init__(
        self,
        design: Design,
        task: Task,
        observed: Observation,
        *,
        rank: int,
        stability: float,
        learning_rate: float,
        max_steps: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.design, self.task, self.observed = design, task, observed
        self.stability, self.learning_rate, self.max_steps, self.seed = stability, learning_rate, max_steps, seed
        generator = torch.Generator().manual_seed(seed)
        num_features, num_outputs = observed.features.shape[1], observed.outputs.shape[1]
        start = torch.randn(num_features, rank, generator=generator) / rank**0.5
        self.basis = nn.Parameter(start.to(observed.features))
        # Operators start at zero: the steered model is the frozen one, and the basis learns once they move.
        self.operators = nn.Parameter(observed.features.new_zeros(num_outputs, rank, design.num_subsets))
        self.predicted = task.mean(observed.outputs)
        self.unexplained = unexplained(design, generator).to(observed.features)
        self.sizes = design.sizes.to(observed.features)

    def fit(self, *, show_progress: bool = True) -> Tensor:
        """Fit basis and operators with a Trainer.

        Returns:
            The operators on the features, shape ``(C, r, K)``.
        """
        device = self.observed.features.device
        fit_by_trainer(self, self.train_dataloader(), device, self.max_steps, show_progress=show_progress)
        return (self.basis @ self.operators).detach()

    def train_dataloader(self) -> DataLoader[Any]:
        """Places of training examples, shuffled by the seed."""
        places = TensorDataset(torch.arange(self.design.num_train))
        generator = torch.Generator().manual_seed(self.seed)
        # Each operator sees a share of a batch only: small batches drown its effect in noise.
        return DataLoader(places, min(1024, self.design.num_train), shuffle=True, generator=generator)

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

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam on the basis and the operators."""
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)
