"""Digests of examples, and the fingerprint of a data set that they make."""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from datetime import date, time, timedelta
from decimal import Decimal
from functools import partial
from operator import itemgetter
from pathlib import PurePath
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any
from weakref import ReferenceType

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from stride_lightning.model.digests import feed

#: Bytes of a digest: SHA-256, and whether all of the example was read.
DIGEST_BYTES = 33

_NUMBERS_AND_TEXTS = (
    bool
    | int
    | float
    | complex
    | str
    | bytes
    | bytearray
    | date
    | time
    | timedelta
    | Decimal
    | PurePath
    | range
    | slice
)
_NAMED = type | FunctionType | BuiltinFunctionType | torch.dtype | torch.device | torch.layout
#: What attributes may hold that is no content: it leads out of the example.
_LEADS_OUT = ReferenceType | ModuleType | MethodType | FunctionType | BuiltinFunctionType | Dataset
_PER_TENSOR = (torch.per_tensor_affine, torch.per_tensor_symmetric)


class Fingerprint:
    """The identity of a data set: its length, and the content of its examples in order.

    Only shapes, and what is a single integer, such as a label, identify it under random augmentation. Where an example
    holds an object that tells nothing of its content, the fingerprint says that it is one of ``shapes``, too.

    Example:
        >>> fingerprint = Fingerprint(content=True)
        >>> fingerprint.update(digest_rows([(torch.zeros(2), 1), (torch.ones(2), 0)], content=True))
        >>> sorted(fingerprint.summary())
        ['content', 'num_examples', 'shapes']
    """

    def __init__(self, *, content: bool) -> None:
        self._has_content, self._examples, self._num_examples = content, hashlib.sha256(), 0

    def update(self, digests: Tensor) -> None:
        """Add a batch, by the digests of its examples."""
        self._num_examples += len(digests)
        self._has_content &= bool(digests[:, -1].all())
        self._examples.update(digests.numpy().tobytes())

    def summary(self) -> dict[str, Any]:
        """Plain values to store: ``num_examples``, and ``content`` or ``shapes`` (the other is None)."""
        examples, names = self._examples.hexdigest(), ("content", "shapes")
        values = (examples, None) if self._has_content else (None, examples)
        return {"num_examples": self._num_examples, **dict(zip(names, values, strict=True))}


def digest_rows(examples: Sequence[Any], *, content: bool) -> Tensor:
    """The :func:`digest` of each example, uint8 of shape ``(B, 33)``."""
    digests = b"".join(digest(example, content=content) for example in examples)
    return torch.frombuffer(bytearray(digests), dtype=torch.uint8).reshape(len(examples), DIGEST_BYTES)


def digest(example: Any, *, content: bool = True) -> bytes:
    """SHA-256 of an example's leaves: types and shapes, single integers, and all values if ``content``.

    It is the same in every process: neither addresses nor the order of a dictionary or set enter. Objects of any class
    are read attribute by attribute. Of one that tells nothing of its content only type and length enter, and the last
    of the 33 bytes is 0.

    Example:
        >>> digest({"x": torch.ones(2), "y": 1}) == digest({"y": 1, "x": torch.ones(2)})
        True
        >>> digest(object())[-1]
        0
    """
    digester = _Digester(content)
    digester.feed(example)
    return digester.hasher.digest() + bytes([digester.is_complete])


class _Digester:
    """Feeds the leaves of one example to a hash."""

    def __init__(self, content: bool) -> None:
        self.hasher, self.content, self.is_complete = hashlib.sha256(), content, True
        self._inside: dict[int, int] = {}  # depth of each object that is being read, by its address

    def feed(self, value: Any) -> None:
        """Add a value of any type."""
        if isinstance(value, Tensor):
            self._feed_tensor(value)
            self._feed_more(value)
        elif value is None:
            self._text("None")
        elif isinstance(value, _NUMBERS_AND_TEXTS) and not isinstance(value, enum.Enum):
            self._text(repr(value) if self.content or isinstance(value, int) else type(value).__name__)
        elif isinstance(value, np.ndarray | np.generic):
            self._feed_array(value)
            self._feed_more(value)
        elif isinstance(value, partial):
            self.feed((value.func, value.args, value.keywords))
        elif isinstance(value, _NAMED):
            self._text(f"{type(value).__name__} {getattr(value, '__qualname__', value)}")
        elif id(value) in self._inside:  # it contains itself
            self._text(f"<{self._inside[id(value)]}>")
        else:
            self._inside[id(value)] = len(self._inside)
            try:
                self._feed_parts(value)
                if isinstance(value, list | tuple | dict):
                    self._feed_more(value)
            except Exception:  # of a class that does not let itself be read
                self._text("?")
                self.is_complete = False
            del self._inside[id(value)]

    def _feed_parts(self, value: Any) -> None:
        """Add what holds other values."""
        if isinstance(value, tuple | list):
            self._feed_items(value)
        elif isinstance(value, Mapping):
            self._text("{" if isinstance(value, dict) else f"{{{type(value).__name__}")
            self._feed_pairs(value.items())
        elif isinstance(value, Set):
            self._text(f"set {len(value)}")
            self.hasher.update(b"".join(sorted(self._alone(item) for item in value)))
        elif isinstance(value, enum.Enum):
            self._text(f"{type(value).__qualname__}.{value.name}")
        elif hasattr(value, "iloc") and hasattr(value, "index"):  # of pandas
            self._text(f"{type(value).__name__}{value.shape}")
            self.feed(np.asarray(value.index))
            columns = value.items() if value.ndim == 2 else [(value.name, value)]
            self._feed_pairs((name, np.asarray(column)) for name, column in columns)
        elif hasattr(value, "tobytes") and hasattr(value, "mode"):  # PIL images
            self._text(f"{type(value).__name__}{value.mode}{value.size}")
            self.hasher.update(value.tobytes() if self.content else b"")
        elif hasattr(value, "__array__"):
            self.feed(np.asarray(value))
        elif hasattr(value, "to_pylist"):  # Arrow's
            self.feed(value.to_pylist())
        elif isinstance(value, Sequence):
            self._feed_items(value)
        else:
            self._feed_attributes(value)

    def _feed_attributes(self, value: Any) -> None:
        """Add an object of a class that is not known: the content of its attributes, else type and length."""
        self._text(type(value).__qualname__)
        attributes = self._content_of(_attributes_of(value))
        if not attributes:
            self.is_complete = False
            self._text(str(len(value)) if hasattr(value, "__len__") else "?")
        self._feed_pairs(attributes.items())

    def _feed_more(self, value: Any) -> None:
        """Add the attributes that an instance of a user's subclass carries."""
        if attributes := self._content_of(getattr(value, "__dict__", {}).items()):
            self._feed_pairs(attributes.items())

    def _content_of(self, attributes: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        """Attributes without those that lead out of the example, where more of it may lie."""
        content = {}
        for name, item in attributes:
            if not isinstance(item, _LEADS_OUT):
                content[name] = item
            elif isinstance(item, Dataset) or (isinstance(item, ReferenceType) and id(item()) not in self._inside):
                self.is_complete = False
        return content

    def _feed_items(self, items: Sequence[Any]) -> None:
        self._text(f"[{len(items)}")
        for item in items:
            self.feed(item)

    def _feed_pairs(self, pairs: Iterable[tuple[Any, Any]]) -> None:
        """Add named values, in the order of their names."""
        named = ((repr(name) if type(name) in (str, int) else self._alone(name).hex(), value) for name, value in pairs)
        for name, value in sorted(named, key=itemgetter(0)):
            self._text(f"{name}:")
            self.feed(value)

    def _alone(self, item: Any) -> bytes:
        """A digest of one of several things that have no order."""
        digester = _Digester(self.content)
        digester._inside = dict(self._inside)
        digester.feed(item)
        self.is_complete &= digester.is_complete
        return digester.hasher.digest()

    def _feed_tensor(self, value: Tensor) -> None:
        self._text(f"{value.dtype}{'' if value.is_nested else tuple(value.shape)}")
        if value.is_meta:
            self.is_complete = False
        elif (parts := _parts_of(value)) is not None:
            self._feed_items(parts)
        elif self.content or (value.numel() == 1 and not value.is_floating_point()):
            feed(self.hasher, value)

    def _feed_array(self, value: np.ndarray[Any, Any] | np.generic) -> None:
        if value.dtype.hasobject:  # its bytes are addresses
            self._text(f"object{value.shape}")
            self.feed(value.tolist())
            return
        self._text(f"{value.dtype}{value.shape}")
        if self.content or (value.size == 1 and value.dtype.kind in "biu"):
            self.hasher.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)

    def _text(self, text: str) -> None:
        self.hasher.update(text.encode(errors="surrogatepass"))


def _attributes_of(value: Any) -> Iterator[tuple[str, Any]]:
    yield from getattr(value, "__dict__", {}).items()
    for cls in type(value).__mro__:
        slots = vars(cls).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                yield name, getattr(value, name)


def _parts_of(value: Tensor) -> list[Tensor] | None:
    """The dense tensors that make up a sparse, quantised or nested one; None of any other."""
    if value.is_nested:
        return list(value.unbind())
    if value.is_quantized:
        is_plain = value.qscheme() in _PER_TENSOR
        scales = [value.q_scale(), value.q_zero_point()] if is_plain else []
        others = [] if is_plain else [value.q_per_channel_scales(), value.q_per_channel_zero_points()]
        return [value.int_repr(), torch.tensor(scales), *others]
    if value.layout == torch.sparse_coo:
        whole = value.coalesce()
        return [whole.indices(), whole.values()]
    if value.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [value.crow_indices(), value.col_indices(), value.values()]
    if value.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [value.ccol_indices(), value.row_indices(), value.values()]
    return None
