"""The inside of the lasso: queries solved together, each on a working set of examples."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stride_lightning.steering.subsets import Design

#: Smallest working set. Below this a pass over all examples costs more than the iterations it saves.
_MIN_WORKING_SET = 100
#: Iterations between looks at the duality gap.
_CHECK_EVERY = 10


@dataclass(frozen=True)
class Fit:
    """Weights of a batch on its working sets: sparse, so that starting points cost little."""

    examples: Tensor  # (q, p)
    weights: Tensor  # (q, p)
    responses: Tensor  # (q, K): M w over all subsets, not centred
    gap: Tensor  # (q,)
    num_iterations: int


class WorkingSet:
    """The columns of M for some examples of each query, and the products with them."""

    def __init__(self, design: Design, examples: Tensor, dtype: torch.dtype) -> None:
        self.shape, self.num_subsets = examples.shape, design.num_subsets
        self.is_dense = design.indices is None
        if design.indices is None:
            rows = design.rows(examples.flatten().cpu(), dtype)
            self.columns = rows.to(examples.device).view(*self.shape, -1)  # (q, p, K) memberships
        else:
            # The queries' subsets are laid end to end, so that one gather or scatter serves the whole batch.
            first = torch.arange(len(examples), device=examples.device, dtype=torch.int32) * self.num_subsets
            local = design.indices.to(examples.device)[examples]
            self.columns = (local + first[:, None, None]).flatten(0, 1)  # (q p, d) subsets

    def correlations(self, residual: Tensor) -> Tensor:
        """``(q, K) -> (q, p)``: M' r, which is M_c' r because r is centred."""
        if self.is_dense:
            return torch.bmm(self.columns, residual[:, :, None])[:, :, 0]
        return nn.functional.embedding_bag(self.columns, residual.reshape(-1, 1), mode="sum").view(self.shape)

    def responses(self, weights: Tensor) -> Tensor:
        """``(q, p) -> (q, K)``: M w, not centred."""
        if self.is_dense:
            return torch.bmm(weights[:, None], self.columns)[:, 0]
        total = weights.new_zeros(len(weights) * self.num_subsets)
        spread = weights.reshape(-1, 1).expand(-1, self.columns.shape[1]).flatten()
        return total.index_add_(0, self.columns.flatten(), spread).view(-1, self.num_subsets)


class Batch:
    """Queries that are solved together, each on the subsets that its fit may use."""

    def __init__(self, measurements: Tensor, in_fit: Tensor, design: Design) -> None:
        self.design, self.in_fit = design, in_fit
        target = _centred(measurements, in_fit)
        # What centring leaves of a constant is rounding, and must not be explained.
        rounding = 4 * torch.finfo(target.dtype).eps * measurements.abs().amax(1, keepdim=True)
        self.target = target.masked_fill(target.abs().amax(1, keepdim=True) <= rounding, 0)  # (q, K)
        self.scale = self.target.square().sum(1) / 2  # (q,): what gaps are relative to
        self.largest_penalty = design.backproject(self.target).abs_().amax(1)  # (q,)

    @torch.no_grad()
    def fit(self, relative: Tensor, start: Fit | None, tolerance: float, max_iterations: int) -> Fit:
        """Grow and solve the working sets until the gaps over all examples close, for penalties ``(q,)``."""
        penalty = relative * self.largest_penalty
        if start is None:
            nobody = torch.zeros(len(penalty), 0, dtype=torch.long, device=penalty.device)
            start = Fit(nobody, self.target.new_zeros(nobody.shape), torch.zeros_like(self.target), penalty, 0)
        examples, weights, responses = start.examples, start.weights, start.responses
        num_iterations, stalled = 0, False
        while True:
            residual = self.target - _centred(responses, self.in_fit)
            correlations = self.design.backproject(residual).abs_()  # (q, n)
            gap = _duality_gap(self.target, residual, weights, penalty, correlations.amax(1))
            unsolved = gap > tolerance * self.scale
            if stalled or num_iterations >= max_iterations or not unsolved.any():
                return Fit(examples, weights, responses, gap / self.scale.clamp_min(1e-30), num_iterations)
            examples, weights = _widened(examples, weights, correlations)
            # A working set that lacks examples is solved only as far as the gap outside it warrants.
            goal = torch.where(unsolved, torch.maximum(0.3 * gap, 0.5 * tolerance * self.scale), torch.inf)
            weights, taken = self._iterate(examples, weights, penalty, goal, max_iterations - num_iterations)
            responses = WorkingSet(self.design, examples, weights.dtype).responses(weights)
            num_iterations += taken
            stalled = taken == 0  # the gap left is rounding

    def _iterate(
        self, examples: Tensor, weights: Tensor, penalty: Tensor, goal: Tensor, max_iterations: int
    ) -> tuple[Tensor, int]:
        """Accelerated proximal gradient until the gaps on the working sets are below ``goal`` ``(q,)``."""
        target, in_fit = self.target, self.in_fit
        columns = WorkingSet(self.design, examples, weights.dtype)
        curvature = _largest_curvature(columns, in_fit)  # (q, 1)
        solved, rows = weights, torch.arange(len(weights), device=weights.device)
        residual = target - _centred(columns.responses(weights), in_fit)
        correlations = columns.correlations(residual)  # (q, p)
        last_weights, last_correlations, momentum = weights, correlations, torch.ones_like(curvature)
        iteration = 0
        while True:
            if iteration % _CHECK_EVERY == 0 or iteration == max_iterations:
                solved = solved.index_copy(0, rows, weights)
                going = _duality_gap(target, residual, weights, penalty, correlations.abs().amax(1)) > goal
                if iteration == max_iterations or not going.any():
                    return solved, iteration
                if going.sum() < 0.8 * len(going):  # solved queries leave; each time the columns are laid out anew
                    rows, target, in_fit, penalty, goal = (x[going] for x in (rows, target, in_fit, penalty, goal))
                    examples, curvature, momentum = examples[going], curvature[going], momentum[going]
                    weights, last_weights = weights[going], last_weights[going]
                    correlations, last_correlations = correlations[going], last_correlations[going]
                    columns = WorkingSet(self.design, examples, weights.dtype)
            next_momentum = (1 + (1 + 4 * momentum.square()).sqrt()) / 2
            reach = 1 + (momentum - 1) / next_momentum
            ahead = torch.lerp(last_weights, weights, reach)
            # Correlations are affine in the weights, so those at the point ahead cost no product.
            climbed = ahead + torch.lerp(last_correlations, correlations, reach) / curvature
            last_weights, last_correlations = weights, correlations
            threshold = penalty[:, None] / curvature
            weights = climbed - climbed.clamp(-threshold, threshold)  # the proximal operator of the L1 norm
            residual = target - _centred(columns.responses(weights), in_fit)
            correlations = columns.correlations(residual)
            # Momentum against the step just taken has overshot: start it afresh.
            overshot = ((ahead - weights) * (weights - last_weights)).sum(1, keepdim=True) > 0
            momentum = next_momentum.masked_fill(overshot, 1)
            iteration += 1


def _widened(examples: Tensor, weights: Tensor, correlations: Tensor) -> tuple[Tensor, Tensor]:
    """Working sets of the support and the most correlated other examples, about twice the largest support.

    Overwrites ``correlations``, absolute and ``(q, n)``, to need no second tensor of that size.
    """
    largest_support = int((weights != 0).sum(1).max())
    size = min(correlations.shape[1], max(_MIN_WORKING_SET, 2 * largest_support))
    correlations.scatter_(1, examples, correlations.gather(1, examples).masked_fill(weights != 0, torch.inf))
    wider = correlations.topk(size, dim=1, sorted=False).indices
    return wider, correlations.zero_().scatter_(1, examples, weights).gather(1, wider)


def _duality_gap(target: Tensor, residual: Tensor, weights: Tensor, penalty: Tensor, steepest: Tensor) -> Tensor:
    """Primal less dual objective ``(q,)``, the dual at the residual scaled to be feasible."""
    feasible = (penalty / steepest.clamp_min(1e-30)).clamp_max(1)
    energy = residual.square().sum(1)
    primal = energy / 2 + penalty * weights.abs().sum(1)
    return (primal - feasible * (target * residual).sum(1) + feasible.square() * energy / 2).clamp_min(0)


def _largest_curvature(columns: WorkingSet, in_fit: Tensor) -> Tensor:
    """Largest eigenvalue of M_c' M_c on each working set, ``(q, 1)``, by power iteration.

    The estimate comes from below, but accelerated steps stay stable down to 3/4 of the true value.
    """
    start = torch.rand(columns.shape[1], generator=torch.Generator().manual_seed(0))
    vector, size = start.to(in_fit).expand(columns.shape), torch.ones_like(in_fit[:, :1])
    for _ in range(20):
        vector = columns.correlations(_centred(columns.responses(vector), in_fit))
        size = vector.norm(dim=1, keepdim=True).clamp_min(1e-30)
        vector = vector / size
    return 1.05 * size


def fit_mean(values: Tensor, in_fit: Tensor) -> Tensor:
    """Mean over the subsets of the fit, ``(q, K) -> (q, 1)``."""
    return (values * in_fit).sum(1, keepdim=True) / in_fit.sum(1, keepdim=True)


def _centred(values: Tensor, in_fit: Tensor) -> Tensor:
    """Values less their mean over the subsets of the fit, and zero in the others, ``(q, K)``."""
    return (values - fit_mean(values, in_fit)) * in_fit
