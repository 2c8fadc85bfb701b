"""Products with the Gauss-Newton matrix and systems of it, against the matrix itself."""

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from stride_lightning import attribute
from stride_lightning.attribute import create
from stride_lightning.gradients import gauss_newton, signs
from tests.helpers.gradient_models import (
    GPT2,
    QUIET,
    TASKS,
    Attention,
    Recurrent,
    Scaled,
    TiedHead,
    TokenModel,
    Transformer,
    attributed,
    cnn,
    exact_scores,
    fitted,
    gauss_newton_of,
    gradients_of,
    inverse_of,
    mlp,
    pictures_for,
    points_for,
    seeded,
    targets_for,
    tokens,
    words_for,
)
from tests.helpers.tiny import random_tensor

#: Torch's own, of the first forward-mode derivatives.
pytestmark = pytest.mark.filterwarnings(r"ignore:.torch\.jit\.script. is deprecated:DeprecationWarning")
CLASSES = TASKS["classification"][0]
LABELS = targets_for(CLASSES, 3, 8, 1)
CASES = {
    **{name: (lambda name=name: mlp(num_outputs=TASKS[name][1]), points_for(name), TASKS[name][0]) for name in TASKS},
    "pictures": (cnn, pictures_for(), CLASSES),
    "words": (lambda: seeded(TokenModel), words_for(), CLASSES),
    "attention": (lambda: seeded(Attention), TensorDataset(random_tensor(8, 3, 4, seed=0), LABELS), CLASSES),
    "transformer": (lambda: seeded(Transformer), words_for(8), CLASSES),
    "tied head": (lambda: seeded(TiedHead), TensorDataset(tokens(8, 4), tokens(8, seed=3)), CLASSES),
    "gpt2": (lambda: seeded(GPT2), TensorDataset(tokens(8, 3, size=7), tokens(8, size=7, seed=3)), CLASSES),
    "lstm": (lambda: seeded(Recurrent), TensorDataset(random_tensor(8, 3, 4, seed=0), LABELS), CLASSES),
    "raw parameters": (lambda: seeded(Scaled), TensorDataset(random_tensor(8, 6, seed=0), LABELS), CLASSES),
}


def expected_scores(attributor, model, task, data):
    """Times n, with the damping that the attributor found."""
    grads, damping = gradients_of(model, task, data), attributor._fitted[0].curvature.absolute_damping
    return grads @ inverse_of(gauss_newton_of(model, task, data), damping) @ grads.T


@pytest.mark.parametrize("name", CASES)
def test_conjugate_gradients(name):
    make, data, task = CASES[name]
    model = make()
    attributor = fitted(model, data, "influence-cg", damping=0.3, tolerance=1e-10, task=task, batch_size=5)
    scores, expected = exact_scores(attributor, data), expected_scores(attributor, model, task, data)
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-7 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["classification", "regression", "attention"])
def test_products(name):
    """The matrix itself, column by column; of some examples too."""
    make, data, task = CASES[name]
    model = make()
    attributor = fitted(model, data, "influence-cg", damping=1.0, task=task, batch_size=5)
    curvature, layouts = attributor._fitted[0].curvature, attributor.capture.layouts
    size = sum(layout.num_parameters for layout in layouts.values())
    with torch.no_grad():
        matrix = curvature.product(torch.eye(size, dtype=torch.float64))
        part = curvature.product(torch.eye(size, dtype=torch.float64), slice(2, 5))
    torch.testing.assert_close(matrix, matrix.T, rtol=0, atol=1e-12)
    assert torch.linalg.eigvalsh(matrix).min() > -1e-10
    for product, rows in ((matrix, slice(None)), (part, slice(2, 5))):
        explicit = gauss_newton_of(model, task, TensorDataset(*(t[rows] for t in data.tensors)))
        torch.testing.assert_close(
            torch.linalg.eigvalsh(product), torch.linalg.eigvalsh(explicit), rtol=1e-9, atol=1e-10
        )


def test_chunks_of_tangents():
    make, data, task = CASES["words"]
    scores = []
    for budget in (None, 1):
        attributor = fitted(make(), data, "influence-cg", damping=1.0, task=task, memory_budget=budget)
        scores.append(exact_scores(attributor, data))
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("tolerance", [0.3, 1e-3, 1e-6])
def test_every_query_is_solved_as_well_as_the_tolerance_says(tolerance):
    """Also one whose gradient is small beside the others'."""
    model, data = mlp(), points_for()
    attributor = fitted(model, data, "influence-cg", damping=0.3, tolerance=tolerance)
    curvature = attributor._fitted[0].curvature
    batch = next(iter(attributor._fitted[0].side.gradients()))[1]
    factors = torch.logspace(0, -6, batch.num_examples, dtype=torch.float64)
    gradients = batch.scaled(factors)
    with torch.no_grad():
        solved = curvature.solve(gradients).dense()
        residual = curvature.product(solved) + curvature.absolute_damping * solved - gradients.dense()
    relative = (residual.norm(dim=1) / gradients.dense().norm(dim=1)).square().mean().sqrt()
    assert 0 < relative <= tolerance * (1 + 1e-6)


def test_slow_convergence_warns():
    message = r"did not reach a residual of 1e-09 in 2 iterations.*`damping=`.*max_iterations"
    with pytest.warns(UserWarning, match=message):
        attributed(mlp(), points_for(), "influence-cg", damping=0.01, max_iterations=2)
    attributed(mlp(), points_for(), "influence-cg", damping=3.0, tolerance=1e-3)  # here a warning would be an error


def test_iterations_are_told():
    attribution = attributed(mlp(), points_for(), "influence-cg", damping=0.1, tolerance=1e-8)
    assert 2 < attribution.metadata["curvature"][0]["iterations"] <= 200


@pytest.mark.filterwarnings("ignore:LiSSA ended with residuals")  # random batches leave some
@pytest.mark.parametrize("batch_size", [14, 5])
@pytest.mark.parametrize("name", ["classification", "regression"])
def test_lissa(name, batch_size, monkeypatch):
    """A long series; random batches leave some noise, the whole training set none."""
    monkeypatch.setattr(gauss_newton, "SERIES_BATCH", batch_size)
    make, data, task = CASES[name]
    model = make()
    attributor = fitted(model, data, "influence-lissa", damping=10.0, depth=300, task=task)
    scores, expected = exact_scores(attributor, data), expected_scores(attributor, model, task, data)
    tolerance = 1e-6 if batch_size == 14 else 0.2
    torch.testing.assert_close(scores, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


@pytest.mark.filterwarnings("ignore:LiSSA ended with residuals")
def test_lissa_cannot_diverge(monkeypatch):
    """Also where a batch has a far larger eigenvalue than the mean of the training set."""
    monkeypatch.setattr(gauss_newton, "SERIES_BATCH", 2)
    x, y = points_for(num=12).tensors
    data = TensorDataset(torch.cat([x[:2] * 30, x[2:] * 0.1]), y)
    scores, short = (
        attributed(mlp(), data, "influence-lissa", points_for(), damping=0.1, depth=depth).scores for depth in (200, 20)
    )
    assert scores.isfinite().all()
    assert scores.abs().max() < 20 * short.abs().max()


@pytest.mark.filterwarnings("ignore:LiSSA ended with residuals")
def test_lissa_with_a_batch_that_the_model_is_sure_of(monkeypatch):
    """Its curvature is exactly zero, and says nothing on the scale of the series."""
    monkeypatch.setattr(gauss_newton, "SERIES_BATCH", 4)
    x, y = points_for(num=12).tensors
    x[:4] *= 1e6
    model, options = seeded(lambda: nn.Linear(4, 3)), {"method": "influence-lissa", **QUIET}
    assert attribute(model, points_for(), train_data=TensorDataset(x, y), **options).scores.isfinite().all()


def test_a_short_series_warns():
    with pytest.warns(UserWarning, match=r"LiSSA ended with residuals.*`damping=`.*`depth=`"):
        attributed(mlp(), points_for(), "influence-lissa", damping=0.01, depth=3)


def test_random_directions_change_the_trace_alone(monkeypatch):
    """Products are exact whatever the number of outputs."""
    make, data, task = CASES["classification"]
    exact = fitted(make(), data, "influence-cg", damping=1.0, task=task)._fitted[0].curvature
    monkeypatch.setattr(signs, "MAX_EXACT_OUTPUTS", 2)
    drawn = [
        fitted(make(), data, "influence-cg", damping=1.0, task=task, seed=seed)._fitted[0].curvature.mean_eigenvalue
        for seed in range(20)
    ]
    error = torch.tensor(drawn).std() / 20**0.5
    assert torch.tensor(drawn).mean() == pytest.approx(exact.mean_eigenvalue, abs=float(4 * error))


def test_wrong_options():
    for method, option, value in (("cg", "tolerance", 0.0), ("cg", "max_iterations", 0), ("lissa", "depth", 0)):
        with pytest.raises(ValueError, match=f"`{option}`"):
            create(f"influence-{method}", **{option: value})
