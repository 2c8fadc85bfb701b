"""Tensors that stay as they are, whatever writes into them inside a block."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

from torch import Tensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.autograd.graph import saved_tensors_hooks
from typing_extensions import Self

#: Arguments of batch norm, which writes into them without saying so.
_STATISTICS = ("running_mean", "running_var")


class WriteGuard:
    """Tensors whose values are put back at the end of a block, to the bit; a copy is made before the first write.

    It is a watcher of :class:`Operations`, and so sees what writes through views and through ``.data``, too. It also
    puts back what ``tensor.data = other`` exchanges. A graph that was made in the block can be used after it: it
    remembers the values that its operations saw.

    Example:
        >>> import torch
        >>> from stride_lightning.runtime.operations import Operations
        >>> weight = torch.ones(2, requires_grad=True)
        >>> with WriteGuard([weight]) as guard, Operations(guard):
        ...     _ = weight.data.mul_(3)
        ...     loss = (weight * weight).sum()
        >>> weight, torch.autograd.grad(loss, weight)
        (tensor([1., 1.], requires_grad=True), (tensor([6., 6.]),))
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._entries: list[tuple[Tensor, int, Tensor]] = []
        self._on: defaultdict[int, list[Tensor]] = defaultdict(list)
        for tensor in tensors:
            if key := _storage_key(tensor):
                self._entries.append((tensor, key, tensor.data))
                self._on[key].append(tensor)
        self._saved: dict[int, tuple[Any, Any, Any]] = {}
        self._hooks = saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Save what an operation is about to write into."""
        if pick := _written(func):
            for tensor in pick(args, kwargs):
                self._save(tensor)
        return NotImplemented

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._saved:
            self._hooks.__exit__()
        for storage, values, versions in self._saved.values():
            if storage.nbytes() != values.nbytes():
                storage.resize_(values.nbytes())
            storage.copy_(values)
            if versions is not None:  # so that graphs made before the write can be used
                versions.__exit__()
        for tensor, key, before in self._entries:
            if _storage_key(tensor) != key:
                tensor.data = before

    def _save(self, tensor: Tensor) -> None:
        key = _storage_key(tensor)
        if key not in self._on or key in self._saved:
            return
        if not self._saved:
            self._hooks.__enter__()
        counted = tuple(each for each in self._on[key] if not each.is_inference())
        versions = _unsafe_preserve_version_counter(counted) if counted else None
        storage = tensor.untyped_storage()
        self._saved[key] = (storage, storage.clone(), versions)

    def _pack(self, tensor: Tensor) -> Tensor:
        """What a graph keeps of a tensor: a copy where the values will be put back."""
        return tensor.detach().clone() if _storage_key(tensor) in self._saved else tensor


def _storage_key(tensor: Tensor) -> int:
    """A number that tensors share that share memory; 0 for tensors without memory of their own."""
    try:
        return tensor.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):  # sparse tensors, and those that torch.func wraps
        return 0


@cache
def _written(func: Any) -> Callable[[tuple[Any, ...], dict[str, Any]], list[Tensor]] | None:
    """For an operation that writes into arguments, what picks these from a call."""
    arguments = func._schema.arguments
    numbers = {argument.name: number for number, argument in enumerate(arguments)}
    written = [
        argument.name
        for argument in arguments
        if (argument.alias_info is not None and argument.alias_info.is_write) or argument.name in _STATISTICS
    ]
    if not written:
        return None

    def pick(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        def value_of(name: str) -> Any:
            number = numbers.get(name, len(args))
            return args[number] if number < len(args) else kwargs.get(name)

        if value_of("training") is False:
            return []
        values = [value_of(name) for name in written]
        flat = [each for value in values for each in (value if isinstance(value, list | tuple) else [value])]
        return [value for value in flat if isinstance(value, Tensor)]

    return pick
