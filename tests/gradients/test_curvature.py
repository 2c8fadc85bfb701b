"""Curvatures in double precision, before scores are rounded; and one of your own."""

import pytest
import torch

from stride_lightning import attribute
from stride_lightning.gradients.curvature import Curvature
from stride_lightning.gradients.presets import InfluenceAttributor
from stride_lightning.model.blocks import Block, Gradients
from tests.helpers.gradient_models import (
    EXACT,
    QUIET,
    blocks_of,
    close_scores,
    cnn,
    exact_scores,
    fitted,
    gauss_newton_of,
    gradients_of,
    margin_of,
    mlp,
    pictures_for,
    points_for,
)

CASES = {
    "points": (mlp, points_for(), points_for(num=5, seed=1)),
    "pictures": (cnn, pictures_for(), pictures_for(num=5, seed=1)),
    "more examples than parameters": (lambda: mlp(width=1), points_for(num=30), points_for(num=5, seed=1)),
}
every_case = pytest.mark.parametrize("name", CASES)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8 * float(expected.abs().max()))


def identity(size):
    return torch.eye(size, dtype=torch.float64)


@every_case
@pytest.mark.parametrize("batch_size", [100, 3])
def test_diagonal(name, batch_size):
    make, data, queries = CASES[name]
    attributor = fitted(make(), data, "diagonal", damping=0.3, batch_size=batch_size)
    mine, theirs = (gradients_of(make(), attributor.task, part) for part in (queries, data))
    squares = theirs.square().mean(0)
    close(exact_scores(attributor, queries), mine / (squares + 0.3 * squares.mean()) @ theirs.T)


@every_case
@pytest.mark.parametrize("batch_size", [100, 3])
def test_datainf(name, batch_size):
    make, data, queries = CASES[name]
    model = make()
    attributor = fitted(model, data, "datainf", damping=0.3, batch_size=batch_size)
    mine, theirs = (gradients_of(model, attributor.task, part) for part in (queries, data))
    expected = 0
    for at in blocks_of(model).values():
        damped = 0.3 * theirs[:, at].square().mean() * identity(len(at))
        inverse = torch.stack([torch.linalg.inv(torch.outer(g, g) + damped) for g in theirs[:, at]]).mean(0)
        expected = expected + mine[:, at] @ inverse @ theirs[:, at].T
    close(exact_scores(attributor, queries), expected)


@every_case
@pytest.mark.parametrize("batch_size", [100, 3])
def test_blocks_of_the_gauss_newton_matrix(name, batch_size):
    make, data, queries = CASES[name]
    model = make()
    attributor = fitted(model, data, "logra", damping=0.3, batch_size=batch_size)
    mine, theirs = (gradients_of(model, attributor.task, part) for part in (queries, data))
    matrix, places = gauss_newton_of(model, attributor.task, data), blocks_of(model).values()
    damping = 0.3 * matrix.trace() / sum(min(len(at), len(data)) for at in places)
    expected = sum(
        mine[:, at] @ torch.linalg.solve(matrix[at][:, at] + damping * identity(len(at)), theirs[:, at].T)
        for at in places
    )
    close(exact_scores(attributor, queries), expected)


@every_case
@pytest.mark.parametrize("batch_size", [100, 3])
def test_fisher(name, batch_size):
    """By the matrix where there are more examples than features, by the kernel where there are fewer."""
    make, data, queries = CASES[name]
    attributor = fitted(make(), data, "trak", damping=0.3, batch_size=batch_size)
    mine, theirs = (gradients_of(make(), attributor.task, part, margin_of) for part in (queries, data))
    matrix = theirs.T @ theirs / len(data)
    damping = 0.3 * matrix.trace() / min(matrix.shape[0], len(data))
    expected = mine @ torch.linalg.solve(matrix + damping * identity(len(matrix)), theirs.T)
    close(exact_scores(attributor, queries), expected)
    (block,) = attributor._fitted[0].curvature._blocks.values()
    assert type(block).__name__ == ("DampedMatrix" if name.startswith("more") else "DampedKernel")


@pytest.mark.filterwarnings(r"ignore:.torch\.jit\.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("method", [method for method in EXACT if not method.startswith("grad-")])
def test_another_damping_after_the_fit(method):
    data, model = points_for(), mlp()
    attributor = fitted(model, data, method, **EXACT[method])
    before = attributor.attribute(data).scores
    attributor.damping = 60.0
    found = attributor.attribute(data)
    expected = attribute(model, data, train_data=data, method=method, **QUIET | EXACT[method] | {"damping": 60.0})
    close_scores(found.scores, expected.scores)
    assert (found.scores - before).abs().max() > 1e-3 * before.abs().max()
    assert found.metadata["options"]["damping"] == 60.0
    with pytest.raises(ValueError, match="`damping` must be"):
        attributor.damping = -1
    assert attributor.damping == 60.0


class Halved(Curvature):
    """Half of the damped identity, to see what a curvature is given."""

    def fit(self, train):
        self.mean_eigenvalue = 2.0
        self.seen = [(places, gradients.num_examples) for places, gradients in train.gradients()]

    def solve(self, gradients):
        return Gradients({name: Block(b.dense() / (2 + self.absolute_damping)) for name, b in gradients.items()})


class HalvedAttributor(InfluenceAttributor):
    default_damping, curvature_class = 1.0, Halved


HalvedAttributor.method = "halved for a test"  # after the class was made, so that it is not registered


def test_a_curvature_of_your_own():
    data = points_for()
    attributor = HalvedAttributor(damping=3.0, batch_size=6, show_progress=False).fit(mlp(), data)
    found = attributor.attribute(data)
    plain = attribute(mlp(), data, train_data=data, method="grad-dot", **QUIET).scores
    close_scores(found.scores, plain / 8 / 14)
    assert attributor._fitted[0].curvature.seen == [(slice(0, 6), 6), (slice(6, 12), 6), (slice(12, 14), 2)]
    assert found.metadata["curvature"] == [{"mean_eigenvalue": 2.0, "damping": 6.0}]
