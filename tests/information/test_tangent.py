"""Tangent features against Jacobians and Hessians of single examples, and their projection by its matrix."""

import pytest
import torch
from torch.utils.data import TensorDataset

from stride_lightning import BinaryClassification
from stride_lightning.gradients import signs
from stride_lightning.gradients.features import Reader
from stride_lightning.gradients.projection import EVERYTHING
from stride_lightning.information.tangent import TangentFeatures
from stride_lightning.model.blocks import Block, Gradients, Outer
from tests.gradients.test_features import order_of, reader_of
from tests.helpers.gradient_models import TASKS, fitted, gauss_newton_of, gradients_of, mlp, points_for
from tests.helpers.tiny import CPU, examples_of
from tests.information.cases import CASES
from tests.information.dense import tangents_of

EVERY = 10_000  # more features than any model here has parameters
every_case = pytest.mark.parametrize("name", CASES)


def close(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * max(1.0, float(expected.abs().max())))


def model_of(name):
    make, data, _, task = CASES[name]
    return make(), data, task


@torch.no_grad()
def read(model, task, data, likelihood="gauss-newton", *, dim=EVERY, batch_size=4, seed=0, signed=False, share=None):
    """Rows, losses and downhill directions; the columns in the order of the parameters if all are kept."""
    attributor = fitted(model, data, "grad-dot", task=task)
    reader = reader_of(data, model, task, attributor.num_outputs, batch_size, capture=attributor.capture)
    capture = attributor.capture
    tangents = TangentFeatures(capture, likelihood, dim, seed, signed=signed)
    batches = list(tangents.batches(reader, share))
    order = order_of(capture) if dim >= capture.num_parameters else slice(None)
    assert tangents.dim == min(dim, capture.num_parameters)
    places = torch.cat([torch.arange(batch.places.start, batch.places.stop) for batch in batches])
    assert places.tolist() == list(range(*(share or slice(None)).indices(len(reader))))
    rows, losses = torch.cat([batch.rows for batch in batches]), torch.cat([batch.losses for batch in batches])
    downhill = torch.cat([batch.downhill for batch in batches])[:, order] if signed else None
    return rows[..., order], losses, downhill


@every_case
def test_rows_make_the_gauss_newton_matrix(name):
    model, data, task = model_of(name)
    rows, losses, downhill = read(model, task, data)
    assert rows.dtype == torch.float64
    assert downhill is None
    close(torch.einsum("ncp,ncq->pq", rows, rows), len(data) * gauss_newton_of(model, task, data))
    # And so does every example by itself.
    exact = tangents_of(model, task, data)
    close(rows.mT @ rows, exact.mT @ exact)
    assert losses.shape == (len(data),)


@pytest.mark.parametrize("name", ["classification", "binary", "pictures", "words"])
def test_margins(name):
    """``p (1 - p)`` times the outer product of the gradient of the target's log-odds."""
    model, data, task = model_of(name)
    rows, _, _ = read(model, task, data, "margin")
    assert rows.shape[1] == 1
    close(rows, tangents_of(model, task, data, "margin"))


def test_margin_of_two_classes_is_everything():
    """Where there are no more than two outcomes the margin says all: one output, or the difference of two."""
    for name, outputs in (("binary", 1), ("classification", 2)):
        task = TASKS[name][0]
        data = points_for("binary")
        data.tensors = (data.tensors[0], data.tensors[1].long())
        model = mlp(num_outputs=outputs)
        one, every = (read(model, task, data, likelihood)[0] for likelihood in ("margin", "gauss-newton"))
        close(one.mT @ one, every.mT @ every)


@pytest.mark.parametrize(
    ("name", "likelihood"),
    [("regression", "gauss-newton")]
    + [(name, likelihood) for name in ("classification", "words") for likelihood in ("gauss-newton", "margin")],
)
def test_downhill_is_minus_the_gradient_of_the_loss(name, likelihood):
    model, data, task = model_of(name)
    rows, _, downhill = read(model, task, data, likelihood, signed=True)
    close(downhill, -gradients_of(model, task, data))
    close(rows, read(model, task, data, likelihood)[0])


def matrix_of(projection, capture):
    """What it makes of every single parameter, in the form in which the layer's gradients come: ``(p, k)``."""
    with capture.watch() as backward:
        inputs = torch.zeros(1, 4, dtype=torch.float64)
        like = backward.gradients(torch.ones_like(backward.run(inputs, 1)))
    parts = []
    for layer, block in like.items():
        left, right = block.shape
        if block.is_dense:
            everyone = {layer: Block(torch.eye(block.size, dtype=torch.float64))}
        else:
            places = torch.cartesian_prod(torch.arange(left), torch.arange(right))
            units = [
                torch.eye(size, dtype=torch.float64)[places[:, side]][:, None]
                for side, size in enumerate((left, right))
            ]
            everyone = {layer: Block(None, (Outer(*units, left),))}
        parts.append(projection(Gradients(everyone))[EVERYTHING].dense())
    return torch.cat(parts)


@pytest.mark.parametrize("likelihood", ["gauss-newton", "margin"])
def test_projection_is_linear(likelihood):
    """Projected rows are the rows times the projected gradients of single parameters."""
    model, data, task = model_of("classification")
    attributor = fitted(model, data, "grad-dot", task=task)
    order = order_of(attributor.capture)
    tangents = TangentFeatures(attributor.capture, likelihood, 7, 3, signed=False)
    matrix = matrix_of(tangents._project, attributor.capture)
    assert matrix.shape == (43, 7)
    rows, _, downhill = read(model, task, data, likelihood, dim=7, seed=3, signed=True)
    close(rows, read(model, task, data, likelihood)[0] @ matrix[order])
    close(downhill, -gradients_of(model, task, data) @ matrix[order])
    assert (rows - read(model, task, data, likelihood, dim=7, seed=4)[0]).abs().max() > 0.1


@pytest.mark.parametrize("dim", [EVERY, 6])
@pytest.mark.parametrize("likelihood", ["gauss-newton", "margin"])
def test_batches_and_shares(likelihood, dim):
    model, data, task = model_of("words")
    whole = read(model, task, data, likelihood, dim=dim, batch_size=14, signed=True)
    for size in (1, 5):
        for rows, expected in zip(
            read(model, task, data, likelihood, dim=dim, batch_size=size, signed=True), whole, strict=True
        ):
            close(rows, expected)
    part = read(model, task, data, likelihood, dim=dim, signed=True, share=slice(3, 10))
    for rows, expected in zip(part, whole, strict=True):
        close(rows, expected[3:10])


def test_between():
    model, data, task = model_of("classification")
    attributor = fitted(model, data, "grad-dot", task=task)
    tangents = TangentFeatures(attributor.capture, "gauss-newton", EVERY, 0, signed=True)
    with torch.no_grad():
        first, second, *_ = tangents.batches(reader_of(data, model, task, batch_size=5, capture=attributor.capture))
    part = second.between(slice(3, 7))
    assert part.places == slice(5, 7)
    assert all(torch.equal(getattr(part, name), getattr(second, name)[:2]) for name in ("rows", "losses", "downhill"))
    nothing = first.between(slice(5, 7))
    assert (len(nothing.rows), len(nothing.losses), len(nothing.downhill)) == (0, 0, 0)
    assert first.num_bytes == 8 * 5 * 4 * 43
    assert second.between(slice(0, 99)).places == slice(5, 10)


# ---- many outputs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["classification", "two real outputs"])
def test_random_directions_of_many_outputs(name, monkeypatch):
    """Eight rows per example, whose products are those of all outputs on average over seeds."""
    model, data, task = model_of(name)
    exact = read(model, task, data, batch_size=14)[0]
    monkeypatch.setattr(signs, "MAX_EXACT_OUTPUTS", 1)
    some = [read(model, task, data, batch_size=14, seed=seed)[0] for seed in range(25)]
    assert some[0].shape == (len(data), 8, exact.shape[2])
    mean = torch.stack([rows.mT @ rows for rows in some]).mean(0)
    expected = exact.mT @ exact
    assert (mean - expected).norm() < 0.15 * expected.norm()
    assert (some[0].mT @ some[0] - expected).norm() > 0.2 * expected.norm()
    for size in (1, 5):
        close(read(model, task, data, batch_size=size)[0], some[0])
    # A margin is one row however many outputs there are.
    if name == "classification":
        close(read(model, task, data, "margin")[0], tangents_of(model, task, data, "margin"))


@torch.no_grad()
def test_directions_are_those_of_a_position(monkeypatch):
    """Whatever is read with it and in whatever order; those of queries are other ones."""
    model, data, task = model_of("classification")
    attributor = fitted(model, data, "grad-dot", task=task)
    tangents = TangentFeatures(attributor.capture, "gauss-newton", EVERY, 3, signed=False)

    def rows_at(places, *, as_queries=False):
        reader = Reader(examples_of(*data.tensors).subset(places), model, task, 3, **options)
        return torch.cat([batch.rows for batch in tangents.batches(reader, as_queries=as_queries)])

    options = {"capture": attributor.capture, "batch_size": 4, "device": CPU, "show_progress": False}
    every = range(len(data))
    close(rows_at(every, as_queries=True), rows_at(every))
    monkeypatch.setattr(signs, "MAX_EXACT_OUTPUTS", 1)
    for as_queries in (False, True):
        whole = rows_at(every, as_queries=as_queries)
        for places in ([9, 3, 11, 0, 5, 12], [7]):
            close(rows_at(places, as_queries=as_queries), whole[places])
    train, queries = rows_at(every), rows_at(every, as_queries=True)
    # An example and its query have the same matrix on average, by directions that have nothing to do with each other.
    assert (train - queries).flatten(1).norm(dim=1).min() > 0.5 * train.flatten(1).norm(dim=1).min()
    same = data.tensors[0].new_ones(14, 1) * data.tensors[0][:1], data.tensors[1][:1].expand(14)
    reader = Reader(examples_of(*same), model, task, 3, **options)
    copies = torch.cat([batch.rows for batch in tangents.batches(reader)])
    assert all((copies[0] - other).abs().max() > 1e-3 for other in copies[1:])


# ---- bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision_of_the_model(dtype):
    model, data, task = model_of("classification")
    rows, exact = read(model.to(dtype), task, data)[0], read(mlp(), task, data)[0]
    assert rows.dtype == torch.float32
    close(rows.double(), exact, 1e-5 if dtype == torch.float32 else 0.03)


def test_two_outputs_of_a_binary_task_have_no_margin():
    x, y = points_for("two real outputs").tensors
    with pytest.raises(ValueError, match=r"likelihood='margin' needs a margin: .*gauss-newton"):
        read(mlp(num_outputs=2), BinaryClassification(), TensorDataset(x, (y > 0).long()), "margin")
