"""Sparse recovery: the Lasso for many queries at once, to a certified duality gap."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import repeat

import torch
from torch import Tensor, nn

from stride_lightning.runtime.parallel import map_chunks
from stride_lightning.runtime.progress import track
from stride_lightning.steering.subsets import Design
from stride_lightning.steering.working_sets import Batch, Fit, fit_mean

#: Relative penalties tried by cross-validation.
PENALTY_GRID = (0.7, 0.5, 0.35, 0.25, 0.18, 0.12, 0.08, 0.05, 0.03, 0.02, 0.01)

#: Numbers one worker may hold, which bounds how many queries it solves together.
_WORKER_NUMBERS = 2**25
#: Queries solved together on a CPU, from and to: enough to hide Python's overhead, few enough to stay in the cache.
_CPU_BATCH = (16, 64)


@dataclass(frozen=True)
class LassoSolution:
    """Solutions for q queries: their scores, and how exact they are."""

    scores: Tensor  # attribution scores w, (q, n): exactly zero outside the support
    gap: Tensor  # duality gap over all n examples, relative to 1/2 ||y_c||^2, (q,)
    penalty: Tensor  # absolute penalty lambda, (q,)
    num_iterations: int  # of the query that took most


def solve_lasso(
    measurements: Tensor,
    design: Design,
    penalty: float | Tensor,
    *,
    tolerance: float = 1e-4,
    max_iterations: int = 20_000,
    show_progress: bool = False,
) -> LassoSolution:
    """Find the scores that explain the measurements with few examples.

    Solves ``min_w 1/2 ||y_c - M_c w||^2 + lambda ||w||_1`` for every query, where ``y_c`` and ``M_c`` are centred
    over subsets (an unpenalised intercept) and ``lambda = penalty * ||M_c' y_c||_inf``. Each query takes accelerated
    proximal gradient steps on a working set of examples; one back-projection over all n examples then certifies the
    duality gap or finds the examples the set lacks. Beside the scores (``4 q n`` bytes) each thread holds about
    ``12 b n + 16 b p d`` bytes for a sparse design, ``12 b n + 4 b p K`` for a dense one, where ``p`` is at most a
    few times K and ``b <= 64``, the queries solved together, falls so that this stays near 128 MiB while one fits.

    Measurements ``(q, K)`` in float64 are solved in float64, all else in float32. The penalty, a number or one per
    query, is relative to the smallest that makes all scores zero; the tolerance, of the duality gap, to ``1/2
    ||y_c||^2``: float32 reaches about 1e-6. Queries that need more iterations are returned with a warning.

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
    fits = _fit_all(batches, relative, repeat(None), (tolerance, max_iterations), show=show_progress)
    scores = measurements.new_zeros(len(measurements), design.num_train)
    for rows, fit in zip(scores.split([len(fit.gap) for fit in fits]), fits, strict=True):
        rows.scatter_(1, fit.examples, fit.weights)
    gap = torch.cat([fit.gap for fit in fits])
    penalties = relative * torch.cat([batch.largest_penalty for batch in batches])
    return LassoSolution(scores, gap, penalties, max(fit.num_iterations for fit in fits))


def cross_validate_penalty(
    measurements: Tensor,
    design: Design,
    *,
    penalties: Sequence[float] = PENALTY_GRID,
    num_folds: int = 5,
    seed: int = 0,
    tolerance: float = 1e-2,
    max_iterations: int = 20_000,
    show_progress: bool = False,
) -> Tensor:
    """Choose for each query the penalty that best predicts subsets left out of its fit.

    Without a fold of subsets the columns of M no longer have equal sums, so measurements and columns are centred
    over the remaining subsets and penalties are relative to the largest of that fit. Choosing per query costs a few
    per cent more error than one choice for all where queries are equally noisy, and saves half where they are not.

    Penalties are tried from the largest, each fit started from the one before, until two in a row have improved hardly
    any query (under 5 %). Choosing needs less precision than the final fit.

    Returns:
        Relative penalties ``(q,)`` for :func:`solve_lasso`.

    Raises:
        ValueError: If the folds or penalties are unusable, or as in :func:`solve_lasso`.

    Example:
        >>> from stride_lightning.steering.subsets import sample_design
        >>> design = sample_design(num_train=50, num_subsets=40, degree=8, seed=0)
        >>> cross_validate_penalty(design.responses(torch.eye(50)[:2]), design, penalties=[0.9, 0.01])
        tensor([0.0100, 0.0100])
    """
    measurements = _checked(measurements, design, tolerance, max_iterations)
    num_queries, num_subsets = measurements.shape
    if not 2 <= num_folds <= num_subsets:
        raise ValueError(f"`num_folds` must be from 2 to the number of subsets ({num_subsets}), got {num_folds}.")
    if not penalties:
        raise ValueError("`penalties` is empty: give at least one relative penalty to choose from.")
    folds = torch.randperm(num_subsets, generator=torch.Generator().manual_seed(seed)) % num_folds
    held_out = nn.functional.one_hot(folds, num_folds).T.to(measurements)  # (folds, K)
    in_fit = (1 - held_out).repeat_interleave(num_queries, 0)  # (folds * q, K)
    repeated = measurements.repeat(num_folds, 1)  # (folds * q, K)
    batches = _split(repeated, in_fit, design)
    fits: Iterable[Fit | None] = repeat(None)
    best = measurements.new_full((num_queries,), torch.inf)
    chosen, since_best = torch.zeros_like(best), 0
    for penalty in track(sorted(penalties, reverse=True), "Choosing penalties", len(penalties), show=show_progress):
        relative = _per_query(penalty, repeated)
        fits = fitted = _fit_all(batches, relative, fits, (tolerance, max_iterations), show=False)
        residual = repeated - torch.cat([fit.responses for fit in fitted])
        residual = (residual - fit_mean(residual, in_fit)) * (1 - in_fit)  # the intercept carries over to the fold
        error = residual.square().sum(1).view(num_folds, num_queries).sum(0)  # (q,)
        better = error < best
        best, chosen = torch.where(better, error, best), chosen.masked_fill(better, penalty)
        since_best = 0 if better.float().mean() > 0.05 else since_best + 1
        if since_best == 2:
            break
    return chosen


def _split(measurements: Tensor, in_fit: Tensor, design: Design) -> list[Batch]:
    """Batches within the memory bound; on a CPU, enough for all threads where queries are many."""
    width = design.num_subsets if design.indices is None else 4 * design.degree
    size = _WORKER_NUMBERS // (3 * design.num_train + min(design.num_train, 2 * design.num_subsets) * width)
    if measurements.device.type == "cpu":
        share = math.ceil(len(measurements) / torch.get_num_threads())
        size = min(size, max(_CPU_BATCH[0], min(share, _CPU_BATCH[1])))
    rows = zip(measurements.split(max(size, 1)), in_fit.split(max(size, 1)), strict=True)
    return [Batch(*part, design) for part in rows]


def _fit_all(
    batches: list[Batch], relative: Tensor, starts: Iterable[Fit | None], limits: tuple[float, int], *, show: bool
) -> list[Fit]:
    """Fit all batches, warning of queries that miss the tolerance."""
    parts = relative.split([len(batch.target) for batch in batches])
    jobs = [
        partial(batch.fit, penalty, start, *limits)
        for batch, penalty, start in zip(batches, parts, starts, strict=False)
    ]
    fits = list(map_chunks(lambda job: job(), jobs, relative.device, "Lasso", show_progress=show))
    gap = torch.cat([fit.gap for fit in fits])
    num_open, num_iterations = int((gap > limits[0]).sum()), max(fit.num_iterations for fit in fits)
    if num_open:
        warnings.warn(
            f"{num_open} of {len(gap)} Lasso fits stopped after {num_iterations} iterations above the tolerance "
            f"{limits[0]:g}: the largest relative duality gap is {float(gap.max()):.2g}. Raise `max_iterations`, "
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
        bad = (~finite).nonzero().flatten().tolist()
        raise ValueError(f"The measurements of queries {bad} are not finite. Leave these queries out.")
    if not (tolerance > 0 and max_iterations > 0):
        raise ValueError(f"`tolerance` and `max_iterations` must be positive, got {tolerance} and {max_iterations}.")
    return measurements.detach().to(torch.promote_types(measurements.dtype, torch.float32))


def _per_query(penalty: float | Tensor, measurements: Tensor) -> Tensor:
    """One relative penalty for each query, ``(q,)``."""
    values = torch.as_tensor(penalty).detach().to(measurements)
    if values.ndim > 0 and values.shape != measurements.shape[:1]:
        raise ValueError(f"`penalty` has shape {tuple(values.shape)}; expected a number or ({len(measurements)},).")
    if not ((values > 0) & values.isfinite()).all():
        raise ValueError(f"`penalty` must be positive and finite, relative to the largest useful one; got {penalty}.")
    return values.expand(len(measurements))
