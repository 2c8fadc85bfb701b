"""The memory budget of a call, and the memory that is free."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from stride_lightning.runtime.checks import check_count

#: The default without a GPU.
DEFAULT_BYTES = 2**29
#: Where Linux tells a process about the limits of its container.
_CONTAINER = Path("/sys/fs/cgroup")


def memory_budget(given: int | None, device: torch.device) -> int:
    """The budget in bytes: the given one, else half of a GPU's free memory, else 512 MiB.

    Example:
        >>> memory_budget(None, torch.device("cpu"))
        536870912
    """
    if given is not None:
        return check_count("memory_budget", given)
    return torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else DEFAULT_BYTES


def free_bytes(device: torch.device) -> int:
    """Bytes that can be taken on a device; as good as endless where the system does not tell.

    Example:
        >>> free_bytes(torch.device("cpu")) > 0
        True
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type != "cpu" or not sys.platform.startswith("linux"):
        return sys.maxsize
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    return min(available, free_in_container(_CONTAINER))


def free_in_container(folder: Path) -> int:
    """Bytes up to the limit of a container, beyond which the system kills; as good as endless without one."""
    try:
        limit, used = (int((folder / name).read_text()) for name in ("memory.max", "memory.current"))
        lines = (folder / "memory.stat").read_text().splitlines()
    except (OSError, ValueError):  # there is no container, or its limit is "max"
        return sys.maxsize
    cached = next(int(line.split()[1]) for line in lines if line.startswith("file "))  # given up when memory is needed
    return limit - used + cached
