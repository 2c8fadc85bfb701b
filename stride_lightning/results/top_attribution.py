"""Attribution of data too large for all scores: only the best and the worst of each query are kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stride_lightning.data.examples import Examples
from stride_lightning.results.attribution import Attribution
from stride_lightning.results.top_examples import TopCollector as TopCollector
from stride_lightning.results.top_examples import TopExamples

_ALL_NEEDED = (
    "A TopAttribution holds only the {k} strongest proponents and opponents of each query: see top(). For the scores "
    "of all {n} training examples, attribute without `top_k=`."
)


class TopAttribution(Attribution):
    """The top proponents and opponents of every query, where there are too many scores to keep all.

    Everything that needs no more works as in :class:`~stride_lightning.Attribution`: ``top``, tables, figures, loggers,
    saving. What needs every score (``scores``, ``std``, ``sum_by``, most metrics) raises an error.

    Args:
        examples: What a :class:`TopCollector` computed: columns, not positions in the training dataset.
        num_train: How many training examples were scored.
        train_indices: Position in the training dataset of every column, int64, shape ``(num_train,)``.
        train_targets: Target of every column, where it has one.
        query_targets: Target each query was asked about.
        metadata: As in :class:`~stride_lightning.Attribution`.
        train_info: Your own columns beside the positions (ids, sources, texts): name to one value per column.
        query_info: The same for queries.
        queries: The data behind the queries, for pictures; not saved.
        train_data: The data behind the columns, for pictures; not saved.

    Example:
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

    def __init__(
        self,
        examples: TopExamples,
        num_train: int,
        *,
        train_indices: Tensor | None = None,
        train_targets: Tensor | None = None,
        query_targets: Tensor | None = None,
        metadata: dict[str, Any] | None = None,
        train_info: dict[str, list[Any]] | None = None,
        query_info: dict[str, list[Any]] | None = None,
        queries: Examples | None = None,
        train_data: Examples | None = None,
    ) -> None:
        named = examples.tensors()
        shapes = {name: tuple(tensor.shape) for name, tensor in named.items()}
        if examples.proponents.ndim != 2 or len(set(shapes.values())) != 1:
            raise ValueError(f"`examples` must hold tensors of one shape (num_queries, k), got {shapes}.")
        columns = torch.cat([examples.proponents, examples.opponents]).flatten()
        if not 1 <= examples.proponents.shape[1] <= num_train or ((columns < 0) | (columns >= num_train)).any():
            raise ValueError(
                f"`examples` must hold from 1 to {num_train} columns in 0..{num_train - 1} for each query (these are "
                f"places in the reading order, not positions in the dataset), got {shapes['proponents'][1]} of them "
                f"in {columns.min().item() if len(columns) else '-'}..{columns.max().item() if len(columns) else '-'}."
            )
        self.examples = examples
        self._num_train = num_train
        self.train_indices = torch.arange(num_train) if train_indices is None else train_indices
        self.train_targets, self.query_targets = train_targets, query_targets
        self.metadata = {} if metadata is None else metadata
        self.train_info = {} if train_info is None else train_info
        self.query_info = {} if query_info is None else query_info
        self.queries, self.train_data = queries, train_data
        self._check_lengths()

    # ---- what only all scores can tell ------------------------------------------------------------------------

    @property
    def scores(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]  # to say why there are none
        """Raises: not all scores were kept."""
        raise ValueError(_ALL_NEEDED.format(k=self.num_ranked, n=self.num_train))

    @property
    def std(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Raises: not all scores were kept."""
        raise ValueError(_ALL_NEEDED.format(k=self.num_ranked, n=self.num_train))

    @property
    def distributions(self) -> dict[str, Tensor]:
        """Nothing: not all scores were kept."""
        return {}

    # ---- what the top can tell --------------------------------------------------------------------------------

    @property
    def num_queries(self) -> int:
        """Number of queries."""
        return len(self.examples.proponents)

    @property
    def num_train(self) -> int:
        """Number of training examples that were scored."""
        return self._num_train

    @property
    def num_ranked(self) -> int:
        """How many proponents, and how many opponents, of each query are held."""
        return self.examples.proponents.shape[1]

    @property
    def has_std(self) -> bool:
        """Whether scores come with a posterior standard deviation."""
        return self.examples.proponent_stds is not None

    def _keep(self, rows: list[int]) -> None:
        self.examples = self.examples.at(rows, self.num_ranked)

    def _ranked(self, k: int) -> TopExamples:
        if k > self.num_ranked:
            raise ValueError(
                f"`k` is {k}, but only the {self.num_ranked} strongest proponents and opponents of each query are "
                f"held: attribute with `top_k={k}` or more."
            )
        return self.examples.at(slice(None), k)

    def pairs(self, k: int | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Queries and training examples with their scores, each pair once; by default all that are held.

        Returns:
            Rows, columns, scores and standard deviations if there are any, each of shape ``(num_pairs,)``.
        """
        top = self.top_columns(self.num_ranked if k is None else k)
        # The worst last; and among few examples, or many that tie, some are both.
        new = ~(top.opponents[:, :, None] == top.proponents[:, None]).any(2).flip(1)
        kept = torch.cat([torch.ones_like(new), new], 1)
        rows = torch.arange(self.num_queries)[:, None].expand_as(kept)[kept]

        def joined(helpful: Tensor, harmful: Tensor) -> Tensor:
            return torch.cat([helpful, harmful.flip(1)], 1)[kept]

        columns, scores = joined(top.proponents, top.opponents), joined(top.proponent_scores, top.opponent_scores)
        if top.proponent_stds is None or top.opponent_stds is None:
            return rows, columns, scores, None
        return rows, columns, scores, joined(top.proponent_stds, top.opponent_stds)

    def _tensors(self) -> dict[str, Tensor]:
        return self.examples.tensors()

    @classmethod
    def _from_tensors(cls, tensors: dict[str, Tensor], info: dict[str, Any]) -> TopAttribution:
        described = {name: tensors.pop(name) for name in list(tensors) if name.startswith(("train_", "query_"))}
        ranked: dict[str, Any] = tensors
        return cls(TopExamples(**ranked), len(described["train_indices"]), **described, **info)

    def _summary(self) -> str:
        certain = ", with posterior std" if self.has_std else ""
        return f"{self.num_queries} queries, top {self.num_ranked} of {self.num_train} training examples{certain}"
