"""Rows of an index, and the result that a search of them must have."""

import numpy as np
import torch

COLUMNS = {"label": int, "text": str, "weight": float, "clean": bool}
IDENTITY = {"weights": "9f3c", "projection": {"seed": 0, "dim": 16}}


def example_rows(rows=300, dim=16, seed=0):
    """Rows in no order, with duplicates, zero vectors, and norms over four decades."""
    rng = np.random.default_rng(seed)
    vectors = (rng.standard_normal((rows, dim)) * 10 ** rng.uniform(-2, 2, (rows, 1))).astype(np.float32)
    vectors[rows // 2 : rows // 2 + 40] = vectors[3]
    vectors[5:9] = -vectors[3]
    vectors[20:30] = 0
    positions = rng.permutation(2 * rows)[:rows]
    columns = {
        "label": positions % 7,
        "text": ["it's", "ünï", ""] * (rows // 3),
        "weight": rng.random(rows),
        "clean": torch.from_numpy(positions % 2 == 0),
    }
    return positions, vectors, columns


def batches(rows, size):
    positions, vectors, columns = rows
    for at in range(0, len(positions), size):
        here = slice(at, at + size)
        yield positions[here], vectors[here], {name: values[here] for name, values in columns.items()}


def queries(count=12, dim=16, seed=1):
    return np.random.default_rng(seed).standard_normal((count, dim))


def brute_force(rows, queries, k, mask=None):
    positions, vectors, _ = rows
    passing = np.arange(len(positions)) if mask is None else np.flatnonzero(mask)
    dots = np.stack([(vectors[passing].astype(np.float64) * query).sum(1) for query in queries])
    order = [np.lexsort((positions[passing], -np.abs(row)))[:k] for row in dots]
    return np.stack([positions[passing][o] for o in order]), np.stack([d[o] for d, o in zip(dots, order, strict=True)])


def as_columns(rows):
    """The columns of rows as a condition sees them."""
    arrays = {
        name: np.array(values, object) if name == "text" else np.asarray(values) for name, values in rows[2].items()
    }
    return {"position": rows[0], **arrays}


def contents(index):
    """All rows of an index on disk, by position."""
    table = index._table.to_arrow().sort_by("position")
    return {name: table[name].to_pylist() for name in table.schema.names}
