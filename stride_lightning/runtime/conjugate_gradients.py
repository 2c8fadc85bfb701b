"""Preconditioned conjugate gradients for many systems at once, on the device of their right sides."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Solution(NamedTuple):
    """The solutions, the number of products with the matrix, and whether every system reached the tolerance."""

    values: Tensor
    num_iterations: int
    is_solved: bool


def conjugate_gradients(
    product: Callable[[Tensor], Tensor],
    right: Tensor,
    precondition: Callable[[Tensor], Tensor],
    *,
    tolerance: float,
    max_iterations: int,
) -> Solution:
    """Solve positive definite systems; unknowns lie along the first two axes, systems along the others.

    A solved system rests, so its solution does not depend on the systems beside it.

    Args:
        product: The matrix times vectors of the shape of ``right``.
        right: Right sides, shape ``(a, b, ...)``; with two axes they are one system.
        precondition: An approximate inverse of the matrix, times such vectors.
        tolerance: Norm of the residual, relative to that of the right side, at which a system counts as solved.
        max_iterations: Largest number of iterations.

    Example:
        >>> right = torch.tensor([[[1.0, 6.0]]])  # two systems of one unknown
        >>> conjugate_gradients(lambda x: 2 * x, right, lambda x: x, tolerance=1e-6, max_iterations=9).values
        tensor([[[0.5000, 3.0000]]])

    Reference: Hestenes and Stiefel, Methods of Conjugate Gradients for Solving Linear Systems (1952).
    """
    values, residual = torch.zeros_like(right), right.clone()
    target = tolerance * _norm(right)
    direction, energy = torch.zeros_like(right), right.new_ones(())
    for iteration in range(max_iterations):
        waiting = _norm(residual) > target
        if not bool(waiting.any()):
            return Solution(values, iteration, bool(residual.isfinite().all()))
        scaled = precondition(residual)
        following = (residual * scaled).sum((0, 1))
        direction = torch.where(waiting, scaled + following / _or_one(energy) * direction, direction)
        energy = following
        mapped = product(direction)
        step = waiting * energy / _or_one((direction * mapped).sum((0, 1)))
        values += step * direction
        residual -= step * mapped
    return Solution(values, max_iterations, False)


def _or_one(divisors: Tensor) -> Tensor:
    """Divisors with ones in place of zeros, which divide zeros only: a system with a zero right side has them."""
    return torch.where(divisors == 0, 1.0, divisors)


def _norm(vectors: Tensor) -> Tensor:
    return vectors.square().sum((0, 1)).sqrt()
