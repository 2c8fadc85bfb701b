"""Meter: time and memory of a call."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from pathlib import Path
from threading import Event, Thread

import torch
from typing_extensions import Self, override

#: Seconds between two measurements of the memory.
PERIOD = 0.005
_STATUS = Path("/proc/self/status")


class Meter:
    """Seconds and peak memory of a ``with`` block.

    The peak is the largest growth since the start of the block: of the process's resident set or of its CUDA memory,
    whichever is larger. A thread measures every 5 ms. A peak that is also the highest of the process's life is exact,
    as the system records it. Counters are read and never reset, since they belong to the caller.

    Example:
        >>> with Meter() as meter:
        ...     _ = torch.zeros(10)
        >>> meter.seconds < 60
        True
    """

    #: Wall-clock time.
    seconds: float = 0.0
    #: In bytes; None if it cannot be measured (without procfs and CUDA).
    peak_memory: int | None = None

    def __enter__(self) -> Self:
        self._gauges: list[_Gauge] = [_Device()]
        if _STATUS.exists():
            self._gauges.append(_Resident())
        self._stop, self._start = Event(), time.perf_counter()
        self._thread = Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._start
        self._stop.set()
        self._thread.join()
        peaks = [gauge.peak() for gauge in self._gauges]
        self.peak_memory = max((peak for peak in peaks if peak is not None), default=None)

    def _watch(self) -> None:
        while not self._stop.wait(PERIOD):
            for gauge in self._gauges:
                gauge.look()


class _Gauge(ABC):
    """Memory of one kind: its present size, and the largest size in the process's life."""

    def __init__(self) -> None:
        self._before = self._highest = self.held()
        self._mark = self.mark()

    @abstractmethod
    def held(self) -> int:
        """Present size in bytes."""

    @abstractmethod
    def mark(self) -> int:
        """Largest size so far in bytes."""

    def look(self) -> None:
        """Measure once."""
        self._highest = max(self._highest, self.held())

    def peak(self) -> int | None:
        """Largest growth since the start in bytes; None if there is no such memory."""
        self.look()
        mark = self.mark()
        highest = max(self._highest, mark) if mark > self._mark else self._highest
        return highest - self._before


class _Resident(_Gauge):
    """Pages of the process in main memory, on Linux."""

    @override
    def held(self) -> int:
        return _status("VmRSS")

    @override
    def mark(self) -> int:
        return _status("VmHWM")


class _Device(_Gauge):
    """Tensors on all CUDA devices; measuring does not initialise these."""

    @override
    def held(self) -> int:
        return sum(map(torch.cuda.memory_allocated, _devices()))

    @override
    def mark(self) -> int:
        return sum(map(torch.cuda.max_memory_allocated, _devices()))

    @override
    def peak(self) -> int | None:
        return super().peak() if torch.cuda.is_initialized() else None


def _devices() -> range:
    return range(torch.cuda.device_count()) if torch.cuda.is_initialized() else range(0)


def _status(key: str) -> int:
    lines = _STATUS.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024
