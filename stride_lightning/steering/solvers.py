"""The batched convex solver: all steering operators of a design at once."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stride_lightning.runtime.parallel import even_slices, map_chunks
from stride_lightning.steering.basis import Observation
from stride_lightning.steering.subsets import Design
from stride_lightning.tasks.likelihoods import Task

#: Bytes that one block of steered outputs, (C, examples, operators), may take; small enough to stay in cache.
BLOCK_BYTES = 2**23
#: Operators solved together.
MAX_CHUNK = 64


@dataclass(frozen=True)
class OperatorFit:
    """Fitted operators and how well they were solved."""

    coefficients: Tensor  # (C, r, K): operator k gives output c of an example as phi . coefficients[c, :, k]
    relative_gradient: Tensor  # norm of each objective's gradient over its norm at zero, (K,)
    iterations: int  # of the slowest chunk


def fit_operators(
    observed: Observation,
    design: Design,
    task: Task,
    ridge: float,
    *,
    stability: float = 0.0,
    start: Tensor | None = None,
    subsets: slice | None = None,
    tolerance: float = 5e-4,
    max_iterations: int = 500,
    show_progress: bool = True,
) -> OperatorFit:
    r"""Fit a steering operator for every subset by minimising its convex objective.

    Without stability, operator k is what training the model's readouts on subset k alone gives:

    .. math:: \frac{1}{|A_k|} \sum_{i \in A_k} \ell(\phi_i a_k, y_i)
              + \frac{n}{|A_k|} \frac{\rho}{2} |a_k|^2.

    With a stability weight ``tau`` it is the published form, anchored at the frozen model: outputs are
    ``o_i + phi_i a_k``, and examples outside the subset hold the frozen model's own predictions ``mu(o_i)``,

    .. math:: \frac{1}{|A_k|} \sum_{i \in A_k} \ell(o_i + \phi_i a_k, y_i)
              + \frac{\tau}{n - |A_k|} \sum_{i \notin A_k} \ell(o_i + \phi_i a_k, \mu(o_i)) + \frac{\rho}{2} |a_k|^2.

    Both are strongly convex, so there is one answer. Nesterov's method with restarts finds it, preconditioned by the
    energies of the features, with a step taken from the curvature seen along the way.

    Memory beyond its arguments: the operators, ``C r K`` floats; and for each thread nine arrays of ``C r 64`` floats,
    ``64 n`` bytes of memberships and three blocks of steered outputs (8 MB each).

    ``observed`` is the training set in a rotated basis, ``ridge`` is ``rho``, ``stability`` is ``tau``, ``start`` are
    coefficients ``(C, r)``. Only the operators of ``subsets`` are fitted: other processes fit the others. An operator
    counts as solved once its relative gradient norm is within the tolerance; ``max_iterations`` end with a warning.

    Raises:
        ValueError: If an option is out of range or the objective is not finite.

    Reference: arXiv:2606.05165 (STRIDE), fidelity and stability losses; solved exactly here.
    """
    if not (ridge > 0 and stability >= 0 and tolerance > 0):
        raise ValueError(
            f"Expected ridge > 0, stability >= 0 and tolerance > 0; got {ridge}, {stability}, {tolerance}."
        )
    numbers, features = range(design.num_subsets)[subsets or slice(None)], observed.features
    coefficients = features.new_empty(observed.outputs.shape[1], features.shape[1], len(numbers))
    relative = features.new_zeros(len(numbers))
    sizes = design.sizes.to(features)

    def solve(chunk: slice) -> tuple[Tensor, Tensor, int]:
        chosen = slice(numbers.start + chunk.start, numbers.start + chunk.stop)
        blocks = [members[:, chosen] for _, members in design.blocks(torch.empty(0, dtype=torch.uint8))]
        # The same penalty per summed loss for every subset size, unless stability keeps all n examples in the sum.
        share = torch.ones_like(sizes[chosen]) if stability else len(observed) / sizes[chosen].clamp(min=1)
        objective = _Objective(observed, torch.cat(blocks), task, ridge * share, stability)
        return _minimise(objective, start, tolerance, max_iterations)

    slowest, chunks = 0, even_slices(len(numbers), MAX_CHUNK, features.device)
    solved = map_chunks(solve, chunks, features.device, "Fitting operators", show_progress=show_progress)
    for chunk, (solution, norms, iterations) in zip(chunks, solved, strict=True):
        coefficients[..., chunk], relative[chunk] = solution, norms
        slowest = max(slowest, iterations)
    unsolved = int((relative > tolerance).sum())
    if unsolved:
        warnings.warn(
            f"{unsolved} of {len(relative)} steering operators were stopped after {max_iterations} iterations with a "
            f"relative gradient norm up to {float(relative.max()):.2g} (tolerance {tolerance:g}). Raise the ridge or "
            "`max_iterations`.",
            stacklevel=2,
        )
    return OperatorFit(coefficients, relative, slowest)


def refit(observed: Observation, task: Task, ridges: Tensor, *, show_progress: bool = False, **limits: Any) -> Tensor:
    """Refit the readouts on all training data: :func:`fit_operators` for m ridges ``rho`` at once, ``(C, r, m)``."""

    def solve(chunk: slice) -> Tensor:
        chosen = ridges[chunk].to(observed.features)
        everyone = torch.ones(len(observed), len(chosen), dtype=torch.uint8)
        return _minimise(_Objective(observed, everyone, task, chosen, stability=0.0), None, **limits)[0]

    device = observed.features.device
    chunks = even_slices(len(ridges), MAX_CHUNK, device)
    return torch.cat(list(map_chunks(solve, chunks, device, "Choosing the ridge", show_progress=show_progress)), 2)


class _Objective:
    """The gradient of a chunk of operators' objectives, over blocks of examples."""

    def __init__(self, observed: Observation, members: Tensor, task: Task, ridges: Tensor, stability: float) -> None:
        self.features, self.task, self.ridges = observed.features, task, ridges
        self.members = members.to(self.features.device)  # (n, k)
        scale, inside = 1 / task.dispersion, self.members.sum(0).to(self.features)
        self.inside = scale / inside.clamp(min=1)
        # Nothing moves the operator of an empty subset from zero, so nothing need hold it there.
        self.outside = (inside > 0) * (scale * stability / (len(observed) - inside).clamp(min=1))
        self.anchor = observed.outputs.T.contiguous() if stability else None  # (C, n)
        self.targets = observed.encoded.T.contiguous()
        self.stable_targets = task.mean(observed.outputs).T.contiguous() if stability else self.targets
        self.shape = (len(self.targets), self.features.shape[1], self.members.shape[1])
        self.block = max(64, BLOCK_BYTES // (self.features.element_size() * self.shape[0] * self.shape[2]))
        # Curvature at the start: of a uniform prediction, or of the frozen model's.
        begin = observed.outputs if stability else torch.zeros_like(observed.outputs[:1])
        typical = float(task.curvature_diagonal(task.mean(begin)).mean()) * (1 + stability)
        energies = self.features.square().mean(0)
        self.preconditioner = 1 / (max(typical, 1e-9) * energies[:, None] + ridges)  # (r, k)

    def gradient(self, coefficients: Tensor) -> Tensor:
        """Gradient at coefficients ``(C, r, k)``, same shape."""
        total = self.ridges * coefficients
        for start in range(0, len(self.features), self.block):
            rows = slice(start, start + self.block)
            features = self.features[rows]
            members = self.members[rows].to(features.dtype)
            steered = features @ coefficients  # (C, b, k)
            if self.anchor is not None:
                steered += self.anchor[:, rows, None]
            residual = self.task.mean(steered, dim=0)
            residual -= self.stable_targets[:, rows, None]
            if self.anchor is not None:
                residual.addcmul_(members, (self.stable_targets - self.targets)[:, rows, None])
            residual *= torch.lerp(self.outside, self.inside, members)
            total += features.T @ residual
        return total


def _minimise(
    objective: _Objective, start: Tensor | None, tolerance: float = 5e-4, max_iterations: int = 500
) -> tuple[Tensor, Tensor, int]:
    """Preconditioned Nesterov descent of every operator in a chunk; each has its own step and momentum."""
    point = objective.features.new_zeros(objective.shape)  # where the gradient is taken
    gradient = objective.gradient(point)
    zero_norm = _norm(gradient)
    if not torch.isfinite(zero_norm).all():
        raise ValueError(
            "The gradient of the operators' objective is not finite. Check the model's outputs and its weights."
        )
    if start is not None:
        point = torch.where(zero_norm > 0, start[:, :, None], point)  # zero is the answer where the gradient is zero
        gradient = objective.gradient(point)
    iterate = point
    smoothness = torch.full_like(zero_norm, 2.0)  # a guess, until curvature has been seen along the path
    momentum, seen = torch.ones_like(zero_norm), torch.zeros_like(zero_norm)
    relative = _norm(gradient) / zero_norm.clamp(min=1e-30)
    for iteration in range(max_iterations):
        if bool((relative <= tolerance).all()):
            return point, relative, iteration
        # Solved operators rest, so that an answer does not depend on which others are solved beside it.
        moving = relative > tolerance
        new_iterate = point - objective.preconditioner * gradient * (moving / smoothness)
        following = (1 + (1 + 4 * momentum.square()).sqrt()) / 2
        uphill = _dot(gradient, new_iterate - iterate) > 0
        extrapolation = torch.where(uphill | ~moving, 0.0, (momentum - 1) / following)
        momentum = torch.where(uphill, 1.0, following)
        new_point = torch.lerp(iterate, new_iterate, 1 + extrapolation)
        new_gradient = objective.gradient(new_point)
        step = new_point - point
        # Curvature along the step, relative to the preconditioner: the largest seen bounds the next steps.
        moved = _dot(step / objective.preconditioner, step)
        bent = _dot(new_gradient - gradient, step)
        seen = torch.maximum(seen, torch.where(moved > 0, bent / moved.clamp(min=1e-38), 0.0))
        smoothness = torch.where(seen > 0, 1.1 * seen, smoothness)
        point, gradient, iterate = new_point, new_gradient, new_iterate
        relative = torch.where(moving, _norm(gradient) / zero_norm.clamp(min=1e-30), relative)
    return point, relative, max_iterations


def _dot(one: Tensor, other: Tensor) -> Tensor:
    return (one * other).sum((0, 1))


def _norm(value: Tensor) -> Tensor:
    return value.square().sum((0, 1)).sqrt()
