"""The records of one run of TracInCallback: finding those that were written before."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any

from stride_lightning.storage.records import RecordError, read_info, read_record


@dataclass(frozen=True)
class Saved:
    """A record of a run: its folder, its step, and the hash of its weights."""

    path: Path
    step: int
    weights: str


def look_up(path: Path, run: str | None) -> Saved | None:
    """The record at a path, if it is sound and of this run."""
    with suppress(FileNotFoundError, RecordError):
        info = read_info(path)
        if info.get("run") == run:
            return Saved(path, info["step"], info["weights"])
    return None


def written_before(folder: Path, info: dict[str, Any], earlier: list[dict[str, Any]]) -> Path | None:
    """The same record of the same run, sound, if a fit that was killed later came this far before."""
    same = info.keys() - {"epoch"}
    for path in sorted(folder.glob(f"step={info['step']}*")):
        with suppress(FileNotFoundError, RecordError):
            written = read_info(path)
            listed = written.get("trajectory", [])[:-1]
            before = [entry for entry in listed if (path.parent / entry["name"]).exists()]
            # Its earlier records may be those of a path that was abandoned; then it is not the same.
            if all(written.get(key) == info[key] for key in same) and before == earlier:
                return read_record(path).path
    return None


def relative(path: Path, folder: Path) -> str:
    """A path as seen from a folder."""
    try:
        return Path(os.path.relpath(path, folder)).as_posix()
    except ValueError:  # another drive on Windows
        return path.as_posix()


def free_name(folder: Path, name: str) -> str:
    """A name that nothing in a folder has: this one, or one of its versions."""
    names = chain([name], (f"{name}-v{version}" for version in count(1)))
    return next(candidate for candidate in names if not os.path.lexists(folder / candidate))
