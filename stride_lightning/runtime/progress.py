"""Progress, shown where a person waits: one bar for a whole call, with its phase and the time that is left.

Work is counted in phases. Those inside ``with call():`` share one bar, which a thread keeps moving while a phase takes
long over one item; a phase outside has a bar of its own.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from threading import Event, Lock, Thread
from typing import Any, TypeVar

from tqdm.auto import tqdm

from stride_lightning.runtime.distributed import rank

T = TypeVar("T")

#: Seconds from one beat of a bar to the next. It appears with the first, so that quick calls show none.
BEAT = 0.5


@contextmanager
def call(*, show: bool = True) -> Iterator[None]:
    """All phases in the block on one bar, on rank 0 only, which leaves no line behind; inside a call, part of that."""
    if not show or rank() != 0 or _current.get() is not None:
        yield
        return
    bar = _Bar()
    _current.set(bar)
    try:
        yield
    finally:
        _current.set(None)
        bar.close()


def expect(phase: str, items: int, work: float = 1.0) -> None:
    """Tell the call in progress of a phase to come, for its estimate of the time left.

    Args:
        phase: The description that it will have.
        items: How many it will count, over all times that it runs.
        work: What each takes, relative to the items of the other phases.
    """
    if (bar := _current.get()) is not None:
        bar.expect(phase, items, work)


@contextmanager
def counting(total: int, description: str, show: bool = True) -> Iterator[Counter]:
    """A phase to be advanced by ``update(count)``, ``total`` in all; without a description it is not shown.

    Inside another phase it belongs to that.
    """
    with call(show=show and bool(description)):
        bar = _current.get() if show and description else None
        counter = Counter(None if bar is None or bar.is_counting else bar)
        counter.begin(description, total)
        try:
            yield counter
        finally:
            counter.end()


def track(items: Iterable[T], description: str, total: int | None = None, *, show: bool = True) -> Iterator[T]:
    """Iterate, as a phase of as many items."""
    length = len(items) if total is None and hasattr(items, "__len__") else total  # pyright: ignore[reportArgumentType]
    with counting(length or 0, description, show) as counter:
        for item in items:
            yield item
            counter.update(1)


def announce(message: str, *, show: bool) -> None:
    """Say something before long work, on rank 0 only."""
    if show and rank() == 0:
        tqdm.write(message, file=sys.stderr)


class Counter:
    """What counts the items of one phase."""

    def __init__(self, bar: _Bar | None) -> None:
        self._bar = bar

    def begin(self, description: str, total: int) -> None:
        """Show the phase."""
        if self._bar is not None:
            self._bar.begin(description, total)

    def update(self, count: int) -> None:
        """So many more items are done."""
        if self._bar is not None:
            self._bar.update(count)

    def end(self) -> None:
        """The next phase may begin."""
        if self._bar is not None:
            self._bar.is_counting = False


@dataclass
class _Phase:
    items: int
    work: float = 0.0  # of one item; 0 where nothing is known
    done: int = 0
    seconds: float = 0.0  # that the items done have taken


class _Bar:
    """One bar for the phases of a call."""

    def __init__(self) -> None:
        self._phases: dict[str, _Phase] = {}
        self._phase = _Phase(0)
        self.is_counting = False
        self._since = self._started = time.perf_counter()
        layout = "{desc}{percentage:3.0f}%|{bar}| {elapsed} passed{postfix}"
        self._tqdm: Any = tqdm(total=1.0, bar_format=layout, leave=False, delay=BEAT)
        self._stop, self._lock = Event(), Lock()  # threads share the work of a phase
        self._thread = Thread(target=self._beat, daemon=True)
        self._thread.start()

    def expect(self, phase: str, items: int, work: float) -> None:
        """Work to come; of a phase that has begun, what is known now."""
        before = self._phases.get(phase, _Phase(0))
        self._phases[phase] = _Phase(max(items, before.done), work, before.done, before.seconds)

    def begin(self, name: str, total: int) -> None:
        """A phase begins, or runs once more."""
        phase = self._phases.setdefault(name, _Phase(0))
        phase.items = max(phase.items, phase.done + total)
        self._phase, self.is_counting, self._since = phase, True, time.perf_counter()
        self._tqdm.set_description(name, refresh=False)

    def update(self, count: int) -> None:
        """Items of the phase are done."""
        with self._lock:
            now = time.perf_counter()
            self._phase.done += count
            self._phase.seconds += now - self._since
            self._since = now

    def left(self) -> float | None:
        """Seconds that are left by what items have taken so far; None before one is done, or if none were counted."""
        phases = list(self._phases.values())
        spent = sum(phase.seconds for phase in phases if phase.done and phase.work)
        work = sum(phase.done * phase.work for phase in phases)
        left = 0.0
        for phase in phases:
            if phase.done > phase.items:
                return None
            if phase.done:
                left += phase.seconds / phase.done * (phase.items - phase.done)
            elif work:
                left += spent / work * phase.work * phase.items
            elif phase.items:
                return None
        return max(0.0, left - (time.perf_counter() - self._since)) if phases else None

    def close(self) -> None:
        """Leave no line behind."""
        self._stop.set()
        self._thread.join()
        self._tqdm.close()

    def _beat(self) -> None:
        while not self._stop.wait(BEAT):
            left, passed = self.left(), time.perf_counter() - self._started
            if left is not None:
                self._tqdm.n = max(self._tqdm.n, passed / (passed + left))
                self._tqdm.set_postfix_str(f"about {tqdm.format_interval(left)} left", refresh=False)
            self._tqdm.refresh()


_current: ContextVar[_Bar | None] = ContextVar("_current", default=None)
