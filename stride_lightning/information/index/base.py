"""Vectors of training examples, ranked by the squared inner product with a query: what all indexes share."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from stride_lightning.information.index.checks import (
    Batch,
    Columns,
    Floats,
    Integers,
    PositionSet,
    as_batch,
    as_column_types,
    as_columns,
    as_identity,
    as_positions,
    as_vectors,
    compare_identities,
    listed,
)
from stride_lightning.information.index.ranking import (
    Ranked,
    Screening,
    dots_of,
    first_of,
    magnitude,
    magnitudes,
    rank_rows,
)
from stride_lightning.runtime.checks import check_count
from stride_lightning.runtime.progress import counting

#: Positions of some rows, their handles, and their vectors.
Block: TypeAlias = tuple[Integers, Integers, Floats]

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
        columns: Metadata of the hits by column, a list of ``k`` values for each query.
    """

    positions: Tensor
    dots: Tensor
    columns: dict[str, list[list[Any]]] = field(default_factory=dict)

    @property
    def scores(self) -> Tensor:
        """The squared inner products, shape ``(q, k)``."""
        return self.dots.square()


class VectorIndex(ABC):
    """One vector for each training example, found by its squared inner product with a query's vector.

    What the indexes on disk and in memory share: checks of what comes in, building from a stream, exact search.

    Args:
        dim: Length of the vectors.
        identity: Plain JSON values that say whose vectors these are (the weights' hash, projection, form, ...).
        columns: Metadata columns by name: ``str``, ``int``, ``float`` or ``bool``.
    """

    def __init__(
        self, dim: int, identity: Mapping[str, Any] | None = None, columns: Mapping[str, type] | None = None
    ) -> None:
        self.dim = check_count("dim", dim)
        self.identity = as_identity(identity or {})
        self.columns = as_column_types(columns or {})

    # ------------------------------------------------------------------------------------------- what a kind provides

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
    def _scan(self, where: Any) -> Iterator[Block]:
        """All rows that meet a condition, once each, in blocks of at most `BLOCK_ROWS`."""

    @abstractmethod
    def _take(self, rows: Integers, columns: bool) -> tuple[Integers, Floats, Columns]:
        """Positions, vectors and, if wanted, metadata of some rows; the handles are sorted and unique."""

    # ---------------------------------------------------------------------------------------------------- what it does

    def add(self, positions: Any, vectors: Any, columns: Mapping[str, Any] | None = None) -> None:
        """Append some training examples: all of them, or none if anything is wrong.

        Args:
            positions: Positions in the training dataset, integers of shape ``(b,)``; each may come once, ever.
            vectors: Shape ``(b, dim)``, finite; kept as float32. Zero vectors are fine: their score is 0.
            columns: ``b`` values for every metadata column.

        Raises:
            ValueError: If shapes do not fit, a value is not finite, a position is negative, came twice or is there
                already, or columns are missing or unknown.
            TypeError: If a metadata value is of another type than its column.
        """
        rows = self._checked(positions, vectors, columns)
        known = self._known()
        if (taken := known.holds(rows[0])).any():
            raise ValueError(
                f"Already in the index, which holds every training example once: {listed(rows[0][taken])}. Leave them "
                "out, or use `build`, which skips what is there."
            )
        if len(rows[0]):
            self._append(*rows)
            known.add(rows[0])

    def build(
        self,
        batches: Iterable[Batch],
        total: int | None = None,
        *,
        rows_per_commit: int | None = None,
        show_progress: bool = True,
    ) -> int:
        """Append a stream of batches, and skip the training examples that are there already.

        So a build that was killed goes on when it is called again with the same stream: rows are committed in groups,
        each whole or not at all, and what is there is read off the index itself. To spare the work of computing
        vectors that are there, make the stream of :meth:`missing` positions only. When training data grow, stream the
        new examples.

        Args:
            batches: Of ``(positions, vectors)`` or ``(positions, vectors, columns)``, as for :meth:`add`.
            total: Number of training examples in the stream, for the progress bar.
            rows_per_commit: Size of a group. By default 64 MiB of vectors, or what came within a minute: at most so
                much is lost by a kill.
            show_progress: Whether to show a progress bar.

        Returns:
            Number of rows appended.

        Raises:
            ValueError: As for :meth:`add`; a position may come only once in the stream.
        """
        default = max(1, _COMMIT_BYTES // (4 * self.dim))
        size = default if rows_per_commit is None else check_count("rows_per_commit", rows_per_commit)
        known, streamed = self._known(), PositionSet()
        pending: list[tuple[Integers, Floats, Columns]] = []
        appended, waiting, since = 0, 0, time.monotonic()

        def commit() -> None:
            nonlocal appended, waiting, since
            if waiting:
                positions = np.concatenate([rows[0] for rows in pending])
                vectors = np.concatenate([rows[1] for rows in pending])
                columns = {name: [value for rows in pending for value in rows[2][name]] for name in self.columns}
                pending.clear()
                self._append(positions, vectors, columns)
                known.add(positions)
            appended, waiting, since = appended + waiting, 0, time.monotonic()

        with counting(total or 0, "Building the index", show_progress) as bar:
            for batch in batches:
                rows = self._checked(*as_batch(batch))
                if (twice := streamed.holds(rows[0])).any():
                    raise ValueError(
                        f"Twice in the stream, where every training example may come once: {listed(rows[0][twice])}."
                    )
                streamed.add(rows[0])
                new = np.flatnonzero(~known.holds(rows[0]))
                pending.append((rows[0][new], rows[1][new], {n: [v[i] for i in new] for n, v in rows[2].items()}))
                waiting += len(new)
                if waiting >= size or time.monotonic() - since > _COMMIT_SECONDS:
                    commit()
                bar.update(len(rows[0]))
            commit()
        return appended

    def holds(self, positions: Tensor) -> Tensor:
        """Which of some positions are in the index."""
        return torch.from_numpy(self._known().holds(positions.numpy()))

    def check_identity(self, identity: Mapping[str, Any]) -> None:
        """Refuse to be taken for an index of something else.

        Raises:
            VectorIndexError: If any key or value differs, naming those that do.
        """
        compare_identities("The index", as_identity(identity), self.identity)

    def missing(self, num_train: int) -> Tensor:
        """The positions in ``range(num_train)`` that are not in the index, sorted."""
        wanted = np.arange(num_train, dtype=np.int64)
        return torch.from_numpy(wanted[~self._known().holds(wanted)])

    def _search_exactly(self, queries: Floats, k: int, where: Any) -> Hits:
        # Candidates are fetched together: fewer queries at a time where there are many for each.
        step = max(1, min(_QUERIES, _CANDIDATE_BYTES // (4 * self.dim * (k + _SPARE))))
        parts = [self._hits(self._screened(queries[at : at + step], k, where)) for at in range(0, len(queries), step)]
        return joined_hits(parts, self.columns)

    def _screened(self, queries: Floats, k: int, where: Any) -> list[Ranked]:
        """Candidates by float32 products, ranked in float64; queries where float32 cannot tell are done in float64."""
        screening = Screening(queries, k + _SPARE)
        for _, rows, vectors in self._scan(where):
            screening.update(rows, vectors)
        unique, inverse = np.unique(screening.rows, return_inverse=True)
        positions, vectors, _ = self._take(unique, columns=False)
        ranked = [
            rank_rows(query, positions[places], vectors[places], unique[places], k)
            for query, places in zip(queries, inverse.reshape(screening.rows.shape), strict=True)
        ]
        if screening.seen > screening.rows.shape[1]:
            # The last of what was found bounds the k-th from below, and what float32 left out from above.
            least, error = np.array([abs(dots[-1]) for _, dots, _ in ranked]), screening.error()
            doubtful = np.flatnonzero(~(screening.floor() + error < least))  # so written that NaN is in doubt too
            if len(doubtful):
                again = self._in_float64(queries[doubtful], (least - error)[doubtful], k, where)
                for i, found in zip(doubtful, again, strict=True):
                    ranked[i] = found
        return ranked

    def _in_float64(self, queries: Floats, bounds: Floats, k: int, where: Any) -> list[Ranked]:
        """A second pass, for ties and near ties: all rows whose float32 products reach a bound are compared."""
        nothing = np.empty(0, np.int64)
        best: list[Ranked] = [(nothing, np.empty(0), nothing)] * len(queries)
        scale = magnitude(queries)
        for positions, rows, vectors in self._scan(where):
            below = magnitudes(queries / scale, vectors) * scale < bounds[:, None]
            for i in np.flatnonzero(~below.all(1)):
                near, (own, dots, handles) = np.flatnonzero(~below[i]), best[i]
                own, handles = np.concatenate([own, positions[near]]), np.concatenate([handles, rows[near]])
                best[i] = first_of(own, np.concatenate([dots, dots_of(queries[i], vectors[near])]), handles, k)
        return best

    def _hits(self, ranked: Sequence[Ranked]) -> Hits:
        rows = np.stack([found[2] for found in ranked])
        columns: dict[str, list[list[Any]]] = {}
        if self.columns:
            unique, inverse = np.unique(rows, return_inverse=True)
            values = self._take(unique, columns=True)[2]
            at = np.reshape(inverse, rows.shape)
            columns = {name: [[values[name][i] for i in row] for row in at] for name in self.columns}
        positions, dots = np.stack([found[0] for found in ranked]), np.stack([found[1] for found in ranked])
        return Hits(torch.from_numpy(positions), torch.from_numpy(dots), columns)

    def _checked(self, positions: Any, vectors: Any, columns: Any = None) -> tuple[Integers, Floats, Columns]:
        positions = as_positions(positions)
        vectors = as_vectors(vectors, self.dim, "vectors")
        if len(vectors) != len(positions):
            raise ValueError(f"Expected a vector for each of {len(positions)} positions, got {len(vectors)}.")
        if not (fine := np.isfinite(vectors).all(1)).all():
            raise ValueError(
                f"Vectors that are not finite as float32: those of {listed(positions[~fine])}. Find what made them so "
                "(a leverage at 1? a loss that diverged?) and mend those examples or leave them out."
            )
        return positions, vectors, as_columns(columns or {}, self.columns, len(positions))

    def _checked_query(self, queries: Any, k: int) -> Floats:
        check_count("k", k)
        queries = as_vectors(queries, self.dim, "queries", np.float64)
        if not (fine := np.isfinite(queries).all(1)).all():
            raise ValueError(f"Query {int(np.flatnonzero(~fine)[0])} is not finite: no ranking follows from it.")
        return queries


def joined_hits(parts: Sequence[Hits], names: Iterable[str]) -> Hits:
    """The hits of some queries, then those of more."""
    if not parts:
        nothing = torch.empty(0, 0, dtype=torch.int64)
        return Hits(nothing, nothing.double(), {name: [] for name in names})
    columns = {name: [row for part in parts for row in part.columns[name]] for name in names}
    return Hits(torch.cat([part.positions for part in parts]), torch.cat([part.dots for part in parts]), columns)
