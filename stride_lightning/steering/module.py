"""StrideModule: the LightningModule that holds the steering operators and fits them."""

from __future__ import annotations

from typing import Any, Literal, get_args

import lightning.pytorch as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from stride_lightning.runtime.checks import check_count, check_positive
from stride_lightning.runtime.distributed import gather, shard
from stride_lightning.steering.basis import Observation
from stride_lightning.steering.influence import imitation_ridge, influence, mean_curvature
from stride_lightning.steering.operators import mean_prediction, measure, steer
from stride_lightning.steering.published.fitting import fit_by_trainer, unexplained
from stride_lightning.steering.solvers import fit_operators, refit
from stride_lightning.steering.subsets import Design
from stride_lightning.tasks.likelihoods import Task

BasisName = Literal["statistics", "learned"]


class StrideModule(L.LightningModule):
    r"""Steering operators that imitate what training on each subset of a design does.

    ``basis="statistics"`` takes the features of the basis as they are and solves a convex problem for every operator
    (:func:`~stride_lightning.steering.solvers.fit_operators`). ``basis="learned"`` is the published form: features of
    low rank are learned together with the operators, on top of the frozen model, through ``Trainer.fit``, by three
    losses: *fidelity*, the loss on the subset; *stability*, the divergence from the frozen model outside it; and
    *linearity*, the part of the K responses to an example that a ridge on a sketch ``M R`` of the design does not
    explain. The sketch has fewer columns than there are subsets: with as many, it would explain any responses.

    Args:
        design: Which example is in which subset.
        task: The likelihood.
        basis: ``"statistics"`` or ``"learned"``.
        rank: Rank of a learned basis.
        stability: Weight of the stability loss; by default 0 with the statistics basis (operators are refits of the
            readouts on the subset) and 1 with a learned one. Positive values anchor operators at the frozen model.
        ridge: Penalty relative to the mean curvature of the training loss in the basis. By default the one with which
            a refit on all data best imitates the frozen model, or half the mean curvature for anchored operators.
        learning_rate: Learning rate of Adam for a learned basis.
        max_steps: Optimizer steps for a learned basis.
        seed: Seed of a learned basis: initialisation, sketch and batch order.

    Reference: arXiv:2606.05165 (STRIDE).
    """

    coefficients: Tensor
    relative_gradient: Tensor

    def __init__(
        self,
        design: Design,
        task: Task,
        *,
        basis: BasisName = "statistics",
        rank: int = 16,
        stability: float | None = None,
        ridge: float | None = None,
        learning_rate: float = 3e-2,
        max_steps: int = 600,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if basis not in get_args(BasisName):
            raise ValueError(f"`basis` must be one of {get_args(BasisName)}, got {basis!r}.")
        check_count("rank", rank)
        if stability is not None and not stability >= 0:
            raise ValueError(f"`stability` must not be negative, got {stability}.")
        if ridge is not None:
            check_positive("ridge", ridge)
        self.design, self.task, self.basis, self.rank = design, task, basis, rank
        self.stability = stability if stability is not None else float(basis == "learned")
        self.ridge, self.learning_rate, self.max_steps, self.seed = ridge, learning_rate, max_steps, seed
        self.anchored = basis == "learned" or self.stability > 0
        #: What was chosen while fitting; plain values.
        self.chosen: dict[str, Any] = {}
        self.register_buffer("coefficients", torch.empty(0))
        self.register_buffer("relative_gradient", torch.empty(0))

    # ---- fitting --------------------------------------------------------------------------------------------

    def fit_operators(self, observed: Observation, *, show_progress: bool = True) -> StrideModule:
        """Fit all operators to an evaluation pass over the training set; ranks share the work.

        Args:
            observed: The evaluation pass, n examples with r features and C outputs.
            show_progress: Show progress bars.

        Returns:
            This module, with ``coefficients`` of shape ``(C, r, K)``.
        """
        if len(observed) != self.design.num_train:
            raise ValueError(f"The design is for {self.design.num_train} examples, the pass saw {len(observed)}.")
        self._choose_ridges(observed, show_progress=show_progress)
        if self.basis == "learned":
            self._fit_by_trainer(observed, show_progress=show_progress)
            return self
        start = None
        if not self.anchored:
            typical = self.chosen["operator_ridge"] * torch.ones(1)
            start = refit(observed, self.task, typical)[..., 0]
        fitted = fit_operators(
            observed,
            self.design,
            self.task,
            self.chosen["ridge"],
            stability=self.stability,
            start=start,
            subsets=shard(self.design.num_subsets),
            show_progress=show_progress,
        )
        self.coefficients = gather(fitted.coefficients, self.design.num_subsets, dim=2)
        self.relative_gradient = gather(fitted.relative_gradient, self.design.num_subsets)
        self.chosen["iterations"] = fitted.iterations
        self.chosen["relative_gradient_max"] = float(self.relative_gradient.max())
        return self

    def _choose_ridges(self, observed: Observation, *, show_progress: bool) -> None:
        """``ridge`` of a fit on all data; ``operator_ridge`` on a subset; ``frozen_ridge`` at the frozen model."""
        unit = max(mean_curvature(observed, self.task), 1e-12)
        mean_size = self.design.num_train * self.design.degree / self.design.num_subsets
        if self.ridge is not None:
            ridge = self.ridge * unit
        elif self.anchored:
            ridge = 0.5 * (1 + self.stability) * unit
        else:
            ridge, _ = imitation_ridge(observed, self.task, show_progress=show_progress)
        self.chosen = {
            "mean_curvature": unit,
            "ridge": ridge,
            "ridge_relative": ridge / unit,
            "ridge_rule": "given" if self.ridge is not None else "anchored" if self.anchored else "imitation",
            "operator_ridge": ridge if self.anchored else ridge * self.design.num_train / mean_size,
            "frozen_ridge": min(ridge, unit),
        }

    # ---- asking ---------------------------------------------------------------------------------------------

    def measure(self, queries: Observation) -> Tensor:
        """Effect of every operator on every query, shape ``(q, K)`` in nats; positive helps."""
        self._check_fitted()
        return measure(queries, self.coefficients, self.task, anchored=self.anchored)

    def mean_prediction(self, observed: Observation) -> Tensor:
        """Predictions averaged over operators, shape ``(n, C)``: those of a typical model trained on a subset."""
        self._check_fitted()
        return mean_prediction(observed, self.coefficients, self.task, anchored=self.anchored)

    def priors(
        self, train: Observation, queries: Observation, train_mean: Tensor, *, show_progress: bool = True
    ) -> tuple[Tensor, Tensor]:
        """First-order influence at the mean of the operators and at the frozen model, each ``(q, n)``.

        Args:
            train: Evaluation pass over the training set.
            queries: Evaluation pass over the queries.
            train_mean: :meth:`mean_prediction` of the training set.
            show_progress: Show progress bars.
        """
        frozen = self.task.mean(train.outputs), self.task.mean(queries.outputs), self.chosen["frozen_ridge"]
        subset = train_mean, self.mean_prediction(queries), self.chosen["operator_ridge"]
        at_subset, at_frozen = (
            influence(train, queries, trained, asked, self.task, ridge, show_progress=show_progress)
            for trained, asked, ridge in (subset, frozen)
        )
        return at_subset, at_frozen

    def _check_fitted(self) -> None:
        if self.coefficients.numel() == 0:
            raise RuntimeError("The operators are not fitted yet: call fit_operators(observed) first.")

    # ---- storing --------------------------------------------------------------------------------------------

    def info(self) -> dict[str, Any]:
        """Plain values to store beside :meth:`tensors`."""
        return {"basis": self.basis, "rank": self.rank, "stability": self.stability, "chosen": self.chosen}

    def tensors(self) -> dict[str, Tensor]:
        """Plain tensors to store."""
        self._check_fitted()
        return {"coefficients": self.coefficients, "relative_gradient": self.relative_gradient}

    def restore(self, info: dict[str, Any], tensors: dict[str, Tensor], device: torch.device) -> StrideModule:
        """Take fitted operators from a record."""
        self.chosen = dict(info["chosen"])
        self.coefficients = tensors["coefficients"].to(device)
        self.relative_gradient = tensors["relative_gradient"].to(device)
        return self

    # ---- the learned basis, by a Trainer --------------------------------------------------------------------

    def _fit_by_trainer(self, observed: Observation, *, show_progress: bool) -> None:
        device = observed.features.device
        self._prepare(observed)
        fit_by_trainer(self, self.train_dataloader(), device, self.max_steps, show_progress=show_progress)
        self.coefficients = (self.low_rank_basis @ self.operators).detach()
        self.relative_gradient = torch.full_like(self.coefficients[0, 0], torch.nan)[:0]
        self.chosen["steps"] = self.max_steps
        del self.low_rank_basis, self.operators, self._observed, self._predicted, self._unexplained, self._sizes

    def _prepare(self, observed: Observation) -> None:
        """Parameters of the learned basis, and what its losses need."""
        generator = torch.Generator().manual_seed(self.seed)
        num_features, num_outputs = observed.features.shape[1], observed.outputs.shape[1]
        start = torch.randn(num_features, self.rank, generator=generator) / self.rank**0.5
        self.low_rank_basis = nn.Parameter(start.to(observed.features))
        # Operators start at zero: the steered model is the frozen one, and the basis learns once they move.
        self.operators = nn.Parameter(observed.features.new_zeros(num_outputs, self.rank, self.design.num_subsets))
        self._observed, self._predicted = observed, self.task.mean(observed.outputs)
        self._unexplained = unexplained(self.design, generator).to(observed.features)
        self._sizes = self.design.sizes.to(observed.features)

    def train_dataloader(self) -> DataLoader[Any]:
        """Positions of training examples, shuffled by the seed."""
        positions = TensorDataset(torch.arange(self.design.num_train))
        generator = torch.Generator().manual_seed(self.seed)
        # Each operator sees a share of a batch only: small batches drown its effect in noise.
        return DataLoader(positions, min(1024, self.design.num_train), shuffle=True, generator=generator)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Fidelity, stability and linearity of all operators on a batch of positions."""
        (positions,) = batch
        seen, task = self._observed, self.task
        outputs, predicted = seen.outputs[positions], self._predicted[positions]
        members = self.design.rows(positions.cpu()).to(outputs)  # (B, K)
        features = seen.features[positions] @ self.low_rank_basis
        steered = steer(outputs, features, self.operators, anchored=True)  # (C, B, K)
        loss = task.loss(steered, seen.encoded[positions].T[:, :, None], dim=0)  # (B, K)
        drift = task.loss(steered, predicted.T[:, :, None], dim=0) - task.loss(outputs, predicted)[:, None]
        share = self.design.num_train / len(positions)
        outside = (self.design.num_train - self._sizes).clamp(min=1)
        fidelity = share * (members * loss / self._sizes.clamp(min=1)).sum(0).mean()
        stability = share * ((1 - members) * drift / outside).sum(0).mean()
        response = seen.losses[positions, None] - loss
        response = response - response.mean(1, keepdim=True)
        nonlinearity = (response @ self._unexplained).square().sum() / response.square().sum().clamp(min=1e-12)
        return fidelity + self.stability * stability + nonlinearity

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam on the learned basis and the operators."""
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)
