"""Progress bars, shown where a person waits."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import NoReturn, TypeVar

from tqdm.auto import tqdm

from stride_lightning.runtime.distributed import rank

T = TypeVar("T")


def track(items: Iterable[T], description: str, total: int | None = None, *, show: bool = True) -> Iterator[T]:
    """Iterate with a progress bar that appears after half a second, on rank 0 only, and leaves no line behind."""
    return iter(tqdm(items, desc=description, total=total, disable=not show or rank() != 0, delay=0.5, leave=False))


def counting(total: int, description: str, show: bool = True) -> tqdm[NoReturn]:
    """A progress bar to be advanced by ``update(count)``, used in a ``with`` block."""
    return tqdm(total=total, desc=description, disable=not show or rank() != 0, delay=0.5, leave=False)


def announce(message: str, *, show: bool) -> None:
    """Say something before long work, on rank 0 only."""
    if show and rank() == 0:
        print(message, file=sys.stderr, flush=True)
