"""Directions of the outputs along which curvature is taken: each output, or random signs where these are too many."""

from __future__ import annotations

import torch
from torch import Tensor

#: Up to so many outputs, curvature is a sum over all of them; beyond, a mean over random directions.
MAX_EXACT_OUTPUTS = 32
#: Number of random directions of an example.
NUM_DIRECTIONS = 8


def is_exact(num_outputs: int) -> bool:
    """Whether curvature is a sum over so many outputs."""
    return num_outputs <= MAX_EXACT_OUTPUTS


def count_directions(num_outputs: int, most_tokens: int) -> int:
    """Number of directions of an example's curvature: all its outputs, or random ones if these are too many."""
    every = num_outputs * most_tokens
    return every if is_exact(every) else NUM_DIRECTIONS


def random_signs(positions: Tensor, column: int, width: int, seed: int, like: Tensor) -> Tensor:
    """Signs of shape ``(*positions, width)``; they depend on the seed, the column and each position only."""
    rows = positions.to(like.device)[..., None]
    keys = (rows * NUM_DIRECTIONS + column) * width + torch.arange(width, device=like.device)
    return ((scrambled(keys + scrambled(torch.tensor(seed, device=like.device))) & 1) * 2 - 1).to(like)


def scrambled(keys: Tensor) -> Tensor:
    """Integers made of other integers by the finaliser of SplitMix64, in wrapping 64-bit arithmetic."""
    keys = keys + -7046029254386353131
    keys = (keys ^ (keys >> 30 & 0x3FFFFFFFF)) * -4658895280553007687
    keys = (keys ^ (keys >> 27 & 0x1FFFFFFFFF)) * -7723592293110705685
    return keys ^ (keys >> 31 & 0x1FFFFFFFF)
