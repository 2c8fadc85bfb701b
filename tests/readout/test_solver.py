"""The solver and its preconditioner against dense algebra."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stride_lightning.readout import preconditioner as preconditioner_module
from stride_lightning.readout import solver as solver_module
from stride_lightning.readout.coordinates import principal_coordinates
from stride_lightning.readout.preconditioner import Preconditioner
from stride_lightning.readout.problem import Curvature, Problem
from stride_lightning.readout.solver import column_chunks, minimise, solve
from stride_lightning.tasks.likelihoods import Classification, Task
from tests.helpers.tiny import TASKS, every_task, observation, random_tensor


def problem_of(task: Task, size: int = 40, num_features: int = 5, dtype: torch.dtype = torch.float64) -> Problem:
    """A problem in principal coordinates, with another precision for every coefficient."""
    observed = observation(task, size, num_features, dtype=dtype)
    _, features = principal_coordinates(observed.features, is_centred=False)
    shape = features.shape[1], 3
    precision = 0.2 + random_tensor(*shape, seed=8).abs().to(dtype)
    return Problem(task, features, observed.encoded, random_tensor(3, seed=9).to(dtype), precision)


def whole(curvature: Curvature) -> Tensor:
    """The curvature as a matrix, by its products with unit vectors: ``(m C, m C)``."""
    shape = curvature.problem.shape
    units = torch.eye(shape[0] * shape[1], dtype=torch.float64).view(*shape, -1)
    return curvature(units.to(curvature.problem.features)).flatten(0, 1)


@every_task
def test_slope_and_curvature_are_derivatives_of_the_objective(task: Task) -> None:
    problem, weights = problem_of(task), random_tensor(40, 2, seed=3).abs()
    coefficients = random_tensor(*problem.shape, 2, seed=4)
    for given, count in ((weights, 2), (None, 1)):
        point = coefficients[..., :count].clone().requires_grad_(True)

        def total(values: Tensor, given: Tensor | None = given) -> Tensor:
            return problem.objective(values, given).sum()

        total(point).backward()
        torch.testing.assert_close(problem.slope(point.detach(), given), point.grad)
        direction = random_tensor(*point.shape, seed=5)
        step = 1e-6
        ahead, behind = (problem.slope(point.detach() + sign * step * direction, given) for sign in (1, -1))
        bent = Curvature(problem, point.detach(), given)(direction)
        torch.testing.assert_close(bent, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-6)


@every_task
def test_one_curvature_serves_many_vectors(task: Task) -> None:
    problem = problem_of(task)
    one, vectors = random_tensor(*problem.shape, 1, seed=4), random_tensor(*problem.shape, 6, seed=5)
    together = Curvature(problem, one)(vectors)
    apart = Curvature(problem, one.expand(-1, -1, 6).contiguous())(vectors)
    torch.testing.assert_close(together, apart)
    matrix = whole(Curvature(problem, one))
    torch.testing.assert_close(together.flatten(0, 1), matrix @ vectors.flatten(0, 1))
    torch.testing.assert_close(matrix, matrix.T)


@every_task
def test_preconditioner_is_the_inverse_of_a_small_curvature(task: Task) -> None:
    problem = problem_of(task)
    curvature = Curvature(problem, random_tensor(*problem.shape, 1, seed=4))
    vectors = random_tensor(*problem.shape, 3, seed=5)
    torch.testing.assert_close(Preconditioner(curvature)(curvature(vectors)), vectors)


@every_task
@pytest.mark.parametrize("most", [0, 2, 3, 8, 9, 14])
def test_preconditioner_of_leading_features(task: Task, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head of the curvature, for all outputs of its features, and the diagonal of the rest."""
    monkeypatch.setattr(preconditioner_module, "MAX_WHOLE", most)
    problem = problem_of(task)
    curvature = Curvature(problem, random_tensor(*problem.shape, 1, seed=4))
    matrix, head = whole(curvature), most // 3 * 3
    expected = torch.diag(matrix.diagonal())
    expected[:head, :head] = matrix[:head, :head]
    units = torch.eye(15, dtype=torch.float64).view(5, 3, 15)
    torch.testing.assert_close(Preconditioner(curvature)(units).flatten(0, 1), torch.linalg.inv(expected))


@pytest.mark.parametrize("most", [2048, 6, 0])
@every_task
def test_systems_are_solved(task: Task, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preconditioner_module, "MAX_WHOLE", most)
    problem = problem_of(task, 20, 30)
    curvature = Curvature(problem, random_tensor(*problem.shape, 1, seed=4))
    right = random_tensor(*problem.shape, 7, seed=5)
    right[..., 3] = 0  # a query without a residual
    values = solve(curvature, Preconditioner(curvature), right)
    expected = torch.linalg.solve(whole(curvature), right.flatten(0, 1)).view_as(right)
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-7 * float(expected.abs().max()))
    assert not values[..., 3].any()
    alone = solve(curvature, Preconditioner(curvature), right[..., 2:3])
    torch.testing.assert_close(values[..., 2:3], alone, rtol=0, atol=1e-8 * float(alone.abs().max()))


@every_task
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_minimum_has_no_slope(task: Task, dtype: torch.dtype) -> None:
    problem = problem_of(task, dtype=dtype)
    weights = (random_tensor(40, 5, seed=3) > 0).to(dtype)
    of_all = Preconditioner(Curvature(problem, problem.features.new_zeros(*problem.shape, 1)))
    coefficients, _ = minimise(problem, weights, preconditioner=of_all)
    start = problem.slope(torch.zeros_like(coefficients), weights).norm()
    tolerance = 1e-3 if dtype == torch.float32 else 1e-8
    assert float(problem.slope(coefficients, weights).norm()) < tolerance * float(start)
    together = minimise(problem)[0]
    nudged = (minimise(problem, start=together + shift)[0] for shift in (0.0, 1.0, -20.0))
    for again in nudged:
        torch.testing.assert_close(again, together, rtol=0, atol=tolerance * float(together.abs().max()))


def test_separable_data_far_from_the_start() -> None:
    """Steps of Newton's method that would overshoot are shortened."""
    features = torch.linspace(-300, 300, 60, dtype=torch.float64)[:, None]
    encoded = torch.eye(2, dtype=torch.float64)[(features[:, 0] > 5).long()]
    problem = Problem(Classification(), features, encoded, features.new_zeros(2), features.new_full((1, 2), 1e-4))
    for start in (None, torch.tensor([[[30.0], [-30.0]]]).double()):
        coefficients, _ = minimise(problem, start=start)
        assert coefficients.isfinite().all()
        assert float(problem.slope(coefficients, None).norm()) < 1e-5
        right = problem.outputs(coefficients, features)[..., 0].argmax(1) == encoded.argmax(1)
        assert float(right.double().mean()) > 0.95


def test_a_preconditioner_is_made_once_the_curvature_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of(TASKS["softmax"])
    monkeypatch.setattr(solver_module, "FIRST_STEPS", 1)
    coefficients, preconditioner = minimise(problem)
    assert isinstance(preconditioner, Preconditioner)
    again, given = minimise(problem, preconditioner=preconditioner)
    assert given is preconditioner
    torch.testing.assert_close(again, coefficients, rtol=0, atol=1e-8)


def test_columns_fit_their_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    like = torch.zeros(1)
    assert [len(chunk) for chunk in column_chunks(10, 2, like, 150)] == [64, 64, 22]
    wide = column_chunks(4096, 10, like, 100)
    assert max(map(len, wide)) == 2**26 // (8 * 4 * 4096 * 10)
    assert [len(chunk) for chunk in column_chunks(4096, 1000, like, 3)] == [1, 1, 1]
    assert torch.cat(wide).equal(torch.arange(100))
    assert sum(map(len, column_chunks(10, 2, like, 0))) == 0


@every_task
@pytest.mark.parametrize("size", [1e-15, 1e-22, 1e-30])
def test_tiny_right_sides_are_solved_too(task: Task, size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """In single precision, whose squares vanish: residuals of sure predictions are as small as that."""
    monkeypatch.setattr(preconditioner_module, "MAX_WHOLE", 6)
    problem = problem_of(task, dtype=torch.float32)
    curvature = Curvature(problem, random_tensor(*problem.shape, 1, seed=4).float())
    right = random_tensor(*problem.shape, 2, seed=5).float()
    expected = torch.linalg.solve(whole(curvature).double(), right.double().flatten(0, 1)).view_as(right)
    products = []
    counted = lambda vectors: products.append(0) or curvature(vectors)  # noqa: E731
    values = solve(counted, Preconditioner(curvature), right * torch.tensor([1.0, size]))  # pyright: ignore
    torch.testing.assert_close(
        values.double() / torch.tensor([1.0, size]).double(), expected, rtol=0, atol=5e-3 * float(expected.abs().max())
    )
    assert len(products) <= 20
