"""StrideModule: holds a readout and the steering operators of a design, measures queries and recovers scores."""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor, nn

from stride_lightning.readout.features import Observation
from stride_lightning.readout.readout import Points, Readout
from stride_lightning.runtime.checks import check_count
from stride_lightning.runtime.distributed import gather, shard
from stride_lightning.steering.fit import BasisName
from stride_lightning.steering.published.learned_basis import LearnedBasis, steered_losses
from stride_lightning.steering.recovery import Recovery, recover
from stride_lightning.steering.subsets import Design
from stride_lightning.tasks.likelihoods import Task


class StrideModule(nn.Module):
    r"""A readout and steering operators that imitate what training on each subset of a design does to it.

    With ``basis="statistics"`` the operator of a subset is the difference between the readout refit on the subset and
    the readout on all data, :class:`~stride_lightning.readout.readout.Readout`. With ``basis="learned"`` operators are
    as published: features of low rank are learned together with operators on the network's outputs, through
    ``Trainer.fit`` (:class:`~stride_lightning.steering.published.learned_basis.LearnedBasis`).

    Args:
        design: Which example is in which subset.
        task: The likelihood.
        basis: ``"statistics"`` or ``"learned"``.
        rank: Rank of a learned basis.
        learning_rate: Learning rate of Adam for a learned basis.
        max_steps: Optimizer steps for a learned basis.
        seed: Seed of a learned basis: initialisation, sketch and batch order.

    Reference: arXiv:2606.05165 (STRIDE).
    """

    operators: Tensor

    def __init__(
        self,
        design: Design,
        task: Task,
        *,
        basis: BasisName = "statistics",
        rank: int = 16,
        learning_rate: float = 3e-2,
        max_steps: int = 600,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if basis not in get_args(BasisName):
            raise ValueError(f"`basis` must be one of {get_args(BasisName)}, got {basis!r}.")
        self.design, self.task, self.basis, self.rank = design, task, basis, check_count("rank", rank)
        self.learning_rate, self.max_steps, self.seed = learning_rate, max_steps, seed
        self.register_buffer("operators", torch.empty(0))

    def fit_operators(self, train: Observation, readout: Readout, *, show_progress: bool = True) -> StrideModule:
        """Fit all operators to an evaluation pass over the training set and the readout on it; ranks share the work.

        Returns:
            This module, with ``operators`` of shape ``(m, C, K)`` for m coordinates, C outputs and K subsets.
        """
        if len(train) != self.design.num_train:
            raise ValueError(
                f"The design is for {self.design.num_train} examples, but the pass read {len(train)}. Make the "
                f"design for {len(train)} examples."
            )
        if self.basis == "learned":
            names = ("rank", "learning_rate", "max_steps", "seed")
            options = {name: getattr(self, name) for name in names}
            learned = LearnedBasis(self.design, self.task, train, readout.problem.features, **options)
            self.operators = learned.fit(show_progress=show_progress)
            return self
        subsets = shard(self.design.num_subsets)
        weights = self.design.rows(slice(None))[:, subsets]
        mine = readout.refit(weights, show_progress=show_progress)
        self.operators = gather(mine, self.design.num_subsets, dim=2)
        return self

    def measure(self, readout: Readout, queries: Observation, points: Points) -> Tensor:
        """Effect of every operator on every query, shape ``(q, K)`` in nats; positive helps.

        An operator's effect is the loss of a query before steering minus that under the operator: of the readout, or of
        the network where the basis is learned.

        Reference: arXiv:2606.05165 (STRIDE), measurement of subset effects.
        """
        if self.operators.numel() == 0:
            raise RuntimeError("The operators are not fitted yet: call fit_operators(train, readout) first.")
        if self.basis == "learned":
            return queries.losses[:, None] - steered_losses(self.task, queries, points.features, self.operators)
        return readout.losses(points)[:, None] - readout.losses(points, self.operators)

    def recover(self, measurements: Tensor, prior: Tensor | None, recovery: str, **how: Any) -> Recovery:
        """Scores from measurements ``(q, K)`` as :func:`~stride_lightning.steering.recovery.recover` makes them."""
        return recover(measurements, self.design, recovery, prior, **how)

    def restore(self, operators: Tensor) -> StrideModule:
        """Take fitted operators."""
        self.operators = operators
        return self
