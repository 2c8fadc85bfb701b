"""Search for the record that belongs to a model's weights."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from stride_lightning.model.weights import attached_trainer
from stride_lightning.storage.records import Record, RecordError, find_records, read_info, read_record

#: The callback that writes records of a kind.
WRITERS = {"stride": "StrideCallback", "tracin": "TracInCallback", "further-training": "FurtherTrainingCallback"}


def choose_record(
    explicit: str | Path | None,
    checkpoint: Mapping[str, Any] | None,
    model: nn.Module,
    weights: str,
    options: Mapping[str, Any],
    kind: str = "stride",
) -> tuple[Record | None, str]:
    """The record of these weights to start from, and a sentence about it for the metadata.

    A record or a folder of records that the user names must fit or is refused. Otherwise the callbacks of the
    checkpoint and of the model's trainer say where records are; that none of the records there is of these weights is
    warned of. A record must agree with the options that are not None, such as ``layers`` or ``num_subsets``.

    Raises:
        FileNotFoundError: If the explicit path does not exist.
        ValueError: If the explicit record is of other weights or other options.
        RecordError: If it is damaged.
    """
    if explicit is not None:
        return _explicit_record(Path(explicit), weights, options, kind), "given by the caller"
    states = attached_states(model) + saved_states(checkpoint)
    folders = dict.fromkeys(Path(state["dirpath"]) for state in states if state.get("dirpath"))
    others: list[Path] = []
    conflicts, problems = [], []
    for path in reversed([record for folder in folders for record in find_records(folder)]):  # the newest first
        try:
            info = read_info(path)
            if info.get("kind") != kind:
                continue
            if info.get("weights") != weights:
                others.append(path)
                continue
            conflict = _conflict(info, options)
            if conflict is None:
                return read_record(path), f"found at {path}, which has these weights"
            conflicts.append(f"{path} {conflict}")
        except (RecordError, FileNotFoundError) as error:
            problems.append(str(error))
    if not conflicts and (others or problems):
        reasons = []
        if others:
            reasons.append(
                f"{others[0]} is of other weights than those that are attributed. To use it, pass the checkpoint of "
                "the same step as ckpt_path=."
            )
        warnings.warn(
            f"No record that {WRITERS[kind]} wrote can be used, so everything is computed on the spot: "
            f"{' '.join(reasons + problems)}",
            stacklevel=2,
        )
    note = "none of these weights was found, so everything was computed on the spot"
    return None, "; ".join([note, *conflicts, *problems])


def attached_states(model: nn.Module) -> list[Mapping[str, Any]]:
    """States of the callbacks with records among those of the trainer that a model is attached to."""
    trainer = attached_trainer(model)
    callbacks = [] if trainer is None else trainer.callbacks
    # By an attribute: callbacks/ builds on this file, not the other way round.
    return [callback.state_dict() for callback in callbacks if hasattr(callback, "record_kind")]


def saved_states(checkpoint: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """States of callbacks with records that a checkpoint holds."""
    # By its content, because the key is the class's name, and a subclass has another.
    saved = {} if checkpoint is None else checkpoint.get("callbacks", {})
    return [state for state in saved.values() if isinstance(state, Mapping) and {"dirpath", "records"} <= state.keys()]


def explain_mismatch(
    record: Record, fingerprint: Mapping[str, Any], task: str, *, is_explicit: bool = False
) -> str | None:
    """Why a record is not of this data and task, which is warned of, or None if it is.

    Raises:
        ValueError: If it is not, and the user named it.
    """
    if record.info["data"] != dict(fingerprint):
        reason = f"The record {record.path} was made with other training data."
        lines = [f"record: {show_fingerprint(record.info['data'])}", f"given:  {show_fingerprint(fingerprint)}"]
        advice = "Pass the data (in the same order) that the model was trained on; was random_split given no seed?"
    elif record.info["task"] != task:
        reason, lines = f"The record {record.path} was made with task {record.info['task']}, now it is {task}.", []
        advice = "Pass the same `task=` to attribute() as to the callback."
    else:
        return None
    if is_explicit:
        raise ValueError("\n  ".join([reason, *lines]) + f"\n{advice} Or leave out `record`.")
    warnings.warn(f"{reason} It is not used, and everything is computed on the spot. {advice}", stacklevel=2)
    return f"{reason} {'; '.join(lines)}"


def _explicit_record(path: Path, weights: str, options: Mapping[str, Any], kind: str) -> Record:
    # Without records inside it is one itself; reading says what is wrong if it is not.
    candidates = (find_records(path) if path.is_dir() else []) or [path]
    infos = {candidate: read_info(candidate) for candidate in candidates}
    kinds = sorted({repr(info.get("kind")) for info in infos.values()})
    infos = {candidate: info for candidate, info in infos.items() if info.get("kind") == kind}
    if not infos:
        raise ValueError(
            f"{path} holds {', '.join(kinds)}, not what {WRITERS[kind]} writes. Name one of its records, or the folder "
            "that holds them."
        )
    fitting = [candidate for candidate, info in infos.items() if info.get("weights") == weights]
    if not fitting:
        hashes = "\n".join(f"  record {candidate.name}: {info.get('weights')}" for candidate, info in infos.items())
        raise ValueError(
            f"No record at {path} is of the weights that are attributed (SHA-256).\n{hashes}\n  model: {weights}\n"
            "Pass the checkpoint of the same step as ckpt_path=, or leave out `record` to compute everything on the "
            "spot."
        )
    conflicts = {candidate: _conflict(infos[candidate], options) for candidate in fitting}
    agreeing = [candidate for candidate, conflict in conflicts.items() if conflict is None]
    if not agreeing:
        raise ValueError(f"The record {fitting[-1]} {conflicts[fitting[-1]]}. Leave out the option, or `record`.")
    return read_record(agreeing[-1])


def _conflict(info: Mapping[str, Any], options: Mapping[str, Any]) -> str | None:
    stored = {**info, **info.get("design", {})}
    for name, value in options.items():
        if value is not None and stored[name] != value:
            return f"has {name}={stored[name]!r}, but you passed {name}={value!r}"
    return None


def show_fingerprint(fingerprint: Mapping[str, Any]) -> str:
    """A fingerprint of data, in a line of a message."""
    kind = "content" if fingerprint["content"] else "shapes (content is random or cannot be read, and is not compared)"
    examples = fingerprint["content"] or fingerprint["shapes"]
    return f"{fingerprint['num_examples']} examples, {kind} {examples[:16]}"
