"""The penalty of the operators: its rules, and planted ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stride_lightning.steering import penalty
from stride_lightning.steering.basis import Observation
from stride_lightning.steering.module import StrideModule
from stride_lightning.steering.penalty import imitation_ridge, mean_curvature
from stride_lightning.steering.solvers import refit
from stride_lightning.steering.subsets import sample_design
from stride_lightning.tasks.likelihoods import Task
from tests.helpers.tiny import every_task, observation
from tests.steering.test_influence import gauss_newton


@every_task
def test_penalties_follow_their_rules(task: Task) -> None:
    observed = observation(task)
    unit = mean_curvature(observed, task)
    given, anchored, chosen = (
        StrideModule(sample_design(40, 8, 4), task, **options).fit_operators(observed, show_progress=False).chosen
        for options in ({"ridge": 0.3}, {"stability": 3.0}, {})
    )
    assert [each["ridge_rule"] for each in (given, anchored, chosen)] == ["given", "anchored", "imitation"]
    assert given["mean_curvature"] == pytest.approx(unit)
    assert given["ridge"] == pytest.approx(0.3 * unit)
    # Half of all examples are in a subset, so the penalty of its mean loss is twice as large.
    assert given["operator_ridge"] == pytest.approx(0.6 * unit)
    assert anchored["ridge"] == anchored["operator_ridge"] == pytest.approx(0.5 * 4 * unit)
    assert anchored["frozen_ridge"] == pytest.approx(unit)
    assert chosen["ridge"] == pytest.approx(imitation_ridge(observed, task)[0])
    assert chosen["ridge_relative"] == pytest.approx(chosen["ridge"] / unit)
    assert chosen["frozen_ridge"] == pytest.approx(min(chosen["ridge"], unit))


@every_task
def test_mean_curvature_is_the_mean_eigenvalue(task: Task) -> None:
    train = observation(task)
    eigenvalues = torch.linalg.eigvalsh(gauss_newton(train, task.mean(train.outputs), task))
    assert mean_curvature(train, task) == pytest.approx(float(eigenvalues.mean()), rel=1e-9)


def solve_tightly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refits solved to rounding, where the shipped tolerance trades precision for time."""

    def tight(observed: Observation, task: Task, ridges: Tensor, **_: object) -> Tensor:
        return refit(observed, task, ridges, tolerance=1e-9, max_iterations=20_000)

    monkeypatch.setattr(penalty, "refit", tight)


@every_task
@pytest.mark.parametrize("factor", [0.01, 0.15, 2.0])
@pytest.mark.parametrize("steps", [1, 2], ids=["solved tightly", "as shipped"])
def test_imitation_finds_a_planted_ridge(
    task: Task, factor: float, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that was itself trained with a ridge: its own ridge imitates it best, up to the grid's spacing."""
    observed = observation(task, size=150)
    planted = factor * mean_curvature(observed, task)
    coefficients = refit(observed, task, torch.tensor([planted]).double(), tolerance=1e-10, max_iterations=20_000)
    outputs = observed.features @ coefficients[..., 0].T
    losses = task.loss(outputs, observed.encoded)
    frozen = Observation(observed.features, outputs, observed.encoded, losses, fingerprint={})
    if steps == 1:
        solve_tightly(monkeypatch)
    chosen, tried = imitation_ridge(frozen, task)
    spacing = 4 ** (steps / 6)
    assert planted / spacing <= chosen <= planted * spacing
    assert list(tried) == sorted(tried)
    assert len(tried) == 19
    best = min(tried, key=tried.__getitem__)
    assert chosen == pytest.approx(best * mean_curvature(frozen, task))


@every_task
def test_imitation_losses_are_those_of_refits(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    observed = observation(task)
    solve_tightly(monkeypatch)
    _, tried = imitation_ridge(observed, task)
    unit = mean_curvature(observed, task)
    for factor, loss in tried.items():
        ridge = torch.tensor([factor * unit], dtype=torch.float64)
        exact = refit(observed, task, ridge, tolerance=1e-9, max_iterations=20_000)[..., 0]
        expected = task.loss(observed.features @ exact.T, task.mean(observed.outputs)).mean()
        assert loss == pytest.approx(float(expected), rel=1e-5)
