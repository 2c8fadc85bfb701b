"""The batched solver against scipy on the objectives as they are written down."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from stride_lightning.steering import solvers
from stride_lightning.steering.basis import Observation
from stride_lightning.steering.operators import measure
from stride_lightning.steering.solvers import OperatorFit, fit_operators, refit
from stride_lightning.steering.subsets import Design, sample_design
from stride_lightning.tasks.likelihoods import Classification, Regression, Task
from tests.helpers.tiny import TASKS, every_task, observation, random_tensor, rows_of

DESIGN = sample_design(40, 6, 2, seed=1)
QUIET = {"show_progress": False}
TIGHT = {"tolerance": 1e-9, "max_iterations": 5000, "show_progress": False}
RIDGE = 0.05


def fitted(task: Task, stability: float = 0.0, observed: Observation | None = None, **options: Any) -> OperatorFit:
    """Solved tightly unless the options say otherwise."""
    settings = {"design": DESIGN, "task": task, "ridge": RIDGE, "stability": stability, **TIGHT} | options
    return fit_operators(observation(task) if observed is None else observed, **settings)


def objective(
    observed: Observation, members: Tensor, task: Task, ridge: float, stability: float, flat: Tensor
) -> Tensor:
    """The objective of one subset, term by term as the docstring of ``fit_operators`` has it."""
    coefficients = flat.reshape(observed.outputs.shape[1], observed.features.shape[1])  # (C, r)
    inside, size, total = members.bool(), int(members.sum()), len(members)
    steered = observed.features @ coefficients.T
    penalty = ridge / 2 * flat.square().sum()
    if not stability:
        return task.loss(steered, observed.encoded)[inside].sum() / size + total / size * penalty
    steered = observed.outputs + steered
    fidelity = task.loss(steered, observed.encoded)[inside].sum() / size
    drift = task.loss(steered, task.mean(observed.outputs))[~inside].sum() / (total - size)
    return fidelity + stability * drift + penalty


def gradient(observed: Observation, members: Tensor, task: Task, ridge: float, stability: float, at: Tensor) -> Tensor:
    flat = at.flatten().requires_grad_()
    return torch.autograd.grad(objective(observed, members, task, ridge, stability, flat), flat)[0]


def by_scipy(observed: Observation, members: Tensor, task: Task, ridge: float, stability: float) -> Tensor:
    shape = observed.outputs.shape[1], observed.features.shape[1]

    def value(flat: np.ndarray) -> tuple[float, np.ndarray]:
        point = torch.from_numpy(flat).requires_grad_()
        loss = objective(observed, members, task, ridge, stability, point)
        return loss.item(), torch.autograd.grad(loss, point)[0].numpy()

    options = {"maxiter": 5000, "ftol": 0, "gtol": 1e-10}
    solution = minimize(value, np.zeros(shape[0] * shape[1]), jac=True, method="L-BFGS-B", options=options)
    return torch.from_numpy(solution.x).reshape(shape)


@every_task
@pytest.mark.parametrize("stability", [0.0, 0.5])
def test_solution_equals_scipy(task: Task, stability: float) -> None:
    observed = observation(task)
    fit = fitted(task, stability)
    assert fit.coefficients.shape == (3, 5, 6)
    for k, members in enumerate(DESIGN.dense()):
        expected = by_scipy(observed, members, task, RIDGE, stability)
        torch.testing.assert_close(fit.coefficients[..., k], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("stability", [0.0, 2.0])
def test_regression_equals_ridge_closed_form(stability: float) -> None:
    task = TASKS["Gaussian"]
    observed = observation(task)
    fit = fitted(task, stability)
    phi, n = observed.features, len(observed)
    for k, members in enumerate(DESIGN.dense(torch.float64)):
        size = members.sum()
        outside = stability / (n - size)
        weights = (members / size + (1 - members) * outside) / task.dispersion
        targets = members[:, None] * (observed.encoded - (observed.outputs if stability else 0))
        ridge = RIDGE * (1 if stability else n / size)
        system = phi.T @ (weights[:, None] * phi) + ridge * torch.eye(5, dtype=torch.float64)
        expected = torch.linalg.solve(system, phi.T @ (weights[:, None] * targets)).T
        torch.testing.assert_close(fit.coefficients[..., k], expected, rtol=1e-6, atol=1e-8)


@every_task
@pytest.mark.parametrize("stability", [0.0, 1.0])
def test_reported_gradient_is_the_gradient_left(task: Task, stability: float) -> None:
    observed = observation(task)
    fit = fitted(task, stability, tolerance=0.05)
    assert 0 < fit.iterations < 500
    for k, members in enumerate(DESIGN.dense()):
        left, first = (
            gradient(observed, members, task, RIDGE, stability, at).norm()
            for at in (fit.coefficients[..., k].clone(), torch.zeros(15, dtype=torch.float64))
        )
        torch.testing.assert_close(fit.relative_gradient[k], left / first)
    assert fit.relative_gradient.max() <= 0.05
    assert fit.relative_gradient.min() > 1e-12


@every_task
@pytest.mark.parametrize("stability", [0.0, 1.0])
def test_start_changes_nothing_but_the_work(task: Task, stability: float) -> None:
    plain, started = fitted(task, stability), fitted(task, stability, start=random_tensor(3, 5, seed=9))
    torch.testing.assert_close(started.coefficients, plain.coefficients, rtol=1e-6, atol=1e-8)
    one = {"design": sample_design(40, 2, 1), "subsets": slice(0, 1)}
    at_end = fitted(task, stability, **one).coefficients[..., 0]
    assert fitted(task, stability, start=at_end, **one).iterations <= 1


@every_task
@pytest.mark.parametrize("stability", [0.0, 1.0])
def test_blocks_chunks_and_shards_change_only_rounding(
    task: Task, stability: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = partial(fitted, task, stability, observation(task, size=300), design=sample_design(300, 7, 3))
    whole = fit().coefficients
    parts = [fit(subsets=slice(*bounds)) for bounds in ((0, 3), (3, 7))]
    torch.testing.assert_close(torch.cat([part.coefficients for part in parts], 2), whole, rtol=1e-6, atol=1e-8)
    assert torch.cat([part.relative_gradient for part in parts]).shape == (7,)
    monkeypatch.setattr(solvers, "MAX_CHUNK", 2)
    monkeypatch.setattr(solvers, "BLOCK_BYTES", 1)  # blocks of 64 examples, the smallest
    torch.testing.assert_close(fit().coefficients, whole, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(fit(subsets=slice(5, 6)).coefficients, whole[..., 5:6], rtol=1e-6, atol=1e-8)
    assert fit(subsets=slice(7, 7)).coefficients.shape == (3, 5, 0)


@every_task
def test_operator_of_a_subset_is_a_refit_on_it(task: Task) -> None:
    """Two subsets with the same content: each operator is what a refit on that content alone gives."""
    observed = observation(task, size=20)
    twice = rows_of(observed, torch.arange(20).repeat(2))
    members = torch.zeros(40, 2, dtype=torch.uint8)
    members[:20, 0], members[20:, 1] = 1, 1
    design = Design(2, 40, 1, 0, bits=torch.from_numpy(np.packbits(members.numpy(), axis=1)))
    # The penalty on the summed loss is n rho = 40 rho for operators and 20 rho' for the refit.
    fit = fit_operators(twice, design, task, RIDGE, **TIGHT)
    expected = refit(observed, task, torch.tensor([2 * RIDGE]), tolerance=1e-9, max_iterations=5000)
    torch.testing.assert_close(fit.coefficients, expected.expand(-1, -1, 2), rtol=1e-6, atol=1e-8)


@every_task
def test_refit_solves_many_ridges_at_once(task: Task) -> None:
    observed = observation(task)
    ridges = torch.tensor([1e-3, 0.1, 1.0, 100.0])
    solution = refit(observed, task, ridges, tolerance=1e-9, max_iterations=20_000)
    assert solution.shape == (3, 5, 4)
    for column, ridge in enumerate(ridges.tolist()):
        expected = by_scipy(observed, torch.ones(40), task, ridge, 0.0)
        torch.testing.assert_close(solution[..., column], expected, rtol=1e-4, atol=1e-6)


@every_task
@pytest.mark.parametrize("stability", [0.0, 1.0])
def test_empty_subset_stays_at_zero(task: Task, stability: float) -> None:
    bits = torch.zeros(40, 1, dtype=torch.uint8)
    bits[:20], bits[20:] = 0b10000000, 0b00100000  # nobody is in subset 1 of 3
    design = Design(3, 40, 1, 0, bits=bits)
    assert design.sizes.tolist() == [20, 0, 20]
    fit = fitted(task, stability, design=design)
    assert torch.isfinite(fit.coefficients).all()
    # Its only term, stability, holds the frozen model where it is.
    torch.testing.assert_close(fit.coefficients[..., 1], torch.zeros(3, 5).double(), rtol=0, atol=1e-8)
    assert fit.coefficients[..., [0, 2]].abs().amax((0, 1)).min() > 0.01
    few = {"start": random_tensor(3, 5, seed=9), "tolerance": 1e-6, "max_iterations": 100}
    started = fitted(task, stability, design=design, **few)
    assert (started.coefficients[..., 1] == 0).all()
    torch.testing.assert_close(started.coefficients, fit.coefficients, rtol=1e-3, atol=1e-4)


def test_single_precision_solves_badly_scaled_features() -> None:
    task = Classification()
    observed = observation(task, size=200, num_features=12, dtype=torch.float32)
    observed.features.mul_(torch.logspace(0, -3, 12))
    design = sample_design(200, 10, 5)
    fit = fit_operators(observed, design, task, 1e-6, tolerance=1e-5, **QUIET)
    assert fit.relative_gradient.max() <= 1e-5
    assert fit.coefficients.dtype == torch.float32
    assert fit.iterations <= 22


def test_unsolved_operators_warn() -> None:
    task = Classification()
    with pytest.warns(UserWarning, match=r"6 of 6 steering operators were stopped after 2 .*tolerance 1e-09\)\. Raise"):
        fit = fit_operators(observation(task), DESIGN, task, RIDGE, tolerance=1e-9, max_iterations=2, **QUIET)
    assert fit.iterations == 2


@pytest.mark.parametrize(
    "options",
    [{"ridge": 0.0}, {"ridge": math.nan}, {"ridge": 1.0, "stability": -1.0}, {"ridge": 1.0, "tolerance": 0.0}],
)
def test_options_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"Expected ridge > 0, stability >= 0 and tolerance > 0; got"):
        fit_operators(observation(Classification()), DESIGN, Classification(), **options, **QUIET)


def test_objective_that_is_not_finite_is_refused() -> None:
    observed = observation(Regression())
    observed.features[3, 2] = math.inf
    with pytest.raises(ValueError, match="gradient of the operators' objective is not finite"):
        fit_operators(observed, DESIGN, Regression(), RIDGE, **QUIET)


@every_task
def test_subsets_help_their_own_members(task: Task) -> None:
    """The sign of measurements: an operator lowers the loss of the examples it was trained on below that of others."""
    observed = observation(task)
    fit = fit_operators(observed, DESIGN, task, 1e-3, **TIGHT)
    effects = measure(observed, fit.coefficients, task, anchored=False)
    members = DESIGN.dense(torch.float64).T
    inside, outside = ((weights * effects).sum() / weights.sum() for weights in (members, 1 - members))
    assert inside > outside + 0.05
