"""The base of every result: its rows and columns, and all ways to rank, save and show them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import torch
from torch import Tensor
from typing_extensions import Self

from stride_lightning.data.examples import Examples
from stride_lightning.data.sources import resolve_queries, resolve_train_data
from stride_lightning.results.agreement import AGREES, agreement_text
from stride_lightning.results.deferred import Deferred, as_tensor
from stride_lightning.results.texts import STD
from stride_lightning.results.top_examples import TopExamples
from stride_lightning.runtime.checks import check_count
from stride_lightning.runtime.distributed import barrier, rank
from stride_lightning.runtime.progress import announce
from stride_lightning.storage.records import RecordError, read_record
from stride_lightning.storage.stored import write_once
from stride_lightning.tasks.measures import OF_LOSS, in_words, measure_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

#: A source of texts: a function of the position in the dataset, one text per row or column, or a column's name.
TextSource: TypeAlias = Callable[[int], str] | Sequence[str] | str | None
#: Shape that makes a picture of flattened inputs, such as ``(28, 28)``; None leaves inputs as they are.
ImageShape: TypeAlias = tuple[int, ...] | None
#: Fields that are saved as JSON.
_PLAIN = ("metadata", "train_info", "query_info")


@dataclass(eq=False, repr=False, kw_only=True)
class AttributionResult(ABC):
    """The base of :class:`~stride_lightning.Attribution` and :class:`~stride_lightning.TopAttribution`.

    Args:
        train_indices: Position in the training dataset of every column, int64, shape ``(num_train,)``.
        train_targets: Target of every column; None if examples have none.
        query_targets: The target that each query's scores are about; None if queries have none.
        metadata: Method, options, every automatic choice, versions, fingerprints, seconds and peak memory.
        train_info: Your columns beside the positions (ids, sources, texts), by name: one value per training example.
        query_info: The same for queries. Methods with a readout add the loss and the prediction of the model and of the
            readout, and whether they agree.
        queries: The data behind the rows, for pictures; not saved.
        train_data: The data behind the columns, for pictures; not saved.
    """

    #: Kind of record that :meth:`save` writes; :meth:`load` finds the class by it.
    kind: ClassVar[str] = "attribution"
    #: The class of each kind; the first subclass of a kind registers itself.
    registry: ClassVar[dict[str, type[AttributionResult]]] = {}

    train_indices: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    train_targets: Tensor | None = None
    query_targets: Tensor | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    train_info: dict[str, list[Any]] = field(default_factory=dict)
    query_info: dict[str, list[Any]] = field(default_factory=dict)
    queries: Examples | None = None
    train_data: Examples | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        AttributionResult.registry.setdefault(cls.kind, cls)

    def __post_init__(self) -> None:
        if len(self.train_indices) == 0:
            self.train_indices = torch.arange(self.num_train)
        lengths = {"train_indices": self.num_train, "train_targets": self.num_train, "query_targets": self.num_queries}
        for name, length in lengths.items():
            values = getattr(self, name)
            if values is not None and len(values) != length:
                raise ValueError(f"`{name}` has {len(values)} entries, expected {length}.")
        for name, length in (("train_info", self.num_train), ("query_info", self.num_queries)):
            for column, values in getattr(self, name).items():
                if len(values) != length:
                    raise ValueError(f"{name}[{column!r}] has {len(values)} values, expected {length}.")

    @property
    def num_queries(self) -> int:
        """Number of queries, rows of the scores."""
        return next(len(values) for values in self._tensors().values() if isinstance(values, Tensor))

    @property
    @abstractmethod
    def num_train(self) -> int:
        """Number of training examples that were scored, columns of the scores."""

    @property
    def num_ranked(self) -> int:
        """Number of proponents, and of opponents, that the result holds of each query."""
        return self.num_train

    @property
    def has_std(self) -> bool:
        """Whether scores come with a standard deviation; it computes nothing."""
        return any("std" in name for name in self._tensors())

    @property
    def distributions(self) -> dict[str, Tensor]:
        """Tensors with a value for every query and training example, shape ``(num_queries, num_train)``, by name."""
        return {}

    @abstractmethod
    def pairs(self, k: int | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Queries and training examples with their scores, each pair once; ``k`` is that of :meth:`to_dataframe`.

        Returns:
            Rows, columns, scores and standard deviations (or None), each of shape ``(num_pairs,)``.
        """

    @abstractmethod
    def _ranked(self, k: int) -> TopExamples:
        """The ``k`` strongest of each side as columns of the scores; ``k`` is from 1 to ``num_train``."""

    @abstractmethod
    def _tensors(self) -> dict[str, Tensor | Deferred]:
        """The scores and what belongs to them, by name, scores first; what is deferred stays so."""

    @classmethod
    def _from_tensors(cls, tensors: dict[str, Any], **described: Any) -> Self:
        """The result made of what :meth:`_tensors` returned and of the other fields."""
        return cls(**tensors, **described)

    @abstractmethod
    def _summary(self) -> str:
        """The sizes of the result, in a few words."""

    def __len__(self) -> int:
        return self.num_queries

    def __getitem__(self, query: int) -> Self:
        """The attribution of one query."""
        if not isinstance(query, int):
            raise TypeError(f"Queries are taken one at a time, by an integer; got {query!r}.")
        if not -self.num_queries <= query < self.num_queries:
            raise IndexError(f"There is no query {query}: the {self.num_queries} queries are numbered from 0.")
        rows = [query % self.num_queries]
        known = {field.name: getattr(self, field.name) for field in fields(AttributionResult)}
        known["query_targets"] = None if self.query_targets is None else self.query_targets[rows]
        known["query_info"] = {name: [values[rows[0]]] for name, values in self.query_info.items()}
        known["queries"] = None if self.queries is None else self.queries.subset(rows)
        return self._from_tensors({name: values[rows] for name, values in self._tensors().items()}, **known)

    @property
    def disagreeing(self) -> tuple[int, ...]:
        """Rows of the queries that :meth:`disagrees` names."""
        return tuple(filter(self.disagrees, range(self.num_queries)))

    def disagrees(self, query: int) -> bool:
        """Whether the readout disagrees with the model on a query, so that its scores explain another prediction.

        Never for methods without a readout.
        """
        return AGREES in self.query_info and not self.query_info[AGREES][query]

    @property
    def label(self) -> str:
        """The method in words, with options that make it another: the name of these scores in tables and dashboards.

        It is the ``"label"`` of the metadata, or else their ``"method"``.
        """
        return str(self.metadata.get("label") or self.metadata.get("method", "scores"))

    @property
    def measure(self) -> dict[str, str]:
        """Name of what is explained of the queries, and whether a positive score ``"lowers"`` or ``"raises"`` it."""
        return measure_of(self.metadata)

    @property
    def is_signed(self) -> bool:
        """Whether the sign of a score tells helpful from harmful, which it does not for unsigned information."""
        return "unsigned" not in self.metadata.get("unit", "")

    @property
    def seconds(self) -> float | None:
        """Seconds of the whole attribution; None if the metadata do not hold them."""
        seconds = self.metadata.get("seconds")
        return seconds.get("total") if isinstance(seconds, dict) else seconds

    def top(self, k: int | None = None) -> TopExamples:
        """Proponents and opponents of every query; ties come in order of columns.

        Args:
            k: Number of proponents and of opponents, 10 by default; never more than there are examples.

        Returns:
            Positions in the training dataset and scores, each of shape ``(num_queries, k)``.

        Raises:
            ValueError: If ``k`` is below 1, or more than the result holds.
        """
        top = self.top_columns(k).renamed(self.train_indices)
        measure = None if self.measure == OF_LOSS else self.measure
        return top.with_fields(is_signed=self.is_signed, disagreeing=self.disagreeing, measure=measure)

    def top_columns(self, k: int | None = None) -> TopExamples:
        """The same as :meth:`top`, with columns of the scores in place of positions in the training dataset."""
        k = max(1, min(10, self.num_ranked)) if k is None else check_count("k", k)
        return self._ranked(min(k, self.num_train))

    def save(self, path: str | Path) -> Path:
        """Write everything but the data into one folder of safetensors and JSON, all or nothing.

        A standard deviation that nobody read yet is computed first: the file holds tensors, no function.
        An existing folder is never overwritten: the new one becomes ``<path>-v1``, ``-v2``, ... In a distributed
        run rank 0 writes. Returns the folder that was written.
        """
        known = {name: getattr(self, name) for name in ("train_indices", "train_targets", "query_targets")}
        tensors = {name: as_tensor(value) for name, value in self._tensors().items()}
        tensors |= {name: value for name, value in known.items() if value is not None}
        info = {"kind": self.kind} | {name: getattr(self, name) for name in _PLAIN}
        written = write_once(path, info, {"attribution": tensors})
        announce(f"{Path(path)} already exists: the scores were saved as {written}.", show=written != Path(path))
        return written

    @classmethod
    def load(cls, path: str | Path, *, train_data: Any = None, queries: Any = None) -> Self:
        """Read what :meth:`save` wrote, in the class that wrote it; every byte is checked.

        Args:
            path: The folder.
            train_data: The training data, for pictures and texts.
            queries: The queries, likewise.

        Raises:
            RecordError: If the folder is damaged or not an attribution.
            ValueError: If ``train_data`` or ``queries`` have another number of examples than the attribution.
        """
        record = read_record(path)
        kind = record.info.get("kind")
        # Attribution.load reads every kind, so that nobody has to remember which one they saved.
        if kind not in cls.registry or cls.kind not in (AttributionResult.kind, kind):
            expected = "attribution" if cls.kind == AttributionResult.kind else cls.__name__
            raise RecordError(
                f"{path} holds a {kind!r} record, not a saved {expected}. Read it with load() of the class that wrote "
                "it."
            )
        tensors = record.tensors("attribution")
        known = {name: tensors.pop(name) for name in list(tensors) if name.startswith(("train_", "query_"))}
        loaded: Any = cls.registry[kind]._from_tensors(tensors, **known, **{name: record.info[name] for name in _PLAIN})
        if train_data is not None:
            loaded.train_data = resolve_train_data(train_data, loaded.train_indices, has_rows_loss=True)
        loaded.queries = None if queries is None else resolve_queries(queries)
        if loaded.queries is not None and len(loaded.queries) != loaded.num_queries:
            raise ValueError(
                f"`queries` has {len(loaded.queries)} examples, but the attribution has {loaded.num_queries} queries: "
                "give the queries that it was made for."
            )
        return loaded

    def __repr__(self) -> str:
        text = agreement_text(self.query_info)
        agreement = "" if text is None else f", readout {text}"
        certain = f", with {STD} of each score" if self.has_std else ""
        duration = f", {self.seconds:.1f} s" if self.seconds is not None else ""
        measure = "" if self.measure == OF_LOSS else f", {in_words(self.measure)}"
        return f"{type(self).__name__}({self.label}: {self._summary()}{measure}{agreement}{certain}{duration})"

    def to_dataframe(self, k: int | None = None) -> DataFrame:
        """A table with one row per query and training example, or only with the top ``k`` proponents and opponents.

        Raises:
            ModuleNotFoundError: If pandas is not installed.
            ValueError: If ``k`` is below 1.
        """
        from stride_lightning.views.tables import dataframe

        return dataframe(self, k)

    def log(
        self,
        loggers: Any,
        *,
        step: int | None = None,
        k: int = 5,
        max_queries: int = 20,
        image_shape: ImageShape = None,
    ) -> None:
        """Log scalars to any Lightning logger, and histograms, tables and pictures to a logger that can show them.

        Args:
            loggers: A logger or a list of them, such as ``trainer.loggers``, or the trainer.
            step: Global step to log at; by default the step of the attributed record or trainer.
            k: Proponents and opponents shown per query.
            max_queries: Queries shown; the scalars are of all queries.
            image_shape: Shape that makes a picture of flattened inputs, such as ``(28, 28)``.
        """
        from stride_lightning.views.loggers import log_attribution

        if rank() == 0:
            step = int(self.metadata.get("step") or 0) if step is None else step
            log_attribution(self, loggers, step=step, k=k, max_queries=max_queries, image_shape=image_shape)

    def plot(self, query: int | Sequence[int] = 0, k: int = 6, *, image_shape: ImageShape = None) -> Figure:
        """A figure of queries with their proponents and opponents: pictures if inputs are images, bars otherwise.

        Args:
            query: Row of the scores, or several.
            k: Number of proponents and of opponents, at most.
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
        image_shape: ImageShape = None,
        query_text: TextSource = None,
        train_text: TextSource = None,
        title: str | None = None,
    ) -> Path:
        """Write one HTML page of queries with their proponents and opponents, to look through in a browser.

        The page holds everything it shows and loads nothing. Pictures and texts come from ``queries`` and
        ``train_data``, facts from ``query_info`` and ``train_info``. In a distributed run rank 0 writes.

        Args:
            path: The file. ``.html`` is added if it is missing, folders are made, an existing file is replaced.
            queries: Row of the scores, or several; all by default.
            k: Number of proponents and of opponents of each query, at most.
            image_shape: Shape that makes a picture of flattened inputs, such as ``(28, 28)``.
            query_text: Texts of the queries: a function of their position in the dataset (such as one that decodes
                tokens), one text per query, or the name of a column of ``query_info``.
            train_text: The same for training examples. The function is called for examples on the page only.
            title: Heading of the page.

        Returns:
            The file that was written.

        Raises:
            ModuleNotFoundError: If the page has pictures and Pillow is not installed.
            IsADirectoryError: If ``path`` is a folder.
            ValueError: If ``queries`` is empty, ``k`` is below 1, or texts or ``image_shape`` do not fit.
        """
        from stride_lightning.views.report.page import html_path, write_report

        path = html_path(path)
        if rank() == 0:
            texts = {"query_text": query_text, "train_text": train_text}
            write_report(self, path, queries=queries, k=k, title=title, image_shape=image_shape, **texts)
        barrier()
        return path
