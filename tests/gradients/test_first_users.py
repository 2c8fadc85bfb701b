"""What first users ran into: examples that are not where they seem to be, and weights that nothing follows from."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset

from stride_lightning import Classification, TracInCallback, attribute
from tests.helpers.gradient_models import attributed, gradients_of
from tests.helpers.models import Classifier, build, classification_data, loader, train
from tests.retraining.cases import LastState, points


class SortedInside(nn.Module):
    """Evaluates the examples of a batch in another order, as packed sequences do."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        order = x[:, 0].argsort()
        return self.outer(torch.tanh(self.inner(x[order]))[order.argsort()])


class OnlySome(nn.Module):
    """A layer that sees the rows of some examples alone."""

    def __init__(self):
        super().__init__()
        self.first, self.expert = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        outputs, chosen = self.first(x), x[:, 0] > 0
        return outputs.index_add(0, chosen.nonzero()[:, 0], self.expert(x[chosen]))


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        x /= 2
        return self.layer(x)


def grad_dot_by_hand(model, train, queries):
    copies = [TensorDataset(data.tensors[0].clone(), data.tensors[1]) for data in (queries, train)]
    mine, theirs = (gradients_of(model, Classification(), data) for data in copies)
    return mine @ theirs.T


@pytest.mark.parametrize("kind", [SortedInside, OnlySome, InPlace])
def test_scores_are_right_whatever_a_model_does_inside(kind):
    torch.manual_seed(0)
    model, train, queries = kind(), classification_data(30), classification_data(6, seed=1)
    scores = attributed(model, train, "grad-dot", queries, batch_size=7).scores
    torch.testing.assert_close(scores, grad_dot_by_hand(model, train, queries), rtol=1e-4, atol=1e-6)


def test_the_last_layer_of_a_model_that_changes_its_inputs():
    model, train, queries = InPlace(), classification_data(30), classification_data(6, seed=1)
    scores = attributed(model, train, "last-layer", queries).scores
    halved = [TensorDataset(data.tensors[0] / 2, data.tensors[1]) for data in (train, queries)]
    expected = attributed(model.layer, halved[0], "last-layer", halved[1]).scores
    torch.testing.assert_close(scores, expected)


def test_examples_that_influence_each_other_late_are_refused():
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            outputs, special = self.layer(x), x[:, 0] > 0
            return outputs - outputs[special].mean(0) if special.sum() > 1 else outputs

    data = classification_data(40)
    data.tensors[0][:2, 0] = -1
    with pytest.raises(ValueError, match="change with the rest of its batch"):
        attributed(Late(), data, "grad-dot")


@pytest.mark.parametrize("method", ["ekfac", "influence-cg", "influence-lissa", "last-layer", "logra", "diagonal"])
def test_a_model_that_is_sure_of_everything_has_no_curvature(method):
    data = TensorDataset(torch.ones(12, 4), torch.zeros(12).long())
    model = nn.Linear(4, 3)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.copy_(torch.tensor([1e6, 0.0, 0.0]))
    with pytest.raises(ValueError, match=r"it is 0 in all directions.*grad-dot"):
        attributed(model, data, method)


def test_a_tensor_of_one_element_with_any_stride():
    model = nn.Linear(3, 1)
    model.bias.data = torch.arange(5.0)[::5]
    data = TensorDataset(torch.randn(6, 3), torch.randn(6))
    assert attributed(model, data, "grad-dot").scores.isfinite().all()


def test_weights_that_no_record_has_are_warned_of(tmp_path):
    model, data = build(Classifier), classification_data(20)
    train(model, loader(data), tmp_path, TracInCallback(), max_epochs=1)
    attributed(model, data, "tracin")
    bias = model.network[0].bias
    bias.data.add_(1.0)
    with pytest.warns(UserWarning, match="TracIn sums over 1 records.* none of them has the model's present weights"):
        attributed(model, data, "tracin")
    bias.data.sub_(1.0)
    bias.requires_grad_(False)
    with pytest.warns(UserWarning, match="had a learning rate in training, but they are frozen.*: network.0.bias"):
        attributed(model, data, "tracin", record=tmp_path / "tracin")


def test_positions_looked_up_once_for_all_examples_stay_fast():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.places, self.out = nn.Embedding(9, 4), nn.Embedding(5, 4), nn.Linear(4, 3)

        def forward(self, x):
            hidden = self.tokens(x) + self.places(torch.arange(x.shape[1])[None])
            return self.out(torch.tanh(hidden)).mean(1)

    torch.manual_seed(0)
    data, model = TensorDataset(torch.randint(0, 9, (14, 5)), torch.arange(14) % 3), Positions()
    attribution = attributed(model, data, "grad-dot", task=Classification(), batch_size=5)
    assert attribution.metadata["gradients"]["blocks"] == {"factors": 3}
    torch.testing.assert_close(attribution.scores, grad_dot_by_hand(model, data, data), rtol=1e-4, atol=1e-6)


# ---- activation checkpointing -----------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    """The middle of it keeps no activations; with ``None`` it keeps them."""

    def __init__(self, use_reentrant):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.use_reentrant = use_reentrant

    def forward(self, x):
        hidden = torch.tanh(self.first(x))
        if self.use_reentrant is None:
            return self.last(torch.tanh(self.middle(hidden)))
        inner = checkpoint(lambda values: torch.tanh(self.middle(values)), hidden, use_reentrant=self.use_reentrant)
        return self.last(inner)


GRADIENT_METHODS = [
    "datainf",
    "ekfac",
    "grad-dot",
    "influence-cg",
    "influence-lissa",
    "information-loss",
    "logra",
    "trak",
]


def checkpointed(use_reentrant, method, **options):
    torch.manual_seed(0)
    model = Checkpointed(use_reentrant)
    return attributed(model, classification_data(30), method, classification_data(6, seed=1), batch_size=7, **options)


@pytest.mark.filterwarnings("ignore:LiSSA ended with residuals")
@pytest.mark.parametrize("method", GRADIENT_METHODS)
def test_activation_checkpointing_changes_no_score(method):
    expected = checkpointed(None, method)
    torch.testing.assert_close(checkpointed(False, method).scores, expected.scores, rtol=1e-3, atol=1e-6)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")  # torch's, of passes without gradients
@pytest.mark.parametrize("method", GRADIENT_METHODS)
def test_reentrant_checkpointing_is_refused_in_our_words(method):
    with pytest.raises(ValueError, match=r"^Checkpointed runs .* use_reentrant=True.*`if self.training`.*`layers="):
        checkpointed(True, method)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_layers_after_reentrant_checkpointing_have_gradients():
    scores = checkpointed(True, "grad-dot", layers=["last"]).scores
    torch.testing.assert_close(scores, checkpointed(None, "grad-dot", layers=["last"]).scores)


# ---- what tasks and inputs do -----------------------------------------------------------------------------------


class OneByOneTask(Classification):
    """Runs the model for every example by itself."""

    def outputs(self, model, inputs):
        return torch.cat([model(piece[None]) for piece in inputs])


@pytest.mark.parametrize("method", ["grad-dot", "ekfac", "influence-cg", "last-layer", "trak"])
def test_a_task_that_runs_the_model_once_per_example(method):
    data, queries = classification_data(30), classification_data(6, seed=1)
    options = {"layers": ["network.2"]} if method == "last-layer" else {}
    model = build(Classifier)
    attribution = attributed(model, data, method, queries, task=OneByOneTask(), batch_size=7, **options)
    expected = attributed(model, data, method, queries, task=Classification(), batch_size=7, **options)
    if method in ("grad-dot", "influence-cg", "last-layer"):  # the others depend on how parameters are blocked
        torch.testing.assert_close(attribution.scores, expected.scores, rtol=2e-3, atol=1e-5)
    assert set(attribution.metadata["gradients"]["blocks"]) == {"vectorized"}
    assert attribution.scores.isfinite().all()


class Annotated(torch.Tensor):
    """A tensor that carries more, with a ``new_empty`` that takes a size alone, as monai's MetaTensor has."""

    def new_empty(self, size, **_):
        return torch.Tensor.new_empty(self, size=size)


@pytest.mark.parametrize("method", ["stride", "grad-dot", "ekfac", "trak", "information-loss"])
def test_inputs_of_a_subclass_of_tensor(method):
    x, y = classification_data(30).tensors
    annotated = [(values.as_subclass(Annotated), label) for values, label in zip(x, y, strict=True)]
    model, queries = build(Classifier), classification_data(6, seed=1)
    attribution = attributed(model, annotated, method, queries)
    torch.testing.assert_close(attribution.scores, attributed(model, TensorDataset(x, y), method, queries).scores)


def test_parameters_that_are_slow_to_read_are_announced(capsys):
    attribute(LastState(), points(), train_data=points(), method="grad-dot", task=Classification())
    assert "are taken one example at a time, because torch cannot vectorise them" in capsys.readouterr().err
