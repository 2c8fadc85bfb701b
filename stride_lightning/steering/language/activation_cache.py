"""Activations of training tokens on disk, memory-mapped, so that a model runs over its data once."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

_PROGRESS = "progress.jsonl"


class ActivationCache:
    """Values of all tokens that count, one sequence after the other.

    Each kind of value has a flat float32 file; one more file says how far writing has come and the checksum of every
    part. An interrupted run goes on where the last part ended.

    Args:
        folder: Made if missing; one for each model and data set.
        identity: Plain values that tell what the activations are of.
        lengths: Tokens that count of each sequence, int64 of shape ``(n,)``.
        widths: Numbers of each kind for a token.

    Raises:
        ValueError: If the folder cannot be made, is damaged, or holds activations of another model, data set or choice
            of layers.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], lengths: Tensor, widths: Mapping[str, int]) -> None:
        self.folder, self._identity = folder, dict(identity)
        self._starts = np.concatenate([[0], lengths.numpy().cumsum()])
        self._parts: list[dict[str, Any]] = []
        self._checked: set[int] = set()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:  # a file stands there, or the user may not write
            raise ValueError(
                f"The folder {folder} for activations cannot be made ({error}). Pass another folder as `cache_dir=`."
            ) from error
        self._load_progress()
        self._files = {name: self._open(name, size) for name, size in widths.items()}

    @property
    def num_bytes(self) -> int:
        """Bytes on disk when complete."""
        return sum(file.nbytes for file in self._files.values())

    @property
    def done(self) -> int:
        """How many sequences have been written, from the first on."""
        return self._parts[-1]["stop"] if self._parts else 0

    def write(self, places: slice, values: Mapping[str, Tensor], losses: Tensor) -> None:
        """Append a batch of values, shape ``(B, T, width)`` each, which must begin where the last batch ended.

        The batch is on disk when this returns.
        """
        if places.start != self.done:
            raise ValueError(
                f"The cache holds the first {self.done} sequences, and the batch begins at {places.start}. Write "
                "batches in order."
            )
        counted = (values["weights"][..., 0] > 0).cpu()
        checksum = 0
        for name, file in self._files.items():
            array = np.ascontiguousarray(values[name].float().cpu()[counted].numpy())
            file[self._rows(places)] = array
            file.flush()
            checksum = zlib.crc32(array.data, checksum)
        part = {"start": places.start, "stop": places.stop, "crc32": checksum, "losses": losses.tolist()}
        self._parts.append(part)
        with (self.folder / _PROGRESS).open("a") as file:
            file.write(json.dumps(part) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def batches(self) -> Iterator[tuple[slice, dict[str, Tensor], Tensor]]:
        """The batches that were written, as they were: places, values padded to the longest, and losses.

        Raises:
            ValueError: If a part is damaged, naming the folder.
        """
        for number, part in enumerate(self._parts):
            places = slice(part["start"], part["stop"])
            lengths = np.diff(self._starts[places.start : places.stop + 1])
            counted = torch.from_numpy(np.arange(lengths.max(initial=0)) < lengths[:, None])
            padded, checksum = {}, 0
            for name, file in self._files.items():
                array = np.array(file[self._rows(places)])
                padded[name] = torch.zeros(*counted.shape, array.shape[1], dtype=torch.float32)
                padded[name][counted] = torch.from_numpy(array)
                # A part is checked when it is first read.
                checksum = part["crc32"] if number in self._checked else zlib.crc32(array.data, checksum)
            if checksum != part["crc32"]:
                raise ValueError(
                    f"The activations of sequences {places.start} to {places.stop - 1} in {self.folder} are damaged "
                    "(their checksum differs). Delete the folder, and the next call computes them again."
                )
            self._checked.add(number)
            yield places, padded, torch.tensor(part["losses"], dtype=torch.float64)

    @property
    def _repair(self) -> str:
        return f"Delete the folder {self.folder}, and the next call computes its activations again."

    def _rows(self, places: slice) -> slice:
        return slice(self._starts[places.start], self._starts[places.stop])

    def _open(self, name: str, width: int) -> np.memmap:
        path, shape = self.folder / f"{name}.f32", (int(self._starts[-1]), width)
        if self._parts and (not path.exists() or path.stat().st_size != 4 * shape[0] * width):
            raise ValueError(f"{path} is missing or has another size. {self._repair}")
        return np.memmap(path, np.float32, "r+" if self._parts else "w+", shape=shape)

    def _load_progress(self) -> None:
        path = self.folder / _PROGRESS
        if not path.exists():
            if any(self.folder.iterdir()) and not (self.folder / "features.f32").exists():
                raise ValueError(f"{self.folder} holds other files. Name an empty folder with `cache_dir=`.")
            self._replace(json.dumps(self._identity) + "\n")
            return
        # A line that a kill left unfinished is a part that was not written.
        *lines, unfinished = path.read_text().split("\n")
        try:
            identity, *self._parts = map(json.loads, lines)
            other = sorted(key for key in self._identity if identity.get(key) != self._identity[key])
            stops = [0, *(part["stop"] for part in self._parts)]
            sound = all(part["start"] == stop for part, stop in zip(self._parts, stops, strict=False))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{path} is damaged. {self._repair}") from error
        if not sound:
            raise ValueError(f"{path} is damaged. {self._repair}")
        if other:
            raise ValueError(
                f"{self.folder} holds activations of another model or data set: {', '.join(other)} differ. Name "
                "another folder with `cache_dir=`, or delete this one."
            )
        if unfinished:
            self._replace("".join(f"{line}\n" for line in lines))

    def _replace(self, text: str) -> None:
        part = self.folder / f"{_PROGRESS}.part"
        part.write_text(text)
        part.replace(self.folder / _PROGRESS)
