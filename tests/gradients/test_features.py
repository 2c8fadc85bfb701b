"""Reading data for gradients, and gradients of losses, margins and curvature, against loops."""

import pytest
import torch
from torch.utils.data import TensorDataset

from stride_lightning import BinaryClassification, Classification, Regression
from stride_lightning.data.examples import Examples
from stride_lightning.gradients import features, signs
from stride_lightning.gradients.features import Reader
from stride_lightning.gradients.signs import random_signs
from stride_lightning.tasks.likelihoods import Task
from tests.helpers.gradient_models import (
    TASKS,
    DictModel,
    DictTask,
    attributed,
    cnn,
    fitted,
    gauss_newton_of,
    gradients_of,
    jacobians_of,
    margin_of,
    mlp,
    pictures_for,
    points_for,
    second_derivatives,
    seeded,
    targets_for,
    tokens,
)
from tests.helpers.tiny import examples_of, random_tensor

CPU = torch.device("cpu")


def reader_of(data, model, task=None, num_outputs=3, batch_size=4, **options):
    task = Classification() if task is None else task
    options = {"capture": None, "batch_size": batch_size, "device": CPU, "show_progress": False} | options
    return Reader(examples_of(*data.tensors), model, task, num_outputs, **options)


def order_of(capture):
    """From vectors of blocks to vectors of parameters."""
    start, at = 0, {}
    for layout in capture.layouts.values():
        places = torch.arange(start, start + layout.num_parameters, dtype=torch.float64)[None]
        at |= {name: part.flatten() for name, part in layout.split(places).items()}
        start += layout.num_parameters
    return torch.cat([at[name] for name in capture.parameters]).long()


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


@torch.no_grad()
def read(model, task, data, what, batch_size=4, seed=0):
    """Vectors of all examples in the order of the parameters."""
    attributor = fitted(model, data, "grad-dot", task=task)
    reader = attributor.reader
    reader.batch_size = batch_size
    reader._held = None
    rows = [list(what(batch)) for batch in reader.run()]
    return [
        torch.cat([g.dense()[:, order_of(attributor.capture)] for g in column]) for column in zip(*rows, strict=True)
    ]


@pytest.mark.parametrize("kind", TASKS)
def test_losses(kind):
    task, num_outputs = TASKS[kind]
    model, data = mlp(num_outputs=num_outputs), points_for(kind)
    for size in (14, 4, 1):
        (gradients,) = read(model, task, data, lambda batch: [batch.loss()], size)
        close(gradients, gradients_of(model, task, data))


@pytest.mark.parametrize("kind", ["classification", "binary", "regression", "two real outputs"])
def test_margins(kind):
    task, num_outputs = TASKS[kind]
    model, data = mlp(num_outputs=num_outputs), points_for(kind)
    weights = []
    (gradients,) = read(model, task, data, lambda batch: [weights.append(batch.margin_weights) or batch.margin()])
    # (1 - p) times the gradient of the margin is that of minus the loss.
    close(gradients * torch.cat(weights)[:, None], -gradients_of(model, task, data))
    if not isinstance(task, Regression):
        close(gradients, gradients_of(model, task, data, margin_of))
        return
    assert (torch.cat(weights) > 0).all()
    residuals = data.tensors[1] - model(data.tensors[0]).detach()
    close(torch.cat(weights), residuals.norm(dim=1) / task.noise_std**2)


@pytest.mark.parametrize("kind", [*TASKS, "pictures"])
def test_curvature_sums_to_the_gauss_newton_matrix(kind):
    task, num_outputs = TASKS.get(kind, (Classification(), 3))
    model, data = (cnn(), pictures_for()) if kind == "pictures" else (mlp(num_outputs=num_outputs), points_for(kind))
    columns = read(model, task, data, lambda batch: batch.curvature(0))
    assert len(columns) == num_outputs
    jacobians, derivatives = jacobians_of(model, data), second_derivatives(model, task, data)
    explicit = torch.einsum("ncp,ncd,ndq->npq", jacobians, derivatives, jacobians)
    close(sum(column[:, :, None] * column[:, None] for column in columns), explicit)


@pytest.mark.parametrize("task", [Classification(), BinaryClassification(), Regression(0.5)], ids=repr)
def test_curvature_root(task):
    """A root of the second derivative, for built-in families and for one that only says what its curvature is."""
    outputs = random_tensor(4, 3, seed=0)
    mean = task.mean(outputs)
    for root_of in (task.curvature_root, lambda m, d: Task.curvature_root(task, m, d)):
        identity = torch.eye(3, dtype=torch.float64)
        root = torch.stack([root_of(mean, unit.expand(4, 3)) for unit in identity], 2)
        explicit = torch.stack([task.curvature(mean, unit.expand(4, 3)) for unit in identity], 2)
        close(root @ root.transpose(1, 2), explicit)


# ---- random directions ------------------------------------------------------------------------------------------


def test_random_directions_give_the_matrix_on_average(monkeypatch):
    monkeypatch.setattr(signs, "MAX_EXACT_OUTPUTS", 2)
    model, task, data = mlp(width=2), Classification(), points_for(num=4)
    exact = gauss_newton_of(model, task, data)
    drawn = []
    for seed in range(80):
        columns = read(model, task, data, lambda batch, seed=seed: batch.curvature(seed))
        assert len(columns) == signs.NUM_DIRECTIONS
        drawn.append(sum(column.T @ column for column in columns) / len(data))
    drawn = torch.stack(drawn)
    error = drawn.std(0) / len(drawn) ** 0.5
    assert ((drawn.mean(0) - exact).abs() <= 5 * error + 1e-12).all()
    assert error.max() < 0.2 * exact.abs().max()


def test_signs_are_made_of_seed_column_and_position():
    like = torch.ones(1, dtype=torch.float64)
    whole = random_signs(torch.arange(40), 3, 50, 7, like)
    assert whole.dtype == torch.float64
    assert set(whole.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(
        torch.cat([random_signs(torch.arange(i, i + 8), 3, 50, 7, like) for i in range(0, 40, 8)]), whole
    )
    # Others for another seed, column or place; no more alike than chance has it: 2000 signs, four standard errors.
    others = [random_signs(torch.arange(40), 3, 50, 8, like), random_signs(torch.arange(40), 4, 50, 7, like)]
    others += [random_signs(torch.arange(1, 41), 3, 50, 7, like), whole.roll(1, 1)]
    for other in others:
        assert (whole * other).mean().abs() < 4 / 2000**0.5
    assert whole.mean().abs() < 4 / 2000**0.5
    covariance = whole.T @ whole / 40
    assert (covariance - torch.eye(50)).abs().max() < 6 / 40**0.5


def test_signs_of_an_example_do_not_depend_on_what_else_is_trained_on(monkeypatch):
    monkeypatch.setattr(signs, "MAX_EXACT_OUTPUTS", 2)
    task, chosen = Classification(), [7, 2, 11, 5, 0]
    attributor = fitted(mlp(), points_for(), "grad-dot", task=task)

    def curvature(positions):
        given = Examples(points_for(), positions=positions)
        reader = Reader(given, attributor.model, task, 3, capture=attributor.capture, batch_size=4, device=CPU)
        batches = reader.run()
        return torch.cat([torch.stack([g.dense() for g in batch.curvature(0)], 1) for batch in batches])

    with torch.no_grad():
        close(curvature(torch.tensor(chosen)), curvature(None)[chosen])


# ---- reading ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [None, slice(0, 14), slice(3, 11), slice(5, 6), slice(4, 8), slice(13, 14)])
@pytest.mark.parametrize("held", [True, False])
def test_any_part_of_the_data(share, held):
    data = points_for()
    reader = reader_of(data, mlp())
    if not held:
        reader._held = None
    places, inputs, _ = zip(*reader.batches(share), strict=True)
    rows = range(14)[share] if share else range(14)
    assert [i for p in places for i in range(p.start, p.stop)] == list(rows)
    assert torch.equal(torch.cat(inputs), data.tensors[0][share or slice(None)])


def test_large_data_is_read_again(monkeypatch):
    monkeypatch.setattr(features, "HELD_BYTES", 100)
    reader = reader_of(points_for(), mlp())
    assert reader._held is None
    assert torch.equal(torch.cat([x for _, x, _ in reader.batches()]), points_for().tensors[0])


def test_example_that_is_not_finite_is_named():
    x, y = points_for().tensors
    x[9] = torch.inf
    data = TensorDataset(x.roll(12, 0).repeat(2, 1), y.repeat(2))
    with pytest.raises(ValueError, match=r"Training example 21 has (NaN|an infinite number) in its outputs"):
        attributed(mlp(), data, "grad-dot", points_for(), train_indices=[0, 3, 21])
    targets = random_tensor(14, 1, seed=0)
    targets[4] = torch.nan
    data = TensorDataset(points_for().tensors[0], targets)
    for chosen in (None, [0, 3, 4]):
        with pytest.raises(ValueError, match="Training example 4 has NaN in its target, which must be finite"):
            attributed(mlp(num_outputs=1), data, "grad-dot", points_for(), task=Regression(), train_indices=chosen)


def test_dictionaries():
    """Inputs that are a dictionary, and batches that are one."""
    words, numbers, labels = tokens(9, 3), random_tensor(9, 6, seed=0), targets_for(Classification(), 3, 9, 1)
    rows = zip(words, numbers, labels, strict=True)
    data = [dict(zip(("words", "numbers", "label"), row, strict=True)) for row in rows]
    model = seeded(DictModel)
    for batch_size in (9, 4):
        scores = attributed(model, data, "grad-dot", task=DictTask(), batch_size=batch_size).scores
        rows = []
        for i in range(9):
            outputs = model({"words": words[i : i + 1], "numbers": numbers[i : i + 1]})
            loss = torch.nn.functional.cross_entropy(outputs, labels[i : i + 1])
            rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*model.parameters()])]))
        explicit = torch.stack(rows) @ torch.stack(rows).T
        torch.testing.assert_close(scores.double(), explicit, rtol=1e-5, atol=1e-5)
