"""An index in memory, for data that fit, or where no vector database is installed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from stride_lightning.information.index.base import VectorIndex
from stride_lightning.information.index.checks import Columns, Integers


class MemoryIndex(VectorIndex):
    """An index in memory; needs no database.

    Memory: ``4 dim`` bytes for each training example, and its metadata.

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
        self._groups: list[Columns] = []  # rows that were appended together
        self._starts = np.zeros(1, np.int64)  # the first handle of each group, and the number of rows

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _append(self, rows: Columns) -> None:
        self._groups.append(rows)
        self._starts = np.append(self._starts, self._starts[-1] + len(rows["position"]))

    def _scan(self, names: list[str]) -> Iterator[tuple[Integers, Columns]]:
        for (start, stop), group in zip(pairwise(self._starts), self._groups, strict=True):
            yield np.arange(start, stop), {name: group[name] for name in names}

    def _read(self, handles: Integers, names: list[str]) -> tuple[Integers, Columns]:
        parts = []
        bounds = np.searchsorted(handles, self._starts)
        for (first, last), start, group in zip(pairwise(bounds), self._starts, self._groups, strict=False):
            if first < last:
                rows = handles[first:last] - start
                whole = rows[-1] - rows[0] + 1 == len(rows)  # then a view will do
                places = slice(rows[0], rows[-1] + 1) if whole else rows
                parts.append({name: group[name][places] for name in names})
        if len(parts) == 1:
            return handles, parts[0]
        return handles, {name: np.concatenate([part[name] for part in parts]) for name in names}
