"""Sparse recovery: the Lasso for many queries at once, to a certified duality gap."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat

import torch
from torch import Tensor, nn

from stride_lightning.steering.subsets import Design

#: Relative penalties tried by cross-validation.
PENALTY_GRID = (0.7, 0.5, 0.35, 0.25, 0.18, 0.12, 0.08, 0.05, 0.03, 0.02, 0.01)

#: Numbers one worker may hold, which bounds how many queries it solves together.
_WORKER_NUMBERS = 2**25
#: Queries solved together on a CPU, from and to: enough to hide Python's overhead, few enough to stay in the cache.
_CPU_BATCH = (16, 64)
#: Smallest working set. Below this a pass over all examples costs more than the iterations it saves.
_MIN_WORKING_SET = 100
#: Iterations between looks at the duality gap.
_CHECK_EVERY = 10


@dataclass(frozen=True)
class LassoSolution:
    """Solutions for q queries: their scores, and how exact they are."""

    #: Attribution scores w, ``(q, n)``: exactly zero outside the support.
    scores: Tensor
    #: Duality gap over all n examples, relative to ``1/2 ||y_c||^2``, ``(q,)``.
    gap: Tensor
    #: Absolute penalty lambda, ``(q,)``.
    penalty: Tensor
    #: Iterations of the query that took most.
    num_iterations: int


def solve_lasso(
    measurements: Tensor,
    design: Design,
    penalty: float | Tensor,
    *,
    tolerance: float = 1e-4,
    max_iterations: int = 20_000,
) -> LassoSolution:
    """Find the scores that explain the measurements with few examples.

    Solves ``min_w 1/2 ||y_c - M_c w||^2 + lambda ||w||_1`` for every query, where ``y_c`` and ``M_c`` are centred
    over subsets (an unpenalised intercept) and ``lambda = penalty * ||M_c' y_c||_inf``. Each query takes accelerated
    proximal gradient steps on a working set of examples; one back-projection over all n examples then certifies the
    duality gap or finds the examples the set lacks. Beside the scores (``4 q n`` bytes) each thread holds about
    ``12 b n + 16 b p d`` bytes for a sparse design, ``12 b n + 4 b p K`` for a dense one, where ``p`` is at most a
    few times K and ``b <= 64``, the queries solved together, falls so that this stays near 128 MiB while one fits.

    Args:
        measurements: What each query measured in each subset, ``(q, K)``. float64 is solved in float64, all else
            in float32, on the device of this tensor.
        design: Which example is in which subset.
        penalty: Penalty relative to the smallest that makes all scores zero: a number, or one per query ``(q,)``.
        tolerance: Largest duality gap to accept, relative to ``1/2 ||y_c||^2``. float32 reaches about 1e-6.
        max_iterations: Iterations a query may take in all; queries that need more are returned with a warning.

    Returns:
        Scores with their duality gaps.

    Raises:
        ValueError: If measurements do not fit the design or are not finite, or an option is out of range.

    Example:
        >>> from stride_lightning.steering.subsets import sample_design
        >>> design = sample_design(num_train=50, num_subsets=20, degree=4, seed=0)
        >>> planted = torch.zeros(1, 50)
        >>> planted[0, 7] = 2.0
        >>> solve_lasso(design.responses(planted), design, penalty=0.1).scores[0].nonzero().flatten()
        tensor([7])

    Reference: arXiv:2606.05165 (STRIDE), sparse recovery; arXiv:1802.07481 (celer), working sets.
    """
    measurements = _checked(measurements, design, tolerance, max_iterations)
    relative = _per_query(penalty, measurements)
    batches = _split(measurements, torch.ones_like(measurements), design)
    fits = _fit_all(batches, relative, [None] * len(batches), tolerance, max_iterations)
    scores = measurements.new_zeros(len(measurements), design.num_train)
    for rows, fit in zip(scores.split([len(fit.gap) for fit in fits]), fits, strict=True):
        rows.scatter_(1, fit.examples, fit.weights)
    return LassoSolution(
        scores=scores,
        gap=torch.cat([fit.gap for fit in fits]),
        penalty=relative * torch.cat([batch.largest_penalty for batch in batches]),
        num_iterations=max(fit.num_iterations for fit in fits),
    )


def cross_validate_penalty(
    measurements: Tensor,
    design: Design,
    *,
    penalties: Sequence[float] = PENALTY_GRID,
    num_folds: int = 5,
    seed: int = 0,
    tolerance: float = 1e-3,
    max_iterations: int = 20_000,
) -> Tensor:
    """Choose for each query the penalty that best predicts subsets left out of its fit.

    Without a fold of subsets the columns of M no longer have equal sums, so measurements and columns are centred
    over the remaining subsets and penalties are relative to the largest of that fit. Choosing per query costs a few
    per cent more error than one choice for all where queries are equally noisy, and saves half where they are not.

    Args:
        measurements: What each query measured in each subset, ``(q, K)``.
        design: Which example is in which subset.
        penalties: Relative penalties to choose from. They are tried from the largest, each fit started from the
            one before, until two in a row have improved hardly any query (under 5 %).
        num_folds: Number of folds the subsets are dealt into, from 2 to K.
        seed: Seed of the folds.
        tolerance: As in :func:`solve_lasso`; choosing needs less precision than the final fit.
        max_iterations: As in :func:`solve_lasso`, for each penalty.

    Returns:
        Chosen relative penalties ``(q,)``, to be passed to :func:`solve_lasso`.

    Raises:
        ValueError: If the folds or penalties are unusable, or as in :func:`solve_lasso`.

    Example:
        >>> from stride_lightning.steering.subsets import sample_design
        >>> design = sample_design(num_train=50, num_subsets=40, degree=8, seed=0)
        >>> cross_validate_penalty(design.responses(torch.eye(50)[:2]), design, penalties=[0.9, 0.01])
        tensor([0.0100, 0.0100])

    Reference: arXiv:2606.05165 (STRIDE), sparse recovery.
    """
    measurements = _checked(measurements, design, tolerance, max_iterations)
    num_queries, num_subsets = measurements.shape
    if not 2 <= num_folds <= num_subsets:
        raise ValueError(f"num_folds must be from 2 to the number of subsets ({num_subsets}), got {num_folds}.")
    if not penalties:
        raise ValueError("penalties is empty: give at least one relative penalty to choose from.")
    folds = torch.randperm(num_subsets, generator=torch.Generator().manual_seed(seed)) % num_folds
    held_out = nn.functional.one_hot(folds, num_folds).T.to(measurements)  # (folds, K)
    kept = (1 - held_out).repeat_interleave(num_queries, 0)  # (folds * q, K)
    repeated = measurements.repeat(num_folds, 1)  # (folds * q, K)
    batches = _split(repeated, kept, design)
    fits: Sequence[_Fit | None] = [None] * len(batches)
    best = measurements.new_full((num_queries,), torch.inf)
    chosen, since_best = torch.zeros_like(best), 0
    for penalty in sorted(penalties, reverse=True):
        fits = fitted = _fit_all(batches, _per_query(penalty, repeated), fits, tolerance, max_iterations)
        residual = repeated - torch.cat([fit.responses for fit in fitted])
        residual = (residual - _kept_mean(residual, kept)) * (1 - kept)  # the intercept carries over to the fold
        error = residual.square().sum(1).view(num_folds, num_queries).sum(0)  # (q,)
        better = error < best
        best, chosen = torch.where(better, error, best), chosen.masked_fill(better, penalty)
        since_best = 0 if better.float().mean() > 0.05 else since_best + 1
        if since_best == 2:
            break
    return chosen


@dataclass(frozen=True)
class _Fit:
    """Weights of a batch on its working sets: sparse, so that starting points cost little."""

    examples: Tensor  # (q, p)
    weights: Tensor  # (q, p)
    responses: Tensor  # (q, K): M w over all subsets, not centred
    gap: Tensor  # (q,)
    num_iterations: int


class _WorkingSet:
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


class _Batch:
    """Queries that are solved together, each on the subsets kept for it."""

    def __init__(self, measurements: Tensor, kept: Tensor, design: Design) -> None:
        self.design, self.kept = design, kept
        target = _centred(measurements, kept)
        # What centring leaves of a constant is rounding, and must not be explained.
        rounding = 4 * torch.finfo(target.dtype).eps * measurements.abs().amax(1, keepdim=True)
        self.target = target.masked_fill(target.abs().amax(1, keepdim=True) <= rounding, 0)  # (q, K)
        self.scale = self.target.square().sum(1) / 2  # (q,): what gaps are relative to
        self.largest_penalty = design.backproject(self.target).abs_().amax(1)  # (q,)

    @torch.no_grad()
    def fit(self, relative: Tensor, start: _Fit | None, tolerance: float, max_iterations: int) -> _Fit:
        """Grow and solve the working sets until the gaps over all examples close, for penalties ``(q,)``."""
        penalty = relative * self.largest_penalty
        if start is None:
            nobody = torch.zeros(len(penalty), 0, dtype=torch.long, device=penalty.device)
            start = _Fit(nobody, self.target.new_zeros(nobody.shape), torch.zeros_like(self.target), penalty, 0)
        examples, weights, responses = start.examples, start.weights, start.responses
        num_iterations, stalled = 0, False
        while True:
            residual = self.target - _centred(responses, self.kept)
            correlations = self.design.backproject(residual).abs_()  # (q, n)
            gap = _duality_gap(self.target, residual, weights, penalty, correlations.amax(1))
            unsolved = gap > tolerance * self.scale
            if stalled or num_iterations >= max_iterations or not unsolved.any():
                return _Fit(examples, weights, responses, gap / self.scale.clamp_min(1e-30), num_iterations)
            examples, weights = _widened(examples, weights, correlations)
            # A working set that lacks examples is solved only as far as the gap outside it warrants.
            goal = torch.where(unsolved, torch.maximum(0.3 * gap, 0.5 * tolerance * self.scale), torch.inf)
            weights, taken = self._iterate(examples, weights, penalty, goal, max_iterations - num_iterations)
            responses = _WorkingSet(self.design, examples, weights.dtype).responses(weights)
            num_iterations += taken
            stalled = taken == 0  # the gap left is rounding

    def _iterate(
        self, examples: Tensor, weights: Tensor, penalty: Tensor, goal: Tensor, max_iterations: int
    ) -> tuple[Tensor, int]:
        """Accelerated proximal gradient until the gaps on the working sets are below ``goal`` ``(q,)``."""
        target, kept = self.target, self.kept
        columns = _WorkingSet(self.design, examples, weights.dtype)
        curvature = _largest_curvature(columns, kept)  # (q, 1)
        solved, rows = weights, torch.arange(len(weights), device=weights.device)
        residual = target - _centred(columns.responses(weights), kept)
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
                    rows, target, kept, penalty, goal = (x[going] for x in (rows, target, kept, penalty, goal))
                    examples, curvature, momentum = examples[going], curvature[going], momentum[going]
                    weights, last_weights = weights[going], last_weights[going]
                    correlations, last_correlations = correlations[going], last_correlations[going]
                    columns = _WorkingSet(self.design, examples, weights.dtype)
            next_momentum = (1 + (1 + 4 * momentum.square()).sqrt()) / 2
            reach = 1 + (momentum - 1) / next_momentum
            ahead = torch.lerp(last_weights, weights, reach)
            # Correlations are affine in the weights, so those at the point ahead cost no product.
            ascent = torch.lerp(last_correlations, correlations, reach) / curvature
            last_weights, last_correlations = weights, correlations
            weights = _soft_threshold(ahead + ascent, penalty[:, None] / curvature)
            residual = target - _centred(columns.responses(weights), kept)
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


def _largest_curvature(columns: _WorkingSet, kept: Tensor) -> Tensor:
    """Largest eigenvalue of M_c' M_c on each working set, ``(q, 1)``, by power iteration.

    The estimate comes from below, but accelerated steps stay stable down to 3/4 of the true value.
    """
    start = torch.rand(columns.shape[1], generator=torch.Generator().manual_seed(0))
    vector, size = start.to(kept).expand(columns.shape), torch.ones_like(kept[:, :1])
    for _ in range(20):
        vector = columns.correlations(_centred(columns.responses(vector), kept))
        size = vector.norm(dim=1, keepdim=True).clamp_min(1e-30)
        vector = vector / size
    return 1.05 * size


def _soft_threshold(values: Tensor, threshold: Tensor) -> Tensor:
    """Proximal operator of ``threshold * ||.||_1``."""
    return values - values.clamp(-threshold, threshold)


def _kept_mean(values: Tensor, kept: Tensor) -> Tensor:
    """Mean over the kept subsets, ``(q, K) -> (q, 1)``."""
    return (values * kept).sum(1, keepdim=True) / kept.sum(1, keepdim=True)


def _centred(values: Tensor, kept: Tensor) -> Tensor:
    """Values less their mean over the kept subsets, and zero in the others, ``(q, K)``."""
    return (values - _kept_mean(values, kept)) * kept


def _split(measurements: Tensor, kept: Tensor, design: Design) -> list[_Batch]:
    """Batches within the memory bound; on a CPU, enough for all threads where queries are many."""
    width = design.num_subsets if design.indices is None else 4 * design.degree
    size = _WORKER_NUMBERS // (3 * design.num_train + min(design.num_train, 2 * design.num_subsets) * width)
    if measurements.device.type == "cpu":
        share = math.ceil(len(measurements) / torch.get_num_threads())
        size = min(size, max(_CPU_BATCH[0], min(share, _CPU_BATCH[1])))
    rows = zip(measurements.split(max(size, 1)), kept.split(max(size, 1)), strict=True)
    return [_Batch(*part, design) for part in rows]


def _fit_all(
    batches: Sequence[_Batch],
    relative: Tensor,
    starts: Sequence[_Fit | None],
    tolerance: float,
    max_iterations: int,
) -> list[_Fit]:
    """Fit all batches, warning of queries that miss the tolerance.

    On a CPU each thread works on its own batch: an iteration is many products too small to share, and waiting for
    a second thread in each takes ten times as long as the work where another process is running.
    """
    parts = relative.split([len(batch.target) for batch in batches])
    num_threads = torch.get_num_threads()
    workers = num_threads if relative.device.type == "cpu" else 1
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            fits = list(pool.map(_Batch.fit, batches, parts, starts, repeat(tolerance), repeat(max_iterations)))
    finally:
        torch.set_num_threads(num_threads)  # the workers' setting reaches this thread's BLAS too
    gap = torch.cat([fit.gap for fit in fits])
    if (num_open := int((gap > tolerance).sum())) > 0:
        num_iterations = max(fit.num_iterations for fit in fits)
        warnings.warn(
            f"{num_open} of {len(gap)} Lasso fits stopped after {num_iterations} iterations above the tolerance "
            f"{tolerance:g}: the largest relative duality gap is {float(gap.max()):.2g}. Raise `max_iterations`, "
            "`tolerance` or `penalty`, or pass float64 measurements.",
            stacklevel=3,
        )
    return fits


def _checked(measurements: Tensor, design: Design, tolerance: float, max_iterations: int) -> Tensor:
    """Measurements in the dtype they are solved in, or an error that says what is wrong."""
    if measurements.ndim != 2 or measurements.shape[1] != design.num_subsets or not len(measurements):
        raise ValueError(
            f"Measurements have shape {tuple(measurements.shape)}; expected (q, {design.num_subsets}): a row for each "
            "of at least one query and a column for each subset of the design."
        )
    finite = measurements.isfinite().all(1)
    if not finite.all():
        raise ValueError(f"Measurements of queries {(~finite).nonzero().flatten().tolist()} are not finite: drop them.")
    if not (tolerance > 0 and max_iterations > 0):
        raise ValueError(f"tolerance and max_iterations must be positive, got {tolerance} and {max_iterations}.")
    return measurements.detach().to(torch.promote_types(measurements.dtype, torch.float32))


def _per_query(penalty: float | Tensor, measurements: Tensor) -> Tensor:
    """One relative penalty for each query, ``(q,)``."""
    values = torch.as_tensor(penalty).detach().to(measurements)
    if values.ndim > 0 and values.shape != measurements.shape[:1]:
        raise ValueError(f"penalty has shape {tuple(values.shape)}; expected a number or ({len(measurements)},).")
    if not ((values > 0) & values.isfinite()).all():
        raise ValueError(f"penalty must be positive and finite, relative to the largest useful one; got {penalty}.")
    return values.expand(len(measurements))
