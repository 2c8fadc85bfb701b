"""StrideAttributor on rows of numbers: recoveries, self-influence, standard deviations and what changes no ranking."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from stride_lightning import Attribution, StrideAttributor
from stride_lightning.data.sources import resolve_queries
from stride_lightning.readout import spread
from stride_lightning.readout.features import Observation
from stride_lightning.readout.readout import Points
from stride_lightning.steering import dense
from stride_lightning.steering.module import StrideModule
from stride_lightning.steering.recovery import recover_with_prior
from stride_lightning.tasks.likelihoods import BinaryClassification, Classification, Regression, Task
from tests.helpers.language_models import bert
from tests.helpers.texts import Texts, padded
from tests.helpers.tiny import TASKS, correlation, every_task, perceptron, random_targets, random_tensor

NUM_TRAIN, NUM_QUERIES = 40, 6
QUIET = {"show_progress": False}


def data_of(task: Task, size: int, seed: int, num_outputs: int = 3) -> TensorDataset:
    return TensorDataset(random_tensor(size, 4, seed=seed), random_targets(task, size, num_outputs, seed + 100))


def queries_of(task: Task) -> TensorDataset:
    return data_of(task, NUM_QUERIES, 1)


def fitted(task: Task, **options: Any) -> StrideAttributor:
    attributor = StrideAttributor(**QUIET, **options)
    return attributor.fit(perceptron().double(), data_of(task, NUM_TRAIN, 0), task)


def seen(attributor: StrideAttributor, task: Task) -> tuple[Observation, Points]:
    return attributor.fitted._read(resolve_queries(queries_of(task)), "label")


# ---- recoveries -----------------------------------------------------------------------------------------------------


@every_task
def test_the_closed_form_is_the_influence_of_the_readout(task: Task) -> None:
    """Against a Hessian that autograd makes of the objective."""
    attributor = fitted(task, recovery="closed-form")
    attribution, readout = attributor.attribute(queries_of(task)), attributor.fitted.readout
    problem, points = readout.problem, seen(attributor, task)[1]

    def losses(flat: Tensor, features: Tensor, encoded: Tensor) -> Tensor:
        return task.loss(problem.offset + features @ flat.view(problem.shape), encoded)

    def objective(flat: Tensor) -> Tensor:
        prior = 0.5 * (problem.precision.flatten() * flat.square()).sum()
        return losses(flat, problem.features, problem.encoded).sum() + prior

    best = readout.coefficients.flatten()
    with torch.enable_grad():
        hessian = torch.autograd.functional.hessian(objective, best)
        sides = [
            torch.autograd.functional.jacobian(lambda flat, of=of: losses(flat, of.features, of.encoded), best)
            for of in (points, readout.training_points)
        ]
    expected = sides[0] @ torch.linalg.solve(hessian, sides[1].T)
    torch.testing.assert_close(attribution.scores.double(), expected, rtol=1e-5, atol=1e-6)
    assert attribution.metadata["design"] is None
    assert attribution.metadata["operators"] is None


@every_task
@pytest.mark.parametrize("recovery", ["prior", "ridge", "lasso"])
def test_scores_are_recovered_from_the_refits(task: Task, recovery: str) -> None:
    options = {} if recovery == "prior" else {"penalty": 0.02}
    attributor = fitted(task, recovery=recovery, num_subsets=60, **options)
    attribution, module = attributor.attribute(queries_of(task)), attributor.fitted.module
    assert module is not None
    observed, points = seen(attributor, task)
    prior = module.readout.influence(points)
    recovered = module.recover(observed, recovery, penalty=options.get("penalty"), **QUIET)
    torch.testing.assert_close(attribution.scores, recovered.scores.float())
    assert correlation(attribution.scores, prior) > (0.9 if recovery == "prior" else 0.5)
    assert attribution.metadata["operators"] == {"num_subsets": 60, "from_record": False}
    assert attribution.metadata["recovered"] == recovered.chosen


@pytest.mark.parametrize(
    ("options", "num_subsets"),
    [
        ({"recovery": "prior"}, 16),
        ({"recovery": "ridge"}, 200),
        ({"recovery": "lasso", "penalty": 0.1}, 200),
        ({"basis": "learned"}, 200),
    ],
    ids=str,
)
def test_few_subsets_are_enough_where_a_prior_knows_most(
    options: dict[str, Any], num_subsets: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense, "StrideModule", partial(StrideModule, max_steps=2))
    metadata = fitted(Classification(), **options).metadata
    design = metadata["design"]
    assert (design["num_subsets"], design["degree"]) == (num_subsets, num_subsets // 2)
    assert metadata["options"]["basis"] == options.get("basis", "statistics")
    assert fitted(Classification(), **options, degree=3).metadata["design"]["degree"] == 3


@pytest.mark.parametrize(
    ("options", "recovery"),
    [
        ({}, "closed-form"),
        ({"num_subsets": 8}, "prior"),
        ({"degree": 4}, "prior"),
        ({"basis": "learned"}, "prior"),
        ({"recovery": "lasso"}, "lasso"),
    ],
    ids=str,
)
def test_scores_are_in_closed_form_unless_operators_are_wanted(options: dict[str, Any], recovery: str) -> None:
    assert StrideAttributor(**options).recovery == recovery


def test_duplicates_have_equal_scores() -> None:
    x, y = data_of(Classification(), NUM_TRAIN, 0).tensors
    twice = TensorDataset(x.repeat(2, 1), y.repeat(2))
    attributor = StrideAttributor(**QUIET).fit(perceptron().double(), twice, Classification())
    first, second = attributor.attribute(queries_of(Classification())).scores.split(NUM_TRAIN, 1)
    torch.testing.assert_close(first, second)


# ---- self-influence -------------------------------------------------------------------------------------------------


@every_task
def test_self_influence_is_the_diagonal_over_one_minus_the_leverage(task: Task) -> None:
    attributor = fitted(task, recovery="closed-form")
    influence = attributor.self_influence().double()
    assert (influence >= 0).all()
    data = data_of(task, NUM_TRAIN, 0)
    diagonal = attributor.attribute(data).scores.diagonal().double()
    readout = attributor.fitted.readout
    problem, points = readout.problem, readout.training_points
    residuals = readout.residuals(points)
    with torch.enable_grad():
        hessian = torch.autograd.functional.hessian(
            lambda flat: (
                task.loss(problem.offset + problem.features @ flat.view(problem.shape), problem.encoded).sum()
                + 0.5 * (problem.precision.flatten() * flat.square()).sum()
            ),
            readout.coefficients.flatten(),
        )
    inverse = torch.linalg.inv(hessian).view(*problem.shape, *problem.shape)
    for place in range(NUM_TRAIN):
        phi = problem.features[place]
        reach = torch.einsum("m,mcnd,n->cd", phi, inverse, phi)  # outputs moved by residuals
        moved = reach @ residuals[place]
        mean = task.mean(problem.offset + phi @ readout.coefficients)
        curved = task.curvature(mean[None], moved[None])[0]
        leverage = (moved @ curved) / (moved @ residuals[place])
        assert 0 < leverage < 1
        assert float(influence[place]) == pytest.approx(float(diagonal[place] / (1 - leverage)), rel=1e-4)


@every_task
def test_self_influence_is_near_leaving_one_out(task: Task) -> None:
    attributor = fitted(task)
    readout = attributor.fitted.readout
    moves = readout.refit(1 - torch.eye(NUM_TRAIN))
    rises = (readout.rises(readout.training_points, moves)).diagonal()
    assert correlation(attributor.self_influence(), rises) > 0.95


def test_perfect_fits_have_no_self_influence_below_zero() -> None:
    """Two far clusters: residuals are rounding."""
    x = torch.cat([torch.full((15, 4), 30.0), torch.full((15, 4), -30.0)]) + random_tensor(30, 4, seed=0).float()
    data = TensorDataset(x, torch.arange(30) // 15)
    influence = StrideAttributor(**QUIET).fit(perceptron(num_outputs=2).float(), data).self_influence()
    assert (influence >= 0).all()
    assert influence.isfinite().all()


# ---- standard deviations --------------------------------------------------------------------------------------------


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[spread.Spread]:
    """Every spread that was computed."""
    calls, compute = [], spread.Spread.__call__
    monkeypatch.setattr(spread.Spread, "__call__", lambda self: calls.append(self) or compute(self))
    return calls


def test_std_is_computed_on_first_use_and_once(computed: list[spread.Spread]) -> None:
    attribution = fitted(Classification()).attribute(queries_of(Classification()))
    assert attribution.has_std
    assert "uncalibrated" in repr(attribution)
    attribution.top(3)
    assert computed == []
    std = attribution.std
    assert std is not None
    assert (std.shape, std.dtype, std.device.type) == (attribution.scores.shape, torch.float32, "cpu")
    assert (std > 0).all()
    assert attribution.std is std
    assert len(computed) == 1


@pytest.mark.parametrize("options", [{"recovery": "lasso", "penalty": 0.1}, {"recovery": "ridge"}], ids=str)
def test_only_the_influence_has_a_spread(computed: list[spread.Spread], options: dict[str, Any]) -> None:
    attribution = fitted(Classification(), num_subsets=20, **options).attribute(queries_of(Classification()))
    assert attribution.has_std == (options["recovery"] == "ridge")  # the posterior's, without draws
    assert attribution.std is None or (attribution.std > 0).all()
    assert computed == []


@every_task
def test_std_holds_the_recovery_s_variance_too(task: Task) -> None:
    plain = fitted(task, recovery="closed-form").attribute(queries_of(task)).std
    attributor = fitted(task, recovery="prior")
    attribution, module = attributor.attribute(queries_of(task)), attributor.fitted.module
    assert module is not None
    readout, (observed, points) = attributor.fitted.readout, seen(attributor, task)
    measured = module.measure(observed, points)
    recovered = recover_with_prior(measured, module.design, readout.influence(points), **QUIET)
    assert plain is not None
    assert recovered.std is not None
    assert recovered.agreement is not None
    # The recovery stretches its prior; the uncertainty of that is stretched too.
    expected = ((recovered.agreement[:, None] * plain).square() + recovered.std.square()).sqrt()
    torch.testing.assert_close(attribution.std.double(), expected, rtol=1e-5, atol=1e-8)
    assert (attribution.std > plain).all()


def test_std_is_that_of_the_seed() -> None:
    first, same, other = (
        fitted(Classification(), recovery="closed-form", seed=seed).attribute(queries_of(Classification())).std
        for seed in (3, 3, 4)
    )
    assert torch.equal(first, same)
    assert not torch.allclose(first, other)
    assert correlation(first, other) > 0.8


@pytest.mark.parametrize("recovery", ["prior", "closed-form"])
def test_std_survives_pickles_copies_and_saving(recovery: str, tmp_path: Any, computed: list[spread.Spread]) -> None:
    attribution = fitted(Classification(), recovery=recovery).attribute(queries_of(Classification()))
    pickled, copied = pickle.loads(pickle.dumps(attribution)), copy.deepcopy(attribution)
    assert computed == []
    loaded = Attribution.load(attribution.save(tmp_path / "scores"))
    assert len(computed) == 1
    for other in (pickled, copied, loaded):
        assert torch.equal(other.std, attribution.std)
        assert torch.equal(other.scores, attribution.scores)


def test_std_needs_no_model_and_no_other_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read by whoever reads it, so it must not wait for ranks that do not."""
    attributor = fitted(Classification())
    attribution = attributor.attribute(queries_of(Classification()))
    expected = copy.deepcopy(attribution).std
    with torch.no_grad():
        for parameter in attributor.model.parameters():
            parameter.fill_(torch.nan)

    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("a collective call")

    for name in ("all_gather", "all_reduce", "broadcast", "barrier", "all_gather_object", "broadcast_object_list"):
        monkeypatch.setattr(torch.distributed, name, refused)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda *_: 1)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda *_: "gloo")
    with pytest.raises(AssertionError, match="a collective call"):
        attributor.attribute(queries_of(Classification()))
    assert torch.equal(attribution.std, expected)


# ---- units, labels and texts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("recovery", ["closed-form", "prior"])
@pytest.mark.parametrize(("scale", "shift"), [(1.0, 35.0), (1e-3, 0.0), (1e-3, 2000.0), (1e5, 2000.0), (-7.0, 1.0)])
def test_units_of_the_targets_change_no_ranking(recovery: str, scale: float, shift: float) -> None:
    def attribution(scale: float, shift: float) -> tuple[Attribution, Tensor]:
        train, queries = (data_of(Regression(), size, seed, 2) for size, seed in ((NUM_TRAIN, 0), (NUM_QUERIES, 1)))
        for data in (train, queries):
            data.tensors = data.tensors[0], data.tensors[1] * scale + shift
        attributor = StrideAttributor(recovery=recovery, **QUIET)
        attributor.fit(perceptron(num_outputs=2).double(), train, Regression())
        return attributor.attribute(queries), attributor.self_influence()

    (expected, diagonal), (scaled, scaled_diagonal) = attribution(1.0, 0.0), attribution(scale, shift)
    # Losses are squares of the target's unit.
    torch.testing.assert_close(scaled.scores / scale**2, expected.scores, rtol=1e-4, atol=1e-5)
    if scale > 0:  # draws are not mirrored
        torch.testing.assert_close(scaled.std / scale**2, expected.std, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scaled_diagonal / scale**2, diagonal, rtol=1e-4, atol=1e-6)
    assert torch.equal(scaled.scores.argsort(1), expected.scores.argsort(1))


def test_noise_std_is_a_factor_of_all_scores() -> None:
    one, other = (fitted(Regression(noise_std)).attribute(queries_of(TASKS["Gaussian"])) for noise_std in (1.0, 0.25))
    torch.testing.assert_close(other.scores, 16 * one.scores, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(other.std, 16 * one.std, rtol=1e-4, atol=1e-6)


def test_scores_of_several_labels_add_up_those_of_each() -> None:
    task = BinaryClassification()
    train, queries = data_of(task, NUM_TRAIN, 0), queries_of(task)
    model = perceptron().double()

    def scores(label: int | None) -> Tensor:
        chosen = slice(None) if label is None else [label]
        network = copy.deepcopy(model)
        if label is not None:
            network[2] = nn.Linear(6, 1).double()
        sets = [TensorDataset(data.tensors[0], data.tensors[1][:, chosen]) for data in (train, queries)]
        attributor = StrideAttributor(recovery="closed-form", **QUIET).fit(network, sets[0], task)
        return attributor.attribute(sets[1]).scores

    torch.testing.assert_close(scores(None), scores(0) + scores(1) + scores(2), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("recovery", ["closed-form", "prior"])
def test_texts_with_a_class(recovery: str) -> None:
    """Each has a copy among the training texts, and one of another class."""

    def loader(texts: list[dict[str, Tensor]], labels: Tensor) -> DataLoader[Any]:
        def collate(items: list[tuple[dict[str, Tensor], Tensor]]) -> dict[str, Tensor]:
            batch = padded([text for text, _ in items])
            return batch | {"labels": torch.stack([label for _, label in items])}

        return DataLoader(list(zip(texts, labels, strict=True)), 4, collate_fn=collate)  # type: ignore[arg-type]

    texts, count = Texts(16), 5
    rows = [texts[place] for place in range(16)]
    labels = torch.arange(16) % 3
    train = loader(rows + rows[:count], torch.cat([labels, (labels[:count] + 1) % 3]))
    attributor = StrideAttributor(recovery=recovery, **QUIET).fit(bert().eval(), train)
    attribution = attributor.attribute(loader(rows[:count], labels[:count]))
    assert "SequenceClassification" in attribution.metadata["task"]
    copies, contradictions = attribution.scores[:, :count].diagonal(), attribution.scores[:, 16:].diagonal()
    assert (copies > 0).all()
    assert (contradictions < 0).all()
    assert list(attribution.query_info)[-1] == "readout agrees"
    assert (attribution.std > 0).all()
    effects = attributor.effect(loader(rows[:count], labels[:count]), [[place] for place in range(count)])
    assert (effects.diagonal() > 0).all()
