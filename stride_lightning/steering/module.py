"""StrideModule: holds the steering operators of a design and fits them."""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor, nn

from stride_lightning.runtime.checks import check_count, check_positive
from stride_lightning.runtime.distributed import gather, shard
from stride_lightning.steering.basis import Observation
from stride_lightning.steering.fit import BasisName
from stride_lightning.steering.influence import influence
from stride_lightning.steering.operators import mean_prediction, measure
from stride_lightning.steering.penalty import choose_penalties
from stride_lightning.steering.published.learned_basis import LearnedBasis
from stride_lightning.steering.solvers import fit_operators, refit
from stride_lightning.steering.subsets import Design
from stride_lightning.tasks.likelihoods import Task


class StrideModule(nn.Module):
    r"""Steering operators that imitate what training on each subset of a design does.

    ``basis="statistics"`` takes the features of the basis as they are and solves a convex problem for every operator
    (:func:`~stride_lightning.steering.solvers.fit_operators`). ``basis="learned"`` is the published form: features of
    low rank are learned together with the operators, through ``Trainer.fit``
    (:class:`~stride_lightning.steering.published.learned_basis.LearnedBasis`).

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
            raise ValueError(f"`stability` must be a number of at least 0, got {stability}.")
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

    def fit_operators(self, observed: Observation, *, show_progress: bool = True) -> StrideModule:
        """Fit all operators to an evaluation pass over the training set; ranks share the work.

        Returns:
            This module, with ``coefficients`` of shape ``(C, r, K)`` for r features, C outputs and K subsets.
        """
        if len(observed) != self.design.num_train:
            raise ValueError(
                f"The design is for {self.design.num_train} examples, but the pass read {len(observed)}. Make the "
                f"design for {len(observed)} examples."
            )
        rule = {"ridge": self.ridge, "stability": self.stability, "anchored": self.anchored}
        self.chosen = choose_penalties(observed, self.design, self.task, **rule, show_progress=show_progress)
        if self.basis == "learned":
            names = ("rank", "stability", "learning_rate", "max_steps", "seed")
            options = {name: getattr(self, name) for name in names}
            learned = LearnedBasis(self.design, self.task, observed, **options)
            self.coefficients = learned.fit(show_progress=show_progress)
            self.relative_gradient = self.coefficients.new_empty(0)
            self.chosen["steps"] = self.max_steps
            return self
        typical = torch.tensor([self.chosen["operator_ridge"]])
        fitted = fit_operators(
            observed,
            self.design,
            self.task,
            self.chosen["ridge"],
            stability=self.stability,
            start=None if self.anchored else refit(observed, self.task, typical)[..., 0],
            subsets=shard(self.design.num_subsets),
            show_progress=show_progress,
        )
        self.coefficients = gather(fitted.coefficients, self.design.num_subsets, dim=2)
        self.relative_gradient = gather(fitted.relative_gradient, self.design.num_subsets)
        self.chosen["iterations"] = fitted.iterations
        self.chosen["relative_gradient_max"] = float(self.relative_gradient.max())
        return self

    def measure(self, queries: Observation) -> Tensor:
        """Effect of every operator on every query, shape ``(q, K)`` in nats; positive helps."""
        return measure(queries, self._fitted, self.task, anchored=self.anchored)

    def mean_prediction(self, observed: Observation) -> Tensor:
        """Predictions averaged over operators, shape ``(n, C)``: those of a typical model trained on a subset."""
        return mean_prediction(observed, self._fitted, self.task, anchored=self.anchored)

    def priors(
        self, train: Observation, queries: Observation, train_mean: Tensor, *, show_progress: bool = True
    ) -> tuple[Tensor, Tensor]:
        """First-order influence at the mean of the operators and at the frozen model, each ``(q, n)``.

        ``train`` and ``queries`` are evaluation passes, ``train_mean`` is :meth:`mean_prediction` of the first.
        """
        task, quiet = self.task, {"show_progress": show_progress}
        at_subset = train_mean, self.mean_prediction(queries), task, self.chosen["operator_ridge"]
        at_frozen = task.mean(train.outputs), task.mean(queries.outputs), task, self.chosen["frozen_ridge"]
        return influence(train, queries, *at_subset, **quiet), influence(train, queries, *at_frozen, **quiet)

    @property
    def _fitted(self) -> Tensor:
        if self.coefficients.numel() == 0:
            raise RuntimeError("The operators are not fitted yet: call fit_operators(observed) first.")
        return self.coefficients

    def info(self) -> dict[str, Any]:
        """Plain values to store beside :meth:`tensors`."""
        return {"basis": self.basis, "rank": self.rank, "stability": self.stability, "chosen": self.chosen}

    def tensors(self) -> dict[str, Tensor]:
        """Plain tensors to store."""
        return {"coefficients": self._fitted, "relative_gradient": self.relative_gradient}

    def restore(self, info: dict[str, Any], tensors: dict[str, Tensor], device: torch.device) -> StrideModule:
        """Take fitted operators from a record."""
        self.chosen = dict(info["chosen"])
        self.coefficients = tensors["coefficients"].to(device)
        self.relative_gradient = tensors["relative_gradient"].to(device)
        return self
