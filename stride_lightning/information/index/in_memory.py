"""An index in memory, for data that fit, or where no vector database is installed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from stride_lightning.information.index.base import BLOCK_ROWS, Block, VectorIndex
from stride_lightning.information.index.checks import Columns, Floats, Integers, PositionSet

#: Positions, vectors and metadata of rows that were appended together.
Group: TypeAlias = "tuple[Integers, Floats, dict[str, NDArray[Any]]]"


class MemoryIndex(VectorIndex):
    """An index in memory, with exact search; needs no database.

    Memory: ``4 dim`` bytes for each training example, and its metadata. ``where`` of a search is a function of the
    metadata columns, as arrays (those of text hold objects), that gives a boolean for each row.

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
        self._groups: list[Group] = []
        self._starts = np.zeros(1, np.int64)  # the first row of each group, and their number

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _known(self) -> PositionSet:
        return self._positions

    def _append(self, positions: Integers, vectors: Floats, columns: Columns) -> None:
        kinds = {name: object if kind is str else kind for name, kind in self.columns.items()}
        arrays = {name: np.array(values, kinds[name]) for name, values in columns.items()}
        self._groups.append((positions, vectors, arrays))
        self._starts = np.append(self._starts, self._starts[-1] + len(positions))

    def _check_where(self, where: Any) -> None:
        if where is not None and not callable(where):
            raise TypeError(
                f"`where` of an index in memory is a function of the columns, got {where!r}: pass for example "
                'lambda columns: columns["label"] == 3, or use InformationIndex, which takes SQL.'
            )

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

    def _vectors_of(self, rows: Integers) -> tuple[Integers, Floats]:
        parts = [(positions[at], vectors[at]) for (positions, vectors, _), at in self._by_group(rows)]
        positions, vectors = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return positions, vectors

    def _columns_of(self, rows: Integers) -> Columns:
        parts = [
            {name: array[at].tolist() for name, array in arrays.items()} for (*_, arrays), at in self._by_group(rows)
        ]
        return {name: [value for part in parts for value in part[name]] for name in self.columns}

    def _by_group(self, rows: Integers) -> Iterator[tuple[Group, Integers]]:
        """Groups, and the places within them of some sorted rows."""
        parts = np.split(rows, np.searchsorted(rows, self._starts[1:-1]))
        return ((group, part - start) for group, part, start in zip(self._groups, parts, self._starts, strict=False))
