"""Exact ranking by the magnitude of inner products: screened in single precision, decided in double."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import torch

from stride_lightning.information.index.checks import Floats, Integers

#: The best rows for a query: positions, inner products, row handles.
Ranked: TypeAlias = tuple[Integers, Floats, Integers]
NOTHING: Ranked = np.empty(0, np.int64), np.empty(0), np.empty(0, np.int64)

_FEW = 2


class Screening:
    """The `width` largest magnitudes of float32 inner products of each query, block by block."""

    def __init__(self, queries: Floats, width: int) -> None:
        self.seen, self.width = 0, width
        self._scale = magnitude(queries)
        self._queries = queries / self._scale
        self._largest = 0.0
        self._values = torch.empty(len(queries), 0)
        #: Handles of the candidates, largest magnitude first, shape ``(q, width)`` or fewer.
        self.rows = np.empty((len(queries), 0), np.int64)

    def floor(self) -> Floats:
        """The least magnitude that was kept of each query."""
        return self._values[:, -1].numpy() * self._scale[:, 0]

    def update(self, rows: Integers, vectors: Floats) -> None:
        """Look at more rows, by their handles."""
        products = torch.from_numpy(magnitudes(self._queries, vectors))  # (q, t)
        with np.errstate(over="ignore"):
            squares = np.einsum("td,td->t", vectors, vectors)
        self._largest = max(self._largest, float(np.sqrt(squares.max(), dtype=np.float64)))
        self.seen += len(rows)
        values, places = products.topk(min(self.width, len(rows)), dim=1)
        self._values = torch.cat([self._values, values], 1)
        self.rows = np.concatenate([self.rows, rows[places.numpy()]], 1)
        if self._values.shape[1] > self.width:
            self._values, places = self._values.topk(self.width, dim=1)  # in order: the last is the least
            self.rows = np.take_along_axis(self.rows, places.numpy(), 1)

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


def magnitudes(queries: Floats, vectors: Floats) -> Floats:
    """Magnitudes of the inner products in float32, ``(q, d), (t, d) -> (q, t)``.

    By numpy: with ``torch.set_float32_matmul_precision`` a user may have lowered the precision of torch's products.
    """
    queries = np.ascontiguousarray(queries, np.float32)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):  # what is infinite or NaN is in doubt
        # Few queries wait for the memory, and threads of a product only for each other.
        few = len(queries) <= _FEW
        dots = np.einsum("td,qd->qt", vectors, queries) if few else queries @ vectors.T
        return np.abs(dots, out=dots)


def dots_of(query: Floats, vectors: Floats) -> Floats:
    """Inner products in float64; a row's value does not depend on the other rows, so equal vectors tie exactly."""
    return (vectors.astype(np.float64) * query).sum(1)


def first_of(positions: Integers, dots: Floats, rows: Integers, k: int) -> Ranked:
    """The first `k` of some rows for a query, by magnitude of the inner product and then by position."""
    order = np.lexsort((positions, -np.abs(dots)))[:k]
    return positions[order], dots[order], rows[order]
