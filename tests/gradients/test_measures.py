"""What is explained of queries by a function: against gradients by hand, its sign, and functions that are refused."""

import itertools

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from stride_lightning import Classification, attribute
from stride_lightning.attribute import create
from stride_lightning.gradients.attributor import GradientAttributor
from stride_lightning.tasks.own_loss import OwnLoss
from tests.helpers.gradient_models import EXACT, close_scores, flat, mlp, points_for
from tests.helpers.own_losses import QUIET, ask, built, gradients, loader, rows_of
from tests.helpers.own_losses_together import VAE
from tests.helpers.own_means import Absolute
from tests.helpers.own_weighted import Texts
from tests.helpers.tiny import correlation

#: Torch's own, of the first forward-mode derivatives.
pytestmark = pytest.mark.filterwarnings(r"ignore:.torch\.jit\.script. is deprecated:DeprecationWarning")
LIKELIHOOD = {"task": Classification()}


def margin(model, batch):
    outputs = model(batch[0])
    return outputs[:, 2] - outputs[:, 0]


def minus_loss(model, batch):
    return -F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def minus_absolute(model, batch):
    return -(model.net(batch[0]) - batch[1]).abs().mean(1)


def distance(model, batch):
    """Of the two outputs of a module without ``forward``."""
    outputs = model.net(batch[0])
    return outputs[:, 0] * outputs[:, 1]


def slopes(model, examples, function):
    """Gradients of a function, one example after the other."""
    parameters, rows = list(model.parameters()), []
    for example in examples:
        batch = [part[None] for part in example]
        with torch.enable_grad():
            rows.append(flat(torch.autograd.grad(function(model, batch).sum(), parameters), parameters))
    return torch.stack(rows)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_positive_scores_raise_the_measure(batch_size):
    model, train, queries = mlp(), points_for(num=13), points_for(num=5, seed=1)
    mine = -slopes(model, train, minus_loss)
    attribution = attribute(
        *(model, queries),
        train_data=train,
        method="grad-dot",
        measure=margin,
        batch_size=batch_size,
        **LIKELIHOOD,
        **QUIET,
    )
    close_scores(attribution.scores, -slopes(model, queries, margin) @ mine.T)
    assert attribution.metadata["measure"] == {"name": "margin", "direction": "raises"}
    # A small step down the loss of an example raises the measure where its score is positive.
    row = int(attribution.scores[0].abs().argmax())
    before = margin(model, [part[:1] for part in queries.tensors])
    with torch.no_grad():
        start = 0
        for parameter in model.parameters():
            parameter -= 1e-4 * mine[row, start : start + parameter.numel()].reshape(parameter.shape)
            start += parameter.numel()
        change = margin(model, [part[:1] for part in queries.tensors]) - before
    assert float(change) == pytest.approx(1e-4 * float(attribution.scores[0, row]), rel=1e-2)


def test_a_measure_with_a_loss_of_the_modules_own():
    model, train, queries = built(Absolute), Absolute.data(13, 0), Absolute.data(5, 1)
    scores = ask(model, train, queries, measure=distance).scores
    close_scores(scores, -slopes(model, queries, distance) @ gradients(model, rows_of(train)).T)


@pytest.mark.parametrize("kind", ["likelihood", "own"])
@pytest.mark.parametrize("method", [name for name in EXACT if name != "grad-cos"])
def test_minus_the_loss_has_the_scores_of_the_loss(method, kind):
    if kind == "own":
        model, data, measure = built(Absolute), Absolute.data, minus_absolute
    else:
        model, data, measure = mlp(), lambda num, seed: points_for(num=num, seed=seed), minus_loss
    options = {"train_data": data(13, 0), "method": method, "task": OwnLoss() if kind == "own" else Classification()}
    options |= QUIET | EXACT[method]
    expected = attribute(model, data(5, 1), **options).scores
    scores = attribute(model, data(5, 1), measure=measure, **options).scores
    if method.startswith("trak"):  # of a query it compares directions
        assert all(correlation(*pair) > 0.9999 for pair in zip(scores, expected, strict=True))
    else:
        close_scores(scores, expected, 1e-4)


@pytest.mark.parametrize("method", ["information-loss", "information-gain"])
def test_information_of_a_measure(method):
    model, train, queries = mlp(), points_for(num=13), points_for(num=5, seed=1)
    options = {"train_data": train, "method": method, "measure": margin, "ridge": 0.1} | QUIET | LIKELIHOOD
    scores = attribute(model, queries, **options).scores
    assert scores.shape == (5, 13)
    assert (scores > 0).any()


def test_a_measure_of_texts_of_unequal_lengths():
    def of_first_token(model, batch):
        return model.head(torch.tanh(model.embedding(batch[:, 0])))[:, 3]

    model, train, queries = built(Texts), Texts.data(13, 0), Texts.data(5, 1)
    scores = [ask(model, train, queries, measure=of_first_token, batch_size=size).scores for size in (1, 7, 64)]
    parameters, rows = list(model.parameters()), []
    for text in queries:
        value = of_first_token(model, text[None]).sum()
        rows.append(flat(torch.autograd.grad(value, parameters, allow_unused=True), parameters))
    for each in scores:
        close_scores(each, -torch.stack(rows) @ gradients(model, rows_of(train)).T)


def test_a_measure_is_taken_in_eval_mode():
    def by_mode(model, batch):
        return margin(model, batch) * (2.0 if model.training else 1.0)

    model, data = mlp(), points_for(num=13)
    options = {"train_data": data, "method": "grad-dot"} | QUIET | LIKELIHOOD
    one, other = (attribute(model, data, measure=measure, **options).scores for measure in (by_mode, margin))
    close_scores(one, other)


def test_a_random_measure_has_draws_of_its_own():
    def noisy(model, batch):
        return margin(model, batch) * (1 + torch.randn(len(batch[0]), dtype=torch.float64))

    model, data = mlp(), points_for(num=13)
    options = {"train_data": data, "method": "grad-dot", "measure": noisy} | QUIET | LIKELIHOOD
    one, other = (attribute(model, data, batch_size=size, **options).scores for size in (1, 64))
    close_scores(one, other)


def test_a_function_as_the_loss():
    def absolute(model, batch):
        return (model.net(batch[0]) - batch[1]).abs().mean(1)

    model, train, queries = built(Absolute), Absolute.data(13, 0), Absolute.data(5, 1)
    for method in ("grad-dot", "ekfac", "trak"):
        options = {} if method == "grad-dot" else {"damping": 0.1}
        expected = ask(model, train, queries, method, **options)
        attribution = ask(model, train, queries, method, task=None, loss=absolute, **options)
        close_scores(attribution.scores, expected.scores, 1e-4)
        assert attribution.metadata["loss"].startswith("absolute, as `loss` says")


def test_predictions_need_a_likelihood():
    model, data = built(Absolute), Absolute.data(13, 0)
    with pytest.raises(
        ValueError, match=r"target='predicted' needs the loss of a likelihood.*a loss of the module's own"
    ):
        ask(model, data, data, target="predicted")
    network, points = mlp(), points_for(num=13)
    options = {"train_data": points, "method": "grad-dot", "measure": margin} | QUIET | LIKELIHOOD
    with pytest.raises(ValueError, match=r"target='predicted' needs the loss of a likelihood.*by measure="):
        attribute(network, points, target="predicted", **options)


def test_self_influence_has_no_measure():
    model, data = built(VAE), VAE.data(13, 0)
    attributor = create("grad-dot", **QUIET).fit(model, loader(VAE, data), OwnLoss(), measure=lambda m, b: b[0].sum(1))
    with pytest.raises(ValueError, match=r"self_influence\(\) tells effects on losses"):
        attributor.self_influence()


# ---- functions that are no functions of single examples -----------------------------------------------------------


def mean(model, batch):
    return margin(model, batch).mean()


def coupled(model, batch):
    return margin(model, batch).softmax(0)


def constant(model, batch):
    return margin(model, batch).detach()


def not_a_number(model, batch):
    return (margin(model, batch) * 0).log() - (margin(model, batch) * 0).log()


WRONG = {
    mean: "must return one number per example",
    coupled: "rows depend on each other",
    constant: "has no gradient in the model's parameters",
    not_a_number: "is not finite",
}


@pytest.mark.parametrize("argument", ["loss", "measure"])
@pytest.mark.parametrize("function", WRONG, ids=lambda function: function.__name__)
def test_wrong_functions_are_refused_before_the_fit(function, argument, monkeypatch):
    monkeypatch.setattr(GradientAttributor, "fit_model", lambda *_: pytest.fail("long work began"))
    data = points_for(num=13)
    with pytest.raises(ValueError, match=rf"`{argument}` {function.__name__}\(model, batch\) .*{WRONG[function]}"):
        attribute(mlp(), data, train_data=data, method="ekfac", **{argument: function}, **QUIET)


@pytest.mark.parametrize("function", WRONG, ids=lambda function: function.__name__)
def test_wrong_measures_of_later_queries(function):
    data = points_for(num=13)
    attributor = create("grad-dot", **QUIET).fit(mlp(), data, Classification(), measure=function)
    with pytest.raises(ValueError, match=WRONG[function]):
        attributor.attribute(points_for(num=5, seed=1))


def test_errors_name_the_function():
    def by_the_clock(model, batch):
        return margin(model, batch) * next(numbers)

    numbers = itertools.count(1)
    data = points_for(num=13)
    with pytest.raises(ValueError, match="The function by_the_clock gives another loss when it runs again"):
        attribute(mlp(), data, train_data=data, method="grad-dot", measure=by_the_clock, **LIKELIHOOD, **QUIET)


def test_queries_of_another_form_than_the_training_data():
    """A measure may read what only queries have."""

    def towards(model, batch):
        return (model(batch[0]) * batch[2]).sum(1)

    model, train, points = mlp(), points_for(num=13), points_for(num=5, seed=1)
    queries = TensorDataset(*points.tensors, torch.ones(5, 3, dtype=torch.float64))
    options = {"train_data": train, "method": "grad-dot", "measure": towards} | QUIET | LIKELIHOOD
    expected = slopes(model, train, minus_loss)
    close_scores(attribute(model, queries, **options).scores, slopes(model, queries, towards) @ expected.T)
