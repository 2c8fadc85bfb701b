"""LanceDB, as an index uses it: the table's schema, errors with a remedy, columns as arrays."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from stride_lightning.information.index.checks import COLUMN_TYPES, Columns, Integers, VectorIndexError

TABLE, KEY, FORMAT = "vectors", b"stride_lightning", 1
REPAIR = "Restore the folder from a copy, or delete it and build the index again."


def table_schema(dim: int, identity: Mapping[str, Any], columns: Mapping[str, type]) -> Any:
    """The schema of the table, with the arguments of the index in its metadata: one file, one commit."""
    import pyarrow as pa

    types = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
    made = {
        "format": FORMAT,
        "dim": dim,
        "identity": dict(identity),
        "columns": {name: kind.__name__ for name, kind in columns.items()},
    }
    fields = [
        pa.field("position", pa.int64(), nullable=False),
        pa.field("vector", pa.list_(pa.float32(), dim), nullable=False),
        *(pa.field(name, types[kind], nullable=False) for name, kind in columns.items()),
    ]
    return pa.schema(fields, metadata={KEY: json.dumps(made).encode()})


def read_schema(schema: Any) -> dict[str, Any]:
    """The arguments of the index of a table; errors of any kind if the table is not that of an index."""
    made = json.loads((schema.metadata or {})[KEY])
    return made | {"columns": {name: COLUMN_TYPES[kind] for name, kind in made["columns"].items()}}


def import_lancedb() -> ModuleType:
    """The module, or an error that says how to install it."""
    try:
        import lancedb
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "InformationIndex needs LanceDB: pip install 'stride-lightning[index]'. Without it, MemoryIndex searches "
            "exactly, in memory."
        ) from error
    return lancedb


def is_index(path: str | os.PathLike[str]) -> bool:
    """Whether a folder holds an index: a table that was ever committed."""
    folder = Path(path) / f"{TABLE}.lance" / "_versions"
    return folder.is_dir() and any(folder.glob("*.manifest"))


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Raise errors of LanceDB as a :class:`VectorIndexError` that names the index and the repair."""
    try:
        yield
    except VectorIndexError:
        raise
    except (ValueError, RuntimeError, OSError) as error:
        text = re.sub(r",? /\S*\.rs:\d+.*", "", str(error).split("\n")[0])  # a line in LanceDB's source
        text = text.strip()[:300].rstrip(".") or type(error).__name__
        raise VectorIndexError(f"The index '{path}' cannot be used: {text}. {REPAIR}") from error


def named(columns: Mapping[str, type]) -> str:
    """Columns and their types, for a message."""
    return "{" + ", ".join(f"{name}: {kind.__name__}" for name, kind in columns.items()) + "}"


def as_arrays(batch: Any, dim: int) -> tuple[Integers, Columns]:
    """The row ids of an Arrow batch, and its columns: vectors as a matrix, text as objects."""
    arrays = {
        name: batch[name].flatten().to_numpy().reshape(-1, dim)
        if name == "vector"
        else batch[name].to_numpy(zero_copy_only=False)
        for name in batch.schema.names
    }
    return arrays.pop("_rowid").astype(np.int64), arrays
