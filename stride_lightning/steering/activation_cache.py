"""Activations of training tokens on disk, memory-mapped, so that a model runs over its data once."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stride_lightning.steering.tokens import TokenBatch

_PROGRESS = "progress.json"


class ActivationCache:
    """Features, gradients and weights of all tokens that count, one sequence after the other.

    Three flat float32 files, ``4 (r + c + 1)`` bytes for each token, and a file that says how far writing has come and
    the checksum of every part. A run that is interrupted goes on where the last part ended; a cache of another model,
    data set or choice of layers is refused, and so is a damaged part.

    Args:
        folder: Made if missing; one for each model and data set.
        identity: Plain values that tell what the activations are of.
        lengths: Tokens that count of each sequence, int64 of shape ``(n,)``.
        num_features: r.
        width: c.

    Raises:
        ValueError: If the folder holds the activations of something else.
    """

    def __init__(
        self, folder: Path, identity: Mapping[str, Any], lengths: Tensor, num_features: int, width: int
    ) -> None:
        self.folder, self._identity = folder, dict(identity)
        self._starts = np.concatenate([[0], lengths.numpy().cumsum()])
        self._widths = {"features": num_features, "downhill": width, "weights": 1}
        self._parts: list[dict[str, int]] = []
        self._checked: set[int] = set()
        folder.mkdir(parents=True, exist_ok=True)
        self._load_progress()
        self._files = {name: self._open(name, size) for name, size in self._widths.items()}

    @property
    def num_bytes(self) -> int:
        """Bytes on disk when complete."""
        return 4 * int(self._starts[-1]) * sum(self._widths.values())

    @property
    def done(self) -> int:
        """How many sequences have been written, from the first on."""
        return self._parts[-1]["stop"] if self._parts else 0

    def write(self, batch: TokenBatch) -> None:
        """Append a batch, which must begin where the last ended; it is on disk when this returns."""
        first, last = batch.places.start, batch.places.stop
        if first != self.done:
            raise ValueError(f"The cache holds {self.done} sequences; the next batch begins at {first}.")
        counted = (batch.weights > 0).cpu()
        rows = slice(int(self._starts[first]), int(self._starts[last]))
        losses = {"losses": [float(loss) for loss in batch.losses]}
        checksum = 0
        for name in self._files:
            values = getattr(batch, name).float().cpu()
            values = np.ascontiguousarray((values[..., None] if values.ndim == 2 else values)[counted].numpy())
            self._files[name][rows] = values
            self._files[name].flush()
            checksum = zlib.crc32(values.tobytes(), checksum)
        self._parts.append({"start": first, "stop": last, "crc32": checksum, **losses})  # type: ignore[dict-item]
        self._save_progress()

    def batches(self, start: int, stop: int, device: torch.device) -> Any:
        """The batches that were written between two sequences, as they were.

        Raises:
            ValueError: If a part is damaged, naming the folder.
        """
        for number, part in enumerate(self._parts):
            if part["start"] >= start and part["stop"] <= stop:
                yield self._read(number, part).to(device)

    def _read(self, number: int, part: Mapping[str, Any]) -> TokenBatch:
        places = slice(part["start"], part["stop"])
        rows = slice(int(self._starts[places.start]), int(self._starts[places.stop]))
        values = {name: np.array(file[rows]) for name, file in self._files.items()}
        if number not in self._checked:
            checksum = 0
            for array in values.values():
                checksum = zlib.crc32(np.ascontiguousarray(array).tobytes(), checksum)
            if checksum != part["crc32"]:
                raise ValueError(
                    f"The activations of sequences {places.start} to {places.stop - 1} in {self.folder} are damaged "
                    "(their checksum is another). Delete the folder; they are computed again."
                )
            self._checked.add(number)
        lengths = np.diff(self._starts[places.start : places.stop + 1])
        counted = torch.from_numpy(np.arange(lengths.max(initial=0)) < lengths[:, None])
        padded = {}
        for name, array in values.items():
            padded[name] = torch.zeros(*counted.shape, array.shape[1])
            padded[name][counted] = torch.from_numpy(array)
        losses = torch.tensor(part["losses"])
        return TokenBatch(places, padded["features"], padded["downhill"], padded["weights"][..., 0], losses)

    def _open(self, name: str, width: int) -> np.memmap:
        path, shape = self.folder / f"{name}.f32", (int(self._starts[-1]), width)
        if self._parts and (not path.exists() or path.stat().st_size != 4 * shape[0] * width):
            raise ValueError(f"{path} is missing or has another size. Delete {self.folder}; it is computed again.")
        return np.memmap(path, np.float32, "r+" if self._parts else "w+", shape=shape)

    def _load_progress(self) -> None:
        path = self.folder / _PROGRESS
        if not path.exists():
            if any(self.folder.iterdir()) and not (self.folder / "features.f32").exists():
                raise ValueError(f"{self.folder} is not empty and holds no activations. Name another folder.")
            return
        try:
            stored = json.loads(path.read_text())
            other = sorted(key for key in self._identity if stored["identity"].get(key) != self._identity[key])
            self._parts = stored["parts"]
        except (ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} is damaged. Delete {self.folder}; it is computed again.") from error
        if other:
            raise ValueError(
                f"{self.folder} holds activations of something else: {', '.join(other)} differ. Name another folder "
                "with `cache_dir=`, or delete this one."
            )

    def _save_progress(self) -> None:
        part = self.folder / f"{_PROGRESS}.part"
        with part.open("w") as file:
            json.dump({"identity": self._identity, "parts": self._parts}, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(self.folder / _PROGRESS)
