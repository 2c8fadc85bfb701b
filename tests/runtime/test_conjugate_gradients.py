import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator, cg

from stride_lightning.runtime.conjugate_gradients import conjugate_gradients
from tests.helpers.tiny import random_tensor


def system(num_systems=5, rows=4, columns=6):
    """A matrix over ``rows x columns`` unknowns, right sides of very different sizes, and a diagonal preconditioner."""
    factor = random_tensor(rows * columns, rows * columns, seed=0)
    matrix = factor @ factor.T + 3 * torch.eye(rows * columns, dtype=torch.float64)
    right = random_tensor(rows, columns, num_systems, seed=1) * torch.logspace(0, -8, num_systems, dtype=torch.float64)
    diagonal = matrix.diagonal().view(rows, columns, 1)
    return matrix, right, lambda residual: residual / diagonal


def times(matrix):
    return lambda vectors: (matrix @ vectors.flatten(0, 1)).view(vectors.shape)


def relative(values, expected):
    return ((values - expected).square().sum((0, 1)) / expected.square().sum((0, 1))).sqrt()


@pytest.mark.parametrize("tolerance", [0.3, 1e-4])
def test_every_system_is_solved_to_the_tolerance_and_alone(tolerance):
    """A small one too; the answer does not depend on the others."""
    matrix, right, precondition = system()

    def solve(some):
        return conjugate_gradients(times(matrix), some, precondition, tolerance=tolerance, max_iterations=200)

    together = solve(right)
    left = relative(times(matrix)(together.values), right)
    assert (left <= tolerance).all()
    assert left.max() > tolerance / 100
    alone = [solve(right[..., place : place + 1]) for place in range(right.shape[2])]
    torch.testing.assert_close(together.values, torch.cat([one.values for one in alone], 2), rtol=1e-6, atol=0)
    assert together.num_iterations == max(one.num_iterations for one in alone)


@pytest.mark.parametrize("tolerance", [0.1, 1e-6])
def test_two_axes_are_one_system_as_scipy_solves_it(tolerance):
    matrix, right, _ = system(num_systems=1)
    right, diagonal = right[..., 0], matrix.diagonal()
    steps = []
    expected, failed = cg(
        matrix.numpy(),
        right.flatten().numpy(),
        rtol=tolerance,
        maxiter=200,
        M=LinearOperator(matrix.shape, lambda vector: vector / diagonal.numpy(), dtype=np.float64),
        callback=lambda _: steps.append(1),
    )
    solution = conjugate_gradients(
        lambda vectors: (matrix @ vectors.flatten()).view(vectors.shape),
        right,
        lambda residual: residual / diagonal.view(right.shape),
        tolerance=tolerance,
        max_iterations=200,
    )
    assert (solution.num_iterations, solution.is_solved) == (len(steps), not failed)
    torch.testing.assert_close(solution.values.flatten(), torch.from_numpy(expected), rtol=1e-5, atol=1e-8)


def test_the_dense_solution_and_stopping():
    matrix, right, precondition = system()

    def solve(product, right=right, tolerance=1e-9, max_iterations=3):
        return conjugate_gradients(product, right, precondition, tolerance=tolerance, max_iterations=max_iterations)

    solution = solve(times(matrix), tolerance=1e-12, max_iterations=200)
    expected = torch.linalg.solve(matrix, right.flatten(0, 1)).view(right.shape)
    assert solution.is_solved
    assert solution.num_iterations < 200
    assert relative(solution.values, expected).max() < 1e-9
    unsolved, zero = solve(times(matrix)), solve(times(matrix), 0 * right)
    assert (unsolved.num_iterations, unsolved.is_solved) == (3, False)
    assert (zero.num_iterations, zero.is_solved, zero.values.any()) == (0, True, False)
    lost = solve(lambda x: x * torch.nan)
    assert (lost.num_iterations, lost.is_solved) == (1, False)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU"))])  # fmt: skip
def test_single_precision_on_the_device_of_the_right_sides(device):
    matrix, right, _ = system()
    matrix, right = matrix.float().to(device), right.float().to(device)
    solution = conjugate_gradients(times(matrix), right, torch.clone, tolerance=1e-3, max_iterations=500)
    assert (solution.values.dtype, solution.values.device) == (right.dtype, right.device)
    assert (relative(times(matrix)(solution.values), right) < 2e-3).all()
