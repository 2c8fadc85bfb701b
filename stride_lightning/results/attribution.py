"""The result: scores of every training example for every query."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from stride_lightning.results.deferred import Deferred, DeferredField
from stride_lightning.results.scores import AttributionResult
from stride_lightning.results.top_examples import TopExamples, rank_columns


@dataclass(eq=False, repr=False)
class Attribution(AttributionResult):
    """Scores that say which training examples made the model do this.

    Args:
        scores: float32, shape ``(num_queries, num_train)``, in nats of query loss to first order; positive is
            helpful: training on the example lowers the query's loss, or raises what :attr:`measure` names. A ranking,
            not calibrated to retraining.
        std: Standard deviation of each score, same shape; None if the method gives none. It is uncalibrated: nobody
            compared it with retraining. It may be a function without arguments that returns the tensor. The function
            runs when ``std`` is first read, in the process that reads it, and is then dropped; until then the result
            holds it, so it should hold tensors, no model. :attr:`has_std` computes nothing.
        train_indices: Position in the training dataset of every column, int64, shape ``(num_train,)``. Give it by
            keyword, like the other arguments: ``train_targets``, ``query_targets``, ``metadata``, ``train_info``,
            ``query_info``, ``queries`` and ``train_data``. See
            :class:`~stride_lightning.results.scores.AttributionResult`.

    Example:
        >>> attribution = Attribution(torch.tensor([[0.5, -0.25, 0.0]]))
        >>> attribution.top(1)
        query 0: helped by 0 (+0.5)
                 harmed by 1 (-0.25)
    """

    scores: Tensor
    std: DeferredField = DeferredField(like="scores")  # noqa: RUF009 (a descriptor)

    @override
    def __post_init__(self) -> None:
        if self.scores.ndim != 2:
            raise ValueError(f"Scores must have shape (num_queries, num_train), got {tuple(self.scores.shape)}.")
        std = self._tensors().get("std")
        if isinstance(std, Tensor) and std.shape != self.scores.shape:
            raise ValueError(f"`std` must have the shape of the scores, got {tuple(std.shape)}.")
        super().__post_init__()

    @property
    @override
    def num_train(self) -> int:
        return self.scores.shape[1]

    @property
    @override
    def distributions(self) -> dict[str, Tensor]:
        return {"scores": self.scores} | ({} if self.std is None else {"std": self.std})

    @override
    def _tensors(self) -> dict[str, Tensor | Deferred]:
        return {name: value for name in ("scores", "std") if (value := vars(self)[name]) is not None}

    @override
    def pairs(self, k: int | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        columns = torch.arange(self.num_train).expand(self.num_queries, -1)
        if k is not None and 2 * k < self.num_train:
            order = self.scores.argsort(dim=1, descending=True, stable=True)
            columns = torch.cat([order[:, :k], order[:, -k:]], 1)
        rows = torch.arange(self.num_queries)[:, None].expand_as(columns).flatten()
        columns = columns.flatten()
        return rows, columns, self.scores[rows, columns], None if self.std is None else self.std[rows, columns]

    def sum_by(self, groups: Sequence[Hashable] | Tensor | str) -> tuple[list[Any], Tensor]:
        """Sum the scores over groups of training examples.

        Args:
            groups: One label per column (source, class, author), the name of a column of ``train_info``, or
                ``"target"`` for the training targets.

        Returns:
            The groups in order of first appearance, and their sums of shape ``(num_queries, num_groups)``.

        Example:
            >>> Attribution(torch.tensor([[0.5, -0.25, 1.0]])).sum_by(["web", "book", "web"])
            (['web', 'book'], tensor([[ 1.5000, -0.2500]]))
        """
        if isinstance(groups, str):
            if groups == "target" and self.train_targets is not None:
                groups = self.train_targets
            elif groups in self.train_info:
                groups = self.train_info[groups]
            else:
                raise KeyError(f"No group {groups!r}: known are 'target' and train_info {sorted(self.train_info)}.")
        labels = groups.tolist() if isinstance(groups, Tensor) else list(groups)
        if len(labels) != self.num_train:
            raise ValueError(f"Expected one group for each of {self.num_train} training examples, got {len(labels)}.")
        number = {name: i for i, name in enumerate(dict.fromkeys(labels))}
        index = torch.tensor([number[label] for label in labels])
        return list(number), self.scores.new_zeros(self.num_queries, len(number)).index_add_(1, index, self.scores)

    @override
    def _ranked(self, k: int) -> TopExamples:
        return rank_columns(self.scores, k, self._tensors().get("std"))

    @override
    def _summary(self) -> str:
        spread = (
            f"scores vary by {self.scores.std():.2g}" if self.scores.numel() > 1 else f"sum {self.scores.sum():.2g}"
        )
        return f"{self.num_queries} queries x {self.num_train} training examples, {spread}"
