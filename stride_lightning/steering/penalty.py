"""The penalty of the steering operators: as given, or read off the data."""

from __future__ import annotations

from typing import Any

import torch

from stride_lightning.steering.basis import Observation
from stride_lightning.steering.solvers import refit
from stride_lightning.steering.subsets import Design
from stride_lightning.tasks.likelihoods import Task

#: Powers of four that are tried first, and sixths of powers around the best.
GRID, AROUND = range(-5, 4), (-5, -4, -3, -2, -1, 1, 2, 3, 4, 5)
NUM_RIDGES = len(GRID), len(AROUND)


def choose_penalties(
    observed: Observation,
    design: Design,
    task: Task,
    *,
    ridge: float | None,
    stability: float,
    anchored: bool,
    show_progress: bool = False,
) -> dict[str, Any]:
    """``ridge`` of a fit on all data; ``operator_ridge`` on a subset; ``frozen_ridge`` at the frozen model.

    Arguments are those of :class:`~stride_lightning.steering.module.StrideModule`, a given ridge among them relative
    to the mean curvature.
    """
    unit = max(mean_curvature(observed, task), 1e-12)
    if ridge is not None:
        rule, chosen = "given", ridge * unit
    elif anchored:
        rule, chosen = "anchored", 0.5 * (1 + stability) * unit
    else:
        rule, chosen = "imitation", imitation_ridge(observed, task, show_progress=show_progress)[0]
    mean_size = design.num_train * design.degree / design.num_subsets
    return {
        "mean_curvature": unit,
        "ridge": chosen,
        "ridge_relative": chosen / unit,
        "ridge_rule": rule,
        "operator_ridge": chosen if anchored else chosen * design.num_train / mean_size,
        "frozen_ridge": min(chosen, unit),
    }


def mean_curvature(observed: Observation, task: Task) -> float:
    """Mean eigenvalue of the Gauss-Newton matrix of the training loss in the basis; the scale of ridges."""
    diagonal = task.curvature_diagonal(task.mean(observed.outputs)).mean(1)
    energy = observed.features.square().sum(1)
    return float((diagonal * energy).mean() / observed.features.shape[1])


def imitation_ridge(
    observed: Observation, task: Task, *, show_progress: bool = False
) -> tuple[float, dict[float, float]]:
    """The ridge with which a refit of the readouts best imitates the frozen model.

    The model's readouts are trained anew on the whole training set, for a grid of ridges at once; the one whose
    predictions are closest to the frozen model's says how strongly the real training regularises. Beside it comes the
    loss against the frozen model's predictions for every ridge tried (relative to the mean curvature).
    """
    unit = max(mean_curvature(observed, task), 1e-12)
    predicted = task.mean(observed.outputs)
    tried: dict[float, float] = {}

    def try_out(factors: list[float]) -> float:
        ridges = torch.tensor(factors) * unit
        coefficients = refit(observed, task, ridges, tolerance=1e-2, show_progress=show_progress)
        for column, factor in enumerate(factors):
            outputs = observed.features @ coefficients[..., column].T
            tried[factor] = float(task.loss(outputs, predicted).mean())
        return min(tried, key=tried.__getitem__)

    best = try_out([4.0**power for power in GRID])
    best = try_out([best * 4.0 ** (step / 6) for step in AROUND])
    return best * unit, dict(sorted(tried.items()))
