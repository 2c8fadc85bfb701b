"""Random numbers that are functions of keys, so that nothing else changes them."""

from __future__ import annotations

import torch
from torch import Tensor

_STEP = -7046029254386353131  # SplitMix64 adds it from one number to the next


def scrambled(keys: Tensor) -> Tensor:
    """The next number of SplitMix64 after each of these states, in wrapping 64-bit arithmetic.

    Args:
        keys: Any int64 tensor.

    Example:
        >>> scrambled(torch.tensor([0]))  # 0xE220A8397B1DCDAF
        tensor([-2152535657050944081])
    """
    bits = keys + _STEP
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        bits ^= (bits >> shift) & (1 << 64 - shift) - 1
        bits *= factor
    bits ^= (bits >> 31) & (1 << 33) - 1
    return bits


def random_bits(seeds: Tensor, count: int) -> Tensor:
    """Row i holds the first 64-bit numbers of SplitMix64 from seed i.

    Args:
        seeds: int64, shape ``(B,)``.
        count: Numbers in each row.

    Returns:
        int64, shape ``(B, count)``.
    """
    return scrambled(seeds[:, None] + torch.arange(count, device=seeds.device) * _STEP)


def uniforms(seeds: Tensor, count: int, digits: int = 53, *, inner: bool = False) -> Tensor:
    """Numbers from [0, 1), each a multiple of ``2 ** -digits``; ``inner`` ones are never 0.

    Args:
        seeds: int64, shape ``(B,)``.
        count: Numbers in each row.
        digits: Binary digits of each, at most 53.
        inner: Add half a multiple, so that the numbers lie in (0, 1).

    Returns:
        float64, shape ``(B, count)``.

    Example:
        >>> bool(((uniforms(torch.arange(3), 1000).mean(1) - 0.5).abs() < 0.05).all())
        True
    """
    # One digit less with `inner`, because float64 holds no half of the last one.
    digits -= inner and digits == 53
    bits = random_bits(seeds, count) >> (64 - digits)
    bits &= (1 << digits) - 1
    values = bits.double()
    return (values.add_(0.5) if inner else values).mul_(2.0**-digits)
