"""Progress, shown where a person waits: one bar for a whole call, with its phase and the time that is left.

Work is counted in phases. Those inside ``with call():`` share one bar, which a thread keeps moving while a phase takes
long over one item; a phase outside has a bar of its own.
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

#: Seconds from one beat of a bar to the next. It appears with the first, so that quick calls show none.
BEAT = 0.5


@contextmanager
def call(*, show: bool = True, is_planned: bool = True) -> Iterator[None]:
    """All phases in the block on one bar, on rank 0 only, which leaves no line behind; inside a call, part of that.

    Of a call that is planned no time is told before :func:`expect` has been.
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
    """Show all phases of a function on one bar, unless it is called with ``show_progress=False``."""

    @wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        with call(show=bool(kwargs.get("show_progress", True)), is_planned=False):
            return function(*args, **kwargs)

    return wrapped


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
    with call(show=show and bool(description), is_planned=False):
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
        #: How many items are done.
        self.done = 0

    def begin(self, description: str, total: int) -> None:
        """Show the phase."""
        if self._bar is not None:
            self._bar.begin(description, total)

    def update(self, count: int) -> None:
        """So many more items are done."""
        self.done += count
        if self._bar is not None:
            self._bar.update(count)

    def skip(self, count: int) -> None:
        """So many items need not be done, as they were before."""
        if self._bar is not None:
            self._bar.skip(count)

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
    #: Of the first update: it may hold preparations, which the items after it do not take.
    first_done: int = 0
    first_seconds: float = 0.0

    @property
    def pace(self) -> float:
        """Seconds for one item, once some are done."""
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
        # In the context of the call: notebooks send what a thread shows to the cell that it belongs to.
        self._thread = Thread(target=copy_context().run, args=(self._beat,), daemon=True)
        self._thread.start()

    def expect(self, phase: str, items: int, work: float) -> None:
        """Work to come; of a phase that has begun, what is known now."""
        self._is_unknown = False
        known = self._phases.setdefault(phase, _Phase(0))
        known.items, known.work = max(items, known.done), work

    def begin(self, name: str, total: int) -> None:
        """A phase begins, or runs once more."""
        phase = self._phases.setdefault(name, _Phase(0))
        phase.items = max(phase.items, phase.done + total)
        self._phase, self.is_counting, self._since = phase, True, time.perf_counter()
        self._name = name

    def update(self, count: int) -> None:
        """Items of the phase are done."""
        with self._lock:
            now = time.perf_counter()
            self._phase.done += count
            self._phase.seconds += now - self._since
            if not self._phase.first_done:
                self._phase.first_done, self._phase.first_seconds = self._phase.done, self._phase.seconds
            self._since = now

    def skip(self, count: int) -> None:
        """Items of the phase need not be done."""
        with self._lock:
            self._phase.items -= count

    def left(self) -> float | None:
        """Seconds that are left by what items have taken so far; None where nothing is known."""
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
        """Leave no line behind."""
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
                bar.set_description(self._name, refresh=False)
                if left is not None:
                    bar.n = max(bar.n, passed / (passed + left))
                    bar.set_postfix_str(f"about {tqdm.format_interval(left)} left", refresh=False)
                bar.refresh()


_current: ContextVar[_Bar | None] = ContextVar("_current", default=None)
