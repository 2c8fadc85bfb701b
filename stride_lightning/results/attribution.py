"""The result: scores of every training example for every query."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from stride_lightning.data.examples import Examples
from stride_lightning.data.sources import resolve_queries, resolve_train_data
from stride_lightning.results.top_examples import TopExamples, rank_columns
from stride_lightning.runtime.checks import check_count
from stride_lightning.runtime.distributed import barrier, broadcast_object, rank
from stride_lightning.storage.records import RecordError, read_record, write_record

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

    from stride_lightning.views.report.content import TextSource


@dataclass(eq=False)
class Attribution:
    """Scores that say which training examples made the model do this.

    Args:
        scores: float32, shape ``(num_queries, num_train)``, in nats of query loss to first order; positive is
            helpful: training on the example lowers the query's loss. A ranking, not calibrated to retraining.
        std: Posterior standard deviation of each score, same shape, where the recovery gives one.
        train_indices: Position in the training dataset of every column, int64, shape ``(num_train,)``.
        train_targets: Target of every column, where it has one.
        query_targets: Target each query was asked about.
        metadata: Method, options, every automatic choice, versions, fingerprints, seconds and peak memory.
        train_info: Your own columns beside the positions (ids, sources, texts): name to one value per column.
        query_info: The same for queries.

    Example:
        >>> attribution = Attribution(torch.tensor([[0.5, -0.25, 0.0]]))
        >>> attribution.top(1)
        query 0: helped by 0 (+0.5)
                 harmed by 1 (-0.25)
    """

    #: Kind of record that :meth:`save` writes, by which :meth:`load` knows it again.
    kind: ClassVar[str] = "attribution"

    scores: Tensor
    std: Tensor | None = None
    train_indices: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    train_targets: Tensor | None = None
    query_targets: Tensor | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    train_info: dict[str, list[Any]] = field(default_factory=dict)
    query_info: dict[str, list[Any]] = field(default_factory=dict)
    #: The data behind rows and columns, for pictures; not saved.
    queries: Examples | None = field(default=None, repr=False)
    train_data: Examples | None = field(default=None, repr=False)
    #: Chooses examples that differ: from queries, their target, candidate columns and k; set by methods that can.
    diversify: Callable[[Examples, str, Tensor, int], TopExamples] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.scores.ndim != 2:
            raise ValueError(f"Scores must have shape (num_queries, num_train), got {tuple(self.scores.shape)}.")
        if self.std is not None and self.std.shape != self.scores.shape:
            raise ValueError(f"`std` must have the shape of the scores, got {tuple(self.std.shape)}.")
        self._check_lengths()

    def _check_lengths(self) -> None:
        """Refuse what does not fit the rows and columns."""
        if len(self.train_indices) == 0:
            self.train_indices = torch.arange(self.num_train)
        rows = {
            "train_indices": (self.train_indices, self.num_train),
            "train_targets": (self.train_targets, self.num_train),
            "query_targets": (self.query_targets, self.num_queries),
        }
        for name, (values, length) in rows.items():
            if values is not None and len(values) != length:
                raise ValueError(f"`{name}` has {len(values)} entries, expected {length}.")
        lengths = {"train_info": self.num_train, "query_info": self.num_queries}
        for name, length in lengths.items():
            for column, values in getattr(self, name).items():
                if len(values) != length:
                    raise ValueError(f"{name}[{column!r}] has {len(values)} values, expected {length}.")

    @property
    def num_queries(self) -> int:
        """Number of queries, rows of the scores."""
        return self.scores.shape[0]

    @property
    def num_train(self) -> int:
        """Number of training examples, columns of the scores."""
        return self.scores.shape[1]

    @property
    def num_ranked(self) -> int:
        """How many proponents, and how many opponents, of each query are known."""
        return self.num_train

    @property
    def has_std(self) -> bool:
        """Whether scores come with a posterior standard deviation."""
        return self.std is not None

    def __len__(self) -> int:
        return self.num_queries

    def __getitem__(self, query: int) -> Attribution:
        """The attribution of one query."""
        if not isinstance(query, int):
            raise TypeError(f"Queries are taken one at a time, by an integer; got {query!r}.")
        if not -self.num_queries <= query < self.num_queries:
            raise IndexError(f"Query {query} of {self.num_queries}.")
        rows = [query % self.num_queries]
        one = copy.copy(self)
        one._keep(rows)
        one.query_targets = None if self.query_targets is None else self.query_targets[rows]
        one.query_info = {name: [values[rows[0]]] for name, values in self.query_info.items()}
        if self.queries is not None:
            one.queries = self.queries.subset(rows)
        return one

    def _keep(self, rows: list[int]) -> None:
        self.scores, self.std = self.scores[rows], None if self.std is None else self.std[rows]

    def top(self, k: int | None = None, *, diverse: bool = False) -> TopExamples:
        """Proponents and opponents of every query; ties come in order of columns.

        Args:
            k: How many of each, by default 10; all examples if there are fewer.
            diverse: Choose proponents one after the other, each for what it tells beyond those before it, from the
                500 (or ``10 k``) with the highest scores; there are no opponents then, and the scores are what each
                adds, in nats, if labels had no noise. For unsigned information methods, as long as their attributor
                and the model are as they were; in a distributed run every process must call it.

        Returns:
            Positions in the training dataset and scores, each of shape ``(num_queries, k)``.

        Raises:
            ValueError: If ``k`` is below 1, or diverse examples were asked of a method that cannot choose them.
        """
        found = (self._diverse(k) if diverse else self.top_columns(k)).renamed(self.train_indices)
        return found if self.is_signed else replace(found, is_signed=False)

    @property
    def is_signed(self) -> bool:
        """Whether positive scores mean helpful; those of unsigned information do not."""
        return "unsigned" not in self.metadata.get("unit", "")

    def _diverse(self, k: int | None) -> TopExamples:
        if self.diversify is None or self.queries is None:
            raise ValueError(
                "diverse=True needs method='information-loss' or 'information-gain' without `signed`, and the result "
                "of attribute() itself: a saved attribution does not keep the model. Use top() without it."
            )
        size = self.top_columns(k).proponents.shape[1]
        wanted = min(self.num_train, max(500, 10 * size))
        if self.num_ranked < wanted:
            raise ValueError(
                f"diverse=True chooses among the {wanted} strongest of each query, and {self.num_ranked} are held: "
                f"attribute with `top_k={wanted}`, or without."
            )
        candidates = self.top_columns(wanted).proponents
        return self.diversify(self.queries, self.metadata["target"], candidates, size)

    def top_columns(self, k: int | None = None) -> TopExamples:
        """As :meth:`top`, with columns of the scores in place of positions in the training dataset."""
        k = max(1, min(10, self.num_ranked)) if k is None else check_count("k", k)
        return self._ranked(min(k, self.num_train))

    def _ranked(self, k: int) -> TopExamples:
        return rank_columns(self.scores, k, self.std)

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
        scores = self.scores
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
        names = list(dict.fromkeys(labels))
        number = {name: i for i, name in enumerate(names)}
        index = torch.tensor([number[label] for label in labels])
        return names, scores.new_zeros(self.num_queries, len(names)).index_add_(1, index, scores)

    def to_dataframe(self, k: int | None = None) -> DataFrame:
        """A table with one row per query and training example (the top ``k`` proponents and opponents if given)."""
        from stride_lightning.views.tables import dataframe

        return dataframe(self, k)

    def pairs(self, k: int | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Queries and training examples with their scores, each pair once; arguments as in :meth:`to_dataframe`.

        Returns:
            Rows, columns, scores and standard deviations if there are any, each of shape ``(num_pairs,)``.
        """
        columns = torch.arange(self.num_train).expand(self.num_queries, -1)
        if k is not None and 2 * k < self.num_train:
            order = self.scores.argsort(dim=1, descending=True, stable=True)
            columns = torch.cat([order[:, :k], order[:, -k:]], 1)
        rows = torch.arange(self.num_queries)[:, None].expand_as(columns).flatten()
        columns = columns.flatten()
        return rows, columns, self.scores[rows, columns], None if self.std is None else self.std[rows, columns]

    @property
    def distributions(self) -> dict[str, Tensor]:
        """What there is a value of for every query and training example, by name."""
        return {"scores": self.scores} | ({} if self.std is None else {"std": self.std})

    def save(self, path: str | Path) -> Path:
        """Write everything but the data into one folder of safetensors and JSON, all or nothing.

        An existing folder is never overwritten: the new one becomes ``<path>-v1``, ``-v2``, ... In a distributed
        run rank 0 writes.

        Returns:
            The folder that was written.
        """
        path = Path(path)
        written = path
        if rank() == 0:
            optional = {"train_targets": self.train_targets, "query_targets": self.query_targets}
            tensors = {**self._tensors(), "train_indices": self.train_indices}
            tensors |= {name: value for name, value in optional.items() if value is not None}
            info = {
                "kind": self.kind,
                "metadata": self.metadata,
                "train_info": self.train_info,
                "query_info": self.query_info,
            }
            written = write_record(path.parent, path.name, info, {"attribution": tensors})
            if written != path:
                print(f"{path} exists and was kept: the scores were saved as {written}.", file=sys.stderr, flush=True)
        barrier()
        return Path(str(broadcast_object(str(written))))

    def _tensors(self) -> dict[str, Tensor]:
        return self.distributions

    @classmethod
    def _from_tensors(cls, tensors: dict[str, Tensor], info: dict[str, Any]) -> Attribution:
        return cls(**tensors, **info)

    @classmethod
    def load(cls, path: str | Path, *, train_data: Any = None, queries: Any = None) -> Attribution:
        """Read what :meth:`save` wrote, in the class that wrote it; every byte is checked.

        Args:
            path: The folder.
            train_data: The training data again, if pictures are wanted.
            queries: The queries again, if pictures are wanted.

        Raises:
            RecordError: If the folder is damaged or not an attribution.
            ValueError: If the data given again are not as many as there are columns or rows.
        """
        from stride_lightning.results.top_attribution import TopAttribution  # which imports this file

        record = read_record(path)
        written_by = {known.kind: known for known in (Attribution, TopAttribution)}.get(record.info.get("kind", ""))
        if written_by is None or not issubclass(written_by, cls):
            expected = "a saved attribution" if cls is Attribution else f"a saved {cls.__name__}"
            raise RecordError(f"{path} holds a {record.info.get('kind')!r} record, not {expected}.")
        info = {name: record.info[name] for name in ("metadata", "train_info", "query_info")}
        loaded = written_by._from_tensors(record.tensors("attribution"), info)
        if train_data is not None:
            loaded.train_data = resolve_train_data(train_data, loaded.train_indices)
        loaded.queries = None if queries is None else resolve_queries(queries)
        if loaded.queries is not None and len(loaded.queries) != loaded.num_queries:
            raise ValueError(f"The attribution is of {loaded.num_queries} queries, got {len(loaded.queries)}.")
        return loaded

    def log(
        self,
        loggers: Any,
        *,
        step: int | None = None,
        k: int = 5,
        max_queries: int = 20,
        image_shape: tuple[int, ...] | None = None,
    ) -> None:
        """Log scalars to any Lightning logger, and histograms, tables and pictures where it can show them.

        Args:
            loggers: A logger or a list of them, such as ``trainer.loggers``, or the trainer.
            step: Global step to log at; the step the attributed record or trainer stands at by default.
            k: Proponents and opponents shown per query.
            max_queries: Queries shown; all are in the scalars.
            image_shape: Shape that makes a picture of flattened inputs, such as ``(28, 28)``.
        """
        from stride_lightning.views.loggers import log_attribution

        if rank() == 0:
            loggers = getattr(loggers, "loggers", loggers)  # a trainer will do
            every: Iterable[Any] = loggers if isinstance(loggers, list | tuple) else [loggers]
            step = int(self.metadata.get("step") or 0) if step is None else step
            log_attribution(self, every, step=step, k=k, max_queries=max_queries, image_shape=image_shape)

    def plot(self, query: int | Sequence[int] = 0, k: int = 6, *, image_shape: tuple[int, ...] | None = None) -> Figure:
        """A figure of queries with their proponents and opponents: pictures if inputs are images, bars otherwise.

        Args:
            query: Row of the scores, or several.
            k: At most how many proponents, and how many opponents.
            image_shape: Shape that makes a picture of flattened inputs, such as ``(28, 28)``.
        """
        from stride_lightning.views.figures import plot_grid

        return plot_grid(self, [query] if isinstance(query, int) else query, k, image_shape=image_shape)

    def report(
        self,
        path: str | Path,
        *,
        queries: int | Sequence[int] | None = None,
        k: int = 5,
        image_shape: tuple[int, ...] | None = None,
        query_text: TextSource = None,
        train_text: TextSource = None,
        title: str | None = None,
    ) -> Path:
        """Write one HTML page of queries with their proponents and opponents, to look through in a browser.

        The page holds everything it shows and loads nothing. Pictures and texts come from the data where it is at
        hand, other facts from ``query_info`` and ``train_info``. In a distributed run rank 0 writes.

        Args:
            path: The file; ``.html`` is added where it is missing, folders are made, an existing file is replaced.
            queries: Row of the scores, or several; all by default.
            k: At most how many proponents, and how many opponents, of each query.
            image_shape: Shape that makes a picture of flattened inputs, such as ``(28, 28)``.
            query_text: Texts of the queries: a function of their position in the dataset (such as one that decodes
                tokens), one text per query, or the name of a column of ``query_info``.
            train_text: The same for training examples. Only texts of examples that are shown are asked for.
            title: Heading of the page.

        Returns:
            The file that was written.
        """
        from stride_lightning.views.report.page import html_path, write_report

        options = {"image_shape": image_shape, "query_text": query_text, "train_text": train_text, "title": title}
        path = html_path(path)
        if rank() == 0:
            write_report(self, path, queries=queries, k=k, **options)
        barrier()
        return path

    def __repr__(self) -> str:
        method = self.metadata.get("method", "scores")
        seconds = self.metadata.get("seconds", {}).get("total")
        took = f", {seconds:.1f} s" if seconds is not None else ""

        return f"{type(self).__name__}({method}: {self._summary()}{took})"

    def _summary(self) -> str:
        spread = f"std {self.scores.std():.2g}" if self.scores.numel() > 1 else f"sum {self.scores.sum():.2g}"
        certain = ", with posterior std" if self.has_std else ""
        return f"{self.num_queries} queries x {self.num_train} training examples, {spread}{certain}"
