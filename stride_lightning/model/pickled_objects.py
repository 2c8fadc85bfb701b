"""Which keys of a checkpoint hold objects that torch refuses to load; none of them is run to find out."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from typing_extensions import Self, override


def pickled_objects(path: Path) -> dict[str, str]:
    """Dotted keys of the objects in a checkpoint that ``weights_only=True`` refuses, and what each of them is.

    Empty where the file is not one that ``torch.save`` writes.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"step": 3, "hyper_parameters": {"net": torch.nn.ReLU()}}, f"{folder}/run.ckpt")
        ...     pickled_objects(Path(folder, "run.ckpt"))
        {'hyper_parameters.net': 'torch.nn.modules.activation.ReLU'}
    """
    try:
        refused = set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        with zipfile.ZipFile(path) as file:
            content = file.read(next(name for name in file.namelist() if name.endswith("/data.pkl")))
        return dict(_refused_keys(_Skeleton(io.BytesIO(content)).load(), refused, ""))
    except Exception:  # whatever a file may do that is damaged, or made by another program
        return {}


#: Modules that pickles of old protocols, such as torch's, call by the names of Python 2.
_RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg"}


class _StandIn:
    """Stands where an object of some class would, and does nothing."""

    arguments: tuple[Any, ...]

    def __new__(cls, *arguments: Any, **_: Any) -> Self:
        made = super().__new__(cls)
        made.arguments = arguments
        return made

    def __setstate__(self, state: object) -> None:
        pass

    def __setitem__(self, key: object, value: object) -> None:
        pass

    def append(self, value: object) -> None:
        pass

    def extend(self, values: object) -> None:
        pass


class _Dictionary(dict[Any, Any]):
    """Has attributes, as a state dict has."""


class _Skeleton(pickle.Unpickler):
    """Reads dictionaries, lists and plain values; no class or function of the file is imported."""

    @override
    def find_class(self, module: str, name: str) -> Any:
        module = _RENAMED.get(module, module)
        return _Dictionary if name == "OrderedDict" else type(f"{module}.{name}", (_StandIn,), {})

    @override
    def persistent_load(self, pid: Any) -> None:
        """Tensors are of no interest."""


def _refused_keys(value: Any, refused: set[str], key: str) -> Iterator[tuple[str, str]]:
    kind = value if isinstance(value, type) else type(value)
    if kind.__name__ in refused:
        yield key, kind.__name__
        return
    if isinstance(value, dict):
        items = [(str(name), item) for name, item in value.items()]
    elif isinstance(value, list | tuple | set | frozenset):
        items = [(str(number), item) for number, item in enumerate(value)]
    elif isinstance(value, _StandIn):
        items = [("", item) for item in value.arguments]
    else:
        items = []
    for name, item in items:
        yield from _refused_keys(item, refused, ".".join(filter(None, (key, name))))
