"""What a call costs."""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path

import torch


class Meter:
    """Seconds and peak memory (resident set, and device memory if any) since it was made."""

    def __init__(self) -> None:
        self._start, self._resident = time.perf_counter(), _resident_bytes()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    @property
    def seconds(self) -> float:
        """Wall-clock time."""
        return time.perf_counter() - self._start

    @property
    def peak_memory(self) -> int:
        """Bytes beyond those held at the start."""
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        return max(0, peak - self._resident, device)


def _resident_bytes() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:  # no procfs: count from zero
        return 0
