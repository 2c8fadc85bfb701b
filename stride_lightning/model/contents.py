"""What a module and the objects that it holds contain, put back after a forward pass has changed it."""

from __future__ import annotations

import random
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Collection
from functools import cache, partial
from operator import is_
from types import BuiltinMethodType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from stride_lightning.runtime.randomness import generator_restorer

#: A longer container holds data, inside which nothing is looked for.
_LONGEST = 1000
#: Of the items of a list beyond these, nothing is put back but the length.
_MOST_COPIED = 100_000
#: A larger array is data, too.
_MOST_BYTES = 2**26
#: Attributes of a LightningModule that lead to the Trainer, which has state of its own.
_TRAINER = frozenset({"_trainer", "_fabric", "_fabric_optimizers"})
#: Dictionaries of a module of which all members count, however many there are.
_REGISTERS = frozenset({"_modules", "_parameters", "_buffers"})
_ATOMS = frozenset({int, float, bool, str, bytes, complex, type(None), torch.dtype, torch.device, torch.Size, type})
#: Packages whose objects belong to the process, or to a program beside the module.
_FOREIGN = (sys.stdlib_module_names - {"types", "collections", "argparse"}) | frozenset(
    {
        "numpy",
        "stride_lightning",
        "lightning",
        "pytorch_lightning",
        "lightning_fabric",
        "wandb",
        "mlflow",
        "tensorboard",
        "tqdm",
    }
)
#: Packages whose classes hold no state of the module.
_LIBRARIES = _FOREIGN | {"builtins", "types", "collections", "argparse", "torch", "torchmetrics", "transformers"}


class Contents:
    """What objects hold at this moment: attributes, containers, arrays, states of generators, also inside each other.

    Tensors are listed in :attr:`tensors`. Data sets, loaders, the Trainer and loggers are left alone.

    Example:
        >>> import types
        >>> owner = types.SimpleNamespace(losses={"train": [1.0]}, count=0)
        >>> contents = Contents(owner)
        >>> owner.losses["train"].append(2.0)
        >>> owner.count += 1
        >>> contents.restore()
        >>> owner
        namespace(losses={'train': [1.0]}, count=0)
    """

    def __init__(self, *owners: object) -> None:
        #: Tensors among the contents: parameters, buffers and others.
        self.tensors: list[Tensor] = []
        self._restores: list[Callable[[], Any]] = []
        self._empty: list[Any] = []
        self._visited: dict[int, object] = {}  # holds what it names, so that no other object takes an id meanwhile
        self._to_visit: list[Any] = list(owners)
        while self._to_visit:
            item = self._to_visit.pop()
            if id(item) not in self._visited:
                self._visited[id(item)] = item
                if visit := _visitor(type(item)):
                    visit(self, item)

    def restore(self) -> None:
        """Put everything but the values of tensors back."""
        for container in self._empty:
            if container:
                container.clear()
        for restore in self._restores:
            restore()

    def _look_inside(self, items: Collection[Any], *, all_of_them: bool = False) -> None:
        if all_of_them or len(items) <= _LONGEST:
            self._to_visit += [item for item in items if type(item) not in _ATOMS]

    def _tensor(self, item: Tensor) -> None:
        self.tensors.append(item)

    def _dict(self, item: dict[Any, Any], *, all_of_them: bool = False) -> None:
        if not item:
            self._empty.append(item)
            return
        self._restores.append(partial(_restore_dict, item, dict(item)))
        self._look_inside(item.values(), all_of_them=all_of_them)

    def _list(self, item: list[Any]) -> None:
        self._restores.append(partial(_restore_list, item, item[:_MOST_COPIED], len(item)))
        self._look_inside(item)

    def _collection(self, item: Any) -> None:
        self._restores.append(partial(_restore_collection, item, list(item)))
        self._look_inside(item)

    def _array(self, item: np.ndarray) -> None:
        if item.flags.writeable and item.nbytes <= _MOST_BYTES:
            self._restores.append(partial(np.copyto, item, item.copy()))

    def _generator(self, item: Any) -> None:
        if restore := generator_restorer(item):
            self._restores.append(restore)

    def _partial(self, item: Any) -> None:
        self._to_visit += [item.func, *item.args, *item.keywords.values()]

    def _method(self, item: Any) -> None:
        self._to_visit.append(item.__self__)

    def _class(self, item: type) -> None:
        held = {name: value for name, value in vars(item).items() if not (name[:2] == "__" or callable(value))}
        self._restores.append(partial(_restore_class, item, held))
        self._to_visit += [value for value in held.values() if isinstance(value, dict | list | set | deque)]

    def _object(self, item: Any) -> None:
        if not isinstance(attributes := getattr(item, "__dict__", None), dict):
            return
        self._dict(attributes)
        self._to_visit += _classes_of_user(type(item))

    def _module(self, item: nn.Module) -> None:
        attributes = vars(item)
        self._restores.append(partial(_restore_dict, attributes, dict(attributes)))
        for name, value in attributes.items():
            kind = type(value)
            if kind in _ATOMS or name in _TRAINER:
                continue
            if kind in (dict, OrderedDict):  # of torch's own, most are empty and any may be long
                self._dict(value, all_of_them=name in _REGISTERS)
            else:
                self._to_visit.append(value)
        if isinstance(item, torch.jit.ScriptModule):
            self._to_visit += [*item.parameters(), *item.buffers()]
        self._to_visit += _classes_of_user(type(item))


@cache
def _visitor(cls: type) -> Callable[[Contents, Any], None] | None:
    """The method of :class:`Contents` for objects of a class; None for those without contents of their own."""
    # The first that fits counts.
    for kinds, visit in (
        (Tensor, Contents._tensor),
        (nn.Module, Contents._module),
        (dict, Contents._dict),
        (list, Contents._list),
        ((tuple, frozenset), Contents._look_inside),
        ((set, deque), Contents._collection),
        (np.ndarray, Contents._array),
        ((torch.Generator, np.random.RandomState, np.random.Generator, random.Random), Contents._generator),
        (partial, Contents._partial),
        ((MethodType, BuiltinMethodType), Contents._method),
        ((Dataset, DataLoader), None),
        (type, Contents._class),
    ):
        if issubclass(cls, kinds):
            return visit
    return None if cls in _ATOMS or cls.__module__.partition(".")[0] in _FOREIGN else Contents._object


@cache
def _classes_of_user(cls: type) -> list[type]:
    """The classes of an object that are no part of a library, so that their attributes may be state."""
    return [base for base in cls.__mro__ if base.__module__.partition(".")[0] not in _LIBRARIES]


def _restore_dict(value: dict[Any, Any], before: dict[Any, Any]) -> None:
    if len(value) != len(before) or not all(map(is_, value.values(), before.values())) or value.keys() != before.keys():
        dict.clear(value)
        dict.update(value, before)


def _restore_list(value: list[Any], start: list[Any], length: int) -> None:
    if len(value) > length:
        del value[length:]
    if len(value) != length or not all(map(is_, value, start)):
        value[: len(start)] = start


def _restore_collection(value: Any, before: list[Any]) -> None:
    if len(value) != len(before) or not all(map(is_, value, before)):
        value.clear()
        (value.update if isinstance(value, set) else value.extend)(before)


def _restore_class(cls: type, before: dict[str, Any]) -> None:
    for name in [name for name in vars(cls) if name[:2] != "__" and name not in before]:
        if not callable(vars(cls)[name]):
            delattr(cls, name)
    for name, value in before.items():
        if vars(cls).get(name, before) is not value:
            setattr(cls, name, value)
