"""The checkpoints along training that TracIn sums over: records of TracInCallback, or plain Lightning files."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from stride_lightning.gradients.stored_rates import stored_rates
from stride_lightning.model.checkpoints import load_checkpoint
from stride_lightning.model.digests import model_digests
from stride_lightning.model.state import check_fits
from stride_lightning.model.weights import state_hash, weight_hash
from stride_lightning.storage.frozen import frozen_elsewhere
from stride_lightning.storage.lookup import attached_states, saved_states
from stride_lightning.storage.records import PathLike, RecordError, find_records, read_info, read_record

_SUFFIXES = (".ckpt", ".pt", ".pth")
_KIND = "tracin"


@dataclass(frozen=True)
class Checkpoint:
    """Weights at one moment of training; they are on disk until :meth:`load`."""

    name: str  # name of the record or file, for messages and metadata
    path: Path
    learning_rates: Mapping[str, float] | None  # by plain parameter name; None where the file holds none
    step: int | None  # optimizer steps taken; None where the file holds no step
    is_scheduled: bool = False  # whether rates were stored beside a scheduler, which may have changed them already
    weights_only: bool | None = None  # as in torch.load; a record holds nothing else
    #: Records that hold weights that were frozen then and are others in the model, with their names.
    frozen: Mapping[Path, list[str]] = field(default_factory=dict)

    def load(self) -> dict[str, Tensor]:
        """The verified weights on the CPU, without those that were frozen then and are the model's.

        An error is raised if the file is damaged or no longer exists.
        """
        if self.path.is_dir():
            state = read_record(self.path).tensors("weights")
            for path, names in self.frozen.items():
                held = read_record(path).tensors("weights")
                state |= {name: held[name] for name in names}
            return state
        return _state_of(load_checkpoint(self.path, self.weights_only), self.path)


def read_checkpoints(
    source: PathLike | Sequence[PathLike], model: nn.Module, weights_only: bool | None = None
) -> list[Checkpoint]:
    """List and verify checkpoints, and refuse those that do not fit the model, before long work starts.

    A source is a folder of records or of ``.ckpt``, ``.pt`` or ``.pth`` files, a single record or file, or a list of
    these. A folder of records stands for one run: its newest record and those before it. If a record has the model's
    weights, the run is that record's, up to its newest one. A single record stands for itself. A folder of files stands
    for all of them; they are read one at a time. A ``.ckpt`` holds the learning rates at saving; a scheduler may have
    changed them since the last step. If two files have the same step and identical weights, like ``last.ckpt`` and the
    file that it repeats, the first by name counts.

    Returns:
        The checkpoints in the order of steps, then of names; those without a step are last.

    Raises:
        FileNotFoundError: If a path does not exist.
        RecordError: If a record is damaged.
        ValueError: If there is nothing to read, a file is damaged, or weights have another architecture.

    Example:
        >>> import tempfile, torch
        >>> model = nn.Linear(2, 1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for step in (10, 2):
        ...         torch.save({"state_dict": model.state_dict(), "global_step": step}, f"{folder}/{step}.ckpt")
        ...         _ = torch.nn.init.zeros_(model.bias)
        ...     [checkpoint.step for checkpoint in read_checkpoints(folder, model)]
        [2, 10]
    """
    sources = list(source) if isinstance(source, list | tuple) else [source]
    if not sources:
        raise ValueError("Expected checkpoints, got an empty list. Give a folder of checkpoints, or files or records.")
    paths = [path for one in sources for path in _expand(Path(os.fspath(one)), model)]  # type: ignore[arg-type]
    digests = cache(lambda: model_digests(model))
    checkpoints = sorted((_read(path, model, digests, weights_only) for path in dict.fromkeys(paths)), key=_order)
    steps = [checkpoint.step for checkpoint in checkpoints]
    different: dict[tuple[Any, ...], Checkpoint] = {}
    for one in checkpoints:
        is_alone = one.step is None or steps.count(one.step) == 1
        different.setdefault((one.path,) if is_alone else (one.step, recorded_weights(one)), one)
    return list(different.values())


def tracin_checkpoints(
    record: PathLike | Sequence[PathLike] | None,
    checkpoint: Mapping[str, Any] | None,
    model: nn.Module,
    weights_only: bool | None = None,
) -> tuple[list[Checkpoint], dict[str, Any] | None, str] | None:
    """The checkpoints that TracIn sums over, read and verified by :func:`read_checkpoints`.

    The first of these that exists: the user's ``record``; the records up to the attributed ``checkpoint``, by its
    callback state; the records of the attached trainer's fit, unless the checkpoint is of another run.

    Returns:
        The checkpoints, the fingerprint of the training data (None for plain files, which hold none), and a sentence
        about them for the metadata; or None if no records are known.
    """
    source, of = (record, "checkpoints given by the caller") if record is not None else _known(checkpoint, model)
    if source is None:
        return None
    checkpoints = read_checkpoints(source, model, weights_only)
    recorded = (read_info(one.path) for one in reversed(checkpoints) if one.path.is_dir())
    return checkpoints, next((info["data"] for info in recorded), None), f"{len(checkpoints)} {of}"


def _known(checkpoint: Mapping[str, Any] | None, model: nn.Module) -> tuple[list[Path] | None, str]:
    """The records that callbacks name, and their origin in words."""
    weights = weight_hash(model)
    for state in saved_states(checkpoint):
        if paths := _records_up_to(weights, state):
            return paths, "records of the checkpoint's run"
    for state in attached_states(model):
        paths = _listed(state)
        if paths and (checkpoint is None or weights in [read_info(path)["weights"] for path in paths]):
            return paths, "records of the attached trainer's fit"
    return None, ""


def recorded_weights(checkpoint: Checkpoint) -> str:
    """Hash of a checkpoint's weights."""
    return read_info(checkpoint.path)["weights"] if checkpoint.path.is_dir() else state_hash(checkpoint.load())


def _listed(state: Mapping[str, Any]) -> list[Path]:
    """Records that a state of TracInCallback lists."""
    return _existing([Path(path) for path in state["records"]]) if "run" in state else []


def _records_up_to(weights: str, state: Mapping[str, Any]) -> list[Path]:
    """Records that a checkpoint's state lists, and the record of its weights, which may be written right after it."""
    for record in reversed(find_records(state["dirpath"]) if "run" in state and state["dirpath"] else []):
        with suppress(RecordError):  # if a damaged record is needed, reading it raises later
            info = read_info(record)
            if info.get("kind") == _KIND and info["run"] == state["run"] and info["weights"] == weights:
                return _existing(_trajectory(record, info))
    return _listed(state)


def _expand(path: Path, model: nn.Module) -> list[Path]:
    """The records or files that a path stands for."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"There are no checkpoints at {path}: the path does not exist. Check it.")
    infos = {record: read_info(record) for record in find_records(path)}
    records = {record: info for record, info in infos.items() if info.get("kind") == _KIND}
    if records:
        return _trajectory_of_one_run(records, model)
    names = sorted(entry.name for entry in path.iterdir())
    files = [path / name for name in names if (path / name).is_file() and not name.startswith(".")]
    files = [file for file in files if file.suffix in _SUFFIXES]
    if files:
        return files
    if not infos and ("MANIFEST" in names or "record.json" in names):
        return [path]
    content = f"other things ({', '.join(names[:5])})" if names else "nothing"
    if infos:
        content = f"records of {', '.join(sorted({repr(info.get('kind')) for info in infos.values()}))}"
    raise ValueError(f"{path} holds {content}: {_expected(path)}")


def _trajectory_of_one_run(records: dict[Path, dict[str, Any]], model: nn.Module) -> list[Path]:
    """Paths of one run's records among those of a folder, oldest first."""
    weights, newest = weight_hash(model), list(records)[-1]
    match = next((record for record in reversed(records) if records[record]["weights"] == weights), None)
    if match is not None:
        # Other records of the run are on another branch: training went on from an earlier checkpoint.
        after = [record for record in records if match in _trajectory(record, records[record])]
        newest = [record for record in after if records[record]["run"] == records[match]["run"]][-1]
    return _existing(_trajectory(newest, records[newest]))


def _trajectory(record: Path, info: Mapping[str, Any]) -> list[Path]:
    # The last entry is the record itself, which may have another name now.
    before = [Path(os.path.normpath(record.parent / entry["name"])) for entry in info["trajectory"][:-1]]
    return [*before, record]


def _existing(paths: list[Path]) -> list[Path]:
    gone = [str(path) for path in paths if not path.exists()]
    if gone:
        warnings.warn(
            f"{len(gone)} of the {len(paths)} records of this run no longer exist and are left out: "
            f"{', '.join(gone)}. If they were moved, move them back.",
            stacklevel=2,
        )
    return [path for path in paths if path.exists()]


def _read(
    path: Path, model: nn.Module, digests: Callable[[], Mapping[str, str]], weights_only: bool | None
) -> Checkpoint:
    """One checkpoint, every byte verified, and fitting the model."""
    if path.is_dir():
        record = read_record(path)
        if (kind := record.info.get("kind")) != _KIND:
            raise ValueError(f"{path} holds a record of {kind!r}: {_expected(path)}")
        check_fits(model, record.tensors("weights"), f"{path}: ", rest=record.info["frozen"]["digests"])
        frozen = frozen_elsewhere(path, record.info, model, digests)
        return Checkpoint(path.name, path, record.info["learning_rates"], record.info["step"], frozen=frozen)
    content = load_checkpoint(path, weights_only)
    check_fits(model, _state_of(content, path), f"{path}: ")
    if "state_dict" not in content:
        return Checkpoint(path.name, path, None, None, weights_only=weights_only)
    step, rates = content.get("global_step"), stored_rates(content, model, str(path))
    is_scheduled = bool(content.get("lr_schedulers"))
    step = None if step is None else int(step)
    return Checkpoint(path.name, path, rates, step, is_scheduled, weights_only)


def _state_of(content: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    state = content.get("state_dict", content)
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(
            f"{path} holds no weights: expected a Lightning checkpoint with 'state_dict' or a state dict, got a "
            f"dictionary with the keys {sorted(map(str, content))[:5]}. Give another file."
        )
    return tensors


def _order(checkpoint: Checkpoint) -> tuple[Any, ...]:
    by_number = [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", checkpoint.name)]
    return checkpoint.step is None, checkpoint.step or 0, by_number


def _expected(path: Path) -> str:
    """The end of a message about a folder, with a hint if one of its subfolders holds checkpoints."""
    hints = [
        child
        for child in sorted(path.iterdir())
        if child.is_dir() and any(_is_tracin(inner) or inner.suffix == ".ckpt" for inner in child.iterdir())
    ]
    hint = f" Did you mean {hints[0]}?" if hints else ""
    return (
        "expected records of TracInCallback, or .ckpt, .pt or .pth files. Give the folder that holds them, such as "
        f"ModelCheckpoint's dirpath.{hint}"
    )


def _is_tracin(path: Path) -> bool:
    try:
        return path.is_dir() and read_info(path).get("kind") == _KIND
    except (RecordError, FileNotFoundError):
        return False
