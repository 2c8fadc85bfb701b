"""Every operation that torch runs inside a block, seen below autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

#: Gets an operation, its arguments and its keyword arguments; returns its result, or NotImplemented to let it run.
Watcher = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]


class Operations(TorchDispatchMode):
    """Show every operation inside the block to watchers, in their order, until one of them gives its result.

    One object for all watchers, because each object costs 8 microseconds per operation.

    Example:
        >>> import torch
        >>> seen = []
        >>> def watch(function, args, kwargs):
        ...     seen.append(function._schema.name)
        ...     return NotImplemented
        >>> with Operations(watch):
        ...     _ = torch.ones(2) * 3
        >>> seen
        ['aten::ones', 'aten::mul']
    """

    def __init__(self, *watchers: Watcher) -> None:
        super().__init__()
        self._watchers = watchers

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for watch in self._watchers:
            result = watch(func, args, kwargs)
            if result is not NotImplemented:
                return result
        return func(*args, **kwargs)
