"""The one solver: Newton's method for coefficients, conjugate gradients for systems in their curvature."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from stride_lightning.readout.preconditioner import Preconditioner
from stride_lightning.readout.problem import Curvature, Problem
from stride_lightning.runtime.conjugate_gradients import conjugate_gradients

#: Columns that are solved together: as many as these bytes hold eight copies of, and no more than 64.
COLUMN_BYTES, MAX_COLUMNS = 2**26, 64
MAX_NEWTON, MAX_ITERATIONS = 50, 500
#: Newton steps before the preconditioner is made: by then the curvature hardly changes.
FIRST_STEPS = 4
#: Relative error below which a step that does not halve it is the last.
SMALL_ERROR = 1e-3


def column_chunks(num_features: int, num_outputs: int, like: Tensor, count: int) -> list[Tensor]:
    """Columns of coefficients, of the type of ``like``, in chunks that are solved together."""
    size = COLUMN_BYTES // (8 * like.element_size() * num_features * num_outputs)
    return list(torch.arange(count).split(max(1, min(MAX_COLUMNS, size)))) if count else []


def minimise(
    problem: Problem,
    weights: Tensor | None = None,
    start: Tensor | None = None,
    preconditioner: Preconditioner | None = None,
) -> tuple[Tensor, Preconditioner | None]:
    """Coefficients of K weightings of the data, shape ``(m, C, K)``, by Newton's method with conjugate gradients.

    Args:
        problem: The problem.
        weights: Shape ``(n, K)``, with a preconditioner; None for one column with all weights 1.
        start: Coefficients to start from, shape ``(m, C, 1)``; zeros if None.
        preconditioner: Of the curvature of all data; made on the way if None.

    Returns:
        The coefficients, and a preconditioner at (nearly) these, if one was given or made.
    """
    count = 1 if weights is None else weights.shape[1]
    zeros = problem.features.new_zeros(*problem.shape, count)
    coefficients = zeros if start is None else zeros + start
    tolerance = 1e-4 if zeros.dtype == torch.float32 else 1e-10
    diagonal = _inverse_diagonal(problem) if preconditioner is None else preconditioner
    slope = problem.slope(zeros, weights)
    largest = _norm(slope, diagonal(slope)).clamp(min=torch.finfo(zeros.dtype).tiny)
    objective, before = problem.objective(coefficients, weights), math.inf
    for step in range(MAX_NEWTON):
        slope = problem.slope(coefficients, weights) if step or start is not None else slope
        errors = _norm(slope, diagonal(slope)) / largest
        error = float(errors.max())
        # Rounding is all that is left where a step no longer helps.
        if error <= tolerance or before / 2 < error < SMALL_ERROR:
            break
        curvature, before = Curvature(problem, coefficients, weights), error
        if preconditioner is None and step == FIRST_STEPS:
            preconditioner = Preconditioner(curvature)
        direction = conjugate_gradients(
            curvature,
            slope * (errors > tolerance),
            diagonal if preconditioner is None else preconditioner,
            tolerance=max(tolerance, min(0.1, error)),
            max_iterations=MAX_ITERATIONS,
        ).values
        coefficients, objective = _descend(problem, weights, coefficients, objective, slope, direction)
    return coefficients, preconditioner


def _descend(
    problem: Problem, weights: Tensor | None, start: Tensor, objective: Tensor, slope: Tensor, direction: Tensor
) -> tuple[Tensor, Tensor]:
    """Step against the direction, half as far wherever the objective would not fall."""
    expected = (slope * direction).sum((0, 1)).double()
    rounding = 4 * torch.finfo(start.dtype).eps * objective.abs()
    step, reached, value = torch.ones_like(expected), start, objective
    for _ in range(20):
        reached = start - step.to(start) * direction
        value = problem.objective(reached, weights)
        has_fallen = value <= objective - 1e-4 * step * expected + rounding
        if has_fallen.all():
            break
        step = torch.where(has_fallen, step, step / 2)
    return reached, value


def _inverse_diagonal(problem: Problem) -> Callable[[Tensor], Tensor]:
    """The inverse of the curvature's diagonal where coefficients are zero, as a function of vectors."""
    typical = problem.task.curvature_diagonal(problem.task.mean(problem.offset[None]))  # (1, C): of every example
    energies = torch.stack([problem.features[rows].square().sum(0) for rows in problem.blocks(1)]).sum(0)
    inverse = (1 / (problem.precision + typical * energies[:, None]))[..., None]
    return lambda vectors: inverse * vectors


def solve(curvature: Curvature, preconditioner: Preconditioner, right: Tensor) -> Tensor:
    """``H^-1`` times vectors of shape ``(m, C, K)``, with the curvature ``H`` at one column of coefficients."""
    tolerance = 1e-3 if right.dtype == torch.float32 else 1e-9
    stop = {"tolerance": tolerance, "max_iterations": MAX_ITERATIONS}
    # Residuals of sure predictions are so small that their squares vanish, and no iteration would be the last.
    largest = right.abs().amax((0, 1))
    largest = torch.where(largest > 0, largest, 1.0)
    return largest * conjugate_gradients(curvature, right / largest, preconditioner, **stop).values


def _norm(slope: Tensor, scaled: Tensor) -> Tensor:
    return (slope * scaled).sum((0, 1)).sqrt()
