"""method="information-loss" and "information-gain" against the dense Gaussian process of a model's Jacobians."""

import json
import warnings

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from stride_lightning import Attribution, Regression, TopAttribution, attribute
from stride_lightning.attribute import create, methods, self_influence
from stride_lightning.gradients import features, planned
from stride_lightning.information import attributor as module
from stride_lightning.information.evidence import fit_evidence
from tests.helpers.gradient_models import (
    QUIET,
    TASKS,
    Everything,
    TokenModel,
    check_same_condition,
    close_scores,
    cnn,
    condition_of,
    fitted,
    mlp,
    pictures_for,
    points_for,
    seeded,
    words_for,
)
from tests.helpers.tiny import CPU, examples_of, permutation, random_tensor
from tests.information import dense
from tests.runtime.test_distributed import run_two, start

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


def exact_of(attributor, queries):
    """Scores before they are rounded to float32."""
    with attributor.borrowed_model() as (model, device):
        asked = attributor.read(model, examples_of(*queries.tensors), device, "label")
        return attributor._tile(attributor._asked(asked), slice(0, len(attributor.train_data)))


def exactly(found, expected, tolerance=1e-10):
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


# ---- dense Gaussian processes -----------------------------------------------------------------------------------


@both_methods
@every_case
def test_entropies_with_and_without_each_example(method, name, likelihood):
    make, data, queries, task = CASES[name]
    model = make()
    train, asked = (dense.tangents_of(model, task, part, likelihood) for part in (data, queries))
    expected = dense.single(METHODS[method], asked, train, RIDGE)
    assert expected.max() > 1e-2
    options = {"likelihood": likelihood, "ridge": RIDGE, "batch_size": 4}
    exactly(exact_of(made(method, model, data, task=task, **options), queries), expected)
    found = ask(method, model, data, queries, task=task, **options)
    assert found.scores.dtype == torch.float32
    torch.testing.assert_close(found.scores.double(), expected, rtol=1e-6, atol=1e-10)
    assert found.metadata["unit"] == "nats, unsigned"


@both_methods
def test_projected_features_are_those_of_the_process(method):
    attributor = made(method, ridge=RIDGE, projection_dim=7)
    assert attributor.posterior.num_features == 7
    with torch.no_grad():
        train = torch.cat([batch.rows for batch in attributor.tangents.batches(attributor.reader)])
        reader = attributor.read(attributor.model, examples_of(*QUERIES.tensors), CPU, "label")
        asked = torch.cat([batch.rows for batch in attributor.tangents.batches(reader)])
    exactly(exact_of(attributor, QUERIES), dense.single(METHODS[method], asked, train, RIDGE))


@both_methods
def test_scores_are_never_negative(method):
    model, data = seeded(TokenModel), words_for()
    for options in ({}, {"likelihood": "margin"}, {"projection_dim": 5}):
        assert ask(method, model, data, data, **options).scores.min() >= 0
        assert ask(method, model.float(), data, data, **options).scores.min() >= 0
        model.double()


@both_methods
def test_labels_enter_through_the_weights_alone(method):
    """Of all outputs; the margin is that of the label."""
    other = TensorDataset(DATA.tensors[0], (DATA.tensors[1] + 1) % 3)
    asked = TensorDataset(QUERIES.tensors[0], (QUERIES.tensors[1] + 1) % 3)
    expected = exact_of(made(method, ridge=RIDGE), QUERIES)
    exactly(exact_of(made(method, data=other, ridge=RIDGE), asked), expected)


# ---- signs ------------------------------------------------------------------------------------------------------


@both_methods
@every_case
def test_signs_are_those_of_influence(method, name, likelihood):
    make, data, queries, task = CASES[name]
    model, options = make(), {"likelihood": likelihood, "ridge": RIDGE}
    signs = dense.signs_of(model, task, data, queries, dense.tangents_of(model, task, data, likelihood), RIDGE)
    assert set(signs.unique().tolist()) == {-1, 1}
    plain = exact_of(made(method, model, data, task=task, **options), queries)
    exactly(exact_of(made(method, model, data, task=task, signed=True, **options), queries), signs * plain)
    found = ask(method, model, data, queries, task=task, signed=True, **options)
    assert torch.equal(found.scores.double().sign(), signs)
    assert found.metadata["unit"] == "nats"


def test_a_positive_sign_lowers_the_loss_of_the_query():
    """A step towards an example with more weight, by the whole inverse curvature, in a model that is its tangent."""
    model, data, queries = mlp(), DATA, QUERIES
    scores = ask(model=model, signed=True, ridge=RIDGE).scores
    train = dense.tangents_of(model, TASKS["classification"][0], data)
    precision = torch.einsum("ncp,ncq->pq", train, train) + RIDGE * torch.eye(43, dtype=torch.float64)
    gradients = dense.gradients_of(model, TASKS["classification"][0], data)

    def losses(parameters):
        outputs = torch.func.functional_call(model, parameters, (queries.tensors[0],))
        return nn.functional.cross_entropy(outputs, queries.tensors[1], reduction="none")

    before = losses(dict(model.named_parameters()))
    for place in (0, 5, 9):
        step = -1e-6 * torch.linalg.solve(precision, gradients[place])
        parts = step.split([parameter.numel() for parameter in model.parameters()])
        moved = {n: p + part.view_as(p) for (n, p), part in zip(model.named_parameters(), parts, strict=True)}
        assert torch.equal((before - losses(moved)).sign(), scores[:, place].sign().double())


# ---- ridge and noise --------------------------------------------------------------------------------------------


def test_ridge_by_evidence():
    model, (task, _) = mlp(), TASKS["classification"]
    rows = dense.tangents_of(model, task, DATA).flatten(0, 1)
    norm = sum(float(parameter.detach().square().sum()) for parameter in model.parameters())
    losses = nn.functional.cross_entropy(model(DATA.tensors[0]).detach(), DATA.tensors[1], reduction="sum")
    expected = fit_evidence(rows.T @ rows, norm, 2 * float(losses), 39, noise_variance=1.0)
    attributor = made(model=model)
    assert attributor.posterior.ridge == pytest.approx(expected.ridge, rel=1e-4)
    assert attributor.evidence.log_evidence == pytest.approx(expected.log_evidence, rel=1e-9)
    described = attributor.metadata["posterior"]
    assert described["ridge"] == attributor.posterior.ridge
    assert described["noise_variance"] == 1.0
    assert described["log_evidence"] == attributor.evidence.log_evidence
    assert described["mean_squared_feature"] == pytest.approx(float(rows.square().sum()) / 13)
    assert attributor.evidence.plot() is not None
    # Its scores are those of that ridge, given.
    exactly(exact_of(attributor, QUERIES), exact_of(made(ridge=expected.ridge), QUERIES), 1e-5)


@pytest.mark.parametrize("name", ["regression", "two real outputs"])
def test_noise_of_a_regression_is_estimated(name):
    """The residuals' of the model at the chosen ridge, in units of the task's noise."""
    make, data, _, _ = CASES[name]
    model = make()
    evidence = made(model=model, data=data, task=Regression(noise_std=0.5)).evidence
    norm = sum(float(parameter.detach().square().sum()) for parameter in model.parameters())
    residuals = model(data.tensors[0]).detach() - data.tensors[1]
    squared = float(residuals.square().sum()) / 0.25 + evidence.ridge * norm
    assert evidence.noise_variance == pytest.approx(squared / residuals.numel(), rel=1e-6)


def test_a_given_ridge_is_kept():
    attributor = made(ridge=3)
    assert attributor.posterior.ridge == 3.0
    assert attributor.evidence is None
    assert set(attributor.metadata["posterior"]) == {"ridge", "mean_squared_feature"}
    assert (exact_of(attributor, QUERIES) - exact_of(made(ridge=4.0), QUERIES)).abs().max() > 1e-3


@both_methods
@pytest.mark.parametrize("name", ["regression", "two real outputs"])
def test_noise_of_a_task_cancels(method, name):
    """Where the ridge is chosen nothing depends on the unit of the noise, for features, residuals and ridge scale
    together: formula (4). A given ridge is one in units of that noise: ``ridge`` at ``s`` is ``ridge s^2`` at 1."""
    make, data, queries, _ = CASES[name]
    found = {
        noise: exact_of(made(method, make(), data, task=Regression(noise_std=noise)), queries)
        for noise in (0.1, 1.0, 5.0)
    }
    exactly(found[0.1], found[1.0], 1e-5)
    exactly(found[5.0], found[1.0], 1e-5)
    ridges = {
        noise: made(data=data, model=make(), task=Regression(noise_std=noise)).posterior.ridge for noise in (0.1, 1.0)
    }
    assert ridges[0.1] == pytest.approx(100 * ridges[1.0], rel=1e-4)
    given = [
        exact_of(made(method, make(), data, task=Regression(noise_std=noise), ridge=RIDGE * scale), queries)
        for noise, scale in ((2.0, 1.0), (1.0, 4.0))
    ]
    exactly(*given)


# ---- what must change nothing -----------------------------------------------------------------------------------


@both_methods
@pytest.mark.parametrize("likelihood", ["gauss-newton", "margin"])
def test_batch_size_and_order(method, likelihood):
    options = {"likelihood": likelihood, "projection_dim": 9, "signed": True}
    full = ask(method, **options).scores
    for size in (1, 5):
        close_scores(ask(method, batch_size=size, **options).scores, full)
    order, rows = permutation(13), permutation(5)
    shuffled = TensorDataset(*(t[order] for t in DATA.tensors))
    close_scores(ask(method, data=shuffled, **options).scores, full[:, order])
    close_scores(ask(method, train_indices=order.tolist(), **options).scores, full[:, order])
    close_scores(ask(method, queries=TensorDataset(*(t[rows] for t in QUERIES.tensors)), **options).scores, full[rows])
    loaders = {"data": DataLoader(DATA, 4, shuffle=True), "queries": DataLoader(QUERIES, 2)}
    close_scores(ask(method, **loaders, **options).scores, full)


def test_part_of_the_data():
    part = [7, 2, 11, 5, 0, 4]
    found = ask(train_indices=part, ridge=RIDGE)
    close_scores(found.scores, ask(data=Subset(DATA, part), ridge=RIDGE).scores)
    assert found.train_indices.tolist() == part
    assert set(found.top(3).proponents.flatten().tolist()) <= set(part)


def test_chosen_layers():
    """The same as freezing the others; the prior is that of the chosen weights."""
    frozen = mlp()
    frozen[0].requires_grad_(False)
    found = ask(layers=["2"])
    close_scores(found.scores, ask(model=frozen).scores)
    assert found.metadata["gradients"]["num_parameters"] == 18
    rows = dense.tangents_of(frozen, TASKS["classification"][0], DATA).flatten(0, 1)
    norm = sum(float(parameter.detach().square().sum()) for parameter in frozen[2].parameters())
    losses = nn.functional.cross_entropy(frozen(DATA.tensors[0]).detach(), DATA.tensors[1], reduction="sum")
    expected = fit_evidence(rows.T @ rows, norm, 2 * float(losses), 39, noise_variance=1.0).ridge
    assert found.metadata["posterior"]["ridge"] == pytest.approx(expected, rel=1e-4)


@both_methods
@pytest.mark.parametrize("options", [{}, {"likelihood": "margin"}, {"signed": True}, {"projection_dim": 8}], ids=str)
def test_precision(method, options):
    exact = ask(method, **options).scores
    close_scores(ask(method, model=mlp().float(), **options).scores, exact, 1e-5)
    close_scores(ask(method, model=mlp().bfloat16(), **options).scores, exact, 0.05)


@both_methods
def test_features_that_are_not_kept(method, monkeypatch):
    plain = {"ridge": RIDGE, "batch_size": 4}
    options = plain | {"signed": True}
    expected = ask(method, **options)
    chosen = ask(method, **plain).top(4, diverse=True)
    own = self_influence(mlp(), train_data=DATA, method=method, **QUIET, **options)
    places = made(method, **options).coreset(5).places
    monkeypatch.setattr(module, "KEPT_BYTES", 0)
    assert made(method, **options)._kept is None
    found = ask(method, **options)
    close_scores(found.scores, expected.scores, 1e-7)
    assert torch.equal(ask(method, **plain).top(4, diverse=True).proponents, chosen.proponents)
    close_scores(self_influence(mlp(), train_data=DATA, method=method, **QUIET, **options), own, 1e-7)
    assert torch.equal(made(method, **options).coreset(5).places, places)
    monkeypatch.setattr(planned, "TILE_BYTES", 4 * 5 * 3)
    close_scores(ask(method, top_k=13, **options).top(13).proponent_scores, expected.top(13).proponent_scores, 1e-7)


def test_features_are_kept_up_to_a_size(monkeypatch):
    size = 13 * 3 * 43 * 8
    for limit, kept in ((size, True), (size - 1, False)):
        monkeypatch.setattr(module, "KEPT_BYTES", limit)
        assert (made(batch_size=4)._kept is not None) == kept


@both_methods
def test_predicted_targets(method):
    model = mlp()
    labelled = TensorDataset(QUERIES.tensors[0], model(QUERIES.tensors[0]).argmax(1))
    for options in ({"likelihood": "margin"}, {"signed": True}):
        expected = ask(method, model, queries=labelled, **options)
        found = ask(method, model, queries=TensorDataset(QUERIES.tensors[0]), target="predicted", **options)
        close_scores(found.scores, expected.scores)
    expected, found = (
        ask(method, model, queries=queries, likelihood="margin", target=target).top(4, diverse=True)
        for queries, target in ((labelled, "label"), (TensorDataset(QUERIES.tensors[0]), "predicted"))
    )
    assert torch.equal(found.proponents, expected.proponents)
    close_scores(found.proponent_scores, expected.proponent_scores)


@both_methods
def test_model_is_as_before(method):
    model = seeded(Everything)
    expected = ask(method, model).scores
    model.train()
    model.norm.eval()
    nn.functional.cross_entropy(model(DATA.tensors[0]), DATA.tensors[1]).backward()
    before = condition_of(model)
    found = ask(method, model, signed=True)
    check_same_condition(before, model)
    close_scores(found.scores.abs(), expected)
    plain = ask(method, model)
    check_same_condition(before, model)
    plain.top(3, diverse=True)
    check_same_condition(before, model)
    made(method, model).coreset(3)
    self_influence(model, train_data=DATA, method=method, **QUIET)
    check_same_condition(before, model)


# ---- the top alone ----------------------------------------------------------------------------------------------


@both_methods
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("tile", [2**26, 4 * 5 * 4], ids=["one tile", "tiles of 4"])
def test_top_k(method, signed, tile, monkeypatch):
    monkeypatch.setattr(planned, "TILE_BYTES", tile)
    options = {"signed": signed, "batch_size": 5}
    full, top = ask(method, **options), ask(method, top_k=4, **options)
    assert isinstance(top, TopAttribution)
    mine, theirs = top.top(4), full.top(4)
    for name in ("proponents", "opponents"):
        assert torch.equal(getattr(mine, name), getattr(theirs, name))
        scores = f"{name.removesuffix('s')}_scores"
        close_scores(getattr(mine, scores), getattr(theirs, scores), 1e-6)


# ---- diverse examples -------------------------------------------------------------------------------------------


@both_methods
@pytest.mark.parametrize(
    ("name", "likelihood"),
    [
        ("classification", "gauss-newton"),
        ("classification", "margin"),
        ("two real outputs", "gauss-newton"),
        ("words", "gauss-newton"),
    ],
)
def test_diverse_is_greedy(method, name, likelihood):
    make, data, queries, task = CASES[name]
    model, options = make(), {"task": task, "likelihood": likelihood, "ridge": RIDGE}
    found = ask(method, model, data, queries, **options)
    train, asked = (dense.tangents_of(model, task, part, likelihood) for part in (data, queries))
    diverse = found.top(5, diverse=True)
    for row, query in enumerate(asked):
        places, gains = dense.greedy_gain(query, train, list(range(len(train))), 5, RIDGE)
        assert diverse.proponents[row].tolist() == places
        assert diverse.proponent_scores[row].tolist() == pytest.approx(gains, rel=1e-4)
    assert diverse.opponents.shape == diverse.opponent_scores.shape == (5, 0)
    assert "most told by" in repr(diverse)
    assert "harmed" not in repr(diverse)
    # All together they say what the whole set says.
    every = found.top(99, diverse=True)
    assert every.proponents.sort(1).values.tolist() == [list(range(len(train)))] * 5
    exact = dense.gain(asked, train, list(range(len(train))), RIDGE, dense.next_to_no_noise(train, RIDGE))
    torch.testing.assert_close(every.proponent_scores.sum(1).double(), exact, rtol=1e-5, atol=0)


def test_diverse_of_one_query():
    found = ask()
    expected = found.top(4, diverse=True)
    for row in (0, 3, -1):
        one = found[row].top(4, diverse=True)
        assert torch.equal(one.proponents[0], expected.proponents[row])
        close_scores(one.proponent_scores[0], expected.proponent_scores[row], 1e-6)
    assert found.top(diverse=True).proponents.shape == (5, 10)


def test_diverse_positions_are_those_of_the_dataset():
    part = [7, 2, 11, 5, 0, 4]
    found = ask(train_indices=part, ridge=RIDGE).top(3, diverse=True).proponents
    train, asked = (dense.tangents_of(mlp(), TASKS["classification"][0], part_) for part_ in (DATA, QUERIES))
    for row, query in enumerate(asked):
        assert found[row].tolist() == dense.greedy_gain(query, train, part, 3, RIDGE)[0]


@both_methods
def test_diverse_among_the_held(method):
    """A TopAttribution chooses among the proponents that it holds."""
    found = ask(method, top_k=13, ridge=RIDGE)
    train, asked = (dense.tangents_of(mlp(), TASKS["classification"][0], part) for part in (DATA, QUERIES))
    diverse = found.top(4, diverse=True).proponents
    for row, query in enumerate(asked):
        held = sorted(found.top(13).proponents[row].tolist())
        assert diverse[row].tolist() == dense.greedy_gain(query, train, held, 4, RIDGE)[0]
    one = found[2].top(4, diverse=True)
    assert torch.equal(one.proponents[0], diverse[2])
    with pytest.raises(ValueError, match=r"among the 13 strongest .* attribute with `top_k=13`"):
        ask(method, top_k=6, ridge=RIDGE).top(4, diverse=True)


def test_diverse_among_candidates_of_each_query():
    found = ask(ridge=RIDGE)
    train, asked = (dense.tangents_of(mlp(), TASKS["classification"][0], part) for part in (DATA, QUERIES))
    # Never 0, 7 or 10: columns are not places among the candidates.
    candidates = torch.stack([torch.tensor([12, 9, 4, 6, 2]) + shift for shift in (0, -1, 0, 0, -1)])
    diverse = found.diversify(found.queries, "label", candidates, 3).proponents
    for row, query in enumerate(asked):
        held = sorted(candidates[row].tolist())
        assert diverse[row].tolist() == dense.greedy_gain(query, train, held, 3, RIDGE)[0]


@pytest.mark.parametrize(("k", "num_candidates"), [(3, 500), (None, 500), (60, 600), (900, 1000)])
def test_candidates_are_the_best(k, num_candidates):
    asked, data = [], examples_of(torch.zeros(2, 1))

    def chosen(*arguments):
        asked.append(arguments)
        return Attribution(torch.zeros(2, 1000)).top(1)

    scores = random_tensor(2, 1000, seed=0).float()
    found = Attribution(scores, metadata={"target": "predicted"}, queries=data, diversify=chosen)
    found.top(k, diverse=True)
    ((queries, target, candidates, size),) = asked
    assert (queries, target, size) == (data, "predicted", k or 10)
    best = scores.sort(1, descending=True).indices[:, :num_candidates]
    assert torch.equal(candidates.sort(1).values, best.sort(1).values)


def distinct(**options):
    """Distinct examples among ten, plain and diverse, where each of twelve comes six times; mean over queries."""
    data, queries = points_for(num=12), points_for(num=4, seed=1)
    copied = TensorDataset(*(torch.cat([tensor] * 6) for tensor in data.tensors))
    found = ask(data=copied, queries=queries, **options)
    chosen = found.top(10).proponents % 12, found.top(10, diverse=True).proponents % 12
    return [sum(len(row.unique()) for row in rows) / 4 for rows in chosen]


@both_methods
@pytest.mark.parametrize("options", [{}, {"ridge": 1e-4}, {"likelihood": "margin"}], ids=str)
def test_copies_are_left_out(method, options):
    plain, diverse = distinct(method=method, **options)
    assert plain == 2
    assert diverse >= 9


def test_diverse_where_it_cannot_be(tmp_path):
    found = ask()
    again = Attribution.load(found.save(tmp_path / "scores"), queries=QUERIES, train_data=DATA)
    top = Attribution.load(ask(top_k=4).save(tmp_path / "top"))
    assert torch.equal(again.top(3).proponents, found.top(3).proponents)
    # Those of signed scores might harm.
    signed = [ask(method, signed=True, top_k=top_k) for method in METHODS for top_k in (None, 4)]
    for other in (again, top, *signed, signed[0][2], ask("grad-dot"), Attribution(torch.zeros(1, 2))):
        with pytest.raises(
            ValueError,
            match=r"needs method='information-loss' or 'information-gain' without `signed`.* a saved attribution",
        ):
            other.top(2, diverse=True)
    with pytest.raises(ValueError, match="`k` must be at least 1, got 0"):
        found.top(0, diverse=True)


def test_diverse_needs_the_weights_of_before():
    model = mlp()
    found = ask(model=model)
    expected = found.top(3, diverse=True)
    with torch.no_grad():
        model[0].weight[0, 0] += 1
        with pytest.raises(ValueError, match="weights have changed since fit"):
            found.top(3, diverse=True)
        model[0].weight[0, 0] -= 1
    torch.testing.assert_close(found.top(3).proponents, ask(model=model).top(3).proponents)
    del expected


def test_diverse_needs_the_fit_of_before():
    attributor = made()
    found = attributor.attribute(QUERIES)
    for model, data in ((mlp(seed=5), points_for(num=13, seed=7)), (mlp(), DATA)):
        attributor.fit(model, data)
        with pytest.raises(ValueError, match=r"fitted again since: call attribute\(queries\) again"):
            found.top(3, diverse=True)
    again = attributor.attribute(QUERIES).top(3, diverse=True)
    assert torch.equal(again.proponents, ask().top(3, diverse=True).proponents)


def test_diverse_after_a_fit_that_failed():
    attributor = made(ridge=RIDGE, top_k=13)
    found = attributor.attribute(QUERIES)
    expected = found.top(3, diverse=True)
    other = TensorDataset(-DATA.tensors[0], DATA.tensors[1].clone())
    other.tensors[1][min(set(range(13)) - set(found.top(4).proponents.flatten().tolist()))] = 7
    with pytest.raises(ValueError, match="Class targets must lie in"):
        attributor.fit(mlp(), other)
    try:
        again = found.top(3, diverse=True)
    except ValueError:
        return
    assert torch.equal(again.proponents, expected.proponents)
    close_scores(again.proponent_scores, expected.proponent_scores)


# ---- self-influence ---------------------------------------------------------------------------------------------


@both_methods
@pytest.mark.parametrize("options", [{}, {"likelihood": "margin"}, {"projection_dim": 6}, {"signed": True}], ids=str)
def test_self_influence_is_the_diagonal(method, options):
    expected = ask(method, queries=DATA, **options).scores.diagonal()
    for size in (13, 4):
        own = self_influence(mlp(), train_data=DATA, method=method, batch_size=size, **QUIET, **options)
        assert own.dtype == torch.float32
        close_scores(own, expected)
    assert expected.min() > 0
    assert expected.std() > 0


# ---- coresets ---------------------------------------------------------------------------------------------------


@both_methods
@pytest.mark.parametrize(
    ("name", "likelihood"),
    [
        ("classification", "gauss-newton"),
        ("classification", "margin"),
        ("two real outputs", "gauss-newton"),
        ("words", "gauss-newton"),
    ],
)
def test_coreset_is_greedy(method, name, likelihood):
    make, data, _, task = CASES[name]
    model = make()
    attributor = made(method, model, data, task=task, likelihood=likelihood, ridge=RIDGE, batch_size=4)
    places, gains = dense.greedy_about_weights(dense.tangents_of(model, task, data, likelihood), 6, RIDGE)
    found = attributor.coreset(6)
    assert found.places.tolist() == places
    assert found.gains.tolist() == pytest.approx(gains, abs=1e-10)
    assert float(attributor.coreset(len(data)).gains.sum()) == pytest.approx(attributor.posterior.information)


def test_coreset_positions():
    part = [7, 2, 11, 5, 0, 4]
    attributor = create("information-loss", ridge=RIDGE, **QUIET).fit(mlp(), DATA, train_indices=part)
    train = dense.tangents_of(mlp(), TASKS["classification"][0], DATA)[part]
    expected = dense.greedy_about_weights(train, 4, RIDGE)[0]
    assert attributor.coreset(4).places.tolist() == [part[place] for place in expected]


def test_coreset_where_it_cannot_be():
    with pytest.raises(RuntimeError, match=r"Call fit\(model, train_data\) before coreset\(\)"):
        create("information-loss", **QUIET).coreset(2)
    model = mlp()
    attributor = made(model=model)
    for size in (0, 14):
        with pytest.raises(ValueError, match=rf"`size` must be in 1..13, the number of examples; got {size}"):
            attributor.coreset(size)
    for size in (2.0, True, "2"):
        with pytest.raises(ValueError, match=rf"`size` must be an integer, got {size!r}"):
            attributor.coreset(size)
    with torch.no_grad():
        model[0].weight += 1
    with pytest.raises(ValueError, match="weights have changed since fit"):
        attributor.coreset(2)


# ---- many outputs -----------------------------------------------------------------------------------------------


def many(monkeypatch):
    """Random directions for the three outputs of a model."""
    monkeypatch.setattr(features, "MAX_EXACT_OUTPUTS", 1)


@torch.no_grad()
def rows_of(attributor, queries):
    """Features of the training examples and of queries, as they are compared."""
    asked = attributor.read(attributor.model, examples_of(*queries.tensors), CPU, "label")
    batches = (
        attributor.tangents.batches(attributor.reader),
        attributor.tangents.batches(asked, asked=True),
    )
    return [torch.cat([batch.rows for batch in part]) for part in batches]


@both_methods
def test_many_outputs(method, monkeypatch):
    many(monkeypatch)
    options = {"ridge": RIDGE, "signed": True}
    full = ask(method, **options).scores
    for size in (1, 5):
        close_scores(ask(method, batch_size=size, **options).scores, full)
    attributor = made(method, ridge=RIDGE)
    train, asked = rows_of(attributor, QUERIES)
    assert train.shape[1] == asked.shape[1] == 8
    exactly(exact_of(attributor, QUERIES), dense.single(METHODS[method], asked, train, RIDGE))
    close_scores(full.abs(), dense.single(METHODS[method], asked, train, RIDGE))
    assert (full - ask(method, seed=1, **options).scores).abs().max() > 0.01 * full.abs().max()
    monkeypatch.setattr(module, "KEPT_BYTES", 0)
    close_scores(ask(method, batch_size=4, **options).scores, full)


@both_methods
def test_self_influence_with_many_outputs(method, monkeypatch):
    """Examples are their own queries, whose directions are other ones."""
    many(monkeypatch)
    expected = ask(method, queries=DATA, ridge=RIDGE).scores.diagonal()
    close_scores(expected, dense.single(METHODS[method], *rows_of(made(method, ridge=RIDGE), DATA)[::-1], RIDGE).diag())
    for size in (13, 4):
        for limit in (2**29, 0):
            monkeypatch.setattr(module, "KEPT_BYTES", limit)
            options = {"ridge": RIDGE, "batch_size": size} | QUIET
            close_scores(self_influence(mlp(), train_data=DATA, method=method, **options), expected)
            close_scores(self_influence(mlp(), train_data=DATA, method=method, signed=True, **options), expected)


def test_self_influence_of_a_share_with_many_outputs(monkeypatch):
    """That of the second of two processes, which begins within a batch; a gain owes nothing to the other's data."""
    many(monkeypatch)
    options = {"ridge": RIDGE, "batch_size": 3}
    expected = made("information-gain", **options).self_influence()
    monkeypatch.setattr(planned, "shard", lambda length: slice(length // 2 + 1, length))
    for limit in (2**29, 0):
        monkeypatch.setattr(module, "KEPT_BYTES", limit)
        close_scores(made("information-gain", **options).self_influence(), expected[7:])


@both_methods
def test_order_with_many_outputs(method, monkeypatch):
    """Directions are those of a position in the dataset, wherever it is read."""
    many(monkeypatch)
    options = {"ridge": RIDGE, "batch_size": 4}
    full = ask(method, **options).scores
    rows, order = permutation(5), permutation(13)
    queries = examples_of(*QUERIES.tensors)
    for some in (rows, rows[:2]):
        close_scores(ask(method, queries=queries.subset(some.tolist()), **options).scores, full[some])
    found = ask(method, train_indices=order.tolist(), **options)
    close_scores(found.scores, full[:, order])
    own = made(method, **options).self_influence()
    again = self_influence(mlp(), train_data=DATA, method=method, train_indices=order.tolist(), **QUIET, **options)
    close_scores(again, own[order])


@both_methods
def test_places_of_queries_with_many_outputs(method):
    """Queries that have nothing to do with the examples at their places owe them no more than others."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(80, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(40, (80,), generator=generator)
    data, queries = (TensorDataset(inputs[part], labels[part]) for part in (slice(40), slice(40, 80)))
    scores = ask(method, mlp(num_outputs=40, width=6), data, queries, ridge=1.0).scores
    others = scores[~torch.eye(40, dtype=torch.bool)]
    assert scores.diagonal().mean() < 1.5 * others.mean()


def test_diverse_with_many_outputs(monkeypatch):
    """By the features that scores are of; also for one query, where few are held, and of part of the data."""
    many(monkeypatch)
    part = [11, 2, 7, 5, 0, 4]
    train, asked = rows_of(made(ridge=RIDGE), QUERIES)
    for options in ({}, {"top_k": 13}, {"train_indices": part}):
        found = ask("information-gain", ridge=RIDGE, **options)
        chosen = found.top(4, diverse=True)
        for row, query in enumerate(asked):
            held = options.get("train_indices")
            places, gains = dense.greedy_gain(query, train, sorted(held or range(13)), 4, RIDGE)
            assert chosen.proponents[row].tolist() == places
            assert chosen.proponent_scores[row].tolist() == pytest.approx(gains, rel=1e-4)
        one = found[3].top(4, diverse=True)
        assert torch.equal(one.proponents[0], chosen.proponents[3])
        close_scores(one.proponent_scores[0], chosen.proponent_scores[3], 1e-6)


# ---- bad input --------------------------------------------------------------------------------------------------


def test_rank_deficient_features():
    """Copies, and more parameters than rows: the prior settles what the data do not; without one it is refused."""
    data = TensorDataset(*(torch.cat([t[:3]] * 4) for t in DATA.tensors))
    train, asked = (dense.tangents_of(mlp(), TASKS["classification"][0], part) for part in (data, QUERIES))
    for ridge in (1.0, 1e-3):
        for method, form in METHODS.items():
            attributor = made(method, data=data, ridge=ridge)
            exactly(exact_of(attributor, QUERIES), dense.single(form, asked, train, ridge), 1e-8)
    with pytest.raises(ValueError, match=r"12 examples and 43 features is singular with a ridge of 0.*`ridge=`"):
        made(data=data, ridge=0)


def test_no_prior_where_the_data_determine_all_weights():
    model, data = seeded(lambda: nn.Linear(4, 1)), points_for("regression")
    queries, task = points_for("regression", 5, 1), Regression()
    train, asked = (dense.tangents_of(model, task, part)[:, 0] for part in (data, queries))

    def variance(rows):
        return torch.einsum("qp,pr,qr->q", asked, torch.linalg.inv(rows.T @ rows), asked)

    left = [train[[j for j in range(14) if j != i]] for i in range(14)]
    expected = torch.stack([0.5 * ((1 + variance(rows)) / (1 + variance(train))).log() for rows in left], 1)
    exactly(exact_of(made(model=model, data=data, task=task, ridge=0), queries), expected)
    with pytest.raises(ValueError, match="A gain is relative to a prior, and `ridge=0` is none"):
        create("information-gain", ridge=0)


def test_leverage_at_one():
    """With next to no prior every example determines directions of its own."""
    for dtype in (torch.float64, torch.float32):
        attributor = made(model=mlp().to(dtype), ridge=1e-9)
        with torch.no_grad():
            rows = torch.cat([batch.rows for batch in attributor._kept])
        assert attributor.posterior.leverage(rows).max() > 2 - 1e-5
        scores = ask(model=mlp().to(dtype), queries=DATA, ridge=1e-9).scores
        assert scores.isfinite().all()
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
        found = ask(method, seeded(Dead), data, data, ridge=1.0, **options)
        assert (found.scores == 0).all()
    assert found.top(2, diverse=True).proponents.tolist() == [[0, 1]] * 14
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


@both_methods
def test_weights_that_are_not_finite(method):
    model = mlp()
    with torch.no_grad():
        model[2].bias[0] = torch.nan
    with pytest.raises(ValueError, match="Training example 0 has NaN in its outputs"):
        ask(method, model)
    data = TensorDataset(DATA.tensors[0].clone(), DATA.tensors[1])
    data.tensors[0][9, 0] = torch.nan
    with pytest.raises(ValueError, match="Training example 9 has NaN in its outputs"):
        ask(method, data=data)
    with pytest.raises(ValueError, match="Query 9 has NaN in its outputs"):
        ask(method, queries=data)


def test_certain_model():
    model = mlp()
    with torch.no_grad():
        model[2].weight *= 1e5
    assert (ask(model=model, ridge=1.0).scores == 0).all()
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
        ({"method": "information-gain", "ridge": 0}, ValueError, "`ridge=0` is none: give a positive number"),
        ({"signed": "no"}, ValueError, "`signed` must be True or False, got 'no'"),
        ({"signed": 1}, ValueError, "`signed` must be True or False, got 1"),
        ({"likelihood": "laplace"}, ValueError, "`likelihood` must be one of"),
        ({"projection_dim": 0}, ValueError, "`projection_dim` must be an integer"),
        ({"top_k": 0}, ValueError, "`top_k` must be an integer"),
        ({"layers": "2"}, TypeError, r"write layers=\['2'\]"),
        ({"damping": 1.0}, TypeError, "layers, likelihood, projection_dim, ridge, signed, top_k"),
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
    with pytest.raises(ValueError, match=r"likelihood='margin' is the noise of a margin: A regression has no margin"):
        made(method, make(), data, task=task, likelihood="margin")


def test_weights_of_another_model():
    model = mlp()
    attributor = made(model=model)
    with torch.no_grad():
        model[0].weight += 1
    with pytest.raises(ValueError, match="weights have changed since fit"):
        attributor.attribute(QUERIES)


@both_methods
def test_one_training_example_and_one_query(method):
    one, asked = (TensorDataset(*(t[:1] for t in part.tensors)) for part in (DATA, QUERIES))
    found = ask(method, data=one, queries=asked, ridge=RIDGE)
    train, query = (dense.tangents_of(mlp(), TASKS["classification"][0], part) for part in (one, asked))
    torch.testing.assert_close(
        found.scores.double(), dense.single(METHODS[method], query, train, RIDGE), rtol=1e-6, atol=0
    )
    assert found.top(diverse=True).proponents.tolist() == [[0]]


# ---- metadata ---------------------------------------------------------------------------------------------------


@both_methods
def test_metadata_and_saving(method, tmp_path):
    found = ask(method, layers=["2"], projection_dim=9, likelihood="margin")
    assert found.metadata["method"] == method
    assert found.metadata["options"] == {
        "layers": ["2"],
        "top_k": None,
        "likelihood": "margin",
        "projection_dim": 9,
        "signed": False,
    }
    assert found.metadata["data"]["num_examples"] == 13
    assert json.loads(json.dumps(found.metadata)) == found.metadata
    again = Attribution.load(found.save(tmp_path / "scores"))
    assert torch.equal(again.scores, found.scores)
    assert again.metadata == found.metadata
    top = ask(method, top_k=3)
    loaded = Attribution.load(top.save(tmp_path / "top"))
    assert isinstance(loaded, TopAttribution)
    assert torch.equal(loaded.top(3).proponents, top.top(3).proponents)


def test_methods_are_known():
    assert set(METHODS) <= set(methods())


def test_progress_is_quiet_when_told(capsys):
    ask().top(2, diverse=True)
    assert capsys.readouterr() == ("", "")


# ---- two processes ----------------------------------------------------------------------------------------------

KINDS = {
    "plain": {"ridge": RIDGE},
    "signed": {"ridge": RIDGE, "signed": True, "projection_dim": 20},
    "streamed": {"ridge": RIDGE, "likelihood": "margin"},
    "evidence": {},
    "many": {"ridge": RIDGE},
}
SHARED = [("information-loss", kind) for kind in KINDS] + [("information-gain", "streamed")]


def on_each(number, port, folder):
    start(number, port)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=number, world_size=2)
    torch.save(everything(), folder / f"rank{number}.pt")


def everything():
    """Scores, tops, self-influences and coresets."""
    warnings.simplefilter("ignore")
    found = {}
    for method, kind in SHARED:
        with pytest.MonkeyPatch.context() as patch:
            options = KINDS[kind] | {"batch_size": 3}
            if kind == "streamed":
                patch.setattr(module, "KEPT_BYTES", 0)
                patch.setattr(planned, "TILE_BYTES", 4 * 5 * 6)  # two tiles of the 7 of rank 0, one of the 6 of rank 1
            if kind == "many":
                many(patch)
            attributor = made(method, **options)
            asked, chosen = attributor.attribute(QUERIES), attributor.coreset(6)
            found[method, kind] = {
                "scores": asked.scores,
                "top": ask(method, top_k=4, **options).top(4).proponents,
                "coreset": chosen.places,
                "gains": chosen.gains,
            }
            if kind != "many":
                found[method, kind]["self"] = attributor.self_influence()
            if kind != "signed":
                found[method, kind]["diverse"] = asked.top(4, diverse=True).proponents
    return found


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return run_two(on_each, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def alone():
    with warnings.catch_warnings():
        return everything()


@pytest.mark.distributed
@pytest.mark.parametrize("key", SHARED, ids="-".join)
def test_two_processes(pair, alone, key):
    for what in alone[key]:
        (first, second), expected = (part[key][what] for part in pair), alone[key][what]
        assert torch.equal(first, second), what
        close_scores(first, expected, 0 if what in ("top", "diverse", "coreset") else 1e-5)
