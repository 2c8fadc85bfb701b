"""What every method does, whatever it computes; a new method is tested here as soon as it is among the methods."""

import json
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import pytest
import torch
from torch.utils.data import DataLoader, Subset, TensorDataset

from stride_lightning import Attribution, TopAttribution, methods
from stride_lightning.attribute import attribute, class_of, create
from stride_lightning.gradients import planned
from stride_lightning.steering.subsets import Design, sample_design
from tests.contract import cases
from tests.contract.cases import CASES, EXEMPT, METHODS, NUM_QUERIES, NUM_TRAIN, fitted, made, model_of, scored
from tests.helpers.gradient_models import check_same_condition, close_scores, condition_of
from tests.helpers.learned import few_steps
from tests.helpers.models import Classifier, build
from tests.helpers.processes import run_two, start
from tests.helpers.tiny import correlation, permutation

pytestmark = [
    #: Torch's own, of the first forward-mode derivatives.
    pytest.mark.filterwarnings(r"ignore:.torch\.jit\.script. is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:LiSSA ended with residuals"),
]


TOPS = [method for method in METHODS if hasattr(made(method, "classification"), "top_k")]


def every_method(demand=None, kinds=("classification", "language")):
    """All methods that meet a demand, with points and with texts or with other kinds of tasks."""
    pairs = [(method, kind) for kind in kinds for method in METHODS if (method, kind) not in EXEMPT]
    return pytest.mark.parametrize(("method", "kind"), [pair for pair in pairs if (pair[0], demand) not in EXEMPT])


whole = cache(scored)
TRAINING_ROWS = range(NUM_QUERIES, NUM_QUERIES + NUM_TRAIN)


def test_no_entry_is_stale_and_a_method_without_one_needs_no_options():
    assert {*cases.OPTIONS, *cases.MADE, *(method for method, _ in EXEMPT)} <= set(METHODS)
    for method in set(methods()) - {*cases.OPTIONS, *cases.MADE}:
        assert class_of(method)().method == method


@every_method(kinds=CASES)
def test_scores_which_come_back_when_saved(method, kind, capsys, tmp_path):
    attribution, case = scored(method, kind), CASES[kind]
    assert capsys.readouterr() == ("", "")  # quiet when told
    scores = attribution.scores
    assert (scores.shape, scores.dtype, scores.device.type) == ((NUM_QUERIES, NUM_TRAIN), torch.float32, "cpu")
    assert scores.isfinite().all()
    assert attribution.std is None or (attribution.std > 0).all()
    assert attribution.train_indices.tolist() == list(range(NUM_TRAIN))
    if kind != "language":
        assert attribution.train_targets.equal(case.train.tensors[1])
        assert attribution.query_targets.equal(case.queries.tensors[1])
    metadata = attribution.metadata
    assert json.loads(json.dumps(metadata)) == metadata
    assert metadata["method"] == method.split(",")[0]
    assert (metadata["num_train"], metadata["num_queries"], metadata["target"]) == (NUM_TRAIN, NUM_QUERIES, "label")
    assert metadata["data"]["num_examples"] == NUM_TRAIN
    assert metadata["seconds"]["total"] >= metadata["seconds"]["attribute"] > 0
    assert "dropout off" in metadata["mode"]
    assert scores.equal(whole(method, kind).scores)  # the same seed gives the same
    again = Attribution.load(attribution.save(tmp_path / "scores"))
    assert again.scores.equal(scores)
    assert again.train_indices.equal(attribution.train_indices)
    assert again.metadata == metadata


@every_method(kinds=["classification", "binary", "regression", "language"])
def test_sign(method, kind):
    """A copy of the query helps it, and helps it more than one with another label."""
    attribution = whole(method, kind)
    if "unsigned" in attribution.metadata["unit"]:
        assert attribution.scores.min() >= 0
        assert attribution.scores[0, cases.COPY] > attribution.scores[0].mean()
    else:
        assert attribution.scores[0, cases.COPY] > 0
        assert attribution.scores[0, cases.CONTRADICTION] < attribution.scores[0, cases.COPY]
        assert kind not in ("binary", "regression") or attribution.scores[0, cases.CONTRADICTION] < 0


def close(attribution, expected, tolerance=2e-5):
    close_scores(attribution.scores, expected, tolerance)


@every_method()
def test_order_of_the_training_data(method, kind, monkeypatch):
    order = permutation(NUM_TRAIN)

    def permuted(*args, **kwargs):
        """Random subsets are of examples, not of their places."""
        design = sample_design(*args, **kwargs)
        return Design.restore(design.info(), {"bits": design.bits[order]})

    monkeypatch.setattr("stride_lightning.steering.attributor.sample_design", permuted)
    expected = whole(method, kind).scores[:, order]
    close(scored(method, kind, columns=order.tolist()), expected, 1e-2 if method == "stride" else 1e-4)


@every_method()
def test_order_and_number_of_queries(method, kind):
    expected = whole(method, kind).scores
    for rows in (permutation(NUM_QUERIES).tolist(), [3, 1], [2]):
        close(scored(method, kind, rows=rows), expected[rows])


@every_method("asked again")
def test_a_fitted_attributor_is_asked_again(method, kind):
    attributor = fitted(method, kind)
    for rows in ([4, 0, 2], range(NUM_QUERIES)):
        close(attributor.attribute(cases.queries_of(kind, rows)), whole(method, kind).scores[list(rows)])


@every_method("batch size")
def test_batch_size(method, kind):
    for size in (1, 4):
        close(scored(method, kind, batch_size=size), whole(method, kind).scores)


@every_method()
def test_precision(method, kind):
    attribution = scored(method, kind, model=model_of(kind).float())
    assert attribution.scores.dtype == torch.float32
    close(attribution, whole(method, kind).scores, 2e-2 if method == "stride" else 1e-3)


@every_method(kinds=["classification"])
def test_data_in_any_form(method, kind):
    """Shuffled loaders are read in the order of the dataset; positions are those of the dataset."""
    case, expected = CASES[kind], whole(method, kind).scores
    attributor = made(method, kind).fit(model_of(kind), DataLoader(case.train, 5, shuffle=True))
    attribution = attributor.attribute(DataLoader(case.queries, 2))
    close(attribution, expected)
    assert attribution.metadata["data"] == whole(method, kind).metadata["data"]
    chosen = [7, 2, 11, 5, 0, 4]
    attribution = scored(method, kind, columns=chosen)
    assert attribution.train_indices.tolist() == chosen
    assert attribution.train_targets.equal(case.train.tensors[1][chosen])
    assert set(attribution.top(3).proponents.flatten().tolist()) <= set(chosen)
    part = made(method, kind, columns=chosen).fit(model_of(kind), Subset(case.train, chosen))
    close(part.attribute(list(case.queries)), attribution.scores)


@every_method("predicted", kinds=["classification"])
def test_predicted_targets(method, kind):
    attributor, model, inputs = fitted(method, kind), model_of(kind), CASES[kind].queries.tensors[0]
    labelled = TensorDataset(inputs, model.eval()(inputs.double()).argmax(1))
    unlabelled = TensorDataset(inputs)
    close(attributor.attribute(unlabelled, target="predicted"), attributor.attribute(labelled).scores)
    with pytest.raises(ValueError, match="no targets"):
        attributor.attribute(unlabelled)


def diagonal(method, kind, **part):
    """The scores of the training examples for themselves, or the finite effect where a method has that."""
    if (method, kind) not in cases.FINITE_EFFECTS:
        return scored(method, kind, **part).scores.diagonal()
    influence = fitted(method, kind, **part).self_influence()
    infinitesimal = scored(method, kind, **part, recovery="closed-form").scores.diagonal()
    assert (influence > infinitesimal).all()
    assert correlation(influence, infinitesimal) > 0.9
    return influence


@every_method("self-influence")
def test_self_influence_is_the_diagonal(method, kind):
    expected = diagonal(method, kind, rows=TRAINING_ROWS)
    assert expected.std() > 0
    for size in (2 * NUM_TRAIN, NUM_TRAIN) if (method, "batch size") in EXEMPT else (2 * NUM_TRAIN, 4):
        influence = fitted(method, kind, rows=TRAINING_ROWS, batch_size=size).self_influence()
        assert influence.dtype == torch.float32
        close_scores(influence, expected, 2e-5)
    part = {"columns": [7, 2, 11, 5], "rows": [NUM_QUERIES + column for column in (7, 2, 11, 5)]}
    close_scores(fitted(method, kind, **part).self_influence(), diagonal(method, kind, **part), 2e-5)


@pytest.mark.parametrize("tile", [2**26, 4 * NUM_QUERIES * 4], ids=["one tile", "tiles of 4"])
@pytest.mark.parametrize("method", TOPS)
def test_the_top_alone(method, tile, monkeypatch):
    monkeypatch.setattr(planned, "TILE_BYTES", tile)
    top, every = scored(method, "classification", top_k=4), whole(method, "classification")
    assert isinstance(top, TopAttribution)
    for name in ("proponents", "opponents"):
        assert getattr(top.top(4), name).equal(getattr(every.top(4), name))
        scores = f"{name.removesuffix('s')}_scores"
        close_scores(getattr(top.top(4), scores), getattr(every.top(4), scores), 1e-6)
    chosen = [7, 2, 11, 5, 0, 4]
    top, every = (scored(method, "classification", columns=chosen, **more) for more in ({"top_k": 3}, {}))
    assert top.top().proponents.equal(every.top(3).proponents)
    assert (len(top.queries), top.num_train, top.metadata["num_queries"]) == (NUM_QUERIES, 6, NUM_QUERIES)


@every_method(kinds=["mixed"])
def test_the_model_is_as_before(method, kind):
    model, expected = model_of(kind), whole(method, kind).scores
    model.network.norm.eval()
    model.network.first.register_forward_hook(lambda *_: None)
    x, y = CASES[kind].train.tensors
    model.loss(model(x.double()), y).backward()
    model.network.norm.load_state_dict(model_of(kind).network.norm.state_dict())
    before = condition_of(model)
    attributor = fitted(method, kind, model=model)
    check_same_condition(before, model)
    close(attributor.attribute(CASES[kind].queries), expected)
    check_same_condition(before, model)
    if (method, "self-influence") not in EXEMPT:
        fitted(method, kind, rows=TRAINING_ROWS, model=model).self_influence()
        check_same_condition(before, model)
    with torch.inference_mode():  # as inside of a test loop
        close(scored(method, kind, model=model), expected)
    check_same_condition(before, model)


class Failing(Classifier):
    """Fails in its n-th forward pass from now."""

    passes = -1

    def forward(self, inputs):
        self.passes -= 1
        if self.passes == 0:
            raise RuntimeError("out of luck")
        return super().forward(inputs)


@every_method("runs the model", kinds=["classification"])
def test_the_model_is_as_before_when_something_fails(method, kind, tmp_path):
    torch.save(build(Failing, seed=1).state_dict(), tmp_path / "other.pt")
    model = build(Failing)
    model.network[1].eval()
    attributor = made(method, kind).fit(model, CASES[kind].train, ckpt_path=tmp_path / "other.pt")
    before = condition_of(model)
    for call in (lambda: attributor.attribute(CASES[kind].queries), lambda: attributor.fit(model, CASES[kind].train)):
        model.passes = 1
        with pytest.raises((RuntimeError, ValueError), match="out of luck"):
            call()
        check_same_condition(before, model)


@every_method(kinds=["classification"])
def test_calls_out_of_order(method, kind):
    queries = CASES[kind].queries
    with pytest.raises(RuntimeError, match=r"Call fit\(model, train_data\) before attribute\(queries\)"):
        made(method, kind).attribute(queries)
    with pytest.raises(RuntimeError, match=r"Call fit\(model, train_data\) before self_influence\(\)"):
        made(method, kind).self_influence()
    model = model_of(kind)
    attributor = fitted(method, kind, model=model)
    with torch.no_grad():
        model.network[0].bias += 1
    for call in (lambda: attributor.attribute(queries), attributor.self_influence):
        with pytest.raises(ValueError, match=r"weights have changed since fit\(\)"):
            call()
    with pytest.raises((ValueError, OSError)):  # nothing of the former fit is left
        attributor.fit(model_of(kind), CASES[kind].train, record="nowhere")
    for call in (lambda: attributor.attribute(queries), attributor.self_influence):
        with pytest.raises(RuntimeError, match=r"Call fit\(model, train_data\) before"):
            call()


@every_method("not finite", kinds=["classification"])
def test_examples_that_are_not_finite_are_named(method, kind):
    x, y = (tensor.clone() for tensor in CASES[kind].train.tensors)
    x[9, 0] = torch.nan
    with pytest.raises(ValueError, match=r"Training example 9 has NaN in its .*, which must be finite"):
        made(method, kind).fit(model_of(kind), TensorDataset(x, y)).attribute(CASES[kind].queries)
    x, y = (tensor.clone() for tensor in CASES[kind].queries.tensors)
    x[3, 0] = torch.inf
    with pytest.raises(ValueError, match=r"Query 3 has .* in its .*, which must be finite"):
        fitted(method, kind).attribute(TensorDataset(x, y))
    model = model_of(kind)
    with torch.no_grad():
        model.network[2].bias[0] = torch.nan
    with pytest.raises(ValueError, match=r"Training example 0 has NaN in its .*did training diverge"):
        fitted(method, kind, model=model).attribute(CASES[kind].queries)


@pytest.mark.parametrize("method", methods())
def test_wrong_options(method):
    with pytest.raises(TypeError, match=f"Unknown option nonsense for method '{method}'. Its options are: "):
        create(method, nonsense=1)
    for name, value in (("batch_size", 0), ("batch_size", True), ("seed", -1), ("seed", 0.5)):
        with pytest.raises(ValueError, match=f"`{name}` must be an integer of at least"):
            made(method, "classification", **{name: value})


#: Ways of STRIDE that share work between processes each in their own manner; 13 subsets divide unevenly.
STRIDE_OPTIONS = [
    ("classification", {"recovery": "ridge"}),
    ("classification", {"recovery": "lasso"}),
    ("classification", {"recovery": "lasso", "penalty": 0.2}),
    ("classification", {}),
    ("regression", {}),
    ("classification", {"basis": "learned", "recovery": "ridge"}),
    ("language", {"recovery": "prior"}),
    ("language", {"recovery": "lasso", "penalty": 0.2}),
    ("language", {"basis": "learned", "recovery": "ridge", "rank": 2}),
]


def everything():
    """Scores of all methods for queries more and fewer than processes, their tops and their self-influences."""
    by_name = {}
    for kind, options in STRIDE_OPTIONS:
        with few_steps():
            attributor = fitted("stride", kind, num_subsets=13, **options)
            for rows in (range(NUM_QUERIES), [2]):
                scores = attributor.attribute(cases.queries_of(kind, rows)).scores
                by_name[kind, str(options), len(rows)] = scores
    kind = "classification"
    for method in METHODS:
        attributor = fitted(method, kind)
        by_name[method] = attributor.attribute(cases.queries_of(kind)).scores
        if not {(method, "self-influence"), (method, "asked again")} & EXEMPT.keys():
            by_name[method, "self-influence"] = attributor.self_influence()
        if method in TOPS:
            by_name[method, "top"] = scored(method, kind, top_k=4).top(4).proponent_scores
    for method in ("stride", "ekfac", "trak"):
        by_name[method, "texts"] = scored(method, "language").scores
    return by_name


def on_each(number, port, folder):
    start(number, port, group=True)
    warnings.simplefilter("ignore")
    torch.save(everything(), folder / f"rank{number}.pt")


@pytest.mark.distributed
def test_two_processes_give_what_one_gives(tmp_path):
    first, second = run_two(on_each, tmp_path)
    for key, expected in everything().items():
        assert first[key].equal(second[key]), key
        close_scores(first[key], expected, 1e-4)


def test_calls_from_several_threads_on_one_model_wait_for_each_other():
    """Each puts the model in another state for its time."""
    case = CASES["classification"]
    model = case.make().train()
    methods_of_threads = ("grad-dot", "ekfac", "grad-dot", "stride", "ekfac", "stride")

    def ask(method):
        options = {"num_subsets": 8} if method == "stride" else {}
        return attribute(model, case.queries, train_data=case.train, method=method, **options, **cases.QUIET).scores

    expected = {method: ask(method) for method in set(methods_of_threads)}
    with ThreadPoolExecutor(3) as pool:
        for method, scores in zip(methods_of_threads, pool.map(ask, methods_of_threads), strict=True):
            assert torch.equal(scores, expected[method])
    assert model.training
