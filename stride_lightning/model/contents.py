"""What modules hold besides parameters and buffers, put back after a forward pass has changed it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor


def restorer(value: object) -> Callable[[], None]:
    """A function that puts the contents of a container, an array or a tensor back in place.

    Containers inside containers are put back too. Arrays and tensors inside containers are not: a list may hold many.

    Example:
        >>> losses = {"train": [1.0]}
        >>> restore = restorer(losses)
        >>> losses["train"].append(2.0)
        >>> restore()
        >>> losses
        {'train': [1.0]}
    """
    if type(value) is Tensor and not value.is_inference():
        return partial(_restore_tensor, value, value.detach().clone(), value._version)
    if type(value) is np.ndarray:
        return partial(_restore_array, value, value.copy())
    return _of_container(value, set())


def _of_container(value: Any, visited: set[int]) -> Callable[[], None]:
    if type(value) not in (list, dict, set, deque) or id(value) in visited:
        return _nothing
    visited.add(id(value))
    items = dict(value) if type(value) is dict else list(value)
    inner = [_of_container(item, visited) for item in (items.values() if isinstance(items, dict) else items)]
    return partial(_restore_container, value, items, [restore for restore in inner if restore is not _nothing])


def _nothing() -> None:
    pass


@torch.no_grad()
def _restore_tensor(tensor: Tensor, before: Tensor, version: int) -> None:
    if tensor._version != version:
        tensor.copy_(before)


def _restore_array(array: np.ndarray, before: np.ndarray) -> None:
    array[...] = before


def _restore_container(container: Any, items: Any, inner: list[Callable[[], None]]) -> None:
    container.clear()
    (container.update if isinstance(container, dict | set) else container.extend)(items)
    for restore in inner:
        restore()
