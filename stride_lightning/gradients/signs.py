"""Directions of the outputs along which curvature is taken: each output, or random signs where these are too many."""

from __future__ import annotations

import torch
from torch import Tensor

from stride_lightning.runtime.hashed_numbers import scrambled

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
