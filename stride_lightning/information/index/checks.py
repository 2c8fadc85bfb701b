"""The input of a vector index, checked: rows, queries, conditions, and the identity of its origin."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats: TypeAlias = NDArray[np.floating]
Integers: TypeAlias = NDArray[np.int64]
#: Arrays by column: ``"position"``, ``"vector"`` and the metadata, with a value for each row.
Columns: TypeAlias = dict[str, NDArray[Any]]
Batch: TypeAlias = tuple[Any, Any] | tuple[Any, Any, Mapping[str, Any]]

COLUMN_TYPES = {"str": str, "int": int, "float": float, "bool": bool}


class VectorIndexError(RuntimeError):
    """An index on disk is damaged, of another layout, or of another model or projection than expected."""


class PositionSet:
    """A set of positions, in blocks of `size`: a byte for each position where they lie densely."""

    size = 2**14

    def __init__(self) -> None:
        self._blocks: dict[int, NDArray[np.bool_]] = {}

    def add(self, positions: Integers) -> None:
        """Add positions to the set."""
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


def as_identity(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Plain JSON values, as they come back from disk."""
    try:
        return json.loads(json.dumps(dict(identity), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"`identity` must be plain JSON values, which {identity!r} is not ({error}). Convert it, for instance "
            "tensors to lists."
        ) from error


def as_column_types(columns: Mapping[str, type]) -> dict[str, type]:
    """Names that LanceDB takes without quotes, and types that both kinds of index hold as they are."""
    for name, kind in columns.items():
        if not isinstance(name, str) or not name.isidentifier() or not name.isascii() or name.startswith("_"):
            raise ValueError(
                f"The metadata column {name!r} must be named by ASCII letters, digits and '_', with a letter in front."
            )
        if name.lower() in ("position", "vector"):
            raise ValueError(f"The metadata column {name!r} has the name of one that every index has: rename it.")
        if kind not in COLUMN_TYPES.values():
            raise TypeError(f"The metadata column {name!r} must be one of {list(COLUMN_TYPES)}, got {kind!r}.")
    if len({name.lower() for name in columns}) < len(columns):
        raise ValueError(f"Metadata columns may not differ in case only, got {list(columns)}.")
    return dict(columns)


def _as_positions(positions: Any) -> Integers:
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
            f"The batch holds {listed(unique[counts > 1])} twice, and every training example may come once."
        )
    return array


def _as_matrix(values: Any, dim: int, name: str, dtype: torch.dtype) -> Floats:
    """A matrix with `dim` columns; values beyond float32 become infinite."""
    tensor = values if isinstance(values, Tensor) else torch.as_tensor(np.asarray(values))
    if tensor.ndim != 2 or tensor.shape[1] != dim or tensor.is_complex():
        raise ValueError(
            f"Expected `{name}` of shape (b, {dim}), as the index has dim={dim}, got {tensor.dtype} of shape "
            f"{tuple(tensor.shape)}: are they of another projection?"
        )
    return np.ascontiguousarray(tensor.detach().to("cpu", dtype).numpy())


def as_queries(queries: Any, dim: int) -> Floats:
    """A finite float64 matrix with `dim` columns."""
    matrix = _as_matrix(queries, dim, "queries", torch.float64)
    if not (finite := np.isfinite(matrix).all(1)).all():
        raise ValueError(
            f"Query {int(np.flatnonzero(~finite)[0])} is not finite, so it ranks nothing. Mend it or leave it out."
        )
    return matrix


def as_rows(positions: Any, vectors: Any, columns: Any, dim: int, types: Mapping[str, type]) -> Columns:
    """Positions, float32 vectors and metadata of some training examples, as arrays of one length."""
    positions = _as_positions(positions)
    vectors = _as_matrix(vectors, dim, "vectors", torch.float32)
    if len(vectors) != len(positions):
        raise ValueError(f"Expected a vector for each of {len(positions)} positions, got {len(vectors)}.")
    if not (finite := np.isfinite(vectors).all(1)).all():
        raise ValueError(
            f"The vectors of {listed(positions[~finite])} are not finite as float32. Find the cause (a leverage "
            "at 1? a loss that diverged?), and mend those examples or leave them out."
        )
    columns = columns or {}
    if set(columns) != set(types):
        raise ValueError(f"Expected the metadata columns {sorted(types)}, got {sorted(columns)}.")
    metadata = {name: _as_column(name, as_list(columns[name]), kind, len(positions)) for name, kind in types.items()}
    return {"position": positions, "vector": vectors, **metadata}


def _as_column(name: str, values: list[Any], kind: type, rows: int) -> NDArray[Any]:
    """Values of a metadata column as an array; text as objects."""
    if len(values) != rows:
        raise ValueError(f"Expected {rows} values of the metadata column {name!r}, got {len(values)}.")
    for value in values:
        fits = type(value) is kind or (kind is float and type(value) is int)
        if not fits or (kind is int and not -(2**63) <= value < 2**63):
            raise TypeError(
                f"The metadata column {name!r} holds {'int of 64 bits' if kind is int else kind.__name__}, got "
                f"{value!r}: convert it, and give a value such as '' or -1 where there is none."
            )
    return np.array(values, object if kind is str else kind)


def check_where(where: Any) -> None:
    """Refuse a condition that is not a function."""
    if not callable(where):
        raise TypeError(
            "`where` must be a function of the columns that returns a boolean for each row, got "
            f'{where!r}. Pass for example lambda columns: columns["label"] == 3.'
        )


def as_mask(where: Any, columns: Columns) -> NDArray[np.bool_]:
    """Which rows meet a condition."""
    try:
        mask = np.asarray(where(columns))
    except KeyError as error:
        raise ValueError(f"`where` looks up the column {error}; there are {list(columns)}.") from error
    if mask.shape != (rows := columns["position"].shape) or mask.dtype != np.bool_:
        raise ValueError(
            f"`where` must return a boolean for each of {rows[0]} rows, got {mask.dtype} of shape {mask.shape}."
        )
    return mask


def as_list(values: Any) -> list[Any]:
    """Plain Python values, whatever array they come in."""
    plain = values.tolist() if hasattr(values, "tolist") else list(values)
    return [value.item() if isinstance(value, np.generic | Tensor) else value for value in plain]


def type_of(name: str, values: list[Any]) -> type:
    """The type of a metadata column."""
    kinds = {type(value) for value in values}
    if kinds == {int, float}:
        return float
    if len(kinds) != 1 or not kinds <= set(COLUMN_TYPES.values()):
        raise TypeError(
            f"The metadata column {name!r} must hold values of one type, one of {', '.join(COLUMN_TYPES)}; got "
            f"{', '.join(sorted(kind.__name__ for kind in kinds))}. Give a value such as '' or -1 where there is none."
        )
    return kinds.pop()


def as_batch(batch: Any) -> tuple[Any, Any, Any]:
    """Positions and vectors, and columns or None."""
    if isinstance(batch, tuple | list) and len(batch) in (2, 3):
        return batch[0], batch[1], batch[2] if len(batch) == 3 else None
    length = f" of length {len(batch)}" if isinstance(batch, tuple | list) else ""
    raise ValueError(
        "Expected batches of (positions, vectors) or (positions, vectors, columns), got "
        f"{type(batch).__name__}{length}."
    )


def listed(positions: Integers) -> str:
    """The first of some positions, for a message."""
    shown = ", ".join(map(str, positions[:5].tolist()))
    more = f" and {len(positions) - 5} more" if len(positions) > 5 else ""
    return f"position{'s' if len(positions) > 1 else ''} {shown}{more}"
