"""Progress: one bar for a whole call, with its phase and the time left.

Phases count their items. All phases inside ``with call():`` share one bar; a thread moves it even during a long item. A
phase outside of a call has a separate bar.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from functools import wraps
from threading import Event, Lock, Thread
from typing import ParamSpec, TypeVar

from tqdm.auto import tqdm

from stride_lightning.runtime.distributed import rank

P = ParamSpec("P")
T = TypeVar("T")

#: Seconds between updates of a bar. The bar appears at the first update, so that quick calls show none.
BEAT = 0.5


@contextmanager
def call(*, show: bool = True, is_planned: bool = True) -> Iterator[None]:
    """Show all phases in the block on one bar, on rank 0 only; it vanishes at the end. Inside a call, use its bar.

    A planned call shows no time left before its first :func:`expect`.
    """
    if not show or rank() != 0 or _current.get() is not None:
        yield
        return
    bar = _Bar(is_planned=is_planned)
    _current.set(bar)
    try:
        yield
    finally:
        _current.set(None)
        bar.close()


def on_one_bar(function: Callable[P, T]) -> Callable[P, T]:
    """Show all phases of a function on one bar, unless its argument is ``show_progress=False``."""

    @wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        with call(show=bool(kwargs.get("show_progress", True))):
            return function(*args, **kwargs)

    return wrapped


def expect(phase: str, items: int, work: float = 1.0) -> None:
    """Announce a phase to the call in progress, for its estimate of the time left.

    Args:
        phase: Description of the phase.
        items: Number of its items, over all its runs.
        work: Work of one item, relative to items of other phases.
    """
    if (bar := _current.get()) is not None:
        bar.expect(phase, items, work)


@contextmanager
def counting(total: int, description: str, show: bool = True) -> Iterator[Counter]:
    """A phase of ``total`` items; ``update(count)`` advances it. Without a description it is not shown.

    A phase inside another one is a part of that and not shown.
    """
    with call(show=show and bool(description), is_planned=False):
        bar = _current.get() if show and description else None
        counter = Counter(None if bar is None or bar.is_counting else bar)
        counter.begin(description, total)
        try:
            yield counter
        finally:
            counter.end()


def track(items: Iterable[T], description: str, total: int | None = None, *, show: bool = True) -> Iterator[T]:
    """Iterate over the items, as a phase."""
    length = len(items) if total is None and hasattr(items, "__len__") else total  # pyright: ignore[reportArgumentType]
    with counting(length or 0, description, show) as counter:
        for item in items:
            yield item
            counter.update(1)


def announce(message: str, *, show: bool) -> None:
    """Print a message before long work, on rank 0 only."""
    if show and rank() == 0:
        tqdm.write(message, file=sys.stderr)


class Counter:
    """The count of the items of one phase."""

    def __init__(self, bar: _Bar | None) -> None:
        self._bar = bar
        #: Number of items done.
        self.done = 0

    def begin(self, description: str, total: int) -> None:
        """Show the phase."""
        if self._bar is not None:
            self._bar.begin(description, total)

    def update(self, count: int) -> None:
        """Count items that are done."""
        self.done += count
        if self._bar is not None:
            self._bar.update(count)

    def skip(self, count: int) -> None:
        """Count items that an earlier call has done."""
        if self._bar is not None:
            self._bar.skip(count)

    def end(self) -> None:
        """End the phase, so that the next may begin."""
        if self._bar is not None:
            self._bar.is_counting = False


@dataclass
class _Phase:
    items: int
    work: float = 0.0  # of one item; 0 if unknown
    done: int = 0
    seconds: float = 0.0  # of all items done
    #: Items and seconds of the first update, which may include preparations that later items do not need.
    first_done: int = 0
    first_seconds: float = 0.0

    @property
    def pace(self) -> float:
        """Seconds of one item; needs items that are done."""
        if self.done > self.first_done:
            return (self.seconds - self.first_seconds) / (self.done - self.first_done)
        return self.seconds / self.done


class _Bar:
    """One bar for the phases of a call."""

    def __init__(self, *, is_planned: bool) -> None:
        self._is_unknown = is_planned
        self._phases: dict[str, _Phase] = {}
        self._phase = _Phase(0)
        self.is_counting = False
        self._since = self._started = time.perf_counter()
        self._name = "Preparing"
        self._stop, self._lock = Event(), Lock()  # threads share the work of a phase
        # In the context of the call: notebooks use it to show a thread's output in the right cell.
        self._thread = Thread(target=copy_context().run, args=(self._beat,), daemon=True)
        self._thread.start()

    def expect(self, phase: str, items: int, work: float) -> None:
        """Announce a phase, or correct what was announced of it."""
        self._is_unknown = False
        known = self._phases.setdefault(phase, _Phase(0))
        known.items, known.work = max(items, known.done), work

    def begin(self, name: str, total: int) -> None:
        """Begin a phase, or run it once more."""
        phase = self._phases.setdefault(name, _Phase(0))
        phase.items = max(phase.items, phase.done + total)
        self._phase, self.is_counting, self._since = phase, True, time.perf_counter()
        self._name = name

    def update(self, count: int) -> None:
        """Count items of the phase that are done."""
        with self._lock:
            now = time.perf_counter()
            self._phase.done += count
            self._phase.seconds += now - self._since
            if not self._phase.first_done:
                self._phase.first_done, self._phase.first_seconds = self._phase.done, self._phase.seconds
            self._since = now

    def skip(self, count: int) -> None:
        """Count items of the phase that need no work."""
        with self._lock:
            self._phase.items -= count

    def left(self) -> float | None:
        """Seconds left, estimated from the time of the items done; None if unknown."""
        if self._is_unknown:
            return None
        phases = list(self._phases.values())
        spent = sum(phase.pace * phase.done for phase in phases if phase.done and phase.work)
        work = sum(phase.done * phase.work for phase in phases)
        left = 0.0
        for phase in phases:
            if phase.done > phase.items:
                return None
            if phase.done:
                left += phase.pace * (phase.items - phase.done)
            elif work:
                left += spent / work * phase.work * phase.items
            elif phase.items:
                return None
        return max(0.0, left - (time.perf_counter() - self._since))

    def close(self) -> None:
        """Stop the thread and remove the bar."""
        self._stop.set()
        self._thread.join()

    def _beat(self) -> None:
        if self._stop.wait(BEAT):
            return
        layout = "{desc}{percentage:3.0f}%|{bar}| {elapsed} passed{postfix}"
        with tqdm(desc=self._name, total=1.0, bar_format=layout, leave=False) as bar:
            bar.start_t -= time.perf_counter() - self._started
            while not self._stop.wait(BEAT):
                left, passed = self.left(), time.perf_counter() - self._started
                done, items = self._phase.done, self._phase.items
                bar.set_description(f"{self._name} {done}/{items}" if items > 1 else self._name, refresh=False)
                if left is not None:
                    bar.n = max(bar.n, passed / (passed + left))
                    bar.set_postfix_str(f"about {tqdm.format_interval(left)} left", refresh=False)
                bar.refresh()


_current: ContextVar[_Bar | None] = ContextVar("_current", default=None)
