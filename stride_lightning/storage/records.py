"""Records of training: folders of tensors and plain values, written atomically and verified when read.

A *record* is one folder with ``record.json`` (plain values), one ``<group>.safetensors`` for each group of tensors, and
``MANIFEST``, the SHA-256 of each of these files and of itself. Nothing is ever unpickled, so a record from a stranger
cannot run code. It appears under its name in one rename, whole, or not at all: a writer that is killed leaves at most a
hidden ``.<name>.part-*`` folder, which readers ignore and anyone may delete.
"""

import contextlib
import json
import math
import os
import re
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from stride_lightning.storage.files import (
    hidden_name,
    remove_folder,
    rename_to_free_name,
    sha256,
    sync_folder,
    write_file,
)

JSON: TypeAlias = bool | int | float | str | list[Any] | tuple[Any, ...] | dict[str, Any] | None
PathLike: TypeAlias = str | os.PathLike[str]

_SCHEMA, _INFO, _MANIFEST, _SUFFIX = 2, "record.json", "MANIFEST", ".safetensors"
# ASCII only: some file systems rewrite accented letters, and then the folder no longer matches its manifest.
_NAME = r"[A-Za-z0-9_=+@-][A-Za-z0-9_=+@., -]*"
_LINES = re.compile(rf"((?:[0-9a-f]{{64}}  {_NAME}\n)*)([0-9a-f]{{64}})  {_MANIFEST}\n".encode())
_REPAIR = "Delete this record and write it again, or restore it from a copy."


class RecordError(RuntimeError):
    """A folder that should be a record is damaged, incomplete, of an unknown layout, or not a record at all."""


@dataclass(frozen=True)
class Record:
    """A verified record, as `read_record` returns it; tensors stay on disk until :meth:`tensors` reads them.

    Args:
        path: The folder.
        info: The plain values in ``record.json``, including ``"schema"`` and ``"written"``.
        checksums: SHA-256 of each file, as the manifest gives it.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     record = read_record(write_record(folder, "step=10", {"step": 10}, {"basis": {"fc": torch.eye(2)}}))
        ...     record.groups, record.info["step"], record.tensors("basis")["fc"].shape
        (('basis',), 10, torch.Size([2, 2]))
    """

    path: Path
    info: dict[str, Any]
    checksums: Mapping[str, str] = field(repr=False)

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the tensor groups, sorted."""
        return tuple(sorted(file.removesuffix(_SUFFIX) for file in self.checksums if file.endswith(_SUFFIX)))

    def tensors(self, group: str) -> dict[str, Tensor]:
        """Read one group onto the CPU, sorted by name; the bytes that are checked are the bytes that are parsed.

        Raises:
            KeyError: If the record has no such group.
            RecordError: If the file was damaged or removed since the record was read.
        """
        if group not in self.groups:
            raise KeyError(f"record '{self.path}' has no tensor group {group!r}; it has {list(self.groups)}")
        content = _read_file(self.path, group + _SUFFIX, self.checksums[group + _SUFFIX])
        try:
            return dict(sorted(load_tensors(content).items()))
        except SafetensorError as error:
            raise _damaged(self.path, group + _SUFFIX, "safetensors", f"something else ({error})") from error


def write_record(
    dirpath: PathLike, name: str, info: Mapping[str, JSON], tensors: Mapping[str, Mapping[str, Tensor]]
) -> Path:
    """Write a record in one atomic step, and return its folder; an existing record is never overwritten.

    Tensors are stored contiguous, with their dtype; those that share memory are stored separately. A group is
    serialised in memory, so writing needs room for a second copy of the largest one.

    Args:
        dirpath: Folder that receives the record; made if missing.
        name: Name of the record; if it is taken, ``<name>-v1``, ``<name>-v2``, ... is used.
        info: Plain JSON values; tuples come back as lists. ``"schema"`` and ``"written"`` (nanoseconds since 1970)
            are added to them.
        tensors: Named tensors by group; a group may be empty.

    Raises:
        TypeError: If a value in `info` is not plain JSON, or a tensor is not a dense tensor.
        ValueError: If a name cannot be a file name, a key is reserved, or a number in `info` is not finite.
        OSError: If the disk is full or not writable. After an exception nothing of the record is left.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     paths = [write_record(folder, "final", {}, {"weights": {"w": torch.ones(3)}}) for _ in range(2)]
        ...     [path.name for path in paths], sorted(os.listdir(paths[0]))
        (['final', 'final-v1'], ['MANIFEST', 'record.json', 'weights.safetensors'])
    """
    if not name.isprintable() or name[:1] in ("", ".") or any(slash in name for slash in r"\/"):
        raise ValueError(f"A record needs a name for its folder, without slashes or a leading dot, got {name!r}.")
    for group in tensors:
        if not re.fullmatch(_NAME, group):
            raise ValueError(f"The name of a tensor group must match {_NAME}, got {group!r}.")
    if reserved := sorted({"schema", "written"} & set(info)):
        raise ValueError(f"info has the reserved keys {reserved}: leave them out, write_record sets them")
    _check_plain(dict(info), "info")

    parent = Path(dirpath)
    parent.mkdir(parents=True, exist_ok=True)
    path = hidden_name(parent / name)
    try:
        os.mkdir(path)
        sums = {
            group + _SUFFIX: write_file(path / (group + _SUFFIX), save_tensors(_storable(group, named)))
            for group, named in tensors.items()
        }
        stamped = {"schema": _SCHEMA, "written": time.time_ns(), **info}
        sums[_INFO] = write_file(path / _INFO, json.dumps(stamped, indent=1, allow_nan=False).encode())
        lines = "".join(f"{sums[file]}  {file}\n" for file in sorted(sums))
        write_file(path / _MANIFEST, f"{lines}{sha256(lines.encode())}  {_MANIFEST}\n".encode())
        sync_folder(path)
        path = rename_to_free_name(path, parent / name)
        sync_folder(parent)
    except BaseException:  # Ctrl-C too
        with contextlib.suppress(OSError):  # what the caller must see is the first error
            remove_folder(path)
        raise
    return path


def read_record(path: PathLike) -> Record:
    """Verify every byte of a record, given by its folder, and open it.

    Raises:
        FileNotFoundError: If there is nothing at `path`.
        RecordError: If it is not a record, has another layout, or any file is damaged, missing or unexpected.
    """
    path = Path(path)
    info = read_info(path)
    sums = _read_manifest(path)
    for file in sorted(sums.keys() | set(os.listdir(path)) - {_MANIFEST}):
        if file not in sums or (file != _INFO and not file.endswith(_SUFFIX)):
            advice = f"Move it elsewhere if you put it there. Otherwise: {_REPAIR}"
            raise _damaged(path, file, f"only {_INFO} and the {_SUFFIX} listed", "this unexpected file", advice)
        _read_file(path, file, sums[file])
    return Record(path, info, sums)


def read_info(path: PathLike) -> dict[str, Any]:
    """Read a record's plain values, ``"schema"`` and ``"written"`` among them.

    Only the manifest and ``record.json`` are verified, which is cheap enough to search many.

    Raises:
        FileNotFoundError: If there is nothing at `path`.
        RecordError: If it is not a record, has another layout, or one of the two files is damaged.
    """
    path = Path(path)
    _check_schema(path)
    content = _read_file(path, _INFO, _read_manifest(path)[_INFO])
    try:
        info = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, _INFO, "JSON", f"something else ({error})") from error
    for key in ("schema", "written"):
        if not isinstance(info, dict) or not isinstance(info.get(key), int):
            raise _damaged(path, _INFO, f"an integer {key!r}", repr(info)[:80])
    return info


def find_records(dirpath: PathLike) -> list[Path]:
    """List the records directly inside a folder, oldest first; none if the folder is missing.

    The order is that of ``info["written"]``, the clock at writing, because modification times do not survive copying;
    ties go by name, ``v2`` before ``v10``. A record whose ``record.json`` is damaged is listed by its modification
    time: leaving it out would hide the damage. Hidden folders, symlinks and folders without a manifest are not listed.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     written = [write_record(folder, name, {}, {}) for name in ("b", "a", "b")]
        ...     [path.name for path in find_records(folder)]
        ['b', 'a', 'b-v1']
    """
    by_age: list[tuple[int, list[str | int], Path]] = []
    for path in Path(dirpath).iterdir() if os.path.exists(dirpath) else ():
        if path.name.startswith(".") or path.is_symlink() or not os.path.lexists(path / _MANIFEST):
            continue
        by_number = [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.name)]
        with contextlib.suppress(FileNotFoundError):  # another process has removed it since the listing
            by_age.append((_time_written(path), by_number, path))
    return [path for *_, path in sorted(by_age)]


def remove_record(path: PathLike) -> None:
    """Delete a record, damaged or not; at no moment is half a record visible.

    Raises:
        FileNotFoundError: If there is nothing at `path`.
        RecordError: If it is not a record, or a symlink to one.
    """
    path = Path(os.path.abspath(path))
    _require_record(path)
    if path.is_symlink():
        raise RecordError(f"'{path}' is a symlink: remove the record it points to, '{path.resolve()}'")
    remove_folder(path)


def _storable(group: str, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors, no two of which share memory (safetensors refuses those that do)."""
    storable: dict[str, Tensor] = {}
    memory: set[int] = set()
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            kind = tensor.layout if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"tensors[{group!r}][{name!r}]: expected a dense torch.Tensor, got {kind}. Convert it")
        if not isinstance(name, str) or name == "__metadata__":  # safetensors writes it and then cannot read the file
            raise ValueError(f"tensors[{group!r}]: {name!r} cannot be the name of a tensor")
        tensor = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        storable[name] = tensor.clone() if tensor.untyped_storage().data_ptr() in memory else tensor
        memory.add(tensor.untyped_storage().data_ptr())
    return storable


def _check_plain(value: Any, where: str) -> None:
    # Exact types: numpy.float64 and enums are subclasses of float and int and would silently come back as those.
    kind = type(value)
    if kind is float and not math.isfinite(value):
        raise ValueError(f"{where} is {value}, which JSON cannot hold: store None or a string instead")
    if kind not in (type(None), bool, int, float, str, list, tuple, dict):
        raise TypeError(f"{where} is a {kind.__module__}.{kind.__qualname__}, not plain JSON: convert it")
    for key, item in value.items() if kind is dict else enumerate(value) if kind in (list, tuple) else ():
        if kind is dict and type(key) is not str:
            raise TypeError(f"{where} has the key {key!r}: expected str, got {type(key).__name__}")
        _check_plain(item, f"{where}[{key!r}]")


def _check_schema(record: Path) -> None:
    """Refuse a record of another schema, whose other files may have any form; what cannot be read is left to others."""
    try:
        info = json.loads((record / _INFO).read_bytes())
        schema, versions = info["schema"], info.get("versions")
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return
    if isinstance(schema, int) and schema != _SCHEMA:
        writer = f" ({versions})" if versions else ""
        raise RecordError(
            f"The record '{record}' has schema {schema}, and this version of stride-lightning reads schema {_SCHEMA}. "
            f"Read it with the version that wrote it{writer}, or write it again."
        )


def _damaged(record: Path, file: str, expected: str, actual: str, advice: str = _REPAIR) -> RecordError:
    return RecordError(f"file '{file}' of record '{record}': expected {expected}, got {actual}. {advice}")


def _require_record(path: Path) -> None:
    if not os.path.lexists(path):
        raise FileNotFoundError(f"no record at '{path}': nothing is there")
    if not os.path.lexists(path / _MANIFEST):
        if path.is_dir() and (held := [record.name for record in find_records(path)]):
            raise RecordError(f"'{path}' holds records and is not one: choose one of {held}")
        raise RecordError(f"'{path}' is not a record: it has no file '{_MANIFEST}'. Give the folder of a record")


def _read_file(record: Path, file: str, checksum: str | None = None) -> bytes:
    try:
        mode = os.lstat(record / file).st_mode
    except FileNotFoundError as error:
        raise _damaged(record, file, "this file, which the manifest lists", "nothing: it is missing") from error
    if not stat.S_ISREG(mode):
        raise _damaged(record, file, "a regular file", "a symlink" if stat.S_ISLNK(mode) else "a folder or device")
    content = (record / file).read_bytes()
    if checksum is not None and sha256(content) != checksum:
        raise _damaged(record, file, f"SHA-256 {checksum}", f"{sha256(content)} ({len(content)} bytes)")
    return content


def _read_manifest(record: Path) -> dict[str, str]:
    """SHA-256 by file name, once the form of each line and the checksum of the manifest are checked."""
    _require_record(record)
    content = _read_file(record, _MANIFEST)
    if not (match := _LINES.fullmatch(content)):
        raise _damaged(record, _MANIFEST, "lines '<sha256>  <file>'", f"another form ({len(content)} bytes)")
    if (checksum := sha256(match[1])) != match[2].decode():
        raise _damaged(record, _MANIFEST, f"SHA-256 {match[2].decode()} of the lines before the last", checksum)
    pairs = [(line[66:], line[:64]) for line in match[1].decode().splitlines()]
    files = [file for file, _ in pairs]
    if files != sorted(set(files)) or _INFO not in files or _MANIFEST in files:
        raise _damaged(record, _MANIFEST, f"every file once, sorted, with '{_INFO}'", f"{files}")
    return dict(pairs)


def _time_written(record: Path) -> int:
    try:
        return read_info(record)["written"]
    except RecordError:
        return record.stat().st_mtime_ns
