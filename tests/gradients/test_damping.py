"""Damped systems against torch's solve, and no answer from a singular matrix."""

import pytest
import torch
from torch.utils.data import TensorDataset

from stride_lightning import Regression
from stride_lightning.gradients.damping import DampedKernel, DampedMatrix, check_damping
from tests.helpers.gradient_models import EXACT, Twice, attributed, close_scores, mlp, points_for, seeded
from tests.helpers.tiny import correlation, random_tensor

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


@pytest.mark.parametrize(("kind", "damping"), [("matrix", 0), ("matrix", 1e-20), ("kernel", 0)])
def test_singular(kind, damping):
    damped = MAKES[kind](torch.float64)
    with pytest.raises(ValueError, match=r"curvature of w \(8 features.*singular.*`damping=`.*`projection_dim=`"):
        damped.solve(VECTORS, damping)


def test_regular_without_damping():
    matrix = MATRIX + torch.eye(8, dtype=torch.float64)
    expected = torch.linalg.solve(matrix, VECTORS.T).T
    torch.testing.assert_close(DampedMatrix(matrix, "w").solve(VECTORS, 0.0), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("damping", [0, 0.0, 1, 2.5])
def test_accepted(damping):
    assert isinstance(check_damping(damping), float)
    assert check_damping(damping) == damping


@pytest.mark.parametrize("damping", [-1e-9, float("nan"), float("inf"), -float("inf"), True, False, "1", [1.0]])
def test_refused(damping):
    with pytest.raises(ValueError, match="`damping` must be a number of at least 0"):
        check_damping(damping)


@pytest.mark.parametrize("method", ["datainf", "ekfac", "logra", "trak", "trak-newton", "last-layer"])
def test_no_scores_from_a_singular_curvature(method):
    """43 parameters, 6 examples and softmax, which leaves a direction flat: without damping there is no answer."""
    where = r"2.weight .* is " if method == "last-layer" else ""
    with pytest.raises(ValueError, match=where + r"singular.*`damping=`"):
        attributed(mlp(), points_for(num=6), method, damping=0)


@pytest.mark.parametrize(("method", "where"), [("diagonal", "diagonal of unused.weight is "), ("ekfac", "")])
def test_no_scores_from_a_layer_without_curvature(method, where):
    data = TensorDataset(random_tensor(6, 6, seed=0), torch.arange(6) % 3)
    with pytest.raises(ValueError, match=where + r"singular.*`damping=`"):
        attributed(seeded(Twice), data, method, damping=0)


@pytest.mark.parametrize("method", DAMPED)
def test_a_layer_that_is_not_used_spoils_nothing(method):
    """It has no curvature at all: with damping its share of every score is zero."""
    data = TensorDataset(random_tensor(14, 6, seed=0), torch.arange(14) % 3)
    model = seeded(Twice)
    with_it, without = (attributed(model, data, method, layers=layers).scores for layers in (None, ["shared", "out"]))
    assert with_it.isfinite().all()
    assert correlation(with_it, without) > 0.9


@pytest.mark.parametrize("method", ["influence-cg", "influence-lissa"])
def test_solvers_warn_of_a_singular_curvature(method):
    options = {"depth": 30} if method == "influence-lissa" else {"tolerance": 1e-12, "max_iterations": 30}
    with pytest.warns(UserWarning, match="`damping=`"):
        attributed(mlp(), points_for(num=6), method, damping=0, **options)


@pytest.mark.parametrize("method", DAMPED)
def test_units_do_not_matter(method):
    """Losses in other units: the damping goes with them, and the ranking stays."""
    data, queries = points_for("regression"), points_for("regression", 4, seed=1)
    model = mlp(num_outputs=1)
    one, other = (attributed(model, data, method, queries, task=Regression(noise_std=std)) for std in (1.0, 30.0))
    factor = float((one.scores * other.scores).sum() / other.scores.square().sum())
    assert factor > 0.5
    close_scores(other.scores * factor, one.scores, 1e-4)


@pytest.mark.parametrize("method", DAMPED)
def test_damping_matters(method):
    one, other = (attributed(mlp(), points_for(), method, damping=damping).scores for damping in (50, 200))
    assert (other.diagonal() < one.diagonal()).all()
    assert correlation(one, other) < 1 - 1e-6


@pytest.mark.parametrize("method", [m for m in DAMPED if m not in ("trak", "trak-newton", "datainf", "last-layer")])
def test_strong_damping_is_grad_dot(method):
    """In the limit the curvature is a multiple of the identity."""
    data, model = points_for("regression"), mlp(num_outputs=1)
    attribution, plain = attributed(model, data, method, damping=1e5), attributed(model, data, "grad-dot").scores
    close_scores(attribution.scores * attribution.metadata["curvature"][0]["damping"] * len(data), plain, 1e-3)


def test_data_of_another_length_is_another_mean():
    """Twice the data: the same mean curvature, and half the effect of each example."""
    data = points_for(num=20)
    double = TensorDataset(*(torch.cat([t, t]) for t in data.tensors))
    model = mlp(num_inputs=4, width=2)
    for method in ("diagonal", "ekfac", "datainf"):
        one, other = (attributed(model, train, method, data, damping=0.5).scores for train in (data, double))
        close_scores(other[:, :20] * 2, one)
        close_scores(other[:, 20:] * 2, one)
