"""Damped systems against torch's solve, and no answer from a singular matrix."""

import pytest
import torch
from torch.utils.data import TensorDataset

from stride_lightning import Regression, attribute
from stride_lightning.gradients.damping import DampedKernel, DampedMatrix, check_damping
from tests.helpers.gradient_models import EXACT, QUIET, Twice, close_scores, mlp, points_for, seeded
from tests.helpers.tiny import random_tensor

#: Torch's own, of the first forward-mode derivatives.
pytestmark = pytest.mark.filterwarnings(r"ignore:.torch\.jit\.script. is deprecated:DeprecationWarning")
DAMPED = [method for method in EXACT if not method.startswith("grad-")]
ROWS, VECTORS = random_tensor(5, 8, seed=0), random_tensor(3, 8, seed=1)
MATRIX = ROWS.T @ ROWS / 5


MAKES = {
    "matrix": lambda dtype: DampedMatrix(MATRIX, "w"),
    "kernel": lambda dtype: DampedKernel(ROWS.to(dtype), "w"),
}


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_systems(make):
    damped = make(torch.float64)
    assert (damped.size, damped.trace) == (8, pytest.approx(float(MATRIX.trace())))
    for damping in (0.1, 2.0, 0.1):  # what is kept of the last one does not stay
        expected = torch.linalg.solve(MATRIX + damping * torch.eye(8, dtype=torch.float64), VECTORS.T).T
        torch.testing.assert_close(damped.solve(VECTORS, damping), expected, rtol=1e-9, atol=1e-12)
        single = make(torch.float32).solve(VECTORS.float(), damping)
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("damping", [0, 1e-20])
@pytest.mark.parametrize("damped", [DampedMatrix(MATRIX, "w"), DampedKernel(ROWS, "w")], ids=["matrix", "kernel"])
def test_singular(damped, damping):
    if damping and isinstance(damped, DampedKernel):
        pytest.skip("the kernel of fewer examples than features is regular")
    with pytest.raises(ValueError, match=r"curvature of w \(8 features.*singular.*`damping=`.*`projection_dim=`"):
        damped.solve(VECTORS, damping)


def test_regular_without_damping():
    matrix = MATRIX + torch.eye(8, dtype=torch.float64)
    expected = torch.linalg.solve(matrix, VECTORS.T).T
    torch.testing.assert_close(DampedMatrix(matrix, "w").solve(VECTORS, 0.0), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("damping", [0, 0.0, 1, 2.5])
def test_accepted(damping):
    found = check_damping(damping)
    assert isinstance(found, float)
    assert found == damping


@pytest.mark.parametrize("damping", [-1e-9, float("nan"), float("inf"), -float("inf"), True, False, "1", [1.0]])
def test_refused(damping):
    with pytest.raises(ValueError, match="`damping` must be a number of at least 0"):
        check_damping(damping)


@pytest.mark.parametrize("method", ["datainf", "ekfac", "logra", "trak", "trak-newton"])
def test_no_scores_from_a_singular_curvature(method):
    """43 parameters, 6 examples and softmax, which leaves a direction flat: without damping there is no answer."""
    data = points_for(num=6)
    with pytest.raises(ValueError, match=r"singular.*`damping=`"):
        attribute(mlp(), data, train_data=data, method=method, damping=0, **QUIET)


def test_no_scores_from_a_diagonal_with_zeros():
    data = TensorDataset(random_tensor(6, 6, seed=0), torch.arange(6) % 3)
    with pytest.raises(ValueError, match=r"diagonal of unused.weight is singular.*`damping=`"):
        attribute(seeded(Twice), data, train_data=data, method="diagonal", damping=0, **QUIET)


@pytest.mark.parametrize("method", DAMPED)
def test_a_layer_that_is_not_used_spoils_nothing(method):
    """It has no curvature at all: with damping its share of every score is zero."""
    data = TensorDataset(random_tensor(14, 6, seed=0), torch.arange(14) % 3)
    model = seeded(Twice)
    with_it = attribute(model, data, train_data=data, method=method, **QUIET | EXACT[method]).scores
    assert with_it.isfinite().all()
    without = attribute(
        model, data, train_data=data, method=method, **{"layers": ["shared", "out"]} | QUIET | EXACT[method]
    ).scores
    assert torch.corrcoef(torch.stack([with_it.flatten(), without.flatten()]))[0, 1] > 0.9


@pytest.mark.parametrize("method", ["influence-cg", "influence-lissa"])
def test_solvers_warn_of_a_singular_curvature(method):
    data = points_for(num=6)
    options = {"depth": 30} if method == "influence-lissa" else {"tolerance": 1e-12, "max_iterations": 30}
    with pytest.warns(UserWarning, match="`damping=`"):
        attribute(mlp(), data, train_data=data, method=method, damping=0, **options, **QUIET)


def test_a_last_layer_with_a_singular_curvature_is_refused():
    data = points_for(num=6)
    with pytest.raises(ValueError, match=r"2.weight .* is singular.*`damping=`"):
        attribute(mlp(), data, train_data=data, method="last-layer", damping=0, **QUIET)


@pytest.mark.parametrize("method", DAMPED)
def test_units_do_not_matter(method):
    """Losses in other units: the damping goes with them, and the ranking stays."""
    data, asked = points_for("regression"), points_for("regression", 4, seed=1)
    model = mlp(num_outputs=1)
    one, other = (
        attribute(model, asked, train_data=data, task=Regression(noise_std=std), method=method, **QUIET | EXACT[method])
        for std in (1.0, 30.0)
    )
    factor = float((one.scores * other.scores).sum() / other.scores.square().sum())
    assert factor > 0.5
    close_scores(other.scores * factor, one.scores, 1e-4)


@pytest.mark.parametrize("method", DAMPED)
def test_damping_matters(method):
    data = points_for()
    options = EXACT[method]
    one, other = (
        attribute(mlp(), data, train_data=data, method=method, **QUIET | options | {"damping": d}).scores
        for d in (50, 200)
    )
    assert (other.diagonal() < one.diagonal()).all()
    assert torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1] < 1 - 1e-6


@pytest.mark.parametrize("method", [m for m in DAMPED if m not in ("trak", "trak-newton", "datainf", "last-layer")])
def test_strong_damping_is_grad_dot(method):
    """In the limit the curvature is a multiple of the identity."""
    data = points_for("regression")
    model = mlp(num_outputs=1)
    options = EXACT[method] | {"damping": 1e5}
    found = attribute(model, data, train_data=data, method=method, **QUIET | options)
    plain = attribute(model, data, train_data=data, method="grad-dot", **QUIET).scores
    close_scores(found.scores * found.metadata["curvature"][0]["damping"] * len(data), plain, 1e-3)


def test_data_of_another_length_is_another_mean():
    """Twice the data: the same mean curvature, and half the effect of each example."""
    data = points_for(num=20)
    double = TensorDataset(*(torch.cat([t, t]) for t in data.tensors))
    model = mlp(num_inputs=4, width=2)
    for method in ("diagonal", "ekfac", "datainf"):
        one, other = (
            attribute(model, data, train_data=d, method=method, damping=0.5, **QUIET).scores for d in (data, double)
        )
        close_scores(other[:, :20] * 2, one)
        close_scores(other[:, 20:] * 2, one)
