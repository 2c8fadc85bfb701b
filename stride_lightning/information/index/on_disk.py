"""Vectors of all training examples on disk, in LanceDB: built from a stream, filtered, searched exactly or nearly."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from stride_lightning.information.index.base import BLOCK_ROWS, Block, Hits, VectorIndex, joined_hits
from stride_lightning.information.index.checks import (
    COLUMN_TYPES,
    Columns,
    Floats,
    Integers,
    PositionSet,
    VectorIndexError,
    as_column_types,
    as_identity,
    compare_identities,
)
from stride_lightning.information.index.lance import (
    FORMAT,
    KEY,
    REPAIR,
    TABLE,
    explained,
    first_line,
    import_lancedb,
    is_index,
    matrix_of,
    named,
    table_schema,
)
from stride_lightning.information.index.ranking import magnitude, rank_rows
from stride_lightning.runtime.checks import check_count

__all__ = ["InformationIndex"]

_MIN_TRAINING_ROWS = 256  # of a product quantiser with one byte for each sub-vector


class InformationIndex(VectorIndex):
    """An index on disk, one row for each training example; memory does not grow with their number.

    The vectors have the variance correction folded in, so that the ranking by information is one by the squared inner
    product with the query's vector. Rows are appended in groups, each committed whole or not at all: after a kill,
    call :meth:`build` again. One process may write at a time; any number may read, and see the index as it was when
    they opened it. Nothing is ever unpickled. Files that are missing or cut are noticed; LanceDB keeps no checksums, so
    that a bit that flips within a vector is not.

    LanceDB warns in processes that are forked once it is imported, as the workers of a data loader may be on Linux:
    they do not touch the index, so the warning is harmless, and ``multiprocessing_context="forkserver"`` avoids it.

    Use :meth:`create` and :meth:`open`; needs ``pip install 'stride-lightning[index]'``.

    Example:
        >>> import tempfile
        >>> made_with = {"weights": "9f3c", "form": "removal"}
        >>> batches = [([7, 8], [[1.0, 0.0], [0.0, 2.0]], {"label": [0, 1]}), ([9], [[-3.0, 0.0]], {"label": [0]})]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     index = InformationIndex.create(folder, dim=2, identity=made_with, columns={"label": int})
        ...     num_rows = index.build(batches, total=3)
        ...     index = InformationIndex.open(folder, identity=made_with)
        ...     hits = index.search([[1.0, 0.5]], k=2)
        ...     filtered = index.search([[1.0, 0.5]], k=2, where="label = 1")
        >>> hits.positions, hits.dots, hits.columns, filtered.positions
        (tensor([[9, 7]]), tensor([[-3.,  1.]], dtype=torch.float64), {'label': [[0, 0]]}, tensor([[8]]))

    Reference:
        Product quantisation and inverted lists: Jegou, Douze and Schmid, "Product Quantization for Nearest Neighbor
        Search" (2011).
    """

    def __init__(self, path: Path, table: Any, dim: int, identity: dict[str, Any], columns: dict[str, type]) -> None:
        super().__init__(dim, identity, columns)
        self.path = path
        self._table = table
        self._positions: PositionSet | None = None
        self._version = table.version

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        dim: int,
        *,
        identity: Mapping[str, Any],
        columns: Mapping[str, type] | None = None,
        exist_ok: bool = False,
    ) -> InformationIndex:
        """Make an empty index.

        Args:
            path: Folder of the index; made if missing.
            dim: Length of the vectors.
            identity: Plain JSON values that say whose vectors these are: the weights' hash, the projection, the form
                of the variance correction, ...; :meth:`open` compares them.
            columns: Metadata columns by name: ``str``, ``int``, ``float`` or ``bool``.
            exist_ok: Open the index if there is one, and check that it was made with the same arguments.

        Raises:
            ModuleNotFoundError: If LanceDB is not installed.
            FileExistsError: If there is an index and `exist_ok` is false.
            VectorIndexError: If the index that is there is another one, or damaged.
        """
        lancedb = import_lancedb()
        path = Path(path)
        dim = check_count("dim", dim)
        identity, types = as_identity(identity), as_column_types(columns or {})
        if path.exists() and not path.is_dir():
            raise FileExistsError(f"'{path}' is a file: give the folder of the index.")
        if is_index(path):
            if not exist_ok:
                raise FileExistsError(f"There is an index at '{path}': open it, delete it, or pass exist_ok=True.")
            index = cls.open(path, identity)
            if (index.dim, index.columns) != (dim, types):
                raise VectorIndexError(
                    f"The index '{path}' has dim={index.dim} and columns {named(index.columns)}; expected dim={dim} "
                    f"and {named(types)}. Build another one in a folder of its own."
                )
            return index
        if any((path / f"{TABLE}.lance").glob("data/*")):
            raise VectorIndexError(f"The index '{path}' has data and no version that says what they are. {REPAIR}")
        path.mkdir(parents=True, exist_ok=True)
        with explained(path):
            # A creation that was killed leaves a folder without a version and without data, which is overwritten.
            mode = "overwrite" if (path / f"{TABLE}.lance").exists() else "create"
            table = lancedb.connect(path).create_table(TABLE, schema=table_schema(dim, identity, types), mode=mode)
            return cls(path, table, dim, identity, types)

    @classmethod
    def open(cls, path: str | os.PathLike[str], identity: Mapping[str, Any] | None = None) -> InformationIndex:
        """Open an index.

        Args:
            path: Folder of the index.
            identity: If given, the keys and values that the index must have been made with, all of them.

        Raises:
            ModuleNotFoundError: If LanceDB is not installed.
            FileNotFoundError: If there is no index.
            VectorIndexError: If the index is damaged, of a later layout, or of another identity.
        """
        lancedb = import_lancedb()
        path = Path(path)
        if not (path / f"{TABLE}.lance").is_dir():
            raise FileNotFoundError(f"No index at '{path}': make one with InformationIndex.create.")
        with explained(path):
            table = lancedb.connect(path).open_table(TABLE)
            schema = table.schema
        try:
            made = json.loads((schema.metadata or {})[KEY])
            layout, dim, made_for = made["format"], made["dim"], made["identity"]
            types = {name: COLUMN_TYPES[kind] for name, kind in made["columns"].items()}
            written = table_schema(dim, made_for, types)
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise VectorIndexError(f"'{path}' holds a table that is not an InformationIndex ({error!r}).") from error
        if layout != FORMAT or not schema.equals(written):
            raise VectorIndexError(
                f"The index '{path}' has layout {layout!r} and columns {schema.names}; expected layout {FORMAT} and "
                f"{written.names}. Read it with the version of the library that wrote it."
            )
        if identity is not None:
            compare_identities(f"The index '{path}'", as_identity(identity), made_for)
        return cls(path, table, dim, made_for, types)

    def __len__(self) -> int:
        with explained(self.path):
            return self._table.count_rows()

    @property
    def has_ann(self) -> bool:
        """Whether :meth:`create_ann` was called, so that searches may be approximate."""
        with explained(self.path):
            return bool(list(self._table.list_indices()))

    def search(
        self,
        queries: Any,
        k: int = 10,
        where: str | None = None,
        *,
        exact: bool = True,
        nprobes: int = 20,
        refine_factor: int = 20,
    ) -> Hits:
        """The training examples with the largest squared inner product; exact: ties in order of positions.

        The exact search reads all vectors once for up to 1,024 queries together. The approximate one looks up
        ``+query`` and ``-query`` in the index of :meth:`create_ann` and merges. It looks through rows appended since
        exactly, and searches exactly for queries where the lists that were probed hold fewer than `k` rows that meet
        `where`. The inner products that are returned are exact in both.

        Args:
            queries: Shape ``(q, dim)``.
            k: How many to find; all rows if there are fewer.
            where: Which rows to look at, as SQL on the metadata columns and ``position``: ``"label = 3 and length <
                20"``, ``"path like 'cats/%'"``. Text stands in single quotes, and a quote in it is doubled:
                ``"author = 'O''Brien'"``.
            exact: Whether to look at every vector.
            nprobes: Approximate search: how many lists of vectors to look through.
            refine_factor: Approximate search: candidates, in multiples of `k`, whose vectors are read and compared.

        Raises:
            ValueError: If a query does not fit, `where` is not understood, or there is no approximate index.
            VectorIndexError: If the index is damaged.
        """
        queries = self._checked_query(queries, k)
        if where is not None and not isinstance(where, str):
            raise TypeError(f"`where` of an index on disk is SQL text such as 'label = 3', got {where!r}.")
        if where is not None:
            self._check_condition(where)
        if exact:
            return self._search_exactly(queries, k, where)
        check_count("nprobes", nprobes)
        check_count("refine_factor", refine_factor)
        if not self.has_ann:
            raise ValueError("There is no approximate index: call `create_ann()` first, or search with exact=True.")
        step = max(1, min(128, 2**28 // (8 * self.dim * k)))
        parts = [
            self._nearly(queries[at : at + step], k, where, nprobes, refine_factor)
            for at in range(0, len(queries), step)
        ]
        return joined_hits(parts, self.columns)

    def create_ann(self, num_partitions: int | None = None, num_sub_vectors: int | None = None) -> None:
        """Build the approximate index (IVF-PQ by inner product), or build it anew after rows were appended.

        It is trained on a sample, so memory stays bounded; the codes are written to the temporary folder on the way.

        Args:
            num_partitions: Lists into which the vectors are sorted; by default one for about 8,192 rows.
            num_sub_vectors: Bytes for each vector; must divide `dim`. By default about ``dim / 4``. Fewer: made
                faster, and more candidates (`refine_factor`) are needed for the same recall.

        Raises:
            ValueError: If there are fewer than 256 rows, or `num_sub_vectors` does not divide `dim`.
        """
        if num_sub_vectors is not None and (num_sub_vectors < 1 or self.dim % num_sub_vectors):
            raise ValueError(f"`num_sub_vectors` must divide dim={self.dim}, got {num_sub_vectors}.")
        if num_partitions is not None:
            check_count("num_partitions", num_partitions)
        self._refresh()
        if (rows := len(self)) < _MIN_TRAINING_ROWS:
            raise ValueError(
                f"An approximate index is trained on {_MIN_TRAINING_ROWS} rows or more, and there are {rows}: search "
                "with exact=True, which is fast for so few."
            )
        lengths = [length for length in range(1, self.dim + 1) if self.dim % length == 0]
        length = min(lengths, key=lambda length: abs(math.log2(length / 4)))
        with explained(self.path):
            from lancedb.index import IvfPq

            config = IvfPq(
                distance_type="dot",
                num_partitions=num_partitions,
                num_sub_vectors=num_sub_vectors or self.dim // length,
            )
            self._table.create_index("vector", config=config, replace=True)
            self._version = self._table.version

    def compact(self) -> None:
        """Merge small groups of rows, fold appended ones into the approximate index, and free space.

        Old versions are deleted, and with them what killed processes have left: no other process may write meanwhile,
        and one that reads must open the index again.
        """
        self._refresh()
        with explained(self.path):
            self._table.optimize(cleanup_older_than=timedelta(milliseconds=1), delete_unverified=True)
            self._version = self._table.version

    # ------------------------------------------------------------------------------------------------ how it is kept

    def _refresh(self) -> None:
        """Look at the newest version, which another process may have written."""
        with explained(self.path):
            self._table.checkout_latest()
            if self._table.version != self._version:
                self._positions, self._version = None, self._table.version

    def _known(self) -> PositionSet:
        self._refresh()
        if self._positions is None:
            known = PositionSet()
            with explained(self.path):
                for batch in self._table.search().select(["position"]).to_batches(BLOCK_ROWS):
                    known.add(batch["position"].to_numpy())
            self._positions = known
        return self._positions

    def _append(self, positions: Integers, vectors: Floats, columns: Columns) -> None:
        import pyarrow as pa

        schema = table_schema(self.dim, self.identity, self.columns)
        lists = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), self.dim)
        data = pa.table([pa.array(positions), lists, *columns.values()], schema=schema)
        with explained(self.path):
            self._table.checkout_latest()
            if self._table.version != self._version:
                self._positions = None
                raise VectorIndexError(
                    f"Another process has written to the index '{self.path}', and one may write at a time: when it is "
                    "done, build again, which skips what is there."
                )
            self._table.add(data)
            self._version = self._table.version

    def _check_condition(self, where: str) -> None:
        try:
            self._table.search().where(where).select(["position"]).explain_plan()
        except (ValueError, RuntimeError) as error:
            raise ValueError(
                f"where={where!r} is not understood: {first_line(error)} The columns are {named(self.columns)} and "
                "position; text stands in single quotes, a quote in it doubled."
            ) from error

    def _scan(self, where: Any) -> Iterator[Block]:
        with explained(self.path):
            scan = self._table.search()
            if where is not None:
                scan = scan.where(where)
            for batch in scan.select(["position", "vector"]).with_row_id(True).to_batches(BLOCK_ROWS):
                positions, rows = batch["position"].to_numpy(), batch["_rowid"].to_numpy().astype(np.int64)
                vectors = matrix_of(batch["vector"], self.dim)
                for at in range(0, len(rows), BLOCK_ROWS):  # a batch may be larger than asked for
                    some = slice(at, at + BLOCK_ROWS)
                    yield positions[some], rows[some], vectors[some]

    def _take(self, rows: Integers, columns: bool) -> tuple[Integers, Floats, Columns]:
        if not len(rows):
            return np.empty(0, np.int64), np.empty((0, self.dim), np.float32), {name: [] for name in self.columns}
        names = ["position", *(self.columns if columns else ["vector"])]
        with explained(self.path):
            found = self._table.take_row_ids(rows.tolist()).select(names).with_row_id().to_arrow()
            found = found.combine_chunks().sort_by("_rowid")
            vectors = np.empty((0, self.dim), np.float32)
            if not columns:
                vectors = matrix_of(found["vector"].combine_chunks(), self.dim)
            values = {name: found[name].to_pylist() for name in self.columns} if columns else {}
            return found["position"].to_numpy(), vectors, values

    def _nearly(self, queries: Floats, k: int, where: str | None, nprobes: int, refine_factor: int) -> Hits:
        # The scale of a query leaves its ranking alone. LanceDB ranks by 1 - dot in float32, which is 1 for all small
        # products alike: they are made large.
        scaled = queries / magnitude(queries) * 2.0**40
        both = np.concatenate([scaled, -scaled]).astype(np.float32)
        with explained(self.path):
            search = self._table.search(list(both), vector_column_name="vector").distance_type("dot")
            if where is not None:
                search = search.where(where)
            search = search.nprobes(nprobes).refine_factor(refine_factor).limit(k)
            names = ["position", "vector", "_distance", "query_index"]
            found = search.select(names).with_row_id(True).to_arrow().combine_chunks()
        owners = found["query_index"].to_numpy() % len(queries)
        rows, positions = found["_rowid"].to_numpy().astype(np.int64), found["position"].to_numpy()
        vectors = matrix_of(found["vector"].combine_chunks(), self.dim)
        ranked = []
        for i, query in enumerate(queries):
            own = np.flatnonzero(owners == i)
            own = own[np.unique(positions[own], return_index=True)[1]]
            ranked.append(rank_rows(query, positions[own], vectors[own], rows[own], k))
        if short := [i for i, (_, dots, _) in enumerate(ranked) if len(dots) < k]:
            exact = self._screened(queries[short], k, where)
            for i, found_exactly in zip(short, exact, strict=True):
                ranked[i] = found_exactly
        return self._hits(ranked)
