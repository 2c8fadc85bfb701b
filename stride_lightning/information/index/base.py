"""The base of all indexes: built from a stream of vectors, searched exactly by squared inner product."""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from stride_lightning.information.index import checks, ranking
from stride_lightning.information.index.checks import Batch, Columns, Integers, PositionSet, VectorIndexError
from stride_lightning.runtime.checks import check_count
from stride_lightning.runtime.progress import counting

#: A condition: from columns, a dict of arrays with a value for each row, to a boolean for each row.
Where: TypeAlias = Callable[[dict[str, Any]], Any]
_COMMIT_BYTES, _COMMIT_SECONDS = 2**26, 60.0


@dataclass(frozen=True, eq=False)
class Hits:
    """The result of a search, best first; a row for each query.

    Args:
        positions: Positions in the training dataset, int64 of shape ``(q, k)``.
        dots: Inner products with the query, float64 of the same shape; ranked by magnitude.
        columns: Metadata by column: ``k`` values for each query.
    """

    positions: Tensor
    dots: Tensor
    columns: dict[str, list[list[Any]]] = field(default_factory=dict)


class VectorIndex(ABC):
    """One vector for each training example, ranked by its squared inner product with a query's vector.

    Args:
        dim: Length of the vectors.
        identity: Plain JSON values that say whose vectors these are (the weights' hash, projection, form, ...).
        columns: Metadata columns by name: ``str``, ``int``, ``float`` or ``bool``.
    """

    #: How messages call the index.
    name = "The index"

    def __init__(
        self, dim: int, identity: Mapping[str, Any] | None = None, columns: Mapping[str, type] | None = None
    ) -> None:
        self.dim = check_count("dim", dim)
        self.identity = checks.as_identity(identity or {})
        self.columns = checks.as_column_types(columns or {})
        self._positions: PositionSet | None = None

    @abstractmethod
    def __len__(self) -> int:
        """Number of rows."""

    @abstractmethod
    def _append(self, rows: Columns) -> None:
        """Store checked rows, all or none."""

    @abstractmethod
    def _scan(self, names: list[str]) -> Iterator[tuple[Integers, Columns]]:
        """Handles of all rows, and some of their columns, block by block."""

    @abstractmethod
    def _read(self, handles: Integers, names: list[str]) -> tuple[Integers, Columns]:
        """The same of the rows with these handles, sorted, unique and at least one; in any order."""

    def add(self, positions: Any, vectors: Any, columns: Mapping[str, Any] | None = None) -> None:
        """Append training examples: all of them, or none if anything is wrong.

        Args:
            positions: Positions in the training dataset, integers of shape ``(b,)``; each may come once, ever.
            vectors: Shape ``(b, dim)``, finite; stored as float32. Zero vectors are fine: their score is 0.
            columns: ``b`` values for every metadata column.

        Raises:
            ValueError: If shapes do not fit, a value is not finite, a position is negative, repeated or in the index
                already, or columns are missing or unknown.
            TypeError: If a metadata value is of another type than its column.
        """
        rows = checks.as_rows(positions, vectors, columns, self.dim, self.columns)
        if (taken := self._known().holds(rows["position"])).any():
            raise ValueError(
                f"The index already holds {checks.listed(rows['position'][taken])}, and takes every training example "
                "once. Leave them out, or use `build`, which skips them."
            )
        self._commit([rows])

    def build(
        self,
        batches: Iterable[Batch],
        total: int | None = None,
        *,
        rows_per_commit: int | None = None,
        show_progress: bool = True,
    ) -> int:
        """Append a stream of batches, and skip training examples that are in the index already.

        Rows are committed in groups, each whole or not at all: a build that was killed continues when it is called
        again with the same stream. Stream :meth:`missing` positions only, to compute no vector twice.

        Memory: ``4 dim (2 g + 2 b)`` bytes for groups of g rows and batches of b, their metadata, and about two bytes
        for each training example. The default group takes 64 MiB, so 128 MiB are enough for small batches.

        Args:
            batches: Of ``(positions, vectors)`` or ``(positions, vectors, columns)``, as for :meth:`add`; a position
                may come only once.
            total: Number of training examples in the stream, for the progress bar.
            rows_per_commit: Size g of a group. By default 64 MiB of vectors, or the rows of a minute.
            show_progress: Whether to show a progress bar.

        Returns:
            Number of rows appended.
        """
        default = max(1, _COMMIT_BYTES // (4 * self.dim))
        size = default if rows_per_commit is None else check_count("rows_per_commit", rows_per_commit)
        known, streamed = self._known(), PositionSet()
        pending: list[Columns] = []
        appended, waiting, since = 0, 0, time.monotonic()
        with counting(total or 0, "Building the index", show_progress) as bar:
            for batch in batches:
                rows = checks.as_rows(*checks.as_batch(batch), self.dim, self.columns)
                positions = rows["position"]
                if (repeated := streamed.holds(positions)).any():
                    raise ValueError(
                        f"The stream holds {checks.listed(positions[repeated])} twice, and every training example may "
                        "come once. Does each batch give its positions in the whole dataset?"
                    )
                streamed.add(positions)
                new = np.flatnonzero(~known.holds(positions))
                pending.append({name: column[new] for name, column in rows.items()})
                waiting += len(new)
                if waiting >= size or time.monotonic() - since > _COMMIT_SECONDS:
                    appended += self._commit(pending)
                    waiting, since = 0, time.monotonic()
                bar.update(len(positions))
            return appended + self._commit(pending)

    def _commit(self, batches: list[Columns]) -> int:
        """Append batches as one group, and release them; returns the number of rows."""
        num_rows = sum(len(rows["position"]) for rows in batches)
        if num_rows:
            group = {name: np.concatenate([rows[name] for rows in batches]) for name in batches[0]}
            batches.clear()
            self._append(group)
            if self._positions is not None:
                self._positions.add(group["position"])
        return num_rows

    def _known(self) -> PositionSet:
        """The positions in the index."""
        if self._positions is None:
            known = PositionSet()
            for _, columns in self._scan(["position"]):
                known.add(columns["position"])
            self._positions = known
        return self._positions

    def holds(self, positions: Tensor) -> Tensor:
        """Which of some positions are in the index."""
        return torch.from_numpy(self._known().holds(positions.numpy()))

    def missing(self, num_train: int) -> Tensor:
        """The positions in ``range(num_train)`` that are not in the index, sorted."""
        positions = torch.arange(num_train)
        return positions[~self.holds(positions)]

    def check_identity(self, identity: Mapping[str, Any]) -> None:
        """Raise a :class:`VectorIndexError` that names the keys and values that differ from those expected."""
        expected = checks.as_identity(identity)

        def value(of: Mapping[str, Any], key: str) -> str:
            return json.dumps(of[key], sort_keys=True) if key in of else "nothing"

        differences = "; ".join(
            f"{key!r}: expected {value(expected, key)}, got {value(self.identity, key)}"
            for key in sorted(expected.keys() | self.identity.keys())
            if value(expected, key) != value(self.identity, key)
        )
        if differences:
            raise VectorIndexError(
                f"{self.name} has another identity; {differences}. Open the index of this model and these data, or "
                "build one in another folder."
            )

    def search(self, queries: Any, k: int = 10, where: Where | None = None) -> Hits:
        """The training examples with the largest squared inner product, exactly; ties in order of positions.

        Products in float32 with blocks of rows tell which rows could be among the best k; products in float64 of the
        float32 vectors rank those. How wrong a float32 product may be is bounded, so the result is always that of a
        float64 search of all rows.

        Memory: 256 KiB for each query, at most 1024 of them at a time, a block of 8192 rows, and 8 bytes for each row.

        Args:
            queries: Shape ``(q, dim)``.
            k: How many to return for each query; all rows if there are fewer.
            where: Which rows to look at: a function of a dict of arrays, ``"position"`` and the metadata columns with
                one value per row, that returns a boolean for each row: ``lambda columns: columns["label"] == 3``. Text
                is in arrays of objects. It is called for a block of rows at a time.

        Raises:
            ValueError: If a query does not fit, or `where` returns no booleans or looks up an unknown column.
            TypeError: If `where` is not a function.
        """
        check_count("k", k)
        queries = checks.as_queries(queries, self.dim)
        handles = self._matching(where)
        shape = len(queries), min(k, len(handles))
        if 0 in shape:
            no_columns = {name: [[] for _ in queries] for name in self.columns}
            return Hits(torch.empty(shape, dtype=torch.int64), torch.empty(shape, dtype=torch.float64), no_columns)
        ranked = []
        for at in range(0, len(queries), ranking.QUERIES):
            some = queries[at : at + ranking.QUERIES]
            ranked += ranking.rank(some, k, handles, lambda rows: self._read(rows, ["position", "vector"]))
        positions, dots, rows = (np.stack(arrays) for arrays in zip(*ranked, strict=True))
        unique, places = np.unique(rows, return_inverse=True)
        columns = {}
        if self.columns:
            read, values = self._read(unique, list(self.columns))
            places = np.argsort(read)[places].reshape(shape)
            columns = {name: column[places].tolist() for name, column in values.items()}
        return Hits(torch.from_numpy(positions), torch.from_numpy(dots), columns)

    def _matching(self, where: Where | None) -> Integers:
        """Handles of the rows that meet a condition, sorted."""
        if where is not None:
            checks.check_where(where)
        names = ["position"] if where is None else ["position", *self.columns]
        parts = [np.empty(0, np.int64)]
        for handles, columns in self._scan(names):
            parts.append(handles if where is None else handles[checks.as_mask(where, columns)])
        return np.sort(np.concatenate(parts))
