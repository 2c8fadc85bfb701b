"""attribute(): what goes in, what comes out, and that the caller's model is as before."""

import copy
import json

import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch import nn
from torch.nn import functional as F
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset

import stride_lightning
from stride_lightning import (
    Attribution,
    Attributor,
    Classification,
    Regression,
    StrideAttributor,
    attribute,
    linear_datamodeling_score,
)
from stride_lightning.attribute import methods
from stride_lightning.model.weights import weight_hash
from stride_lightning.steering import dense
from tests.helpers.gradient_models import check_same_condition, condition_of
from tests.helpers.models import (
    NUM_QUERIES,
    NUM_TRAIN,
    BinaryClassifier,
    Classifier,
    ConvNet,
    Data,
    Dicts,
    DictTask,
    Regressor,
    Validated,
    binary_data,
    build,
    classification_data,
    make_trainer,
    picture_data,
    points,
    regression_data,
    train,
)

DATA = classification_data()
QUERIES = classification_data(NUM_QUERIES, seed=1)
#: A label that no output stands for.
HIGH = TensorDataset(DATA.tensors[0], DATA.tensors[1].clone().index_fill_(0, torch.tensor([59]), 7))
FEW = {"num_subsets": 16, "show_progress": False}
#: Conjugate gradients stop when all queries that are solved together are solved to 5 %.
SOLVED_TOGETHER = 2e-5


@pytest.fixture(scope="module")
def expected(model):
    return attribute(model, QUERIES, train_data=DATA, **FEW)


def same(one, other, rtol=1e-4):
    scores = other.scores if hasattr(other, "scores") else other
    torch.testing.assert_close(one.scores, scores, rtol=rtol, atol=rtol * scores.abs().max().item())


# ---- what goes in -----------------------------------------------------------------------------------------------


def test_queries_of_a_datamodule_are_its_test_data_else_validation(model, expected):
    data = Data()
    same(attribute(model, data, train_data=DATA, **FEW), expected.scores[:4], rtol=SOLVED_TOGETHER)
    assert data.calls == ["prepare_data", "test"]

    class Validation(Data):
        def setup(self, stage):
            super().setup(stage)
            assert stage in ("fit", "validate")

    only_validation = Validation()
    only_validation.test_dataloader = super(Data, only_validation).test_dataloader
    same(attribute(model, only_validation, train_data=DATA, **FEW), expected)
    assert only_validation.calls == ["prepare_data", "validate"]


def test_datamodule_from_datasets(model, expected):
    data = LightningDataModule.from_datasets(DATA, val_dataset=QUERIES, batch_size=8)
    same(attribute(model, data, train_data=data, **FEW), expected)


def test_an_attached_datamodule_is_not_set_up_again(tmp_path):
    data, model = Data(), build(Validated)
    make_trainer(tmp_path).fit(model, data)
    data.calls.clear()
    attribute(model, QUERIES, train_data=data, **FEW)
    assert data.calls == []


def test_batch_transfer_hooks_apply(expected, model):
    shift = torch.tensor([1.0, -2.0, 0.5, 0.0])

    class Shifted(Data):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch[0] - shift, batch[1]

    class Normalising(Classifier):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return batch[0] - shift, batch[1]

    moved = [TensorDataset(data.tensors[0] + shift, data.tensors[1]) for data in (DATA, QUERIES)]
    data = Shifted(*moved)
    same(attribute(model, data, train_data=data, **FEW), expected.scores[:4], rtol=SOLVED_TOGETHER)
    normalising = Normalising(dropout=0.3)
    normalising.load_state_dict(model.state_dict())
    same(attribute(normalising, moved[1], train_data=moved[0], **FEW), expected)


def test_functional_module_and_plain_nn_module(model, expected):
    same(attribute(model.network, QUERIES, train_data=DATA, **FEW, layers=["0", "3"]), expected)


# ---- the caller's model is as before ----------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"basis": "learned"}, {"recovery": "lasso"}], ids=str)
@pytest.mark.usefixtures("few_steps")
def test_model_is_as_before(options, tmp_path):
    model, other = build(ConvNet), build(ConvNet, seed=1)
    model.network[1].eval()
    next(model.parameters()).requires_grad_(False)
    torch.save(other.state_dict(), tmp_path / "other.pt")
    arguments = {"train_data": picture_data(), "ckpt_path": tmp_path / "other.pt", **FEW, **options}
    before = condition_of(model)
    attribution = attribute(model, picture_data(3, seed=1), **arguments)
    if options == {"basis": "learned"}:
        torch.set_rng_state(before["random"])  # which fitting draws from
    check_same_condition(before, model)
    assert attribution.metadata["weights"] == weight_hash(other)


# ---- errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "strid"}, ValueError, r"Unknown method 'strid'. Use one of: .*stride"),
        ({"num_subset": 3}, TypeError, r"Unknown option num_subset for method 'stride'.*layers.*num_subsets"),
        ({"basis": "other"}, ValueError, r"`basis` must be one of \('statistics', 'learned'\)"),
        ({"recovery": "other"}, ValueError, r"`recovery` must be one of \('prior', 'lasso', 'ridge', 'closed-form'\)"),
        ({"target": "other"}, ValueError, "'label' or 'predicted', got 'other'"),
        ({"layers": ["network.7"]}, ValueError, r"'network\.7' is not a submodule.*'network\.0'"),
        ({"penalty": 0.1}, ValueError, "`penalty` belongs to recovery="),
        ({"rank": 4}, ValueError, "`rank` belongs to basis='learned'"),
        ({"num_subsets": 4, "degree": 4}, ValueError, "degree=4 with num_subsets=4"),
        ({"task": "classification"}, TypeError, "`task` must be an instance of Task, got 'classification'"),
        ({"task": Classification}, TypeError, "got the class Classification; make an instance"),
        ({"layers": []}, ValueError, "`layers` is empty: name at least one module"),
        ({"layers": ["network.0", "network.0"]}, ValueError, "each once; got"),
        ({"layers": "network.0"}, TypeError, r"write layers=\['network.0'\]"),
        ({"train_data": [DataLoader(DATA), DataLoader(DATA)]}, ValueError, "Pass `loss=fn`"),
        ({"model": Classifier}, TypeError, "`model` must be a module"),
        ({"train_data": Subset(DATA, [0]), "recovery": "prior"}, ValueError, "at least 2 training examples, got 1"),
        ({"train_data": HIGH}, ValueError, r"a model with 3 outputs takes 0\.\.2"),
    ],
)
def test_wrong_arguments(model, options, error, message):
    with pytest.raises(error, match=message):
        attribute(**{"model": model, "queries": QUERIES, "train_data": DATA, "show_progress": False} | options)


def test_broken_weights_and_inputs(model):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.network[3].bias[1] = float("nan")
    with pytest.raises(ValueError, match=r"0 has NaN in its outputs, .*did training diverge.* 9 and 50 more"):
        attribute(broken, QUERIES, train_data=DATA, **FEW)
    x, y = (tensor.clone() for tensor in DATA.tensors)
    x[23] = float("inf")
    with pytest.raises(ValueError, match=r"Training example 23 has NaN in its (features|outputs), which"):
        attribute(model, QUERIES, train_data=TensorDataset(x, y), **FEW)
    with pytest.raises(ValueError, match=r"Training example 46 has NaN in its (features|outputs)"):
        attribute(model, QUERIES, train_data=TensorDataset(x.roll(23, 0), y), train_indices=[4, 46, 3], **FEW)


def test_queries_without_labels(model):
    unlabelled = TensorDataset(QUERIES.tensors[0])
    with pytest.raises(ValueError, match=r"no targets.*target='predicted'"):
        attribute(model, unlabelled, train_data=DATA, **FEW)
    predicted = attribute(model, unlabelled, train_data=DATA, target="predicted", **FEW)
    assert predicted.query_targets.tolist() == model.eval()(QUERIES.tensors[0]).argmax(1).tolist()
    assert predicted.metadata["target"] == "predicted"
    with pytest.raises(ValueError, match="says nothing for a regression"):
        attribute(build(Regressor), regression_data(3), train_data=regression_data(), target="predicted", **FEW)


# ---- a fitted attributor ----------------------------------------------------------------------------------------


def test_a_fitted_attributor_is_asked_again(model, expected, monkeypatch):
    attributor = StrideAttributor(**FEW).fit(model, DATA)
    monkeypatch.setattr(dense.StrideModule, "fit", None)  # asking must not fit
    same(attributor.attribute(QUERIES), expected)
    same(attributor.attribute(Subset(QUERIES, [4, 1])), expected.scores[[4, 1]], rtol=SOLVED_TOGETHER)


def test_a_new_method_is_a_subclass(model):
    class Constant(Attributor):
        method = "constant for a test"

        def __init__(self, *, value: float = 0.0, **common):
            super().__init__(**common)
            self.value = value

        def fit_model(self, model, device, record, checkpoint):
            self.metadata["value"] = self.value

        def score_queries(self, model, queries, device, target):
            return Attribution(torch.full((len(queries), len(self.train_data)), self.value))

    try:
        attribution = attribute(model, QUERIES, train_data=DATA, method=Constant.method, value=2.0)
        assert (attribution.scores == 2).all()
        assert attribution.metadata["value"] == 2
        assert Constant.method in methods()
        with pytest.raises(TypeError, match=r"^Constant has no option valeu\. help\(Constant\) shows its options\.$"):
            Constant(valeu=1.0)
        for wrong in (None, torch.zeros(4, 4), Attribution(torch.zeros(2, 3))):
            Constant.score_queries = lambda *_, wrong=wrong: wrong
            with pytest.raises(
                TypeError, match=r"Constant\.score_queries\(\) must return an Attribution of \d+ queries"
            ):
                attribute(model, QUERIES, train_data=DATA, method=Constant.method)
    finally:
        del Attributor.registry[Constant.method]


# ---- metadata ---------------------------------------------------------------------------------------------------


def test_metadata_states_every_choice(expected):
    metadata = expected.metadata
    assert metadata["record"] is None
    assert "computed on the spot" in metadata["record_note"]
    assert metadata["options"] == {
        "layers": ["network.0", "network.3"],
        "basis": "statistics",
        "recovery": "prior",
    }
    assert metadata["design"] == {"num_subsets": 16, "num_train": NUM_TRAIN, "degree": 8, "seed": 0}
    assert metadata["operators"] == {"num_subsets": 16, "from_record": False}
    assert metadata["readout"] == {
        "num_features": 4 + 8 + 1,
        "num_coordinates": 4 + 8 + 1,
        "noise_variance": None,
        "scales_from_record": False,
        "from_record": False,
    }
    agreement = metadata["agreement"]
    assert agreement == {"agree": sum(expected.query_info["readout agrees"]), "queries": len(QUERIES)}
    assert metadata["recovered"].keys() == {"prior_agreement", "noise"}
    assert metadata["peak_memory_bytes"] >= 0  # 0 where the process has held more before


# ---- tasks, models, recoveries ----------------------------------------------------------------------------------


RUNS = {
    "classification": (Classifier, DATA, QUERIES),
    "regression": (Regressor, regression_data(), regression_data(4, seed=1)),
    "binary": (BinaryClassifier, binary_data(), binary_data(4, seed=1)),
    "conv": (ConvNet, picture_data(), picture_data(4, seed=1)),
}


@pytest.fixture(scope="module", params=RUNS.values(), ids=RUNS.keys())
def trained(request, tmp_path_factory):
    kind, data, queries = request.param
    model = build(kind)
    train(model, data, tmp_path_factory.mktemp("run"), max_epochs=4)
    model.trainer = None
    return model, data, queries


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"recovery": "lasso"},
        {"recovery": "lasso", "penalty": 0.1},
        {"recovery": "ridge"},
        {"basis": "learned"},
        {"basis": "learned", "rank": 3, "recovery": "lasso"},
        {"recovery": "closed-form", "num_subsets": None},
    ],
    ids=str,
)
@pytest.mark.usefixtures("few_steps")
def test_end_to_end(trained, options):
    model, data, queries = trained
    attribution = attribute(model, queries, train_data=data, **FEW | options)
    again = attribute(model, queries, train_data=data, **FEW | options)
    assert torch.equal(attribution.scores, again.scores)
    assert torch.isfinite(attribution.scores).all()
    assert attribution.scores.abs().max() > 0
    assert (attribution.std is None) == (options.get("recovery") == "lasso")
    assert json.loads(json.dumps(attribution.metadata)) == attribution.metadata


def test_half_precision_model(model, expected):
    half = copy.deepcopy(model).bfloat16()
    attribution = attribute(half, QUERIES, train_data=DATA, **FEW)
    pairs = torch.stack([attribution.scores.flatten(), expected.scores.flatten()])
    assert torch.corrcoef(pairs)[0, 1] > 0.9


def test_custom_task_with_dictionaries(model, expected):
    with pytest.raises(ValueError, match=r"STRIDE needs a likelihood, .*must be Tensor, not str"):
        attribute(model, Dicts(QUERIES), train_data=Dicts(DATA), **FEW)
    same(attribute(model, Dicts(QUERIES), train_data=Dicts(DATA), task=DictTask(), **FEW), expected)


def test_noise_of_a_regression_scales_the_scores():
    model, data, queries = build(Regressor), regression_data(), regression_data(3, seed=1)
    one, two = (attribute(model, queries, train_data=data, task=Regression(s), **FEW) for s in (1.0, 0.5))
    same(two, 4 * one.scores, rtol=1e-2)


# ---- odd training sets ------------------------------------------------------------------------------------------


def test_one_class_only(model):
    one = TensorDataset(DATA.tensors[0], torch.ones(NUM_TRAIN, dtype=torch.int64))
    assert torch.isfinite(attribute(model, QUERIES, train_data=one, **FEW).scores).all()


def test_constant_features(model):
    x = DATA.tensors[0].clone()
    x[:, 1], x[:, 2] = 0, 3
    assert torch.isfinite(attribute(model, QUERIES, train_data=TensorDataset(x, DATA.tensors[1]), **FEW).scores).all()
    blank = TensorDataset(torch.zeros_like(x), DATA.tensors[1])
    assert torch.isfinite(attribute(model, QUERIES, train_data=blank, **FEW).scores).all()


@pytest.mark.parametrize("recovery", ["prior", "lasso", "ridge"])
def test_fewer_examples_than_subsets(model, recovery):
    few = Subset(DATA, range(7))
    attribution = attribute(model, QUERIES, train_data=few, num_subsets=40, recovery=recovery, show_progress=False)
    assert attribution.scores.shape == (NUM_QUERIES, 7)
    assert torch.isfinite(attribution.scores).all()


def test_duplicates_get_similar_scores(model):
    doubled = ConcatDataset([DATA, Subset(DATA, range(10))])
    scores = attribute(model, QUERIES, train_data=doubled, num_subsets=100, show_progress=False).scores
    gap = (scores[:, :10] - scores[:, NUM_TRAIN:]).abs().mean()
    shuffled = (scores[:, :10] - scores[:, NUM_TRAIN:].flip(1)).abs().mean()
    assert gap < 0.2 * shuffled


# ---- are the scores right? --------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"recovery": "lasso"}], ids=str)
def test_sign(tmp_path, options):
    """A copy of the query helps it most, a copy with the wrong label harms it most."""
    data, query = classification_data(), Subset(classification_data(5, seed=5), [4])
    query_x, query_y = query[0]
    x, y = (tensor.clone() for tensor in data.tensors)
    x[11], y[11] = query_x, query_y
    x[42], y[42] = query_x, (query_y + 1) % 3
    planted, model = TensorDataset(x, y), build(Classifier)
    train(model, planted, tmp_path, max_epochs=10)
    top = attribute(model, query, train_data=planted, num_subsets=300, show_progress=False, **options).top(3)
    assert top.proponents[0, 0] == 11
    assert top.opponents[0, 0] == 42
    assert top.proponent_scores[0, 0] > 0 > top.opponent_scores[0, 0]


def logistic_regression(x, y, weight_decay, weights=None):
    """The exact minimum, by Newton-like LBFGS in float64."""
    model = nn.Linear(x.shape[1], 2).double()
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=100, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def objective():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y) + weight_decay * sum(p.square().sum() for p in model.parameters())
        loss.backward()
        return loss

    optimizer.step(objective)
    return model


def test_scores_predict_retraining():
    """On a convex problem, trained to the minimum, scores rank the losses of models retrained on random halves."""
    x, noise = points(100, 5).double(), points(100, 1, seed=3)[:, 0].double()
    y = (x[:, 0] - x[:, 1] + 0.7 * noise > 0).long()
    query_x = points(12, 5, seed=1).double()
    query_y = (query_x[:, 0] - query_x[:, 1] > 0).long()
    generator = torch.Generator().manual_seed(0)
    masks = torch.stack([torch.randperm(100, generator=generator) < 50 for _ in range(60)])
    losses = []
    for mask in masks:
        retrained = logistic_regression(x[mask], y[mask], 0.01)
        with torch.no_grad():
            losses.append(F.cross_entropy(retrained(query_x), query_y, reduction="none"))
    model = logistic_regression(x, y, 0.01)
    attribution = attribute(model, TensorDataset(query_x, query_y), train_data=TensorDataset(x, y), show_progress=False)
    score = linear_datamodeling_score(attribution.scores, masks, torch.stack(losses))
    assert score > 0.8


def test_a_name_that_the_package_lacks():
    with pytest.raises(AttributeError, match="module 'stride_lightning' has no attribute 'atribute'"):
        stride_lightning.atribute  # noqa: B018
