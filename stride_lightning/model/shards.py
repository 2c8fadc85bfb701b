"""Distributed checkpoints: a folder into which every process of a sharded fit writes its part of the weights."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

#: The file of a distributed checkpoint that says where each part is, and Lightning's file with all but tensors.
_INDEX, _REST = ".metadata", "meta.pt"
#: The keys under which Lightning's strategies store the weights.
_WEIGHTS = ("state_dict", "model")
#: What an index is made of besides types of numbers; unpickling anything else might run code.
_PARTS = frozenset(
    {
        *(
            ("torch.distributed.checkpoint.metadata", name)
            for name in (
                "BytesStorageMetadata",
                "ChunkStorageMetadata",
                "Metadata",
                "MetadataIndex",
                "StorageMeta",
                "TensorProperties",
                "TensorStorageMetadata",
                "_MEM_FORMAT_ENCODING",
            )
        ),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.serialization", "_get_layout"),
        ("torch", "Size"),
        ("collections", "OrderedDict"),
        ("pathlib", "Path"),
        ("pathlib", "PosixPath"),
        ("pathlib", "WindowsPath"),
    }
)


def rest_of(path: Path) -> Path | None:
    """Lightning's file in a distributed checkpoint that holds all but its tensors; None if the path is no such folder.

    Example:
        >>> rest_of(Path("epoch=1.ckpt"))
    """
    return path / _REST if (path / _INDEX).is_file() and (path / _REST).is_file() else None


def read_weights(path: Path, weights_only: bool | None) -> dict[str, Tensor]:
    """The whole weights of a distributed checkpoint, on the CPU; this process reads all parts by itself.

    Raises:
        UnpicklingError: If the folder's index holds other objects than it should, unless ``weights_only`` is False.
    """
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    with (path / _INDEX).open("rb") as file:
        metadata = (pickle.Unpickler if weights_only is False else _IndexUnpickler)(file).load()
    states: dict[str, Any] = {key: {} for key in _WEIGHTS}
    for key, (first, *names) in metadata.planner_data.items():
        stored = metadata.state_dict_metadata[key]
        if first in states and isinstance(stored, TensorStorageMetadata):
            states[first][".".join(map(str, names))] = torch.empty(stored.size, dtype=stored.properties.dtype)
    reader, planner = FileSystemReader(path), DefaultLoadPlanner()
    planner.set_up_planner(states, metadata, is_coordinator=True)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    reader.read_data(reader.prepare_local_plan(planner.create_local_plan()), planner).wait()
    return states["state_dict"] | states["model"]


class _IndexUnpickler(pickle.Unpickler):
    """Makes nothing but the parts of an index."""

    @override
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _PARTS or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is no part of a checkpoint's index")
