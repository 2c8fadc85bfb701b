"""The memory budget of a call."""

from __future__ import annotations

import torch

from stride_lightning.runtime.checks import check_count

#: The default without a GPU.
DEFAULT_BYTES = 2**29


def memory_budget(given: int | None, device: torch.device) -> int:
    """The budget in bytes: the given one, else half of a GPU's free memory, else 512 MiB.

    Example:
        >>> memory_budget(None, torch.device("cpu"))
        536870912
    """
    if given is not None:
        return check_count("memory_budget", given)
    return torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else DEFAULT_BYTES
