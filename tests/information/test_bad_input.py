"""Features, weights and options that leave little or nothing to say."""

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from stride_lightning import Regression
from stride_lightning.attribute import create
from stride_lightning.gradients import planned
from stride_lightning.information import attributor as module
from tests.helpers.gradient_models import TASKS, close_scores, mlp, points_for, seeded
from tests.information import dense
from tests.information.cases import (
    CASES,
    DATA,
    METHODS,
    QUERIES,
    RIDGE,
    ask,
    both_methods,
    exact_of,
    exactly,
    informed,
    made,
    rows_of,
)

# ---- bad input --------------------------------------------------------------------------------------------------


def test_rank_deficient_features():
    """Copies, and more parameters than rows: the prior settles what the data do not; without one it is refused."""
    data = TensorDataset(*(torch.cat([t[:3]] * 4) for t in DATA.tensors))
    train, query_rows = (dense.tangents_of(mlp(), TASKS["classification"][0], part) for part in (data, QUERIES))
    for ridge in (1.0, 1e-3):
        for method, form in METHODS.items():
            attributor = made(method, data=data, ridge=ridge)
            exactly(exact_of(attributor, QUERIES), dense.single(form, query_rows, train, ridge), 1e-8)
    with pytest.raises(ValueError, match=r"12 examples and 43 features is singular with a ridge of 0.*`ridge=`"):
        made(data=data, ridge=0)


def test_no_prior_where_the_data_determine_all_weights():
    model, data = seeded(lambda: nn.Linear(4, 1)), points_for("regression")
    queries, task = points_for("regression", 5, 1), Regression()
    train, query_rows = (dense.tangents_of(model, task, part)[:, 0] for part in (data, queries))

    def variance(rows):
        return torch.einsum("qp,pr,qr->q", query_rows, torch.linalg.inv(rows.T @ rows), query_rows)

    left = [train[[j for j in range(14) if j != i]] for i in range(14)]
    expected = torch.stack([0.5 * ((1 + variance(rows)) / (1 + variance(train))).log() for rows in left], 1)
    exactly(exact_of(made(model=model, data=data, task=task, ridge=0), queries), expected)
    with pytest.raises(ValueError, match="A gain is relative to a prior, and `ridge=0` means no prior"):
        create("information-gain", ridge=0)


def test_leverage_at_one():
    """With next to no prior every example determines directions of its own."""
    for dtype in (torch.float64, torch.float32):
        attributor = made(model=mlp().to(dtype), ridge=1e-9)
        rows = rows_of(attributor, DATA)[0]
        assert attributor.posterior.variance(rows).diagonal(dim1=1, dim2=2).sum(1).max() > 2 - 1e-5
        scores = attributor.attribute(DATA).scores
        assert scores.min() >= 0
        # Two directions of three outputs, each worth 6.6 nats about itself.
        assert scores.max() < 14
        assert scores.diagonal().min() > 6


def test_leverage_at_one_in_tiles(monkeypatch):
    """As with features that are kept, or refused."""
    options = {"model": mlp().float(), "ridge": 1e-12, "batch_size": 4, "top_k": 13}
    expected = ask(**options).top(13).proponent_scores
    monkeypatch.setattr(module, "KEPT_BYTES", 0)
    monkeypatch.setattr(planned, "TILE_BYTES", 4 * 5 * 3)
    close_scores(ask(**options).top(13).proponent_scores, expected, 0.1)


def test_rank_deficient_features_of_rounded_models():
    """Twelve examples that are four times three have rank six at the most; what is more comes of rounding."""
    data = TensorDataset(*(torch.cat([t[:3]] * 4) for t in DATA.tensors))
    assert made(model=mlp().bfloat16(), data=data, ridge=1.0).posterior.precision == torch.finfo(torch.bfloat16).eps
    with pytest.raises(ValueError, match="is singular with a ridge of 1e-09"):
        made(model=mlp().bfloat16(), data=data, ridge=1e-9)


@both_methods
def test_a_query_that_is_a_training_example(method):
    train = dense.tangents_of(mlp(), TASKS["classification"][0], DATA)
    expected = dense.single(METHODS[method], train, train, RIDGE)
    exactly(exact_of(made(method, ridge=RIDGE), DATA), expected)
    gained = ask("information-gain", queries=DATA, ridge=1e-3).scores
    assert gained.argmax(1).tolist() == list(range(13))


class Dead(nn.Module):
    """Its outputs are one, whatever its weights."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 1)

    def forward(self, x):
        return self.linear(x) * 0 + 1


@both_methods
def test_zero_gradients(method):
    data = points_for("regression")
    for options in ({"signed": True}, {}):
        attributor, attribution = informed(method, seeded(Dead), data, data, ridge=1.0, **options)
        assert (attribution.scores == 0).all()
    assert attributor.diverse(attribution, 2).proponents.tolist() == [[0, 1]] * 14
    with pytest.raises(ValueError, match=r"All features are zero.*give `ridge=`"):
        ask(method, seeded(Dead), data, data)
    model = seeded(lambda: nn.Linear(4, 1))
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    with pytest.raises(ValueError, match=r"All weights are zero.*give `ridge=`"):
        ask(method, model, data, data)


@both_methods
def test_an_example_without_gradient(method):
    """Zero inputs and no bias: it tells nothing, and nothing is told of it."""
    model = seeded(lambda: nn.Linear(4, 3, bias=False))
    data = TensorDataset(DATA.tensors[0].clone(), DATA.tensors[1])
    data.tensors[0][4] = 0
    scores = ask(method, model, data, data).scores
    assert (scores[4] == 0).all()
    assert (scores[:, 4] == 0).all()
    assert scores.isfinite().all()


def test_certain_model():
    model = mlp()
    with torch.no_grad():
        model[2].weight *= 1e5
    for likelihood in ("gauss-newton", "margin"):
        assert (ask(model=model, ridge=1.0, likelihood=likelihood).scores == 0).all()
    with pytest.raises(ValueError, match="All features are zero"):
        ask(model=model)
    with torch.no_grad():
        model[2].weight *= 0.1
    with pytest.warns(UserWarning, match="upper end of the ridges"):
        assert ask(model=model).scores.isfinite().all()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ridge": -1.0}, ValueError, "`ridge` must be a number of at least 0"),
        ({"ridge": float("nan")}, ValueError, "`ridge` must be a number of at least 0"),
        ({"ridge": "1"}, ValueError, "`ridge` must be a number of at least 0"),
        ({"ridge": True}, ValueError, "`ridge` must be a number of at least 0"),
        ({"method": "information-gain", "ridge": 0}, ValueError, "`ridge=0` means no prior: give a positive number"),
        ({"signed": "no"}, ValueError, "`signed` must be True or False, got 'no'"),
        ({"signed": 1}, ValueError, "`signed` must be True or False, got 1"),
        ({"likelihood": "laplace"}, ValueError, r"`likelihood` must be one of \('gauss-newton', 'margin'\), got 'lap"),
        ({"projection_dim": 0}, ValueError, "`projection_dim` must be an integer of at least 1, got 0"),
        ({"projection_dim": 2.0}, ValueError, "`projection_dim` must be an integer of at least 1, got 2.0"),
        ({"projection_dim": True}, ValueError, "`projection_dim` must be an integer of at least 1, got True"),
        ({"top_k": 0}, ValueError, "`top_k` must be an integer"),
        ({"layers": "2"}, TypeError, r"write layers=\['2'\]"),
        ({"damping": 1.0}, TypeError, "layers, likelihood, memory_budget, projection_dim, ridge, signed, top_k"),
        ({"checkpoints": "folder"}, TypeError, "Unknown option checkpoints"),
        ({"record": "folder"}, ValueError, "reads no record"),
        ({"target": "argmax"}, ValueError, "`target` must be 'label' or 'predicted'"),
    ],
)
def test_wrong_options(options, error, message):
    with pytest.raises(error, match=message):
        ask(**options)


@both_methods
@pytest.mark.parametrize("name", ["regression", "two real outputs"])
def test_margin_of_a_task_without_one(method, name):
    make, data, _, task = CASES[name]
    with pytest.raises(ValueError, match=r"likelihood='margin' needs a margin: A regression has no margin"):
        made(method, make(), data, task=task, likelihood="margin")


@both_methods
def test_one_training_example_and_one_query(method):
    one, one_query = (TensorDataset(*(t[:1] for t in part.tensors)) for part in (DATA, QUERIES))
    attributor, attribution = informed(method, data=one, queries=one_query, ridge=RIDGE)
    train, query = (dense.tangents_of(mlp(), TASKS["classification"][0], part) for part in (one, one_query))
    close_scores(attribution.scores, dense.single(METHODS[method], query, train, RIDGE), 1e-6)
    assert attributor.diverse(attribution).proponents.tolist() == [[0]]
