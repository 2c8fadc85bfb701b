"""Attribution of data too large for all scores: the result holds the best and the worst of each query."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from typing_extensions import Self, override

from stride_lightning.results.deferred import Deferred
from stride_lightning.results.scores import AttributionResult
from stride_lightning.results.top_examples import TopExamples


class TopAttribution(AttributionResult):
    """The top proponents and opponents of every query, for data with too many scores to hold.

    ``top``, tables, figures, loggers and saving work as in :class:`~stride_lightning.Attribution`. It has no ``scores``
    and no ``std``, so ``sum_by`` and most metrics do not work.

    Args:
        examples: The result of a :class:`~stride_lightning.results.top_examples.TopCollector`. It names columns, not
            positions in the training dataset.
        num_train: Number of training examples that were scored.
        described: ``train_indices`` and the other fields of
            :class:`~stride_lightning.results.scores.AttributionResult`.

    Example:
        >>> from stride_lightning.results.top_examples import TopCollector
        >>> collector = TopCollector(num_queries=1, k=1)
        >>> collector.update(torch.tensor([[0.5, -0.25, 1.0]]), columns=torch.tensor([0, 1, 2]))
        >>> attribution = TopAttribution(collector.compute(), num_train=3)
        >>> attribution.top()
        query 0: helped by 2 (+1)
                 harmed by 1 (-0.25)
        >>> attribution
        TopAttribution(scores: 1 queries, top 1 of 3 training examples)
    """

    kind = "top-attribution"

    def __init__(self, examples: TopExamples, num_train: int, **described: Any) -> None:
        # Deferred standard deviations are parts of a tensor like the scores.
        held = examples.tensors().items()
        shapes = {name: tuple(tensor.shape) for name, tensor in held if isinstance(tensor, Tensor)}
        if examples.proponents.ndim != 2 or len(set(shapes.values())) != 1:
            raise ValueError(f"`examples` must hold tensors of one shape (num_queries, k), got {shapes}.")
        columns = torch.cat([examples.proponents, examples.opponents]).flatten()
        if not 1 <= examples.proponents.shape[1] <= num_train or ((columns < 0) | (columns >= num_train)).any():
            raise ValueError(
                f"`examples` must hold from 1 to {num_train} columns in 0..{num_train - 1} for each query (these are "
                f"places in the reading order, not positions in the dataset), got {shapes['proponents'][1]} of them"
                f"{f' in {columns.min().item()}..{columns.max().item()}' if len(columns) else ''}."
            )
        self.examples, self._num_train = examples, num_train
        super().__init__(**described)

    @property
    def why_no_scores(self) -> str:
        """The error message for somebody who needs all scores."""
        return (
            f"A TopAttribution holds only the {self.num_ranked} strongest proponents and opponents of each query: see "
            f"top(). For the scores of all {self.num_train} training examples, attribute without `top_k=`."
        )

    def __getattr__(self, name: str) -> NoReturn:
        reason = self.why_no_scores if name in ("scores", "std", "sum_by") else None
        raise AttributeError(reason or f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)

    @property
    @override
    def num_train(self) -> int:
        return self._num_train

    @property
    @override
    def num_ranked(self) -> int:
        return self.examples.proponents.shape[1]

    @override
    def pairs(self, k: int | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        top = self.top_columns(self.num_ranked if k is None else k)
        # The worst comes last. Among few examples, or many that tie, some are both proponent and opponent.
        new = ~(top.opponents[:, :, None] == top.proponents[:, None]).any(2).flip(1)
        once = torch.cat([torch.ones_like(new), new], 1)
        rows = torch.arange(self.num_queries)[:, None].expand_as(once)[once]

        def joined(helpful: Tensor, harmful: Tensor) -> Tensor:
            return torch.cat([helpful, harmful.flip(1)], 1)[once]

        columns, scores = joined(top.proponents, top.opponents), joined(top.proponent_scores, top.opponent_scores)
        stds = [std for std in (top.proponent_stds, top.opponent_stds) if std is not None]
        return rows, columns, scores, joined(*stds) if stds else None

    @override
    def _ranked(self, k: int) -> TopExamples:
        if k > self.num_ranked:
            raise ValueError(
                f"`k` is {k}, but the attribution holds only the {self.num_ranked} strongest proponents and opponents "
                f"of each query: attribute with `top_k={k}` or more."
            )
        return self.examples.first(k)

    @override
    def _tensors(self) -> dict[str, Tensor | Deferred]:
        return self.examples.tensors()

    @classmethod
    @override
    def _from_tensors(cls, tensors: dict[str, Any], **described: Any) -> Self:
        return cls(TopExamples(**tensors), len(described["train_indices"]), **described)

    @override
    def _summary(self) -> str:
        return f"{self.num_queries} queries, top {self.num_ranked} of {self.num_train} training examples"
