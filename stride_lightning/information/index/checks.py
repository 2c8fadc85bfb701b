"""What comes into an index of vectors, and says whose vectors they are: checked, as plain arrays and values."""

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
Columns: TypeAlias = dict[str, list[Any]]
Batch: TypeAlias = tuple[Any, Any] | tuple[Any, Any, Mapping[str, Any]]

COLUMN_TYPES = {"str": str, "int": int, "float": float, "bool": bool}


class VectorIndexError(RuntimeError):
    """An index on disk is damaged, of another layout, or of another model or projection than expected."""


class PositionSet:
    """A set of positions: a byte for each where they lie densely; blocks of `size` where they do not."""

    size = 2**14

    def __init__(self) -> None:
        self._blocks: dict[int, NDArray[np.bool_]] = {}

    def add(self, positions: Integers) -> None:
        """Take positions in."""
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
        raise TypeError(f"`identity` must be plain JSON values, which {identity!r} is not ({error}).") from error


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
        raise ValueError(f"Twice in a batch, where every training example may come once: {listed(unique[counts > 1])}.")
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
    return {name: _as_column(name, as_list(columns[name]), kind, rows) for name, kind in types.items()}


def _as_column(name: str, values: list[Any], kind: type, rows: int) -> list[Any]:
    if len(values) != rows:
        raise ValueError(f"Expected {rows} values of the metadata column {name!r}, got {len(values)}.")
    for value in values:
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
                reason = f"The metadata column {name!r} holds Unicode text, got {value!r} ({error})."
                raise ValueError(reason) from error
    return [float(value) for value in values] if kind is float else values


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


def as_batch(batch: Any) -> Batch:
    """Positions and vectors, and columns if there are any."""
    if isinstance(batch, tuple | list) and len(batch) in (2, 3):
        return tuple(batch)  # type: ignore[return-value]
    length = f" of length {len(batch)}" if isinstance(batch, tuple | list) else ""
    raise ValueError(
        "Expected batches of (positions, vectors) or (positions, vectors, columns), got "
        f"{type(batch).__name__}{length}."
    )


def listed(positions: Integers) -> str:
    """A few positions, for a message."""
    shown = ", ".join(map(str, positions[:5].tolist()))
    more = f" and {len(positions) - 5} more" if len(positions) > 5 else ""
    return f"position{'s' if len(positions) > 1 else ''} {shown}{more}"
