"""StrideModule: holds a readout and the steering operators of a design, measures queries and recovers scores."""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor, nn

from stride_lightning.readout.features import Observation
from stride_lightning.readout.readout import Points, Readout
from stride_lightning.runtime.checks import check_count
from stride_lightning.runtime.distributed import gather, shard
from stride_lightning.steering.fit import BasisName, ScoresName
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
        design: Which example is in which subset; None for a readout without operators.
        task: The likelihood.
        basis: ``"statistics"`` or ``"learned"``.
        rank: Rank of a learned basis.
        learning_rate: Learning rate of Adam for a learned basis.
        max_steps: Optimizer steps for a learned basis.
        seed: Seed of a learned basis: initialisation, sketch and batch order.

    Reference: arXiv:2606.05165 (STRIDE).
    """

    #: Fitted by :meth:`fit`.
    readout: Readout
    operators: Tensor

    def __init__(
        self,
        design: Design | None,
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
        if basis == "learned" and task.is_weighted:
            raise ValueError(
                f"basis='learned' knows no weights of examples or classes, and the task is {task!r}. Leave out `basis`."
            )
        self.design, self.task, self.basis, self.rank = design, task, basis, check_count("rank", rank)
        self.learning_rate, self.max_steps, self.seed = learning_rate, max_steps, seed
        self.register_buffer("operators", torch.empty(0))

    def fit(
        self,
        train: Observation,
        *,
        start: Tensor | None = None,
        operators: Tensor | None = None,
        show_progress: bool = True,
    ) -> StrideModule:
        """Fit the readout, then all operators; ranks share the operators.

        Args:
            train: An evaluation pass over the training set, whose features become coordinates in place.
            start: Coefficients of the readout to start from, shape ``(r, C)``, on features.
            operators: Operators that are known, shape ``(r, C, K)``, on features; None to fit them.
            show_progress: Show a progress bar.

        Returns:
            This module, with ``operators`` of shape ``(m, C, K)`` for m coordinates, C outputs and K subsets.
        """
        if self.design is not None and len(train) != self.design.num_train:
            raise ValueError(
                f"The design is for {self.design.num_train} examples, but the pass read {len(train)}. Make the "
                f"design for {len(train)} examples."
            )
        self.readout = readout = Readout.fit(train, self.task, start=start, show_progress=show_progress)
        if operators is not None:
            self.operators = readout.coordinates.inward(operators.to(readout.coefficients))
        elif self.design is not None:
            self.operators = self._fit_operators(self.design, train, show_progress=show_progress)
        return self

    def _fit_operators(self, design: Design, train: Observation, *, show_progress: bool) -> Tensor:
        if self.basis == "learned":
            names = ("rank", "learning_rate", "max_steps", "seed")
            options = {name: getattr(self, name) for name in names}
            learned = LearnedBasis(design, self.task, train, self.readout.problem.features, **options)
            return learned.fit(show_progress=show_progress)
        weights = design.rows(slice(None))[:, shard(design.num_subsets)]
        return gather(self.readout.refit(weights, show_progress=show_progress), design.num_subsets, dim=2)

    def measure(self, queries: Observation, points: Points) -> Tensor:
        """Effect of every operator on every query, shape ``(q, K)`` in nats; positive helps.

        An operator's effect is the loss of a query before steering minus that under the operator: of the readout, or of
        the network where the basis is learned. ``points`` are the queries as the readout sees them.

        Reference: arXiv:2606.05165 (STRIDE), measurement of subset effects.
        """
        if self.operators.numel() == 0:
            raise RuntimeError("The operators are not fitted yet: call fit(train) first, with a design.")
        if self.basis == "learned":
            return queries.losses[:, None] - steered_losses(self.task, queries, points.features, self.operators)
        return -self.readout.rises(points, self.operators)

    def recover(self, queries: Observation, recovery: ScoresName = "prior", **how: Any) -> Recovery:
        """Scores of the training examples for queries, from an evaluation pass over these.

        With ``"closed-form"`` they are the influence on the readout alone; options of the others are those of
        :func:`~stride_lightning.steering.recovery.recover`.
        """
        points = self.readout.points(queries)
        prior = self.readout.influence(points) if recovery in ("prior", "closed-form") else None
        if recovery == "closed-form":
            assert prior is not None
            return Recovery(prior)
        if self.design is None:
            raise ValueError(f"recovery={recovery!r} needs operators: make the module with a design.")
        return recover(self.measure(queries, points), self.design, recovery, prior, **how)
