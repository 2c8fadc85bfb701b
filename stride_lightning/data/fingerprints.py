"""Digests of examples, and the fingerprint of a data set that they make."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stride_lightning.model.weights import raw_bytes

_FINGERPRINTED = (
    "Examples may hold dense tensors, arrays, PIL images, numbers, strings, and tuples, lists, dicts or plain objects "
    "of them. Convert it, or leave it out of what the dataset returns."
)


class Fingerprint:
    """The identity of a data set: its length, and the content of its examples in order.

    Under random augmentation only shapes identify it, and what is a single integer, such as a label.

    Example:
        >>> fingerprint = Fingerprint(content=True)
        >>> fingerprint.update(torch.zeros(2, 32, dtype=torch.uint8))
        >>> sorted(fingerprint.summary())
        ['content', 'num_examples', 'shapes']
    """

    def __init__(self, *, content: bool) -> None:
        self._has_content, self._examples, self._num_examples = content, hashlib.sha256(), 0

    def update(self, digests: Tensor) -> None:
        """Add a batch, by the digests of its examples."""
        self._num_examples += len(digests)
        self._examples.update(digests.numpy().tobytes())

    def summary(self) -> dict[str, Any]:
        """Plain values to store: ``num_examples``, and ``content`` or ``shapes`` (the other is None)."""
        examples, names = self._examples.hexdigest(), ("content", "shapes")
        values = (examples, None) if self._has_content else (None, examples)
        return {"num_examples": self._num_examples, **dict(zip(names, values, strict=True))}


def digest(example: Any, *, content: bool = True) -> bytes:
    """SHA-256 of an example's leaves: types and shapes, single integers, and all values if ``content``.

    Raises:
        TypeError: If it holds something whose content is not known, as a clause that says what "it" holds.
    """
    hasher = hashlib.sha256()
    try:
        _feed(hasher, example, content=content)
    except RecursionError as error:
        raise TypeError(f"it holds a {type(example).__name__} that contains itself. {_FINGERPRINTED}") from error
    return hasher.digest()


def _feed(hasher: Any, value: Any, *, content: bool) -> None:
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_quantized:
            raise TypeError(f"it holds a tensor with layout {value.layout} and dtype {value.dtype}. {_FINGERPRINTED}")
        hasher.update(f"{value.dtype}{tuple(value.shape)}".encode())
        if content or (value.numel() == 1 and not value.is_floating_point()):
            hasher.update(raw_bytes(value))
    elif isinstance(value, dict):
        for key in value:
            hasher.update(f"{{{key}:".encode())
            _feed(hasher, value[key], content=content)
    elif isinstance(value, tuple | list):
        hasher.update(f"[{len(value)}".encode())
        for item in value:
            _feed(hasher, item, content=content)
    elif isinstance(value, np.ndarray | np.generic):
        is_label = value.size == 1 and value.dtype.kind in "biu"
        hasher.update(f"{value.dtype}{value.shape}".encode() + (value.tobytes() if content or is_label else b""))
    elif isinstance(value, bool | int | float | str | bytes) or value is None:
        hasher.update(repr(value).encode() if content or isinstance(value, int) else type(value).__name__.encode())
    elif hasattr(value, "tobytes") and hasattr(value, "size"):  # PIL images
        hasher.update(f"{type(value).__name__}{value.size}".encode() + (value.tobytes() if content else b""))
    elif isinstance(value, type):
        hasher.update(f"{value.__module__}.{value.__qualname__}".encode())
    elif hasattr(value, "__dict__"):
        hasher.update(type(value).__qualname__.encode())
        _feed(hasher, vars(value), content=content)
    else:
        hasher.update(type(value).__qualname__.encode())
