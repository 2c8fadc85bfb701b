"""Vectors of all training examples on disk, in LanceDB: built from a stream, filtered, searched exactly or nearly."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from stride_lightning.information.index import lance
from stride_lightning.information.index.base import BLOCK_ROWS, Block, Hits, VectorIndex
from stride_lightning.information.index.checks import Columns, Floats, Integers, PositionSet, VectorIndexError
from stride_lightning.information.index.ranking import Ranked, dots_of, first_of, magnitude
from stride_lightning.runtime.checks import check_count

_MIN_TRAINING_ROWS = 256  # of a product quantiser with one byte for each sub-vector


class InformationIndex(VectorIndex):
    """An index on disk, one row for each training example; memory does not grow with their number.

    Rows are appended in groups, each committed whole or not at all: after a kill, call :meth:`build` again. One process
    may write at a time; any number may read, and see the index as it was when they opened it. Nothing is ever
    unpickled. Files that are missing or cut are noticed; LanceDB keeps no checksums, so that a bit that flips within a
    vector is not. LanceDB warns in processes that are forked once it is imported, as the workers of a data loader may
    be on Linux: they do not touch the index, so the warning is harmless, and ``multiprocessing_context="forkserver"``
    avoids it.

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

    Reference: Jegou, Douze and Schmid 2011, Product quantization for nearest neighbor search.
    """

    def __init__(
        self, path: Path, dim: int, identity: Mapping[str, Any] | None, columns: Mapping[str, type] | None
    ) -> None:
        super().__init__(dim, identity, columns)
        self.path, self.name = path, f"The index '{path}'"
        self._schema = lance.table_schema(self.dim, self.identity, self.columns)
        self._table: Any = None
        self._version = 0
        self._positions: PositionSet | None = None

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
        """Make an empty index in a folder, which is made if missing; the other arguments as for :class:`VectorIndex`.

        With `exist_ok` an index that is there is opened if it was made with the same arguments.

        Raises:
            ModuleNotFoundError: If LanceDB is not installed.
            FileExistsError: If there is an index and `exist_ok` is false.
            VectorIndexError: If the index that is there is another one, or damaged.
        """
        lancedb = lance.import_lancedb()
        path = Path(path)
        index = cls(path, dim, identity, columns)
        if path.exists() and not path.is_dir():
            raise FileExistsError(f"'{path}' is a file: give the folder of the index.")
        if lance.is_index(path):
            if not exist_ok:
                raise FileExistsError(f"There is an index at '{path}': open it, delete it, or pass exist_ok=True.")
            there = cls.open(path, index.identity)
            if (there.dim, there.columns) != (index.dim, index.columns):
                raise VectorIndexError(
                    f"{there.name} has dim={there.dim} and columns {lance.named(there.columns)}; expected "
                    f"dim={dim} and {lance.named(index.columns)}. Build another one in a folder of its own."
                )
            return there
        folder = path / f"{lance.TABLE}.lance"
        if any(folder.glob("data/*")):
            raise VectorIndexError(f"{index.name} has data and no version that says what they are. {lance.REPAIR}")
        path.mkdir(parents=True, exist_ok=True)
        # A creation that was killed leaves a folder without a version and without data, which is overwritten.
        mode = "overwrite" if folder.exists() else "create"
        with index._writing():
            index._table = lancedb.connect(path).create_table(lance.TABLE, schema=index._schema, mode=mode)
        return index

    @classmethod
    def open(cls, path: str | os.PathLike[str], identity: Mapping[str, Any] | None = None) -> InformationIndex:
        """Open the index in a folder; one of another identity, if that is given, is refused.

        Raises:
            ModuleNotFoundError: If LanceDB is not installed.
            FileNotFoundError: If there is no index.
            VectorIndexError: If the index is damaged, of a later layout, or of another identity.
        """
        lancedb = lance.import_lancedb()
        path = Path(path)
        if not (path / f"{lance.TABLE}.lance").is_dir():
            raise FileNotFoundError(f"No index at '{path}': make one with InformationIndex.create.")
        with lance.explained(path):
            table = lancedb.connect(path).open_table(lance.TABLE)
            schema, version = table.schema, table.version
        try:
            made = lance.read_schema(schema)
            index = cls(path, made["dim"], made["identity"], made["columns"])
            layout = made["format"]
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise VectorIndexError(f"'{path}' holds a table that is not an InformationIndex ({error!r}).") from error
        if layout != lance.FORMAT or not schema.equals(index._schema):
            raise VectorIndexError(
                f"{index.name} has layout {layout!r} and columns {schema.names}; expected layout {lance.FORMAT} and "
                f"{index._schema.names}. Read it with the version of the library that wrote it."
            )
        index._table, index._version = table, version
        if identity is not None:
            index.check_identity(identity)
        return index

    def __len__(self) -> int:
        with lance.explained(self.path):
            return self._table.count_rows()

    @property
    def has_ann(self) -> bool:
        """Whether :meth:`create_ann` was called, so that searches may be approximate."""
        with lance.explained(self.path):
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
        ``+query`` and ``-query`` in `nprobes` lists of the index of :meth:`create_ann`, and compares `refine_factor`
        times `k` vectors; rows appended since, and queries whose lists hold fewer than `k` rows that meet `where`, are
        searched exactly. Inner products are exact in both.

        `where` is SQL on the metadata columns and ``position``: ``"label = 3 and length < 20"``, ``"path like
        'cats/%'"``; a quote in a text is doubled: ``"author = 'O''Brien'"``.

        Raises:
            ValueError: If a query does not fit, `where` is not understood, or there is no approximate index.
            VectorIndexError: If the index is damaged.
        """
        if exact:
            return super().search(queries, k, where)
        queries = self._checked_queries(queries, k)
        self._check_where(where)
        check_count("nprobes", nprobes)
        check_count("refine_factor", refine_factor)
        if not self.has_ann:
            raise ValueError("There is no approximate index: call `create_ann()` first, or search with exact=True.")
        step = max(1, min(128, 2**28 // (8 * self.dim * k)))
        return self._in_groups(queries, step, lambda some: self._nearly(some, k, where, nprobes, refine_factor))

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
        num_sub_vectors = num_sub_vectors or self.dim // min(lengths, key=lambda length: abs(math.log2(length / 4)))
        with self._writing():
            from lancedb.index import IvfPq

            config = IvfPq(distance_type="dot", num_partitions=num_partitions, num_sub_vectors=num_sub_vectors)
            self._table.create_index("vector", config=config, replace=True)

    def compact(self) -> None:
        """Merge small groups of rows, fold appended ones into the approximate index, and delete old versions.

        What killed processes have left goes too: no other process may write meanwhile, and readers must open it again.
        """
        self._refresh()
        with self._writing():
            self._table.optimize(cleanup_older_than=timedelta(milliseconds=1), delete_unverified=True)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Errors explained, and the version that is written known as this process's."""
        with lance.explained(self.path):
            yield
            self._version = self._table.version

    def _refresh(self) -> None:
        """Look at the newest version, which another process may have written."""
        with lance.explained(self.path):
            self._table.checkout_latest()
            if self._table.version != self._version:
                self._positions, self._version = None, self._table.version

    def _known(self) -> PositionSet:
        self._refresh()
        if self._positions is None:
            known = PositionSet()
            with lance.explained(self.path):
                for batch in self._table.search().select(["position"]).to_batches(BLOCK_ROWS):
                    known.add(batch["position"].to_numpy())
            self._positions = known
        return self._positions

    def _append(self, positions: Integers, vectors: Floats, columns: Columns) -> None:
        import pyarrow as pa

        lists = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), self.dim)
        data = pa.table([pa.array(positions), lists, *columns.values()], schema=self._schema)
        with self._writing():
            self._table.checkout_latest()
            if self._table.version != self._version:
                self._positions = None
                raise VectorIndexError(
                    f"Another process has written to the index '{self.path}', and one may write at a time: when it is "
                    "done, build again, which skips what is there."
                )
            self._table.add(data)

    def _check_where(self, where: Any) -> None:
        if where is None:
            return
        if not isinstance(where, str):
            raise TypeError(f"`where` of an index on disk is SQL text such as 'label = 3', got {where!r}.")
        try:
            self._table.search().where(where).select(["position"]).explain_plan()
        except (ValueError, RuntimeError) as error:
            raise ValueError(
                f"where={where!r} is not understood: {lance.first_line(error)} The columns are "
                f"{lance.named(self.columns)} and position; text stands in single quotes, a quote in it doubled."
            ) from error

    def _scan(self, where: Any) -> Iterator[Block]:
        with lance.explained(self.path):
            scan = self._table.search() if where is None else self._table.search().where(where)
            for batch in scan.select(["position", "vector"]).with_row_id(True).to_batches(BLOCK_ROWS):
                positions, rows = batch["position"].to_numpy(), batch["_rowid"].to_numpy().astype(np.int64)
                vectors = lance.matrix_of(batch["vector"], self.dim)
                for at in range(0, len(rows), BLOCK_ROWS):  # a batch may be larger than asked for
                    some = slice(at, at + BLOCK_ROWS)
                    yield positions[some], rows[some], vectors[some]

    def _take(self, rows: Integers, names: list[str]) -> Any:
        """Columns of the table at some rows, in their order."""
        with lance.explained(self.path):
            table = self._table.take_row_ids(rows.tolist()).select(names).with_row_id().to_arrow()
            return table.combine_chunks().sort_by("_rowid")

    def _vectors_of(self, rows: Integers) -> tuple[Integers, Floats]:
        table = self._take(rows, ["position", "vector"])
        return table["position"].to_numpy(), lance.matrix_of(table["vector"].combine_chunks(), self.dim)

    def _columns_of(self, rows: Integers) -> Columns:
        table = self._take(rows, list(self.columns))
        return {name: table[name].to_pylist() for name in self.columns}

    def _nearly(self, queries: Floats, k: int, where: str | None, nprobes: int, refine_factor: int) -> list[Ranked]:
        # The scale of a query leaves its ranking alone. LanceDB ranks by 1 - dot in float32, which is 1 for all small
        # products alike: they are made large.
        scaled = queries / magnitude(queries) * 2.0**40
        both = np.concatenate([scaled, -scaled]).astype(np.float32)
        with lance.explained(self.path):
            search = self._table.search(list(both), vector_column_name="vector").distance_type("dot")
            if where is not None:
                search = search.where(where)
            search = search.nprobes(nprobes).refine_factor(refine_factor).limit(k)
            names = ["position", "vector", "_distance", "query_index"]
            table = search.select(names).with_row_id(True).to_arrow().combine_chunks()
        owners = table["query_index"].to_numpy() % len(queries)
        rows, positions = table["_rowid"].to_numpy().astype(np.int64), table["position"].to_numpy()
        vectors = lance.matrix_of(table["vector"].combine_chunks(), self.dim)
        ranked = []
        for i, query in enumerate(queries):
            places = np.flatnonzero(owners == i)
            places = places[np.unique(positions[places], return_index=True)[1]]
            ranked.append(first_of(positions[places], dots_of(query, vectors[places]), rows[places], k))
        if short := [i for i, (_, dots, _) in enumerate(ranked) if len(dots) < k]:
            for i, exact in zip(short, self._screened(queries[short], k, where), strict=True):
                ranked[i] = exact
        return ranked
