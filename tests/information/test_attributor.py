"""method="information-loss" and "information-gain" against the dense Gaussian process of a model's Jacobians."""

import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from stride_lightning import Regression
from stride_lightning.attribute import self_influence
from stride_lightning.gradients import planned
from stride_lightning.information import attributor as module
from stride_lightning.information.evidence import fit_evidence
from tests.helpers.gradient_models import QUIET, TASKS, close_scores, mlp
from tests.helpers.processes import run_two, start
from tests.helpers.tiny import CPU, examples_of, permutation
from tests.information import dense
from tests.information.cases import (
    CASES,
    DATA,
    METHODS,
    QUERIES,
    RIDGE,
    ask,
    both_methods,
    diverse,
    every_case,
    exact_of,
    exactly,
    made,
    many,
    rows_of,
)

# ---- dense Gaussian processes -----------------------------------------------------------------------------------


@both_methods
@every_case
def test_entropies_with_and_without_each_example(method, name, likelihood):
    make, data, queries, task = CASES[name]
    model = make()
    train, query_rows = (dense.tangents_of(model, task, part, likelihood) for part in (data, queries))
    expected = dense.single(METHODS[method], query_rows, train, RIDGE)
    assert expected.max() > 1e-2
    options = {"likelihood": likelihood, "ridge": RIDGE, "batch_size": 4}
    exactly(exact_of(made(method, model, data, task=task, **options), queries), expected)
    attribution = ask(method, model, data, queries, task=task, **options)
    assert attribution.scores.dtype == torch.float32
    torch.testing.assert_close(attribution.scores.double(), expected, rtol=1e-6, atol=1e-10)
    assert attribution.metadata["unit"] == "nats, unsigned"
    chosen = {"likelihood": likelihood, "projection_dim": 512, "signed": False}
    assert attribution.metadata["options"] == {"layers": None, "top_k": None} | chosen


@both_methods
def test_projected_features_are_those_of_the_process(method):
    attributor = made(method, ridge=RIDGE, projection_dim=7)
    assert attributor.posterior.num_features == 7
    with torch.no_grad():
        train = torch.cat([batch.rows for batch in attributor.tangents.batches(attributor.reader)])
        reader = attributor.read(attributor.model, examples_of(*QUERIES.tensors), CPU, "label")
        query_rows = torch.cat([batch.rows for batch in attributor.tangents.batches(reader)])
    exactly(exact_of(attributor, QUERIES), dense.single(METHODS[method], query_rows, train, RIDGE))


@both_methods
def test_labels_enter_through_the_weights_alone(method):
    """Of all outputs; the margin is that of the label."""
    other = TensorDataset(DATA.tensors[0], (DATA.tensors[1] + 1) % 3)
    relabelled = TensorDataset(QUERIES.tensors[0], (QUERIES.tensors[1] + 1) % 3)
    expected = exact_of(made(method, ridge=RIDGE), QUERIES)
    exactly(exact_of(made(method, data=other, ridge=RIDGE), relabelled), expected)


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
    attribution = ask(method, model, data, queries, task=task, signed=True, **options)
    assert torch.equal(attribution.scores.double().sign(), signs)
    assert attribution.metadata["unit"] == "nats"


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


def evidence_of(model, layer):
    """By the dense features of the model, with the prior of the weights of a layer, or of all."""
    rows = dense.tangents_of(model, TASKS["classification"][0], DATA).flatten(0, 1)
    norm = sum(float(parameter.detach().square().sum()) for parameter in layer.parameters())
    losses = nn.functional.cross_entropy(model(DATA.tensors[0]).detach(), DATA.tensors[1], reduction="sum")
    return rows, fit_evidence(rows.T @ rows, norm, 2 * float(losses), 39, noise_variance=1.0)


def test_ridge_by_evidence():
    model = mlp()
    rows, expected = evidence_of(model, model)
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

    def scores(noise, **options):
        return exact_of(made(method, make(), data, task=Regression(noise_std=noise), **options), queries)

    for noise in (0.1, 5.0):
        exactly(scores(noise), scores(1.0), 1e-5)
    exactly(scores(2.0, ridge=RIDGE), scores(1.0, ridge=4 * RIDGE))
    ridges = [made(data=data, model=make(), task=Regression(noise_std=s)).posterior.ridge for s in (0.1, 1.0)]
    assert ridges[0] == pytest.approx(100 * ridges[1], rel=1e-4)


# ---- what must change nothing -----------------------------------------------------------------------------------


def test_chosen_layers():
    """The same as freezing the others; the prior is that of the chosen weights."""
    frozen = mlp()
    frozen[0].requires_grad_(False)
    attribution = ask(layers=["2"])
    close_scores(attribution.scores, ask(model=frozen).scores)
    assert attribution.metadata["gradients"]["num_parameters"] == 18
    expected = evidence_of(frozen, frozen[2])[1]
    assert attribution.metadata["posterior"]["ridge"] == pytest.approx(expected.ridge, rel=1e-4)


@both_methods
def test_features_that_are_not_kept(method, monkeypatch):
    plain = {"ridge": RIDGE, "batch_size": 4}
    options = plain | {"signed": True}
    expected = ask(method, **options)
    chosen = diverse(method, k=4, **plain)
    influence = self_influence(mlp(), train_data=DATA, method=method, **QUIET, **options)
    places = made(method, **options).coreset(5).places
    monkeypatch.setattr(module, "KEPT_BYTES", 0)
    assert made(method, **options)._held is None
    attribution = ask(method, **options)
    close_scores(attribution.scores, expected.scores, 1e-7)
    assert torch.equal(diverse(method, k=4, **plain).proponents, chosen.proponents)
    close_scores(self_influence(mlp(), train_data=DATA, method=method, **QUIET, **options), influence, 1e-7)
    assert torch.equal(made(method, **options).coreset(5).places, places)
    monkeypatch.setattr(planned, "TILE_BYTES", 4 * 5 * 3)
    close_scores(ask(method, top_k=13, **options).top(13).proponent_scores, expected.top(13).proponent_scores, 1e-7)


def test_features_are_kept_up_to_a_size(monkeypatch):
    size = 13 * 3 * 43 * 8
    for limit, is_held in ((size, True), (size - 1, False)):
        monkeypatch.setattr(module, "KEPT_BYTES", limit)
        assert (made(batch_size=4)._held is not None) == is_held


# ---- many outputs -----------------------------------------------------------------------------------------------


@both_methods
def test_many_outputs(method, monkeypatch):
    many(monkeypatch)
    options = {"ridge": RIDGE, "signed": True}
    full = ask(method, **options).scores
    for size in (1, 5):
        close_scores(ask(method, batch_size=size, **options).scores, full)
    attributor = made(method, ridge=RIDGE)
    train, query_rows = rows_of(attributor, QUERIES)
    assert train.shape[1] == query_rows.shape[1] == 8
    exactly(exact_of(attributor, QUERIES), dense.single(METHODS[method], query_rows, train, RIDGE))
    close_scores(full.abs(), dense.single(METHODS[method], query_rows, train, RIDGE))
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
    attribution = ask(method, train_indices=order.tolist(), **options)
    close_scores(attribution.scores, full[:, order])
    influence = made(method, **options).self_influence()
    again = self_influence(mlp(), train_data=DATA, method=method, train_indices=order.tolist(), **QUIET, **options)
    close_scores(again, influence[order])


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


# ---- two processes ----------------------------------------------------------------------------------------------


def everything():
    """What the contract does not ask for: sets of examples, features that are not kept, and random directions."""
    warnings.simplefilter("ignore")
    results = {}
    for method, kind in [(method, "streamed") for method in METHODS] + [("information-loss", "many")]:
        with pytest.MonkeyPatch.context() as patch:
            options = {"ridge": RIDGE, "batch_size": 3}
            if kind == "streamed":
                options["likelihood"] = "margin"
                patch.setattr(module, "KEPT_BYTES", 0)
                patch.setattr(planned, "TILE_BYTES", 4 * 5 * 6)  # two tiles of the 7 of rank 0, one of the 6 of rank 1
            else:
                many(patch)
            attributor = made(method, **options)
            attribution, chosen = attributor.attribute(QUERIES), attributor.coreset(6)
            results[method, kind, "scores"] = attribution.scores
            results[method, kind, "top"] = ask(method, top_k=4, **options).top(4).proponents
            results[method, kind, "coreset"], results[method, kind, "gains"] = chosen.places, chosen.gains
            results[method, kind, "diverse"] = attributor.diverse(attribution, 4).proponents
            if kind == "streamed":
                results[method, kind, "self"] = attributor.self_influence()
    return results


def on_each(number, port, folder):
    start(number, port, group=True)
    torch.save(everything(), folder / f"rank{number}.pt")


@pytest.mark.distributed
def test_two_processes(tmp_path):
    first, second = run_two(on_each, tmp_path)
    with warnings.catch_warnings():
        alone = everything()
    for key, expected in alone.items():
        assert torch.equal(first[key], second[key]), key
        close_scores(first[key], expected, 0 if key[-1] in ("top", "diverse", "coreset") else 1e-5)
