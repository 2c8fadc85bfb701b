"""STRIDE and what is explained by a function of the network's outputs, in whose place those of the readout stand."""

import lightning.pytorch as L
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from stride_lightning import BinaryClassification, Classification, Regression, attribute
from stride_lightning.attribute import create
from tests.helpers.tiny import perceptron, random_targets, random_tensor

TASKS = {"softmax": (Classification(), 3), "binary": (BinaryClassification(), 1), "Gaussian": (Regression(), 2)}
QUIET = {"show_progress": False}


def data_of(task, num_outputs, size, seed):
    targets = random_targets(task, size, num_outputs, seed + 100)
    return TensorDataset(random_tensor(size, 4, seed=seed), targets)


def minus_loss(task):
    def value(model, batch):
        outputs, targets = model(batch[0]), batch[1]
        if isinstance(task, Classification):
            return -F.cross_entropy(outputs, targets, reduction="none")
        if isinstance(task, BinaryClassification):
            return -F.binary_cross_entropy_with_logits(outputs, targets.to(outputs), reduction="none")[:, 0]
        return -(outputs - targets).square().sum(1) / 2

    return value


def margin(model, batch):
    outputs = model(batch[0])
    return outputs[:, 1] - outputs[:, 0]


def ask(model, task, queries, train, **options):
    return attribute(model, queries, train_data=train, task=task, method="stride", **QUIET | options)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("name", TASKS)
def test_minus_the_loss_has_the_scores_of_the_loss(name, batch_size):
    task, num_outputs = TASKS[name]
    model = perceptron(num_outputs=num_outputs).double()
    train, queries = data_of(task, num_outputs, 30, 0), data_of(task, num_outputs, 7, 1)
    expected = ask(model, task, queries, train, recovery="closed-form")
    attribution = ask(
        model, task, queries, train, recovery="closed-form", measure=minus_loss(task), batch_size=batch_size
    )
    torch.testing.assert_close(attribution.scores, expected.scores, rtol=1e-4, atol=1e-6)
    assert attribution.metadata["measure"] == {"name": "value", "direction": "raises"}
    assert attribution.std is None


def test_a_linear_measure_is_what_its_outputs_are():
    """Scores of a margin are a difference of those of two outputs, and ten times a margin has ten times its scores."""

    def output(number):
        return lambda model, batch: model(batch[0])[:, number]

    task = Classification()
    model, train, queries = perceptron().double(), data_of(task, 3, 30, 0), data_of(task, 3, 7, 1)

    def scores_of(measure):
        return ask(model, task, queries, train, recovery="closed-form", measure=measure).scores

    parts = scores_of(output(1)) - scores_of(output(0))
    torch.testing.assert_close(scores_of(margin), parts, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(scores_of(lambda m, b: 10 * margin(m, b)), 10 * parts, rtol=1e-4, atol=1e-5)


def test_positive_scores_raise_the_measure():
    """Most examples of a class make its own logits larger than the others."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 4, generator=generator, dtype=torch.float64)
    y = (x[:, 0] > 0).long()
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double().eval()
    scores = ask(
        model, Classification(), TensorDataset(x, y), TensorDataset(x, y), recovery="closed-form", measure=margin
    )
    same = (y[:, None] == y) & (x @ x.T > 2)
    assert (scores.scores[same & (y == 1)] > 0).float().mean() > 0.95
    assert (scores.scores[same & (y == 0)] < 0).float().mean() > 0.95


class Wrapped(L.LightningModule):
    """Runs other things before and after its network; the task reads the logits."""

    def __init__(self):
        super().__init__()
        self.net, self.other = perceptron().double(), perceptron(seed=1).double()

    def forward(self, x):
        self.other(x)
        return self.net(x)


def test_the_output_that_the_task_reads_among_others():
    task, train, queries = Classification(), data_of(Classification(), 3, 30, 0), data_of(Classification(), 3, 7, 1)
    expected = ask(Wrapped(), task, queries, train, recovery="closed-form").scores
    scores = ask(Wrapped(), task, queries, train, recovery="closed-form", measure=minus_loss(task)).scores
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-6)


def test_other_calls_of_the_network_are_no_outputs_of_the_readout():
    """The readout tells outputs of the queries, not of what a measure makes of them."""

    def both(model, batch):
        return margin(model, batch) + model(batch[0] + 1)[:, 2]

    task, train, queries = Classification(), data_of(Classification(), 3, 30, 0), data_of(Classification(), 3, 7, 1)
    one, other = (
        ask(perceptron().double(), task, queries, train, recovery="closed-form", measure=measure).scores
        for measure in (both, margin)
    )
    torch.testing.assert_close(one, other)


def test_a_measure_that_does_not_read_the_outputs_is_refused():
    def inner(model, batch):
        return model[0](batch[0]).sum(1)

    task, train = Classification(), data_of(Classification(), 3, 30, 0)
    with pytest.raises(
        ValueError, match=r"STRIDE explains functions of the network's outputs, and inner\(model, batch\)"
    ):
        ask(perceptron().double(), task, train, train, recovery="closed-form", measure=inner)


def coupled(model, batch):
    return margin(model, batch).softmax(0)


def constant(model, batch):
    return margin(model, batch).detach()


@pytest.mark.parametrize(
    ("measure", "message"), [(coupled, "rows depend on each other"), (constant, "has no gradient")]
)
def test_wrong_functions_are_refused(measure, message):
    task, train = Classification(), data_of(Classification(), 3, 30, 0)
    with pytest.raises(ValueError, match=message):
        ask(perceptron().double(), task, train, train, recovery="closed-form", measure=measure)
    attributor = create("stride", recovery="closed-form", **QUIET)
    attributor.fit(perceptron().double(), train, task, measure=measure)
    with pytest.raises(ValueError, match=message):
        attributor.attribute(train)


@pytest.mark.parametrize("options", [{"recovery": "lasso"}, {"recovery": "prior", "num_subsets": 20}])
def test_recovery_with_subsets_is_refused(options):
    task, train = Classification(), data_of(Classification(), 3, 30, 0)
    with pytest.raises(ValueError, match="STRIDE explains a `measure` by the closed form"):
        ask(perceptron().double(), task, train, train, measure=margin, **options)


def test_predictions_and_effects_and_self_influence_have_no_measure():
    task, train = Classification(), data_of(Classification(), 3, 30, 0)
    attributor = create("stride", recovery="closed-form", **QUIET)
    attributor.fit(perceptron().double(), train, task, measure=margin)
    with pytest.raises(ValueError, match=r"target='predicted'.*measure="):
        attributor.attribute(train, target="predicted")
    with pytest.raises(ValueError, match="without `measure`"):
        attributor.effect(train, [[0, 1]])
    with pytest.raises(ValueError, match="without `measure`"):
        attributor.self_influence()
