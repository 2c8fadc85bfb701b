"""An index in memory, for data that fit, or where no vector database is installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stride_lightning.information.index.base import BLOCK_ROWS, Block, Hits, VectorIndex
from stride_lightning.information.index.checks import Columns, Floats, Integers, PositionSet


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
                try:
                    mask = np.asarray(where(columns))
                except KeyError as error:
                    raise ValueError(f"`where` asks for the column {error}; there are {sorted(columns)}.") from error
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
