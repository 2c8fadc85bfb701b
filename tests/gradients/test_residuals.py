"""residuals="readout": the loss linearised at a readout's outputs, through the Jacobian of the network."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from stride_lightning import GroundTruth, evaluate, tune_damping
from stride_lightning.attribute import attribute, class_of, create, methods, self_influence
from stride_lightning.data.reading import Reading
from stride_lightning.gradients import residuals
from stride_lightning.tasks.likelihoods import columns
from stride_lightning.views.loggers import tag_of
from stride_lightning.views.report.page import header_facts
from tests.helpers.dense_residuals import REFERENCES, Dense
from tests.helpers.gradient_models import (
    EXACT,
    QUIET,
    TASKS,
    attributed,
    blocks_of,
    close_scores,
    fitted,
    mlp,
    points_for,
    save_weights,
    seeded,
)
from tests.helpers.texts import LanguageModule, Texts, padded

pytestmark = [
    #: Torch's own, of the first forward-mode derivatives.
    pytest.mark.filterwarnings(r"ignore:.torch\.jit\.script. is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:LiSSA ended with residuals"),
]
METHODS = (
    "datainf",
    "diagonal",
    "ekfac",
    "grad-dot",
    "influence-cg",
    "influence-lissa",
    "last-layer",
    "logra",
    "trak",
    "trak-newton",
)
OTHERS = sorted({name for name in methods() if class_of(name).__module__.startswith("stride_lightning.")} - {*METHODS})
READOUT = {"residuals": "readout"}
every_method = pytest.mark.parametrize("method", METHODS)


class Given:
    """A readout in place of the one that is fitted: a function of the inputs and of the network."""

    def __init__(self, outputs):
        self.outputs, self.fits = outputs, []

    def fit(self, model, task, train, *, layers=None, batch_size, device, show_progress):
        self.fits.append((task, len(train), batch_size, show_progress))
        return Answers(self.outputs, model, task, train, batch_size, device)


class Answers:
    def __init__(self, outputs, model, task, train, batch_size, device):
        self.outputs, self.model, self.task = outputs, model, task
        self.batch_size, self.device = batch_size, device
        self.train_outputs = self.outputs_of(train)

    def without_training(self):
        return self

    def outputs_of(self, queries, target="label"):
        assert target in ("label", "predicted")
        rows = Reading(queries, self.task, self.model, batch_size=self.batch_size, device=self.device)
        return torch.cat([columns(self.outputs(self.model, row.inputs)).detach() for row in rows])


@pytest.fixture
def given(monkeypatch):
    """Puts a readout of a function in the place of the fitted one."""

    def put(outputs):
        readout = Given(outputs)
        monkeypatch.setattr(residuals, "NetworkReadout", readout)
        return readout

    return put


# ---- by hand ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [14, 3])
@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("method", REFERENCES)
def test_scores_by_hand(method, kind, batch_size, given):
    task, num_outputs = TASKS[kind]
    model, other = (mlp(num_outputs=num_outputs, seed=seed) for seed in (0, 7))
    data, queries = points_for(kind), points_for(kind, 5, seed=1)
    readout = given(lambda model, x: other(x))
    options = EXACT[method] | {"task": task, "batch_size": batch_size, **READOUT}
    attributor = fitted(model, data, method, **options)
    assert readout.fits == [(task, 14, batch_size, False)]
    layers = ["2"] if method == "last-layer" else None
    sides = [Dense(task, model, other, part, layers) for part in (queries, data)]
    expected = REFERENCES[method](*sides, EXACT[method].get("damping"), model)
    expected = expected if method == "grad-dot" else expected / len(data)
    tolerance = 1e-4 if method == "influence-lissa" else 1e-5
    close_scores(attributor.attribute(queries).scores, expected, tolerance)
    of_itself = REFERENCES[method](sides[1], sides[1], EXACT[method].get("damping"), model).diagonal()
    influence = self_influence(model, train_data=data, method=method, **QUIET | options)
    close_scores(influence * (1 if method == "grad-dot" else len(data)), of_itself, tolerance)


@pytest.mark.parametrize("kind", TASKS)
def test_ekfac_of_a_single_layer_by_hand(kind, given):
    """In the basis of its two covariances, with the diagonal of the matrix there in place of the matrix."""
    task, num_outputs = TASKS[kind]
    model, other = seeded(lambda: nn.Sequential(nn.Linear(4, num_outputs))), mlp(num_outputs=num_outputs, seed=7)
    data, queries = points_for(kind), points_for(kind, 5, seed=1)
    given(lambda model, x: other(x))
    attribution = attributed(model, data, "ekfac", queries, task=task, **READOUT)
    (at,) = blocks_of(model).values()
    rows = torch.cat([at[: 4 * num_outputs].view(num_outputs, 4), at[4 * num_outputs :, None]], 1).flatten()
    mine, theirs = (Dense(task, model, other, part) for part in (queries, data))
    inputs = torch.cat([data.tensors[0], torch.ones(14, 1, dtype=torch.float64)], 1)
    sides = theirs.hessian.sum(0), inputs.T @ inputs
    basis = torch.kron(*(torch.linalg.eigh(side)[1] for side in sides))
    eigenvalues = (basis.T @ theirs.gauss_newton()[rows][:, rows] @ basis).diagonal()
    rotated = [side.gradients[:, rows] @ basis for side in (mine, theirs)]
    expected = rotated[0] / (eigenvalues + 0.3 * eigenvalues.mean()) @ rotated[1].T / 14
    close_scores(attribution.scores, expected)


# ---- the same where the readout is the model --------------------------------------------------------------------


@every_method
@pytest.mark.parametrize("kind", TASKS)
def test_a_readout_that_answers_as_the_model_does(method, kind, given):
    given(lambda model, x: model(x))
    task, num_outputs = TASKS[kind]
    arguments = mlp(num_outputs=num_outputs), points_for(kind), method, points_for(kind, 5, seed=1)
    theirs = attributed(*arguments, task=task, **READOUT)
    close_scores(theirs.scores, attributed(*arguments, task=task).scores, 1e-7)
    assert theirs.label != method


@every_method
def test_each_checkpoint_has_a_readout(method, given, tmp_path):
    readout, folder = given(lambda model, x: 0.5 * model(x)), save_weights(tmp_path)
    scores = attributed(mlp(seed=5), points_for(), method, checkpoints=folder, **READOUT).scores
    assert len(readout.fits) == 2
    if not method.startswith("trak"):  # which averages two factors apart
        alone = [attributed(mlp(seed=seed), points_for(), method, **READOUT).scores for seed in range(2)]
        close_scores(scores, sum(alone) / 2, 1e-4 if method == "influence-lissa" else 1e-5)


def test_predicted_targets_are_the_networks(given):
    given(lambda model, x: -model(x))  # whose answers are others
    model, (x, _) = mlp(), points_for(num=5, seed=1).tensors
    options = {"train_data": points_for(), "method": "ekfac", **READOUT, **QUIET}
    predicted = attribute(model, TensorDataset(x), target="predicted", **options)
    labelled = attribute(model, TensorDataset(x, model(x).argmax(1)), **options)
    close_scores(predicted.scores, labelled.scores, 1e-7)
    assert predicted.query_targets.equal(model(x).argmax(1))


def test_precision_of_the_model(given):
    """Whatever that of the readout is."""
    given(lambda model, x: 0.5 * model(x).double())
    full = attributed(mlp(), points_for(), "ekfac", **READOUT).scores
    for model, tolerance in ((mlp().float(), 1e-4), (mlp().bfloat16(), 0.2)):
        close_scores(attributed(model, points_for(), "ekfac", **READOUT).scores, full, tolerance)


# ---- refusals and names -----------------------------------------------------------------------------------------


def test_every_method_is_on_one_of_the_lists():
    assert len(METHODS) == 10
    assert {"grad-cos", "tracin", "information-loss", "further-training", "retraining", "stride"} <= {*OTHERS}


@pytest.mark.parametrize("method", OTHERS)
def test_other_methods_refuse_it(method):
    message = rf"Unknown option residuals for method '{method}'.*Methods with `residuals`: {', '.join(METHODS)}\."
    with pytest.raises(TypeError, match=message):
        create(method, residuals="readout")


def test_other_values():
    for value in ("network", None, True):
        with pytest.raises(ValueError, match=rf"`residuals` must be 'model' or 'readout', got {value!r}\."):
            create("ekfac", residuals=value)


@every_method
def test_texts_are_refused(method, given):
    readout = given(lambda model, x: model(x))
    with pytest.raises(ValueError, match=r"residuals='readout' needs one row of outputs per example.*one per token"):
        create(method, **READOUT, **QUIET).fit(LanguageModule(), DataLoader(Texts(4), 4, collate_fn=padded))
    assert not readout.fits


@every_method
def test_label_and_metadata(method, given):
    given(lambda model, x: 0.5 * model(x))
    for more, label in (({}, method), (READOUT, f"{method}, readout residuals")):
        attribution = attributed(mlp(), points_for(), method, **more)
        metadata = attribution.metadata
        assert (metadata["method"], attribution.label) == (method, label)
        assert metadata["options"]["residuals"] == more.get("residuals", "model")
        assert f"Attribution({label}: " in repr(attribution)
        assert header_facts(attribution, 1, 1)["Method"] == label
        assert attribution[0].label == label
        top = attributed(mlp(), points_for(), method, top_k=2, **more)
        assert f"({label}: " in repr(top)
    assert tag_of(attribution) == f"{method}-readout-residuals"


def test_rows_of_evaluations(given):
    given(lambda model, x: 0.5 * model(x))
    masks = torch.rand(20, 14, generator=torch.Generator().manual_seed(0)) < 0.5
    losses = torch.rand(1, 20, 14, generator=torch.Generator().manual_seed(1))
    truth, data = GroundTruth(masks, losses, [0]), points_for()
    both = [attributed(mlp(), data, "ekfac", **more) for more in ({}, READOUT)]
    evaluation = evaluate(both, truth, num_resamples=1, **QUIET)
    assert {row.name for row in evaluation.rows} == {"ekfac", "ekfac, readout residuals"}
    search = tune_damping(mlp(), data, train_data=data, truth=truth, dampings=[0.3], **READOUT, **QUIET)
    assert search.method == "ekfac, readout residuals"
    expected = evaluation.per_query["ekfac, readout residuals"]
    torch.testing.assert_close(search.per_query[0], expected)
