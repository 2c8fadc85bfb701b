"""Digests of tensors: SHA-256 of their values, and those of a model's state, read again only where values changed."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Collection, Mapping
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from stride_lightning.model.layers import plain_name

#: Tensors below so many bytes are hashed each time, because a checksum would save nothing.
_SMALL = 2**16
#: Words of which a checksum takes a sum: on a CPU so many that they stay in its cache, elsewhere few launches.
_WORDS = {"cpu": 2**17}
_WORDS_ELSEWHERE = 2**20
#: What the sums of earlier words are multiplied by.
_STEP = 0x9E3779B97F4A7C15


class Hasher(Protocol):
    """What takes in bytes, like those of ``hashlib``."""

    def update(self, data: Any, /) -> None:
        """Take in some bytes."""


def feed(hasher: Hasher, tensor: Tensor) -> None:
    r"""Give a hasher the bytes of a dense tensor's values, in order, whatever its device and strides.

    A contiguous tensor on the CPU is not copied.

    Example:
        >>> one, other = hashlib.sha256(), hashlib.sha256(b"\x01\x03\x02\x04")
        >>> feed(one, torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8).T)
        >>> one.digest() == other.digest()
        True
    """
    octets = _bytes_of(tensor)
    # Not `numpy()`: its memory could never be resized again, which sharded models do.
    hasher.update((ctypes.c_char * len(octets)).from_address(octets.data_ptr()) if len(octets) else b"")


def raw_bytes(tensor: Tensor) -> bytes:
    r"""The bytes of a dense tensor's values, in order, whatever its device and strides.

    Example:
        >>> raw_bytes(torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8).T)
        b'\x01\x03\x02\x04'
    """
    octets = _bytes_of(tensor)
    return ctypes.string_at(octets.data_ptr(), len(octets)) if len(octets) else b""


def digest_of(tensor: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and values."""
    hasher = hashlib.sha256(f"{tensor.dtype}:{tuple(tensor.shape)};".encode())
    feed(hasher, tensor)
    return hasher.hexdigest()


def hash_of_digests(digests: Mapping[str, str]) -> str:
    """One SHA-256 of tensors, from their digests by name; their order does not count."""
    lines = (f"{name}:{digest}\n" for name, digest in sorted(digests.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def state_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by plain name, themselves and not copies.

    These are all of them, also where the model's own ``state_dict()`` leaves some out.
    """
    state = nn.Module.state_dict(model, keep_vars=True)
    return {plain_name(name): value for name, value in state.items() if isinstance(value, Tensor)}


def model_digests(model: nn.Module, names: Collection[str] | None = None) -> dict[str, str]:
    """The digest of each tensor of a model's state, by plain name; or of some of them.

    A large tensor that does not train is hashed once. Afterwards an exact checksum of all its values, which its own
    device computes, says whether they are still the same. Versions of tensors do not tell: they miss what is written
    through ``.data``.
    """
    known, summer = _known.setdefault(model, {}), _Checksums()
    digests: dict[str, str] = {}
    for name, tensor in state_tensors(model).items():
        if names is not None and name not in names:
            continue
        checksum = None if tensor.requires_grad else summer(tensor)
        if checksum is None:
            digests[name] = digest_of(tensor)
            continue
        state = tensor.dtype, tuple(tensor.shape), checksum
        if name not in known or known[name][0] != state:
            known[name] = state, digest_of(tensor)
        digests[name] = known[name][1]
    return digests


_known: WeakKeyDictionary[nn.Module, dict[str, tuple[Any, str]]] = WeakKeyDictionary()


class _Checksums:
    """Exact sums over the 64-bit words of tensors, each word and its upper half times fixed random odd factors.

    Sums are modulo 2^64, so the lower half of a word needs the first sum and the upper half the second. Another tensor
    has the same two sums with a chance of at most 2^-33.
    """

    def __init__(self) -> None:
        self._factors: dict[torch.device, Tensor] = {}

    def __call__(self, tensor: Tensor) -> tuple[Any, ...] | None:
        """The checksum of a large tensor, which depends on its kind of device; None where it cannot be taken."""
        size, offset = (count * tensor.element_size() for count in (tensor.numel(), tensor.storage_offset()))
        if size < _SMALL or offset % 8 or not tensor.is_contiguous() or tensor.is_meta:
            return None
        octets = tensor.detach().reshape(-1).view(torch.uint8)
        words = octets[: size - size % 8].view(torch.int64)
        factors, sums = self._factors_on(tensor.device), []
        inner = torch.dot if tensor.device.type == "cpu" else _inner
        for part in words.split(len(factors)):
            sums += [inner(part, factors[: len(part)]), inner(part >> 32, factors[: len(part)])]
        totals = [0, 0]
        for pair in torch.stack(sums).view(-1, 2).tolist():
            totals = [(total * _STEP + value) % 2**64 for total, value in zip(totals, pair, strict=True)]
        return tensor.device.type, *totals, *octets[len(words) * 8 :].tolist()

    def _factors_on(self, device: torch.device) -> Tensor:
        if device not in self._factors:
            generator = torch.Generator().manual_seed(0)
            factors = torch.randint(
                -(2**63), 2**63 - 1, (_WORDS.get(device.type, _WORDS_ELSEWHERE),), generator=generator
            )
            self._factors[device] = (factors | 1).to(device)
        return self._factors[device]


def _inner(words: Tensor, factors: Tensor) -> Tensor:
    return (words * factors).sum()  # CUDA has no torch.dot of integers


def _bytes_of(tensor: Tensor) -> Tensor:
    """The values as bytes, shape ``(n,)``, on the CPU; they share memory with a contiguous tensor there."""
    values = tensor.detach().cpu().resolve_conj().resolve_neg()
    if values.numel() == 1 or not values.is_contiguous():
        # torch calls a tensor of one element contiguous whatever its stride.
        values = values.clone(memory_format=torch.contiguous_format)
    return values.reshape(-1).view(torch.uint8)
