"""The global random generators: seeded for a block, and restored after it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
import torch


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Restore the random states of Python, NumPy and torch (every device) after the block."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002


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
