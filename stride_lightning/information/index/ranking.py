"""Exact ranking by the magnitude of inner products: screened in single precision, decided in double."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import torch

from stride_lightning.information.index.checks import Columns, Floats, Integers

#: From handles of rows, sorted and unique, to handles and ``"position"`` and ``"vector"`` of these, in any order.
Read: TypeAlias = Callable[[Integers], tuple[Integers, Columns]]
#: The best rows for a query: positions, inner products in float64, handles.
Ranked: TypeAlias = tuple[Integers, Floats, Integers]

BLOCK_ROWS = 8192  # rows multiplied at once
QUERIES = 1024  # queries multiplied at once
_FEW = 4  # queries whose products wait for memory: threads of a matrix product would only wait for each other
_NOTHING: Ranked = np.empty(0, np.int64), np.empty(0), np.empty(0, np.int64)


def rank(queries: Floats, k: int, handles: Integers, read: Read) -> list[Ranked]:
    """The best `k` rows (or all) for each query, by magnitude of the inner product and then by position.

    Each block of rows is multiplied with all queries in float32. A row is ranked in float64 where its float32 product,
    with all that may be wrong with it, reaches the best `k` before it and of its block. So no row is missed.

    Args:
        queries: Float64, ``(q, dim)``.
        k: How many rows for each query.
        handles: Rows to rank, sorted and unique.
        read: Reads some of these rows, their vectors in float32.
    """
    dim = queries.shape[1]
    scale = np.abs(queries).max(1, keepdims=True)
    scale[scale == 0] = 1
    scaled = (queries / scale).astype(np.float32)
    # How wrong a product may be, over the norm of the vector: the query, the products and their sum are rounded.
    rounding = (1.1 * dim + 8) * 2.0**-24 * np.linalg.norm(queries / scale, axis=1, keepdims=True)
    ranked, least = [_NOTHING] * len(queries), np.full((len(queries), 1), -np.inf)
    for at in range(0, len(handles), BLOCK_ROWS):
        block, rows = read(handles[at : at + BLOCK_ROWS])
        vectors = rows["vector"]
        # Where vectors are beyond float32 the error is infinite, and all rows of the block are ranked.
        with np.errstate(over="ignore", invalid="ignore", under="ignore"):
            squares = np.einsum("td,td->t", vectors, vectors)
            # The squares of the tiniest entries vanish from a norm.
            error = rounding * (float(squares.max()) ** 0.5 + dim * 2.0**-63)
            magnitudes, bound = _magnitudes(scaled, vectors), least
            if len(block) >= k:
                kth = torch.from_numpy(magnitudes).topk(k).values[:, -1:].numpy()
                bound = np.fmax(least, kth - error)  # the larger, or the one that is not NaN
            near = ~(magnitudes < (bound - error).astype(np.float32))
        for query in np.flatnonzero(near.any(1)):
            some, (positions, dots, places) = near[query], ranked[query]
            positions = np.concatenate([positions, rows["position"][some]])
            dots = np.concatenate([dots, _dots(queries[query], vectors[some])])
            places = np.concatenate([places, block[some]])
            order = np.lexsort((positions, -np.abs(dots)))[:k]
            ranked[query] = positions[order], dots[order], places[order]
            if len(order) == k:
                least[query] = abs(dots[order[-1]]) / scale[query]
    return ranked


def _magnitudes(queries: Floats, vectors: Floats) -> Floats:
    """Magnitudes of the inner products, ``(q, d), (b, d) -> (q, b)``.

    By numpy: with ``torch.set_float32_matmul_precision`` a user may have lowered the precision of torch's products.
    """
    dots = np.einsum("td,qd->qt", vectors, queries) if len(queries) <= _FEW else queries @ vectors.T
    return np.abs(dots, out=dots)


def _dots(query: Floats, vectors: Floats) -> Floats:
    """Inner products in float64; a row's value does not depend on the other rows, so equal vectors tie exactly."""
    return (vectors.astype(np.float64) * query).sum(1)
