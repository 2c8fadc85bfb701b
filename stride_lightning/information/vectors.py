"""Vectors of training examples, ranked by the squared inner product with a query: the exact search, and in memory."""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stride_lightning.progress import counting

__all__ = ["Hits", "MemoryIndex", "VectorIndex", "VectorIndexError"]

Floats: TypeAlias = NDArray[np.floating]
Integers: TypeAlias = NDArray[np.int64]
Columns: TypeAlias = dict[str, list[Any]]
Batch: TypeAlias = tuple[Any, Any] | tuple[Any, Any, Mapping[str, Any]]
#: Positions of some rows, their handles, and their vectors.
Block: TypeAlias = tuple[Integers, Integers, Floats]
#: What was found for a query: positions, inner products, row handles.
Ranked: TypeAlias = tuple[Integers, Floats, Integers]

COLUMN_TYPES = {"str": str, "int": int, "float": float, "bool": bool}
BLOCK_ROWS = 8192  # rows multiplied at once
_QUERIES = 1024  # queries multiplied at once
_FEW = 2
_SPARE = 32  # candidates beyond k that the float32 screening keeps
_CANDIDATE_BYTES = 2**28
_COMMIT_BYTES, _COMMIT_SECONDS = 2**26, 60.0


class VectorIndexError(RuntimeError):
    """An index on disk is damaged, of another layout, or of another model or projection than expected."""


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
        self.dim = as_dim(dim)
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
                f"Already in the index, which holds every training example once: {_listed(rows[0][taken])}. Leave them "
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
        size = rows_per_commit if rows_per_commit is not None else max(1, _COMMIT_BYTES // (4 * self.dim))
        if size < 1:
            raise ValueError(f"`rows_per_commit` must be at least 1, got {rows_per_commit}.")
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
                        f"Twice in the stream, where every training example may come once: {_listed(rows[0][twice])}."
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
        screening = _Screening(queries, k + _SPARE)
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
            below = _magnitudes(queries / scale, vectors) * scale < bounds[:, None]
            for i in np.flatnonzero(~below.all(1)):
                near, (own, dots, handles) = np.flatnonzero(~below[i]), best[i]
                own, handles = np.concatenate([own, positions[near]]), np.concatenate([handles, rows[near]])
                best[i] = _first(own, np.concatenate([dots, _dots(queries[i], vectors[near])]), handles, k)
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
                f"Vectors that are not finite as float32: those of {_listed(positions[~fine])}. Find what made them so "
                "(a leverage at 1? a loss that diverged?) and mend those examples or leave them out."
            )
        return positions, vectors, as_columns(columns or {}, self.columns, len(positions))

    def _checked_query(self, queries: Any, k: int) -> Floats:
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ValueError(f"`k` must be a positive integer, got {k!r}.")
        queries = as_vectors(queries, self.dim, "queries", np.float64)
        if not (fine := np.isfinite(queries).all(1)).all():
            raise ValueError(f"Query {int(np.flatnonzero(~fine)[0])} is not finite: no ranking follows from it.")
        return queries


class MemoryIndex(VectorIndex):
    """An index in memory, with exact search; needs no database.

    Memory: ``4 dim`` bytes for each training example, and its metadata.

    Args:
        dim: Length of the vectors.
        identity: Plain JSON values that say whose vectors these are.
        columns: Metadata columns by name: ``str``, ``int``, ``float`` or ``bool``.

    Example:
        >>> index = MemoryIndex(dim=2, columns={"label": int})
        >>> index.add([7, 8, 9], [[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]], {"label": [0, 1, 0]})
        >>> hits = index.search([[1.0, 0.5]], k=2)
        >>> hits.positions, hits.dots, hits.columns
        (tensor([[9, 7]]), tensor([[-3.,  1.]], dtype=torch.float64), {'label': [[0, 0]]})
        >>> index.search([[1.0, 0.5]], k=2, where=lambda columns: columns["label"] == 1).positions
        tensor([[8]])
    """

    def __init__(
        self, dim: int, identity: Mapping[str, Any] | None = None, columns: Mapping[str, type] | None = None
    ) -> None:
        super().__init__(dim, identity, columns)
        self._positions = PositionSet()
        self._groups: list[tuple[Integers, Floats, dict[str, NDArray[Any]]]] = []
        self._starts = np.zeros(1, np.int64)  # the first row of each group, and their number

    def __len__(self) -> int:
        return int(self._starts[-1])

    def search(
        self,
        queries: Any,
        k: int = 10,
        where: Callable[[dict[str, NDArray[Any]]], NDArray[np.bool_]] | None = None,
        *,
        exact: bool = True,
    ) -> Hits:
        """The training examples with the largest squared inner product; ties in order of positions.

        Ranked by inner products in float64 of the vectors, which are float32.

        Args:
            queries: Shape ``(q, dim)``.
            k: How many to find; all rows if there are fewer.
            where: Which rows to look at: a function of the metadata columns, as arrays (those of text hold objects),
                that gives a boolean for each row.
            exact: Ignored: this search is always exact, also where an index on disk would be asked for less.

        Raises:
            ValueError: If a query does not fit, or `where` gives something else.
            TypeError: If `where` is not a function: SQL is for :class:`InformationIndex`.
        """
        queries = self._checked_query(queries, k)
        if where is not None and not callable(where):
            raise TypeError(
                f"`where` of an index in memory is a function of the columns, got {where!r}: pass for example "
                'lambda columns: columns["label"] == 3, or use InformationIndex, which takes SQL.'
            )
        return self._search_exactly(queries, k, where)

    def _known(self) -> PositionSet:
        return self._positions

    def _append(self, positions: Integers, vectors: Floats, columns: Columns) -> None:
        arrays = {
            name: np.array(values, object if self.columns[name] is str else self.columns[name])
            for name, values in columns.items()
        }
        # Copies: the caller may change what it passed.
        self._groups.append((positions.copy(), vectors.copy(), arrays))
        self._starts = np.append(self._starts, self._starts[-1] + len(positions))

    def _scan(self, where: Any) -> Iterator[Block]:
        for start, (positions, vectors, columns) in zip(self._starts, self._groups, strict=False):
            rows = np.arange(len(positions), dtype=np.int64)
            if where is not None:
                mask = np.asarray(where(columns))
                if mask.shape != rows.shape or mask.dtype != np.bool_:
                    raise ValueError(
                        f"`where` must give a boolean for each of {len(rows)} rows, got {mask.dtype} of shape "
                        f"{mask.shape}."
                    )
                rows = rows[mask]
            for at in range(0, len(rows), BLOCK_ROWS):
                some = rows[at : at + BLOCK_ROWS]
                whole = len(rows) == len(positions)  # then a view will do
                yield positions[some], start + some, vectors[at : at + BLOCK_ROWS] if whole else vectors[some]

    def _take(self, rows: Integers, columns: bool) -> tuple[Integers, Floats, Columns]:
        groups = np.searchsorted(self._starts, rows, side="right") - 1
        at = rows - self._starts[groups]
        positions, vectors = np.empty(len(rows), np.int64), np.empty((len(rows), self.dim), np.float32)
        values: dict[str, NDArray[Any]] = {name: np.empty(len(rows), object) for name in self.columns}
        for group in np.unique(groups):
            here = groups == group
            own, matrix, arrays = self._groups[group]
            positions[here], vectors[here] = own[at[here]], matrix[at[here]]
            if columns:
                for name, array in arrays.items():
                    values[name][here] = array[at[here]].tolist()
        return positions, vectors, {name: array.tolist() for name, array in values.items()} if columns else {}


class PositionSet:
    """A set of positions: a byte for each where they lie densely; blocks of `size` where they do not."""

    size = 2**14

    def __init__(self) -> None:
        self._blocks: dict[int, NDArray[np.bool_]] = {}

    def add(self, positions: Integers) -> None:
        for block, here in self._by_block(positions):
            self._blocks.setdefault(block, np.zeros(self.size, bool))[positions[here] % self.size] = True

    def holds(self, positions: Integers) -> NDArray[np.bool_]:
        """Which of some positions are in the set."""
        held = np.zeros(len(positions), bool)
        for block, here in self._by_block(positions):
            if block in self._blocks:
                held[here] = self._blocks[block][positions[here] % self.size]
        return held

    def _by_block(self, positions: Integers) -> Iterator[tuple[int, Integers]]:
        blocks = positions // self.size
        order = np.argsort(blocks, kind="stable")
        names, starts = np.unique(blocks[order], return_index=True)
        return zip(names.tolist(), np.split(order, starts[1:]), strict=bool(len(names)))


class _Screening:
    """The `width` largest magnitudes of float32 inner products of each query, block by block."""

    def __init__(self, queries: Floats, width: int) -> None:
        self.seen, self.width = 0, width
        self._scale = magnitude(queries)
        self._queries = queries / self._scale
        self._largest = 0.0
        self._values = torch.empty(len(queries), 0)
        self._rows = torch.empty(len(queries), 0, dtype=torch.int64)

    @property
    def rows(self) -> Integers:
        """Handles of the rows that were kept, largest magnitude first, shape ``(q, width)`` or fewer."""
        return self._rows.numpy()

    def floor(self) -> Floats:
        """The least magnitude that was kept of each query."""
        return self._values[:, -1].numpy() * self._scale[:, 0]

    def update(self, rows: Integers, vectors: Floats) -> None:
        magnitudes = torch.from_numpy(_magnitudes(self._queries, vectors))  # (q, t)
        with np.errstate(over="ignore"):
            squares = np.einsum("td,td->t", vectors, vectors)
        self._largest = max(self._largest, float(np.sqrt(squares.max(), dtype=np.float64)))
        self.seen += len(rows)
        values, places = magnitudes.topk(min(self.width, len(rows)), dim=1)
        self._values = torch.cat([self._values, values], 1)
        self._rows = torch.cat([self._rows, torch.from_numpy(rows)[places]], 1)
        if self._values.shape[1] > self.width:
            self._values, kept = self._values.topk(self.width, dim=1)  # in order: the last is the least
            self._rows = self._rows.gather(1, kept)

    def error(self) -> Floats:
        """By how much a float32 product of each query may be wrong, with any vector that was seen."""
        dim, norms = self._queries.shape[1], np.linalg.norm(self._queries, axis=1)
        with np.errstate(invalid="ignore"):  # NaN: in doubt
            # Rounding of the query, of the products and of their sum, and products too small for float32.
            return self._scale[:, 0] * ((dim + 4) * 2.0**-24 * norms * self._largest + dim * 2.0**-125)


def magnitude(queries: Floats) -> Floats:
    """The largest entry of each query, shape ``(q, 1)``; 1 for one of zeros."""
    largest = np.abs(queries).max(1, keepdims=True, initial=0)
    return np.where(largest > 0, largest, 1)


def _magnitudes(queries: Floats, vectors: Floats) -> Floats:
    """Magnitudes of the inner products in float32, ``(q, d), (t, d) -> (q, t)``.

    By numpy: with ``torch.set_float32_matmul_precision`` a user may have lowered the precision of torch's products.
    """
    queries = np.ascontiguousarray(queries, np.float32)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):  # what is infinite or NaN is in doubt
        # Few queries wait for the memory, and threads of a product only for each other.
        few = len(queries) <= _FEW
        dots = np.einsum("td,qd->qt", vectors, queries) if few else queries @ vectors.T
        return np.abs(dots, out=dots)


def _dots(query: Floats, vectors: Floats) -> Floats:
    """Inner products in float64; a row's value does not depend on the other rows, so equal vectors tie exactly."""
    return (vectors.astype(np.float64) * query).sum(1)


def rank_rows(query: Floats, positions: Integers, vectors: Floats, rows: Integers, k: int) -> Ranked:
    """The first `k` of some rows for a query, by magnitude of the inner product and then by position."""
    return _first(positions, _dots(query, vectors), rows, k)


def _first(positions: Integers, dots: Floats, rows: Integers, k: int) -> Ranked:
    order = np.lexsort((positions, -np.abs(dots)))[:k]
    return positions[order], dots[order], rows[order]


def joined_hits(parts: Sequence[Hits], names: Iterable[str]) -> Hits:
    """The hits of some queries, then those of more."""
    if not parts:
        nothing = torch.empty(0, 0, dtype=torch.int64)
        return Hits(nothing, nothing.double(), {name: [] for name in names})
    columns = {name: [row for part in parts for row in part.columns[name]] for name in names}
    return Hits(torch.cat([part.positions for part in parts]), torch.cat([part.dots for part in parts]), columns)


# ------------------------------------------------------------------------------------------------- what comes in


def as_dim(dim: int) -> int:
    """A positive integer."""
    if isinstance(dim, bool) or not isinstance(dim, int) or dim < 1:
        raise ValueError(f"`dim` must be a positive integer, got {dim!r}.")
    return dim


def as_identity(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Plain JSON values, as they come back from disk."""
    try:
        plain = json.loads(json.dumps(dict(identity), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise TypeError(f"`identity` must be plain JSON values, which {identity!r} is not ({error}).") from error
    return plain


def compare_identities(what: str, expected: Mapping[str, Any], came: Mapping[str, Any]) -> None:
    """Refuse an index of something else, naming what differs."""
    differences = [
        f"{key!r}: expected {_value(expected, key)}, came {_value(came, key)}"
        for key in sorted(expected.keys() | came.keys())
        if _value(expected, key) != _value(came, key)
    ]
    if differences:
        raise VectorIndexError(
            f"{what} is another one; {'; '.join(differences)}. Open the index of this model and projection, or build "
            "one in a folder of its own."
        )


def _value(identity: Mapping[str, Any], key: str) -> str:
    return json.dumps(identity[key], sort_keys=True) if key in identity else "nothing"


def as_column_types(columns: Mapping[str, type]) -> dict[str, type]:
    """Names that SQL takes without quotes, and types that both kinds of index keep as they are."""
    for name, kind in columns.items():
        if not isinstance(name, str) or not name.isidentifier() or not name.isascii() or name.startswith("_"):
            raise ValueError(
                f"The metadata column {name!r} must be named by ASCII letters, digits and '_', with a letter in front."
            )
        if name.lower() in ("position", "vector", "query_index"):
            raise ValueError(f"The metadata column {name!r} has the name of one that every index has: rename it.")
        if kind not in COLUMN_TYPES.values():
            raise TypeError(f"The metadata column {name!r} must be one of {list(COLUMN_TYPES)}, got {kind!r}.")
    if len({name.lower() for name in columns}) < len(columns):
        raise ValueError(f"Metadata columns may not differ in case only, got {list(columns)}.")
    return dict(columns)


def as_positions(positions: Any) -> Integers:
    """Integers, none negative, none twice."""
    array = positions.detach().cpu().numpy() if isinstance(positions, Tensor) else np.asarray(positions)
    if array.size == 0:
        array = array.astype(np.int64).reshape(-1)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"`positions` must be integers of shape (b,), got {array.dtype} of shape {array.shape}.")
    array = array.astype(np.int64)
    if (array < 0).any():
        raise ValueError(f"Positions in a dataset are not negative, got {int(array.min())}.")
    unique, counts = np.unique(array, return_counts=True)
    if (counts > 1).any():
        raise ValueError(
            f"Twice in a batch, where every training example may come once: {_listed(unique[counts > 1])}."
        )
    return array


def as_vectors(vectors: Any, dim: int, name: str, dtype: type[np.floating] = np.float32) -> Floats:
    """A matrix with `dim` columns; values beyond float32 become infinite, and the caller refuses those."""
    tensor = vectors if isinstance(vectors, Tensor) else torch.as_tensor(np.asarray(vectors))
    if tensor.ndim != 2 or tensor.shape[1] != dim or tensor.is_complex():
        raise ValueError(
            f"Expected `{name}` of shape (b, {dim}), as the index has dim={dim}, got {tensor.dtype} of shape "
            f"{tuple(tensor.shape)}: are they of another projection?"
        )
    kind = torch.float32 if dtype is np.float32 else torch.float64
    return np.ascontiguousarray(tensor.detach().to("cpu", kind).numpy())


def as_columns(columns: Mapping[str, Any], types: Mapping[str, type], rows: int) -> Columns:
    """`rows` plain Python values for every column."""
    if set(columns) != set(types):
        raise ValueError(f"Expected the metadata columns {sorted(types)}, got {sorted(columns)}.")
    return {name: _as_column(name, columns[name], kind, rows) for name, kind in types.items()}


def _as_column(name: str, values: Any, kind: type, rows: int) -> list[Any]:
    values = values.tolist() if isinstance(values, Tensor | np.ndarray) else list(values)
    if len(values) != rows:
        raise ValueError(f"Expected {rows} values of the metadata column {name!r}, got {len(values)}.")
    for i, value in enumerate(values):
        value = values[i] = value.item() if isinstance(value, np.generic | Tensor) else value
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise TypeError(
                f"The metadata column {name!r} holds {kind.__name__}, got {value!r}: convert it, and give a value such "
                "as '' or -1 where there is none."
            )
        if kind is int and not -(2**63) <= value < 2**63:
            raise ValueError(f"The metadata column {name!r} holds integers of 64 bits, got {value}.")
        if isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"The metadata column {name!r} holds Unicode text, got {value!r} ({error})."
                ) from error
    return [float(value) for value in values] if kind is float else values


def as_batch(batch: Any) -> Batch:
    """Positions and vectors, and columns if there are any."""
    if not isinstance(batch, tuple | list) or len(batch) not in (2, 3):
        raise ValueError(
            "Expected batches of (positions, vectors) or (positions, vectors, columns), got "
            f"{type(batch).__name__}{f' of length {len(batch)}' if isinstance(batch, tuple | list) else ''}."
        )
    return tuple(batch)  # type: ignore[return-value]


def _listed(positions: Integers) -> str:
    shown = ", ".join(map(str, positions[:5].tolist()))
    more = f" and {len(positions) - 5} more" if len(positions) > 5 else ""
    return f"position{'s' if len(positions) > 1 else ''} {shown}{more}"
