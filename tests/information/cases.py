"""Models, data and questions that the tests of information share."""

import pytest
import torch

from stride_lightning import Regression, attribute
from stride_lightning.attribute import create
from stride_lightning.gradients import signs
from tests.helpers.gradient_models import (
    QUIET,
    TASKS,
    TokenModel,
    cnn,
    fitted,
    mlp,
    pictures_for,
    points_for,
    seeded,
    words_for,
)
from tests.helpers.tiny import CPU, examples_of

METHODS = {"information-loss": "loss", "information-gain": "gain"}
RIDGE = 0.4
DATA, QUERIES = points_for(num=13), points_for(num=5, seed=1)
CASES = {
    "classification": (mlp, DATA, QUERIES, TASKS["classification"][0]),
    "binary": (lambda: mlp(num_outputs=1), points_for("binary"), points_for("binary", 5, 1), TASKS["binary"][0]),
    "regression": (
        lambda: mlp(num_outputs=1),
        points_for("regression"),
        points_for("regression", 5, 1),
        Regression(noise_std=0.7),
    ),
    "two real outputs": (
        lambda: mlp(num_outputs=2),
        points_for("two real outputs"),
        points_for("two real outputs", 5, 1),
        Regression(noise_std=1.6),
    ),
    "pictures": (cnn, pictures_for(), pictures_for(5, seed=1), TASKS["classification"][0]),
    "words": (lambda: seeded(TokenModel), words_for(), words_for(5, seed=1), TASKS["classification"][0]),
}
LIKELIHOODS = [(name, "gauss-newton") for name in CASES] + [
    (name, "margin") for name in ("classification", "binary", "pictures", "words")
]
both_methods = pytest.mark.parametrize("method", METHODS)
every_case = pytest.mark.parametrize(("name", "likelihood"), LIKELIHOODS)


def ask(method="information-loss", model=None, data=DATA, queries=QUERIES, **options):
    options = QUIET | options
    return attribute(mlp() if model is None else model, queries, train_data=data, method=method, **options)


def made(method="information-loss", model=None, data=DATA, **options):
    """Fitted, with features and scores in the precision of the model."""
    return fitted(mlp() if model is None else model, data, method, **options)


def informed(method="information-loss", model=None, data=DATA, queries=QUERIES, target="label", **options):
    """An attributor and what it says of the queries."""
    fit = {name: options.pop(name, None) for name in ("task", "train_indices")}
    attributor = create(method, **QUIET | options).fit(mlp() if model is None else model, data, **fit)
    return attributor, attributor.attribute(queries, target=target)


def diverse(*arguments, k=None, **options):
    attributor, attribution = informed(*arguments, **options)
    return attributor.diverse(attribution, k)


def exact_of(attributor, queries):
    """Scores before they are rounded to float32."""
    with attributor.borrowed_model() as (model, device):
        reader = attributor.read(model, examples_of(*queries.tensors), device, "label")
        return attributor._tile(*attributor._query_side(reader), slice(0, len(attributor.train_data)))


def exactly(actual, expected, tolerance=1e-10):
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def many(monkeypatch):
    """Random directions for the three outputs of a model."""
    monkeypatch.setattr(signs, "MAX_EXACT_OUTPUTS", 1)


@torch.no_grad()
def rows_of(attributor, queries):
    """Features of the training examples and of queries, as they are compared."""
    reader = attributor.read(attributor.model, examples_of(*queries.tensors), CPU, "label")
    tangents = attributor.tangents
    batches = tangents.batches(attributor.reader), tangents.batches(reader, as_queries=True)
    return [torch.cat([batch.rows for batch in part]) for part in batches]
