"""Vectors of training examples, ranked by the squared inner product with a query: what all indexes share."""

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
from stride_lightning.information.index.checks import Batch, Columns, Floats, Integers, PositionSet, VectorIndexError
from stride_lightning.information.index.ranking import NOTHING, Ranked
from stride_lightning.runtime.checks import check_count
from stride_lightning.runtime.progress import counting

#: Positions of some rows, their handles, and their vectors.
Block: TypeAlias = tuple[Integers, Integers, Floats]
#: Positions, vectors and metadata that were checked.
Rows: TypeAlias = tuple[Integers, Floats, Columns]

BLOCK_ROWS = 8192  # rows multiplied at once
_QUERIES = 1024  # queries multiplied at once
_SPARE = 32  # candidates beyond k that the float32 screening keeps
_CANDIDATE_BYTES = 2**28
_COMMIT_BYTES, _COMMIT_SECONDS = 2**26, 60.0


@dataclass(frozen=True, eq=False)
class Hits:
    """What a search found, best first; a row for each query.

    Args:
        positions: Positions in the training dataset, int64 of shape ``(q, k)``.
        dots: Inner products with the query, float64 of the same shape; ranked by magnitude.
        columns: Metadata by column: ``k`` values for each query.
    """

    positions: Tensor
    dots: Tensor
    columns: dict[str, list[list[Any]]] = field(default_factory=dict)


class VectorIndex(ABC):
    """One vector for each training example, found by its squared inner product with a query's vector.

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

    @abstractmethod
    def __len__(self) -> int:
        """Number of rows."""

    @abstractmethod
    def _known(self) -> PositionSet:
        """The positions that are there; `add` and `build` extend it."""

    @abstractmethod
    def _append(self, positions: Integers, vectors: Floats, columns: Columns) -> None:
        """Store checked rows, all or none."""

    @abstractmethod
    def _check_where(self, where: Any) -> None:
        """Refuse a condition of another kind, or one that is not understood."""

    @abstractmethod
    def _scan(self, where: Any) -> Iterator[Block]:
        """All rows that meet a condition, if there is one; once each, in blocks of at most `BLOCK_ROWS`."""

    @abstractmethod
    def _vectors_of(self, rows: Integers) -> tuple[Integers, Floats]:
        """Positions and vectors of some rows, whose handles are sorted and unique."""

    @abstractmethod
    def _columns_of(self, rows: Integers) -> Columns:
        """Metadata of such rows."""

    def add(self, positions: Any, vectors: Any, columns: Mapping[str, Any] | None = None) -> None:
        """Append some training examples: all of them, or none if anything is wrong.

        Args:
            positions: Positions in the training dataset, integers of shape ``(b,)``; each may come once, ever.
            vectors: Shape ``(b, dim)``, finite; kept as float32. Zero vectors are fine: their score is 0.
            columns: ``b`` values for every metadata column.

        Raises:
            ValueError: If shapes do not fit, a value is not finite, a position is negative, twice or there already, or
                columns are missing or unknown.
            TypeError: If a metadata value is of another type than its column.
        """
        rows = self._checked(positions, vectors, columns)
        known = self._known()
        if (taken := known.holds(rows[0])).any():
            raise ValueError(
                f"Already in the index, which holds every training example once: {checks.listed(rows[0][taken])}. "
                "Leave them out, or use `build`, which skips what is there."
            )
        self._commit([rows], known)

    def build(
        self,
        batches: Iterable[Batch],
        total: int | None = None,
        *,
        rows_per_commit: int | None = None,
        show_progress: bool = True,
    ) -> int:
        """Append a stream of batches, and skip the training examples that are there already.

        Rows are committed in groups, each whole or not at all: a build that was killed goes on when it is called again
        with the same stream. To spare vectors that are there, stream :meth:`missing` positions only.

        Args:
            batches: Of ``(positions, vectors)`` or ``(positions, vectors, columns)``, as for :meth:`add`; a position
                may come only once.
            total: Number of training examples in the stream, for the progress bar.
            rows_per_commit: Size of a group. By default 64 MiB of vectors, or what came within a minute.
            show_progress: Whether to show a progress bar.

        Returns:
            Number of rows appended.
        """
        default = max(1, _COMMIT_BYTES // (4 * self.dim))
        size = default if rows_per_commit is None else check_count("rows_per_commit", rows_per_commit)
        known, streamed = self._known(), PositionSet()
        pending: list[Rows] = []
        appended, waiting, since = 0, 0, time.monotonic()
        with counting(total or 0, "Building the index", show_progress) as bar:
            for batch in batches:
                positions, vectors, values = self._checked(*checks.as_batch(batch))
                if (twice := streamed.holds(positions)).any():
                    raise ValueError(
                        "Twice in the stream, where every training example may come once: "
                        f"{checks.listed(positions[twice])}."
                    )
                streamed.add(positions)
                new = np.flatnonzero(~known.holds(positions))
                pending.append((positions[new], vectors[new], {n: [v[i] for i in new] for n, v in values.items()}))
                waiting += len(new)
                if waiting >= size or time.monotonic() - since > _COMMIT_SECONDS:
                    appended += self._commit(pending, known)
                    waiting, since = 0, time.monotonic()
                bar.update(len(positions))
            return appended + self._commit(pending, known)

    def _commit(self, batches: list[Rows], known: PositionSet) -> int:
        """Append batches as one group, and let go of them; returns the number of rows."""
        num_rows = sum(len(positions) for positions, _, _ in batches)
        if num_rows:
            positions = np.concatenate([positions for positions, _, _ in batches])
            vectors = np.concatenate([vectors for _, vectors, _ in batches])
            columns = {name: [value for _, _, values in batches for value in values[name]] for name in self.columns}
            batches.clear()
            self._append(positions, vectors, columns)
            known.add(positions)
        return num_rows

    def holds(self, positions: Tensor) -> Tensor:
        """Which of some positions are in the index."""
        return torch.from_numpy(self._known().holds(positions.numpy()))

    def check_identity(self, identity: Mapping[str, Any]) -> None:
        """Raise a :class:`VectorIndexError` that names the keys and values that differ from those expected."""
        expected = checks.as_identity(identity)

        def value(of: Mapping[str, Any], key: str) -> str:
            return json.dumps(of[key], sort_keys=True) if key in of else "nothing"

        differences = [
            f"{key!r}: expected {value(expected, key)}, came {value(self.identity, key)}"
            for key in sorted(expected.keys() | self.identity.keys())
            if value(expected, key) != value(self.identity, key)
        ]
        if differences:
            raise VectorIndexError(
                f"{self.name} is another one; {'; '.join(differences)}. Open the index of this model and projection, "
                "or build one in a folder of its own."
            )

    def missing(self, num_train: int) -> Tensor:
        """The positions in ``range(num_train)`` that are not in the index, sorted."""
        positions = torch.arange(num_train)
        return positions[~self.holds(positions)]

    def search(self, queries: Any, k: int = 10, where: Any = None, *, exact: bool = True) -> Hits:
        """The training examples with the largest squared inner product; ties in order of positions.

        Ranked by inner products in float64 of the vectors, which are float32. This search is always exact.

        Args:
            queries: Shape ``(q, dim)``.
            k: How many to find; all rows if there are fewer.
            where: Which rows to look at.
            exact: Ignored; an index on disk may be asked for less.

        Raises:
            ValueError: If a query does not fit, or `where` is not understood.
            TypeError: If `where` is a condition for the other kind of index.
        """
        queries = self._checked_queries(queries, k)
        self._check_where(where)
        # Candidates are fetched together: fewer queries at a time where there are many for each.
        step = max(1, min(_QUERIES, _CANDIDATE_BYTES // (4 * self.dim * (k + _SPARE))))
        return self._in_groups(queries, step, lambda some: self._screened(some, k, where))

    def _in_groups(self, queries: Floats, step: int, rank: Callable[[Floats], list[Ranked]]) -> Hits:
        """Rank some queries after the others, and look up the metadata of their hits."""
        if len(queries) == 0:
            nothing = torch.empty(0, 0, dtype=torch.int64)
            return Hits(nothing, nothing.double(), {name: [] for name in self.columns})
        ranked = [hits for at in range(0, len(queries), step) for hits in rank(queries[at : at + step])]
        positions, dots, rows = (np.stack(arrays) for arrays in zip(*ranked, strict=True))
        columns: dict[str, list[list[Any]]] = {}
        if self.columns:
            unique, inverse = np.unique(rows, return_inverse=True)
            values = self._columns_of(unique) if len(unique) else {}
            places = np.reshape(inverse, rows.shape)
            columns = {name: [[values[name][i] for i in row] for row in places] for name in self.columns}
        return Hits(torch.from_numpy(positions), torch.from_numpy(dots), columns)

    def _screened(self, queries: Floats, k: int, where: Any) -> list[Ranked]:
        """Candidates by float32 products, ranked in float64; queries where float32 cannot tell are done in float64."""
        screening = ranking.Screening(queries, k + _SPARE)
        for _, rows, vectors in self._scan(where):
            screening.update(rows, vectors)
        if screening.seen == 0:
            return [NOTHING] * len(queries)
        unique, inverse = np.unique(screening.rows, return_inverse=True)
        positions, vectors = self._vectors_of(unique)
        ranked = [
            ranking.first_of(positions[places], ranking.dots_of(query, vectors[places]), unique[places], k)
            for query, places in zip(queries, inverse.reshape(screening.rows.shape), strict=True)
        ]
        if screening.seen > screening.rows.shape[1]:
            # The last candidate bounds the k-th from below, and what float32 left out from above.
            least, error = np.array([abs(dots[-1]) for _, dots, _ in ranked]), screening.error()
            doubtful = np.flatnonzero(~(screening.floor() + error < least))  # so written that NaN is in doubt too
            if len(doubtful):
                again = self._in_float64(queries[doubtful], (least - error)[doubtful], k, where)
                for query, exact in zip(doubtful, again, strict=True):
                    ranked[query] = exact
        return ranked

    def _in_float64(self, queries: Floats, bounds: Floats, k: int, where: Any) -> list[Ranked]:
        """A second pass, for ties and near ties: all rows whose float32 products reach a bound are compared."""
        best = [NOTHING] * len(queries)
        scale = ranking.magnitude(queries)
        for positions, rows, vectors in self._scan(where):
            below = ranking.magnitudes(queries / scale, vectors) * scale < bounds[:, None]
            for i in np.flatnonzero(~below.all(1)):
                near, (best_positions, dots, handles) = np.flatnonzero(~below[i]), best[i]
                best[i] = ranking.first_of(
                    np.concatenate([best_positions, positions[near]]),
                    np.concatenate([dots, ranking.dots_of(queries[i], vectors[near])]),
                    np.concatenate([handles, rows[near]]),
                    k,
                )
        return best

    def _checked(self, positions: Any, vectors: Any, columns: Any = None) -> Rows:
        positions = checks.as_positions(positions)
        vectors = checks.as_vectors(vectors, self.dim, "vectors")
        if len(vectors) != len(positions):
            raise ValueError(f"Expected a vector for each of {len(positions)} positions, got {len(vectors)}.")
        if not (fine := np.isfinite(vectors).all(1)).all():
            raise ValueError(
                f"Vectors that are not finite as float32: those of {checks.listed(positions[~fine])}. Find what "
                "made them so (a leverage at 1? a loss that diverged?) and mend those examples or leave them out."
            )
        return positions, vectors, checks.as_columns(columns or {}, self.columns, len(positions))

    def _checked_queries(self, queries: Any, k: int) -> Floats:
        check_count("k", k)
        queries = checks.as_vectors(queries, self.dim, "queries", np.float64)
        if not (fine := np.isfinite(queries).all(1)).all():
            raise ValueError(f"Query {int(np.flatnonzero(~fine)[0])} is not finite: no ranking follows from it.")
        return queries
