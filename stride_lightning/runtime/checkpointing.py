"""Activation checkpointing, switched off inside a block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

from torch.utils import checkpoint as torch_checkpoint

_lock = Lock()
_inside = 0
_originals: dict[str, Any] = {}


@contextmanager
def without_checkpointing() -> Iterator[None]:
    """Run what ``torch.utils.checkpoint`` wraps as if it were not wrapped, in this whole process.

    A graph that was made in the block then keeps its activations. With checkpointing it would run the forward pass
    again after the block, with other random numbers and perhaps other modes and buffers.

    Example:
        >>> import torch
        >>> calls, x = [], torch.ones(1, requires_grad=True)
        >>> with without_checkpointing():
        ...     y = torch_checkpoint.checkpoint(lambda x: calls.append(1) or x.exp(), x, use_reentrant=False)
        >>> y.backward(), len(calls)
        (None, 1)
    """
    global _inside
    with _lock:
        _inside += 1
        if _inside == 1:
            for name, plain in _PLAIN.items():
                _originals[name] = getattr(torch_checkpoint, name)
                setattr(torch_checkpoint, name, plain)
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                for name, original in _originals.items():
                    setattr(torch_checkpoint, name, original)


class _Direct:
    """Takes the place of the autograd function of reentrant checkpointing."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        return function(*args)


def _nothing_around(*_: Any, **__: Any) -> Iterator[None]:
    """Takes the place of what surrounds the forward pass in checkpointing of the other kind."""
    yield


_PLAIN = {"CheckpointFunction": _Direct, "_checkpoint_without_reentrant_generator": _nothing_around}
