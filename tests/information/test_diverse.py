"""Diverse examples and coresets of an attributor against plain greedy choice."""

import pytest
import torch
from torch.utils.data import TensorDataset

from stride_lightning import Attribution, TopAttribution
from stride_lightning.attribute import create
from stride_lightning.information import attributor as module
from tests.helpers.gradient_models import QUIET, TASKS, close_scores, mlp, points_for
from tests.information import dense
from tests.information.cases import (
    CASES,
    DATA,
    METHODS,
    QUERIES,
    RIDGE,
    both_methods,
    diverse,
    informed,
    made,
    many,
    rows_of,
)

some_cases = pytest.mark.parametrize(
    ("name", "likelihood"),
    [
        ("classification", "gauss-newton"),
        ("classification", "margin"),
        ("two real outputs", "gauss-newton"),
        ("words", "gauss-newton"),
    ],
)

# ---- diverse examples -------------------------------------------------------------------------------------------


def check_greedy(chosen, rows, size, candidates):
    """By trying all candidates, of each query or of all of them."""
    train, queries = rows
    if isinstance(candidates[0], int):
        candidates = [candidates] * len(queries)
    for row, (query, among) in enumerate(zip(queries, candidates, strict=True)):
        places, gains = dense.greedy_gain(query, train, sorted(among), size, RIDGE)
        assert chosen.proponents[row].tolist() == places
        assert chosen.proponent_scores[row].tolist() == pytest.approx(gains, rel=1e-4)


def dense_rows():
    return [dense.tangents_of(mlp(), TASKS["classification"][0], part) for part in (DATA, QUERIES)]


@both_methods
@some_cases
def test_diverse_is_greedy(method, name, likelihood):
    make, data, queries, task = CASES[name]
    model, options = make(), {"task": task, "likelihood": likelihood, "ridge": RIDGE}
    attributor, attribution = informed(method, model, data, queries, **options)
    train, query_rows = (dense.tangents_of(model, task, part, likelihood) for part in (data, queries))
    chosen = attributor.diverse(attribution, 5)
    check_greedy(chosen, (train, query_rows), 5, range(len(train)))
    assert chosen.opponents.shape == chosen.opponent_scores.shape == (5, 0)
    assert "most told by" in repr(chosen)
    assert "harmed" not in repr(chosen)
    # All together they say what the whole set says.
    every = attributor.diverse(attribution, 99)
    assert every.proponents.sort(1).values.tolist() == [list(range(len(train)))] * 5
    exact = dense.gain(query_rows, train, list(range(len(train))), RIDGE, dense.next_to_no_noise(train, RIDGE))
    torch.testing.assert_close(every.proponent_scores.sum(1).double(), exact, rtol=1e-5, atol=0)


def test_diverse_of_one_query_and_quietly(capsys):
    attributor, attribution = informed()
    expected = attributor.diverse(attribution, 4)
    for row in (0, 3, -1):
        one = attributor.diverse(attribution[row], 4)
        assert torch.equal(one.proponents[0], expected.proponents[row])
        close_scores(one.proponent_scores[0], expected.proponent_scores[row], 1e-6)
    assert attributor.diverse(attribution).proponents.shape == (5, 10)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("options", [{}, {"top_k": 13}, {"train_indices": [7, 2, 11, 5, 0, 4]}], ids=str)
def test_diverse_with_many_outputs(options, monkeypatch):
    """By the features that scores are of; also for one query, where few are held, and of part of the data."""
    many(monkeypatch)
    attributor, attribution = informed("information-gain", ridge=RIDGE, **options)
    chosen = attributor.diverse(attribution, 4)
    check_greedy(chosen, rows_of(made(ridge=RIDGE), QUERIES), 4, options.get("train_indices", range(13)))
    one = attributor.diverse(attribution[3], 4)
    assert torch.equal(one.proponents[0], chosen.proponents[3])
    close_scores(one.proponent_scores[0], chosen.proponent_scores[3], 1e-6)


@both_methods
def test_diverse_among_the_held(method):
    """Among the proponents that a TopAttribution holds."""
    attributor, attribution = informed(method, top_k=13, ridge=RIDGE)
    check_greedy(attributor.diverse(attribution, 4), dense_rows(), 4, attribution.top(13).proponents.tolist())
    with pytest.raises(ValueError, match=r"among the 13 strongest .* attribute with `top_k=13`"):
        diverse(method, top_k=6, ridge=RIDGE, k=4)


@both_methods
def test_diverse_of_predicted_targets(method):
    model = mlp()
    labelled = TensorDataset(QUERIES.tensors[0], model(QUERIES.tensors[0]).argmax(1))
    options = {"likelihood": "margin", "k": 4}
    expected = diverse(method, model, queries=labelled, **options)
    chosen = diverse(method, model, queries=TensorDataset(QUERIES.tensors[0]), target="predicted", **options)
    assert torch.equal(chosen.proponents, expected.proponents)
    close_scores(chosen.proponent_scores, expected.proponent_scores)


def test_diverse_among_candidates_of_each_query(monkeypatch):
    attributor, attribution = informed(ridge=RIDGE)
    # Never 0, 7 or 10: columns are not places among the candidates.
    candidates = torch.stack([torch.tensor([12, 9, 4, 6, 2]) + shift for shift in (0, -1, 0, 0, -1)])
    best = Attribution(
        torch.zeros(5, 13).scatter_(1, candidates, 1.0), metadata=attribution.metadata, queries=attribution.queries
    )
    monkeypatch.setattr(module, "NUM_CANDIDATES", 1)
    monkeypatch.setattr(module, "CANDIDATES_EACH", 1)
    check_greedy(attributor.diverse(best, 5), dense_rows(), 5, candidates.tolist())


@pytest.mark.parametrize(("k", "num_candidates"), [(3, 500), (None, 500), (60, 600), (900, 1000)])
def test_number_of_candidates(k, num_candidates):
    attributor, attribution = informed()
    best = Attribution(torch.arange(5000.0).view(5, 1000)).top_columns(num_candidates - 1)
    held = TopAttribution(best, 1000, metadata=attribution.metadata, queries=attribution.queries)
    with pytest.raises(ValueError, match=f"among the {num_candidates} strongest of each query, and "):
        attributor.diverse(held, k)


def distinct(**options):
    """Distinct examples among ten, plain and diverse, where each of twelve comes six times; mean over queries."""
    data, queries = points_for(num=12), points_for(num=4, seed=1)
    copied = TensorDataset(*(torch.cat([tensor] * 6) for tensor in data.tensors))
    attributor, attribution = informed(data=copied, queries=queries, **options)
    chosen = attribution.top(10).proponents % 12, attributor.diverse(attribution, 10).proponents % 12
    return [sum(len(row.unique()) for row in rows) / 4 for rows in chosen]


@both_methods
@pytest.mark.parametrize("options", [{}, {"ridge": 1e-4}, {"likelihood": "margin"}], ids=str)
def test_copies_are_left_out(method, options):
    plain, diverse = distinct(method=method, **options)
    assert plain == 2
    assert diverse >= 9


def test_diverse_of_a_loaded_attribution(tmp_path):
    attributor, attribution = informed()
    path = attribution.save(tmp_path / "scores")
    expected = attributor.diverse(attribution, 3)
    again = made().diverse(Attribution.load(path, queries=QUERIES), 3)
    assert torch.equal(again.proponents, expected.proponents)
    with pytest.raises(ValueError, match=r"holds no queries: load it with `Attribution\.load"):
        attributor.diverse(Attribution.load(path), 3)
    with pytest.raises(ValueError, match="loaded with other queries: load it with the queries that"):
        attributor.diverse(Attribution.load(path, queries=points_for(num=5, seed=9)), 3)


def test_diverse_where_it_cannot_be():
    attributor, attribution = informed()
    with pytest.raises(ValueError, match="`k` must be an integer of at least 1, got 0"):
        attributor.diverse(attribution, 0)
    with pytest.raises(RuntimeError, match=r"Call fit\(model, train_data\) before diverse"):
        create("information-gain").diverse(attribution)
    for method in METHODS:  # those of signed scores might harm
        with pytest.raises(ValueError, match="Make the attributor without `signed=True`"):
            diverse(method, signed=True)
    others = {
        "weights": informed(model=mlp(seed=5)),
        "data": informed(data=points_for(num=13, seed=7)),
        "method, options": informed("grad-dot"),
        "method": informed("information-gain"),
        "seed": informed(seed=3),
        "options": informed(likelihood="margin"),
    }
    for names, (_, other) in others.items():
        with pytest.raises(
            ValueError, match=rf"not of the model, data and options of this attributor\. These differ: {names}\. Give"
        ):
            attributor.diverse(other)
    with pytest.raises(ValueError, match="These differ: method, weights, data, task, seed, options"):
        attributor.diverse(Attribution(torch.zeros(1, 2)))


def test_diverse_after_another_fit():
    attributor, attribution = informed()
    expected = attributor.diverse(attribution, 3)
    attributor.fit(mlp(seed=5), points_for(num=13, seed=7))
    with pytest.raises(ValueError, match="These differ: weights, data"):
        attributor.diverse(attribution, 3)
    other = TensorDataset(-DATA.tensors[0], DATA.tensors[1].clone())
    other.tensors[1][3] = 7
    with pytest.raises(ValueError, match="Training example 3 has the target 7"):
        attributor.fit(mlp(), other)
    with pytest.raises(RuntimeError, match=r"Call fit\(model, train_data\) before diverse"):
        attributor.diverse(attribution, 3)
    attributor.fit(mlp(), DATA)
    assert torch.equal(attributor.diverse(attribution, 3).proponents, expected.proponents)


# ---- coresets ---------------------------------------------------------------------------------------------------


@both_methods
@some_cases
def test_coreset_is_greedy(method, name, likelihood):
    make, data, _, task = CASES[name]
    model = make()
    attributor = made(method, model, data, task=task, likelihood=likelihood, ridge=RIDGE, batch_size=4)
    train = dense.tangents_of(model, task, data, likelihood)
    places, gains = dense.greedy_about_weights(train, 6, RIDGE)
    coreset = attributor.coreset(6)
    assert coreset.places.tolist() == places
    assert coreset.gains.tolist() == pytest.approx(gains, abs=1e-10)
    whole = dense.about_weights(train, list(range(len(data))), RIDGE)
    assert float(attributor.coreset(len(data)).gains.sum()) == pytest.approx(whole)


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
    attributor, attribution = informed(model=model)
    for size in (0, 14, True, "2"):
        with pytest.raises(ValueError, match=rf"`size` must be an integer .* and at most 13, .*, got {size!r}"):
            attributor.coreset(size)
    with torch.no_grad():
        model[0].weight += 1
    for call in (lambda: attributor.coreset(2), lambda: attributor.diverse(attribution, 3)):
        with pytest.raises(ValueError, match="weights have changed since fit"):
            call()
