"""method="further-training" and method="retraining": what attribute() gives, and which records it takes."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from stride_lightning import (
    FurtherTraining,
    FurtherTrainingCallback,
    GroundTruth,
    StrideCallback,
    attribute,
    further_train,
    retrain,
)
from stride_lightning.retraining import attributors as module
from stride_lightning.steering.recovery import NOISES
from tests.helpers.models import Classifier, build, classification_data, loader, picture_data, train
from tests.retraining.cases import LastState, Net, mlp, numbers, points, random, sgd
from tests.retraining.further import SPREAD

DATA, QUERIES = classification_data(40), classification_data(5, seed=1)
QUIET = {"show_progress": False}
SGD = partial(torch.optim.SGD, lr=0.1)


@pytest.fixture
def refuse_to_train(monkeypatch):
    """Further training is an error from here on."""

    def fail(*_, **__):
        raise AssertionError("trained again")

    def refuse():
        monkeypatch.setattr(module, "measure_effects", fail)

    return refuse


# ---- further training, computed on the spot ---------------------------------------------------------------------


def ask(model, queries=QUERIES, data=None, **more):
    data = loader(DATA) if data is None else data
    return attribute(model, queries, train_data=data, method="further-training", **QUIET, **more)


def test_scores_are_the_effects_of_every_example():
    model = build(Classifier)
    attribution = ask(model, num_seeds=3, epochs=2, seed=4)
    how = {"left_out": range(40), "num_seeds": 3, "epochs": 2, "seed": 4}
    expected = further_train(model, QUERIES, train_data=loader(DATA), **how, **QUIET)
    assert attribution.scores.equal(expected.effects())
    assert attribution.std.equal(expected.std_error())
    assert attribution.scores.abs().max() > 1e-4
    metadata = attribution.metadata
    known = {"seeds": [4, 5, 6], "epochs": 2, "batch_size": 16, "one_by_one_because": None}
    assert {name: metadata["further_training"][name] for name in known} == known
    assert metadata["versions"]["torch"] == torch.__version__
    assert metadata["record"] is None
    assert "computed on the spot" in metadata["record_note"]
    for name in ("weights", "data", "query_data"):
        assert metadata[name] == expected.metadata[name]


def test_defaults_are_one_epoch_and_five_seeds():
    model, how = build(Classifier), {"left_out": range(40), "epochs": 1, "num_seeds": 5}
    expected = further_train(model, QUERIES, train_data=loader(DATA), **how, **QUIET)
    assert ask(model).scores.equal(expected.effects())
    assert ask(model, num_seeds=1).std is None


@pytest.mark.parametrize("left_out", [[31, 2, 17, 9], list(reversed(range(40)))], ids=["some", "all, in another order"])
def test_left_out_examples_are_the_columns(left_out):
    model = build(Classifier)
    whole, some = ask(model, num_seeds=2), ask(model, num_seeds=2, left_out=left_out)
    torch.testing.assert_close(some.scores, whole.scores[:, left_out], rtol=1e-3, atol=1e-6)
    assert some.train_indices.tolist() == left_out
    assert some.train_targets.equal(DATA.tensors[1][left_out])
    best = some.top(1).proponents[:, 0]
    assert best.tolist() == [left_out[column] for column in some.scores.argmax(1)]
    assert [some.train_data[column][1].item() for column in range(4)] == DATA.tensors[1][left_out[:4]].tolist()
    assert some.metadata["num_train"] == 40


def test_positions_of_train_indices():
    model, chosen = build(Classifier), [30, 4, 22, 9, 1, 16, 8, 3]
    left_out, how = [9, 30, 3], {"num_seeds": 2, "train_batch_size": 4}
    attribution = ask(model, train_indices=chosen, left_out=left_out, **how)
    expected = ask(model, data=TensorDataset(*(tensor[chosen] for tensor in DATA.tensors)), left_out=[3, 0, 7], **how)
    assert attribution.scores.equal(expected.scores)
    assert attribution.train_indices.tolist() == left_out
    assert attribution.train_targets.equal(DATA.tensors[1][left_out])
    assert ask(model, train_indices=chosen, **how).train_indices.tolist() == chosen
    with pytest.raises(ValueError, match=r"\[2\] are not among the 8 training examples"):
        ask(model, train_indices=chosen, left_out=[2])


def test_a_figure_shows_the_examples_that_were_left_out():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    pictures, model = picture_data(20), nn.Sequential(nn.Flatten(), nn.Linear(36, 2))
    how = {"left_out": [13, 2, 7], "optimizer": SGD, "train_batch_size": 5, "num_seeds": 2}
    attribution = ask(model, Subset(pictures, [0]), pictures, **how)
    shown = [image.get_array() for axes in attribution.plot(0, k=3).axes for image in axes.get_images()]
    drawn = [np.asarray(array, dtype=float).squeeze() for array in shown]
    expected = [pictures[position][0].squeeze().numpy() for position in (0, *how["left_out"])]
    normed = lambda picture: (picture - picture.min()) / (picture.max() - picture.min())  # noqa: E731
    matches = {
        place for array in drawn for place, picture in enumerate(expected)
        if array.shape == picture.shape and np.allclose(normed(array), normed(picture), atol=0.02)
    }  # fmt: skip
    assert len(drawn) == 4
    assert matches == {0, 1, 2, 3}


@pytest.mark.parametrize("network", [mlp, LastState])
def test_one_by_one_in_attribute(network):
    model, how = Net(network(), sgd, SPREAD), {"left_out": [3, 0], "num_seeds": 2}
    attribution = ask(model, points(2, seed=1), loader(points(), 9), **how)
    assert attribution.metadata["further_training"]["one_by_one_because"] is not None
    expected = further_train(model, points(2, seed=1), train_data=loader(points(), 9), **how, **QUIET)
    assert attribution.scores.equal(expected.effects())


OPTIONS = {
    "no seeds": ({"num_seeds": 0}, "`num_seeds` must be an integer of at least 1, got 0"),
    "no epochs": ({"epochs": 0}, "`epochs` must be an integer of at least 1, got 0"),
    "several epochs": ({"epochs": [1, 2]}, r"`epochs` must be an integer of at least 1, got \[1, 2\]"),
    "batch size": ({"data": DATA}, r"DataLoader with a batch_size, or `train_batch_size=`"),
    "unknown": ({"left_out": [40]}, r"\[40\] are not among the 40 training examples"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_that_cannot_work(name):
    options, message = OPTIONS[name]
    with pytest.raises(ValueError, match=message):
        ask(build(Classifier), **options)


# ---- records ----------------------------------------------------------------------------------------------------


@pytest.fixture
def fitted(tmp_path):
    """A model whose fit left a record of each kind in a folder of its own."""
    model = build(Classifier)
    further = FurtherTrainingCallback(
        QUERIES, left_out=[12, 3, 30], epochs=[1, 3], num_seeds=2, dirpath=tmp_path / "further", seed=8
    )
    stride = StrideCallback(tmp_path / "stride", num_subsets=8)
    trainer = train(model, DATA, tmp_path, further, stride)
    return model, further, stride, trainer


def test_the_record_of_the_fit_is_found(fitted, refuse_to_train):
    model, further, stride, _ = fitted
    refuse_to_train()
    attribution = ask(model)
    assert attribution.scores.equal(further.result.effects(3))
    assert attribution.std.equal(further.result.std_error(3))
    assert attribution.train_indices.tolist() == [12, 3, 30]
    assert attribution.metadata["record"] == str(further.records[0])
    assert attribution.metadata["further_training"]["epochs"] == 3
    assert attribution.metadata["further_training"]["seeds"] == [8, 9]
    assert attribution.metadata["step"] == 6
    # Without its DataLoader too: nothing is trained.
    assert ask(model, data=DATA).scores.equal(attribution.scores)
    # Each method finds its own.
    other = attribute(model, QUERIES, train_data=DATA, **QUIET)
    assert other.metadata["record"] == str(stride.records[0])


def test_the_record_serves_what_it_holds(fitted, refuse_to_train):
    model, further, _, _ = fitted
    refuse_to_train()
    one = ask(model, epochs=1, left_out=[30, 12], num_seeds=2, train_batch_size=16)
    assert one.scores.equal(further.result.effects(1)[:, [2, 0]])
    assert one.std.equal(further.result.std_error(1)[:, [2, 0]])
    assert one.train_indices.tolist() == [30, 12]
    assert one.train_targets.equal(DATA.tensors[1][[30, 12]])
    assert one.train_data[0][0].equal(DATA.tensors[0][30])
    assert one.metadata["further_training"]["epochs"] == 1


CONFLICTS = {
    "left_out": {"left_out": [12, 4]},
    "epochs": {"epochs": 2},
    "num_seeds": {"num_seeds": 3},
    "train_batch_size": {"train_batch_size": 5},
    "optimizer": {"optimizer": SGD},
}


@pytest.mark.parametrize("name", CONFLICTS)
def test_other_options_are_not_answered_by_the_record(fitted, name):
    model, further, _, _ = fitted
    options = {"left_out": [12], **CONFLICTS[name]}
    attribution = ask(model, **options)
    assert attribution.metadata["record"] is None
    assert f"made with other options: {name}" in attribution.metadata["record_note"]
    model.trainer = None
    assert attribution.scores.equal(ask(model, **options).scores)
    with pytest.raises(
        ValueError, match=f"made with other options: {name}.*Leave out these options to use the record, or"
    ):
        ask(model, record=further.records[0], **options)


def test_other_queries_are_computed_on_the_spot(fitted):
    model, further, _, _ = fitted
    other, few = classification_data(5, seed=7), {"left_out": [12], "num_seeds": 2}
    attribution = ask(model, other, **few)
    assert attribution.metadata["record"] is None
    assert attribution.metadata["record_note"] == "the record is of other queries; computed on the spot"
    expected = further_train(model, other, train_data=loader(DATA), left_out=[12], num_seeds=2, **QUIET)
    assert attribution.scores.equal(expected.effects())
    assert ask(model, target="predicted", **few).metadata["record"] is None
    for queries, target in ((other, "label"), (QUERIES, "predicted")):
        with pytest.raises(ValueError, match=r"holds effects on other queries\. Leave out `record`"):
            ask(model, queries, record=further.records[0], target=target)


def test_other_weights_and_data(fitted):
    model, further, _, _ = fitted
    few = {"left_out": [12], "num_seeds": 2}
    flipped = TensorDataset(DATA.tensors[0], 2 - DATA.tensors[1])
    with pytest.warns(UserWarning, match="made with other training data.* computed on the spot"):
        attribution = ask(model, data=loader(flipped), **few)
    assert attribution.metadata["record"] is None
    assert "made with other training data" in attribution.metadata["record_note"]
    with pytest.raises(ValueError, match="made with other training data"):
        ask(model, data=loader(flipped), record=further.records[0])
    with torch.no_grad():
        model.network[0].bias += 1
    with pytest.warns(UserWarning, match="^No record that FurtherTrainingCallback wrote can be used"):
        assert "none of these weights was found" in ask(model, **few).metadata["record_note"]
    with pytest.raises(ValueError, match="of the weights that are attributed"):
        ask(model, record=further.records[0])


def test_records_by_name(fitted, refuse_to_train, tmp_path):
    model, further, stride, _ = fitted
    model.trainer = None
    refuse_to_train()
    for record in (further.records[0], tmp_path / "further", str(further.records[0])):
        assert ask(model, record=record).scores.equal(further.result.effects())
    with pytest.raises(ValueError, match="holds 'stride', not what FurtherTrainingCallback writes"):
        ask(model, record=stride.records[0])
    with pytest.raises(ValueError, match="holds 'further-training', not what StrideCallback writes"):
        attribute(model, QUERIES, train_data=DATA, record=further.records[0], **QUIET)


def test_what_further_train_saved_is_a_record_too(refuse_to_train, tmp_path):
    model, few = build(Classifier), {"left_out": [5, 2], "num_seeds": 2}
    result = further_train(model, QUERIES, train_data=loader(DATA), path=tmp_path / "effects", **few, **QUIET)
    refuse_to_train()
    assert ask(model, record=tmp_path / "effects").scores.equal(result.effects())
    bare = FurtherTraining(result.effects_by_seed, result.left_out, [1], [0, 1]).save(tmp_path / "bare")
    with pytest.raises(ValueError, match=r"No record at .* is of the weights"):
        ask(model, record=bare)


def test_the_record_is_found_through_a_checkpoint(fitted, refuse_to_train, tmp_path):
    _, further, _, trainer = fitted
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    refuse_to_train()
    attribution = ask(build(Classifier, seed=5), ckpt_path=tmp_path / "end.ckpt")
    assert attribution.scores.equal(further.result.effects())
    assert attribution.metadata["record"] == str(further.records[0])


def test_both_callbacks_in_one_folder(tmp_path, refuse_to_train):
    model = build(Classifier)
    further = FurtherTrainingCallback(QUERIES, left_out=[1], num_seeds=2, dirpath=tmp_path / "both")
    stride = StrideCallback(tmp_path / "both", num_subsets=8)
    train(model, DATA, tmp_path, further, stride)
    refuse_to_train()
    assert sorted(path.name for path in (tmp_path / "both").iterdir()) == ["step=6", "step=6-v1"]
    for record in (None, tmp_path / "both"):
        assert ask(model, record=record).metadata["record"] == str(further.records[0])
        other = attribute(model, QUERIES, train_data=DATA, record=record, **QUIET)
        assert other.metadata["record"] == str(stride.records[0])


def test_a_damaged_record_is_passed_over(fitted):
    model, further, _, _ = fitted
    (further.records[0] / "effects.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"FurtherTrainingCallback wrote can be used.*effects\.safetensors"):
        attribution = ask(model, left_out=[12], num_seeds=2)
    assert attribution.metadata["record"] is None
    assert "effects.safetensors" in attribution.metadata["record_note"]


# ---- retraining -------------------------------------------------------------------------------------------------


N, Q = 25, 4
REGULAR, IRREGULAR = "regular", "irregular"


def planted(kind, num_subsets, noise=0.0, seed=0):
    """Masks, and losses that are linear in them, without fingerprints of any data."""
    generator = torch.Generator().manual_seed(seed)
    fraction = torch.full((N,), 0.5) if kind == REGULAR else torch.linspace(0.15, 0.9, N)
    masks = torch.rand(num_subsets, N, generator=generator) < fraction
    weights = torch.randn(Q, N, generator=generator) * (torch.rand(Q, N, generator=generator) < 0.4)
    losses = 3 - masks.float() @ weights.T + noise * torch.randn(num_subsets, Q, generator=generator)
    return GroundTruth(masks, losses[None], [0]), weights


def recover(truth, model=None, **more):
    model = Net(mlp(), sgd) if model is None else model
    return attribute(model, points(Q, seed=1), train_data=points(N), method="retraining", truth=truth, **QUIET, **more)


def by_sklearn(model, masks, losses):
    """Coefficients of a regression of minus the losses on the memberships, with an intercept."""
    return torch.from_numpy(model.fit(masks.double().numpy(), -losses.double().numpy()).coef_).float()


@pytest.mark.parametrize("kind", [REGULAR, IRREGULAR])
@pytest.mark.parametrize("recovery", ["lasso", "ridge"])
def test_planted_scores_are_recovered(kind, recovery):
    truth, weights = planted(kind, 120, noise=0.1)
    attribution = recover(truth, recovery=recovery)
    assert attribution.scores.shape == (Q, N)
    for row, exact in zip(attribution.scores, weights, strict=True):
        assert torch.corrcoef(torch.stack([row, exact]))[0, 1] > 0.98
    assert (attribution.std is None) is (recovery == "lasso")


@pytest.mark.parametrize("kind", [REGULAR, IRREGULAR])
@pytest.mark.parametrize("num_subsets", [15, 60, 300])
@pytest.mark.parametrize("penalty", [0.01, 0.3])
def test_ridge_is_that_of_scikit_learn(kind, num_subsets, penalty):
    linear_model = pytest.importorskip("sklearn.linear_model")
    truth, _ = planted(kind, num_subsets, noise=0.3)
    attribution = recover(truth, recovery="ridge", penalty=penalty)
    centred = truth.masks.double() - truth.masks.double().mean(0)
    level = penalty * (centred @ centred.T).diagonal().mean().item()
    expected = by_sklearn(linear_model.Ridge(alpha=level), truth.masks, truth.losses)
    torch.testing.assert_close(attribution.scores, expected, rtol=1e-3, atol=1e-4)
    assert attribution.metadata["recovered"]["penalty"] == penalty


@pytest.mark.parametrize("kind", [REGULAR, IRREGULAR])
@pytest.mark.parametrize("num_subsets", [15, 60])
@pytest.mark.parametrize("penalty", [0.05, 0.4])
def test_lasso_is_that_of_scikit_learn(kind, num_subsets, penalty):
    """Examples in different numbers of subsets: columns are centred and not scaled."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    truth, _ = planted(kind, num_subsets, noise=0.3)
    centred = truth.masks.double() - truth.masks.double().mean(0)
    for scores, losses in zip(recover(truth, recovery="lasso", penalty=penalty).scores, truth.losses.T, strict=True):
        largest = (centred.T @ (losses - losses.mean()).double()).abs().max() / num_subsets
        fit = linear_model.Lasso(alpha=penalty * largest.item(), tol=1e-10, max_iter=100_000)
        expected = by_sklearn(fit, truth.masks, losses)
        scale = expected.abs().max().item()
        torch.testing.assert_close(centred @ scores.double(), centred @ expected.double(), rtol=1e-2, atol=1e-2 * scale)
        if num_subsets > N:  # else columns may be equal, and their shares are free
            torch.testing.assert_close(scores, expected, rtol=1e-2, atol=5e-3 * scale)
        assert 0 < (expected != 0).sum() < N


def test_recovery_that_starts_from_stride():
    """Few subsets of a linear truth near the prior: the prior carries what they leave open."""
    data, queries = points(N), points(Q, seed=1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3))
    stride = attribute(model, queries, train_data=data, **QUIET)
    masks = torch.rand(12, N, generator=torch.Generator().manual_seed(2)) < 0.5
    truth = GroundTruth(masks, 1 - 7 * (masks.float() @ stride.scores.T)[None], [0])
    prior, exact = recover(truth, model, recovery="prior"), 7 * stride.scores
    assert prior.std.shape == (Q, N)
    torch.testing.assert_close(prior.scores, exact, rtol=1e-3, atol=1e-3 * exact.abs().max())
    assert prior.metadata["recovered"]["noise"] in [pytest.approx(noise) for noise in NOISES]
    ridge = recover(truth, model, recovery="ridge")
    assert (ridge.scores - exact).norm() > 10 * (prior.scores - exact).norm()


@pytest.fixture(scope="module")
def retrained():
    data = DataLoader(numbers(N), 9, shuffle=True)
    make = lambda: Net(nn.Linear(4, 1), lambda m: SGD(m.parameters()), nn.functional.mse_loss)  # noqa: E731
    torch.manual_seed(0)
    truth = retrain(make, numbers(Q, seed=1), train_data=data, max_epochs=2, num_subsets=60, num_seeds=2, **QUIET)
    return make, data, truth


@pytest.mark.parametrize("recovery", ["prior", "ridge", "lasso"])
def test_retrained_models_from_memory_from_disk_and_on_the_spot(retrained, tmp_path, recovery):
    make, data, truth = retrained
    queries, model = numbers(Q, seed=1), make()
    how = {"train_data": data, "method": "retraining", "recovery": recovery, **QUIET}
    attribution = attribute(model, queries, truth=truth, **how)
    assert attribution.query_targets.equal(queries.tensors[1][:, 0])
    assert attribution.train_targets.equal(numbers(N).tensors[1][:, 0])
    assert attribution.metadata["options"]["recovery"] == recovery
    assert attribution.metadata["retraining"]["max_epochs"] == 2
    held_out = retrain(make, queries, train_data=data, max_epochs=2, num_subsets=40, num_seeds=2, seed=77, **QUIET)
    predicted = held_out.masks.float() @ attribution.scores.T
    pairs = zip(predicted.T, -held_out.losses.T, strict=True)
    assert torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in pairs]).mean() > 0.4
    path = truth.save(tmp_path / "truth")
    assert attribute(model, queries, truth=path, **how).scores.equal(attribution.scores)
    assert attribute(model, queries, truth=str(path), **how).scores.equal(attribution.scores)
    how |= {"model_fn": make, "max_epochs": 2, "num_subsets": 60, "num_seeds": 2}
    assert attribute(model, queries, path=tmp_path / "kept", **how).scores.equal(attribution.scores)
    assert GroundTruth.load(tmp_path / "kept").losses.equal(truth.losses)


def test_models_that_are_retrained_one_by_one():
    make = lambda: Net(mlp(), sgd, SPREAD)  # noqa: E731
    how = {"method": "retraining", "recovery": "ridge"}
    same = {"train_data": points(), "max_epochs": 1, "num_subsets": 3}
    attribution = attribute(make(), points(2), model_fn=make, train_batch_size=9, **how, **same, **QUIET)
    assert "it trains on the module's own loss" in attribution.metadata["retraining"]["one_by_one_because"]
    truth = retrain(make, points(2), batch_size=9, num_seeds=1, **same, **QUIET)
    expected = attribute(make(), points(2), train_data=points(), truth=truth, **how)
    assert attribution.scores.equal(expected.scores)
    assert attribution.scores.abs().max() > 0


def test_a_truth_of_other_data_is_refused(retrained):
    make, data, truth = retrained
    how = {"method": "retraining", "truth": truth, "recovery": "ridge", **QUIET}
    queries = numbers(Q, seed=1)
    with pytest.raises(ValueError, match="`train_data` has other training data than the ground truth"):
        attribute(make(), queries, train_data=numbers(N, seed=4), **how)
    with pytest.raises(ValueError, match="`queries` has other queries than the ground truth"):
        attribute(make(), numbers(Q, seed=4), train_data=data, **how)
    bare = how | {"truth": GroundTruth(truth.masks, truth.losses_by_seed, truth.seeds)}
    with pytest.raises(ValueError, match="`truth` has 25 training examples, but `train_data` has 24"):
        attribute(make(), queries, train_data=numbers(24), **bare)
    with pytest.raises(ValueError, match="`truth` has 4 queries, but 3 were given"):
        attribute(make(), numbers(3, seed=1), train_data=data, **bare)


WRONG = {
    "nothing": ({"truth": None}, r"pass `truth=`, a result of retrain\(\), or `model_fn=` and `max_epochs=`"),
    "no epochs": ({"truth": None, "model_fn": mlp}, "`model_fn=` and `max_epochs=` to retrain now"),
    "recovery": ({"recovery": "magic"}, "`recovery` must be one of .*got 'magic'"),
    "penalty": ({"penalty": 0.1}, "`penalty` belongs to recovery='lasso' or 'ridge'"),
    "target": ({"target": "predicted", "recovery": "ridge"}, "Use target='label'"),
    "record": ({"record": "somewhere", "recovery": "ridge"}, "Only recovery='prior' reads a record"),
    "batch size": ({"truth": None, "model_fn": mlp, "max_epochs": 1, "recovery": "ridge"}, "or `train_batch_size=`"),
    "folder": ({"truth": "/no/such/folder"}, "/no/such/folder"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_work_is_refused(name):
    options, message = WRONG[name]
    with pytest.raises(FileNotFoundError if name == "folder" else ValueError, match=message):
        recover(**({"truth": planted(REGULAR, 5)[0]} | options))


def test_the_prior_takes_a_record_of_stride(tmp_path):
    model, data = build(Classifier), classification_data(N)
    callback = StrideCallback(tmp_path / "stride", num_subsets=8)
    train(model, data, tmp_path, callback)
    truth = GroundTruth(planted(REGULAR, 20)[0].masks, random(1, 20, 5), [0])
    how = {"train_data": data, "method": "retraining", "truth": truth, **QUIET}
    explicit = attribute(model, QUERIES, record=callback.records[0], **how)
    assert explicit.scores.equal(attribute(model, QUERIES, **how).scores)
    model.trainer = None
    torch.testing.assert_close(explicit.scores, attribute(model, QUERIES, **how).scores, rtol=1e-3, atol=1e-3)
    with pytest.raises(FileNotFoundError):
        attribute(model, QUERIES, record=tmp_path / "nowhere", **how)
