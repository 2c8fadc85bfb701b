"""An index on disk, in LanceDB: built from a stream, resumed after a kill, filtered, searched exactly."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from stride_lightning.information.index import lance
from stride_lightning.information.index.base import VectorIndex
from stride_lightning.information.index.checks import Columns, Integers, PositionSet, VectorIndexError

_SCAN_ROWS = 65536  # read at once, but their vectors


class InformationIndex(VectorIndex):
    """An index on disk, one row for each training example; memory does not grow with their number.

    Rows are appended in groups, each committed whole or not at all: after a kill, call :meth:`build` again. One process
    may write at a time; any number may read, and see the index as it was when they opened it. Nothing is unpickled. The
    index notices files that are missing or cut; LanceDB stores no checksums, so a flipped bit within a vector goes
    unnoticed. LanceDB warns in processes that are forked after its import, such as the workers of a data loader on
    Linux. They do not touch the index, so the warning is harmless; ``multiprocessing_context="forkserver"`` avoids it.

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
        ...     filtered = index.search([[1.0, 0.5]], k=2, where=lambda columns: columns["label"] == 1)
        >>> hits.positions, hits.dots, hits.columns, filtered.positions
        (tensor([[9, 7]]), tensor([[-3.,  1.]], dtype=torch.float64), {'label': [[0, 0]]}, tensor([[8]]))
    """

    def __init__(
        self, path: Path, dim: int, identity: Mapping[str, Any] | None, columns: Mapping[str, type] | None
    ) -> None:
        super().__init__(dim, identity, columns)
        self.path, self.name = path, f"The index '{path}'"
        self._schema = lance.table_schema(self.dim, self.identity, self.columns)
        self._table: Any = None
        self._version = 0

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
        """Make an empty index in a folder, and the folder too; the other arguments are those of :class:`VectorIndex`.

        With `exist_ok` an existing index is opened if it was made with the same arguments.

        Raises:
            ModuleNotFoundError: If LanceDB is not installed.
            FileExistsError: If there is an index and `exist_ok` is false.
            VectorIndexError: If the existing index has other arguments, or is damaged.
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
                    f"dim={dim} and {lance.named(index.columns)}. Build another one in another folder."
                )
            return there
        folder = path / f"{lance.TABLE}.lance"
        if any(folder.glob("data/*")):
            raise VectorIndexError(f"{index.name} has data but no version that describes them. {lance.REPAIR}")
        path.mkdir(parents=True, exist_ok=True)
        # A creation that was killed leaves a folder without a version and without data, which is overwritten.
        mode = "overwrite" if folder.exists() else "create"
        with index._writing():
            index._table = lancedb.connect(path).create_table(lance.TABLE, schema=index._schema, mode=mode)
        return index

    @classmethod
    def open(cls, path: str | os.PathLike[str], identity: Mapping[str, Any] | None = None) -> InformationIndex:
        """Open the index in a folder; if an identity is given, refuse an index of another one.

        Raises:
            ModuleNotFoundError: If LanceDB is not installed.
            FileNotFoundError: If the folder holds no index.
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
            raise VectorIndexError(
                f"'{path}' holds a table that is not an InformationIndex ({error!r}). Give the folder of an index."
            ) from error
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

    def compact(self) -> None:
        """Merge small groups of rows, and delete old versions and the files that killed processes have left.

        No other process may write meanwhile, and readers must open the index again.
        """
        self._refresh()
        with self._writing(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # LanceDB warns of readers, as the docstring does
            self._table.optimize(cleanup_older_than=timedelta(0), delete_unverified=True)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Explain errors, and remember the version that this process writes."""
        with lance.explained(self.path):
            yield
            self._version = self._table.version

    def _refresh(self) -> None:
        """Check out the newest version, which another process may have written."""
        with lance.explained(self.path):
            self._table.checkout_latest()
            if self._table.version != self._version:
                self._positions, self._version = None, self._table.version

    def _known(self) -> PositionSet:
        self._refresh()
        return super()._known()

    def _append(self, rows: Columns) -> None:
        import pyarrow as pa

        vectors = pa.FixedSizeListArray.from_arrays(pa.array(rows["vector"].reshape(-1)), self.dim)
        data = pa.table({**rows, "vector": vectors}, schema=self._schema)
        with self._writing():
            self._table.checkout_latest()
            if self._table.version != self._version:
                self._positions = None
                raise VectorIndexError(
                    f"Another process has written to the index '{self.path}', and one may write at a time. Build again "
                    "when it is done, which skips the rows that are there."
                )
            self._table.add(data)

    def _scan(self, names: list[str]) -> Iterator[tuple[Integers, Columns]]:
        with lance.explained(self.path):
            for batch in self._table.search().select(names).with_row_id(True).to_batches(_SCAN_ROWS):
                yield lance.as_arrays(batch, self.dim)

    def _read(self, handles: Integers, names: list[str]) -> tuple[Integers, Columns]:
        with lance.explained(self.path):
            table = self._table.take_row_ids(handles.tolist()).select(names).with_row_id().to_arrow()
            return lance.as_arrays(table.combine_chunks().to_batches()[0], self.dim)
