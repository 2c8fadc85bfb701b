"""Random generators: seeded for a block, and put back."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from types import BuiltinMethodType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

#: A longer container holds data, in which no generator is looked for.
_LONGEST = 1000


@contextmanager
def preserved_random_state(*owners: object, beyond: object = None) -> Iterator[None]:
    """Put the random states of Python, NumPy and torch (every device) back after the block.

    Generators among the attributes of ``owners``, and of what these hold, are put back too; but not those that are
    reached only through ``beyond``.

    Example:
        >>> import types
        >>> owner = types.SimpleNamespace(rng=random.Random(0))
        >>> with preserved_random_state(owner):
        ...     first = owner.rng.random()
        >>> first == owner.rng.random()
        True
    """
    # Devices by name: without them torch warns where there are several. Their states are read without waiting.
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    restores = [
        partial(random.setstate, random.getstate()),
        partial(np.random.set_state, np.random.get_state()),  # noqa: NPY002
        *filter(None, map(generator_restorer, held_generators(*owners, beyond=beyond))),
    ]
    try:
        with torch.random.fork_rng(list(devices)):
            yield
    finally:
        for restore in restores:
            restore()


def held_generators(*owners: object, beyond: object = None) -> list[Any]:
    """Every random generator that the owners hold, but those that are reached only through ``beyond``."""
    to_visit, visited, held = list(owners), {id(beyond): beyond}, []
    while to_visit:
        item: Any = to_visit.pop()
        if id(item) in visited or isinstance(item, Tensor | np.ndarray | str | bytes | type | ModuleType):
            continue
        visited[id(item)] = item  # held, so that no other object takes its id meanwhile
        if generator_restorer(item):
            held.append(item)
        elif isinstance(item, Mapping | list | tuple | set | frozenset):
            if len(item) <= _LONGEST:
                to_visit.extend(item.values() if isinstance(item, Mapping) else item)
        elif isinstance(item, partial):
            to_visit.extend([item.func, *item.args, *item.keywords.values()])
        elif isinstance(item, MethodType | BuiltinMethodType):
            to_visit.append(item.__self__)
        elif isinstance(item, FunctionType) and item.__closure__:
            to_visit.extend(cell.cell_contents for cell in item.__closure__ if _is_filled(cell))
        elif isinstance(attributes := getattr(item, "__dict__", None), dict):
            to_visit.extend(attributes.values())
    return held


def _is_filled(cell: Any) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:  # of a name that has no value yet
        return False
    return True


def reseed(generator: Any, seed: int) -> None:
    """Seed a generator of Python, NumPy or torch that somebody holds."""
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif isinstance(generator, np.random.RandomState):
        generator.seed(seed % 2**32)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = type(generator.bit_generator)(seed).state
    else:
        generator.seed(seed)


def generator_restorer(item: Any) -> Callable[[], Any] | None:
    """What puts the state of a random generator of Python, NumPy or torch back; None for any other object."""
    if isinstance(item, torch.Generator | np.random.RandomState):
        return partial(item.set_state, item.get_state())
    if isinstance(item, np.random.Generator):
        return partial(setattr, item.bit_generator, "state", item.bit_generator.state)
    if isinstance(item, random.Random):
        return partial(item.setstate, item.getstate())
    return None


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed Python, NumPy and torch for the block; after it they go on as if nothing had been drawn.

    Example:
        >>> with seeded(3):
        ...     first = torch.rand(2)
        >>> with seeded(3):
        ...     print(torch.equal(first, torch.rand(2)))
        True
    """
    with preserved_random_state():
        seed_all(seed)
        yield


def seed_all(seed: int) -> None:
    """Seed Python, NumPy and torch, as augmentation and models may draw from any of them."""
    seed_torch(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    random.seed(seed)


def seed_torch(seed: int) -> None:
    """Seed torch on every device of this machine.

    ``torch.manual_seed`` stores a stack trace for every kind of device that is missing, milliseconds each.
    """
    if _has_accelerator():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


def mix(*numbers: int) -> int:
    """One seed made of several numbers, so that (seed, epoch), (epoch, seed) and (seed,) draw differently.

    Example:
        >>> len({mix(0, 1), mix(1, 0), mix(0), mix(0, 0)})
        4
    """
    # The count comes first, because SeedSequence takes (0,) and (0, 0) for the same.
    return int(np.random.SeedSequence([len(numbers), *numbers]).generate_state(1, np.uint64)[0] >> np.uint64(1))


@cache
def _has_accelerator() -> bool:
    return torch.accelerator.is_available()
