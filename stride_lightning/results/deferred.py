"""Tensors that a function computes on first use, as fields of a result."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias, overload

from torch import Tensor

#: What such a field takes: a tensor, a function that returns it, or None where there is none.
TensorSource: TypeAlias = "Tensor | Deferred | Callable[[], Tensor] | None"


class Deferred:
    """A tensor that a function without arguments computes on first use; the function is then dropped.

    Parts of it are deferred too and share the computation.

    Args:
        compute: Returns the tensor. It can be pickled if the function can.
        shape: The shape that the tensor must have; None leaves it unchecked.

    Example:
        >>> import torch
        >>> whole = Deferred(lambda: torch.arange(6.0).view(2, 3), (2, 3))
        >>> whole[:, 1].tensor(), whole.is_known
        (tensor([1., 4.]), True)
    """

    def __init__(self, compute: Callable[[], Tensor], shape: tuple[int, ...] | None = None) -> None:
        self._source: Tensor | Callable[[], Tensor] = compute
        self._shape = shape

    @property
    def is_known(self) -> bool:
        """Whether the tensor was computed."""
        return isinstance(self._source, Tensor)

    def tensor(self) -> Tensor:
        """The tensor, computed if this is its first use.

        Raises:
            ValueError: If the function returns something else than a tensor of the shape.
        """
        if isinstance(self._source, Tensor):
            return self._source
        tensor = self._source()
        given = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
        if self._shape is not None and given != self._shape:
            raise ValueError(
                f"The function given as `std` must return a tensor of the shape of the scores, {self._shape}; it "
                f"returned {given}. Return one standard deviation for each score."
            )
        self._source = tensor
        return tensor

    def __getitem__(self, index: Any) -> Deferred:
        return Deferred(partial(_part, self, index))


def _part(whole: Deferred, index: Any) -> Tensor:
    return whole.tensor()[index]


def as_tensor(value: Tensor | Deferred) -> Tensor:
    """The tensor itself, computed if it is deferred."""
    return value.tensor() if isinstance(value, Deferred) else value


class DeferredField:
    """A dataclass field that takes a :data:`TensorSource` and reads as a tensor or None.

    The instance's ``vars`` hold what was given. Reading computes it and puts the tensor in its place.

    Args:
        like: The field whose shape the tensor has.
    """

    def __init__(self, like: str) -> None:
        self._like = like

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, instance: None, owner: type) -> None: ...
    @overload
    def __get__(self, instance: object, owner: type) -> Tensor | None: ...
    def __get__(self, instance: object | None, owner: type) -> Tensor | None:
        if instance is None:
            return None  # the default, as dataclasses read it
        value = vars(instance)[self._name]
        if isinstance(value, Deferred):
            value = vars(instance)[self._name] = value.tensor()
        return value

    def __set__(self, instance: object, value: TensorSource) -> None:
        if not (value is None or isinstance(value, Tensor | Deferred)):
            value = Deferred(value, tuple(getattr(instance, self._like).shape))
        vars(instance)[self._name] = value
