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

    Under random augmentation the content is left out, so that only length, shapes and targets identify it.

    Example:
        >>> fingerprint = Fingerprint(content=True)
        >>> fingerprint.update(torch.zeros(2, 32, dtype=torch.uint8), torch.tensor([0, 1]))
        >>> sorted(fingerprint.summary())
        ['content', 'num_examples', 'shapes', 'targets']
    """

    def __init__(self, *, content: bool) -> None:
        self._has_content = content
        self._examples, self._targets = hashlib.sha256(), hashlib.sha256()
        self._num_examples = 0

    def update(self, digests: Tensor, targets: Tensor | None) -> None:
        """Add a batch: the digests of its examples and its targets; for tokens, the targets that count."""
        self._num_examples += len(digests)
        self._examples.update(digests.numpy().tobytes())
        if self._has_content:
            return
        if targets is not None and targets.ndim == 3 and targets.shape[2] == 2:  # labels and weights
            targets = targets[targets[..., 1] != 0]
        if targets is not None:
            self._targets.update(raw_bytes(targets))

    def summary(self) -> dict[str, Any]:
        """Plain values to store: ``num_examples``, and ``content``, or ``shapes`` and ``targets`` (others are None)."""
        examples = self._examples.hexdigest()
        return {
            "num_examples": self._num_examples,
            "content": examples if self._has_content else None,
            "shapes": None if self._has_content else examples,
            "targets": None if self._has_content else self._targets.hexdigest(),
        }


def digest(example: Any, *, content: bool = True) -> bytes:
    """SHA-256 of an example's leaves: types and shapes, and their values if ``content``.

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
        if content:
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
        hasher.update(f"{value.dtype}{value.shape}".encode() + (value.tobytes() if content else b""))
    elif isinstance(value, bool | int | float | str | bytes) or value is None:
        hasher.update(repr(value).encode() if content else type(value).__name__.encode())
    elif hasattr(value, "tobytes") and hasattr(value, "size"):  # PIL images
        hasher.update(f"{type(value).__name__}{value.size}".encode() + (value.tobytes() if content else b""))
    elif isinstance(value, type):
        hasher.update(f"{value.__module__}.{value.__qualname__}".encode())
    elif hasattr(value, "__dict__"):
        hasher.update(type(value).__qualname__.encode())
        _feed(hasher, vars(value), content=content)
    else:
        raise TypeError(f"it holds a {type(value).__name__}. {_FINGERPRINTED}")
