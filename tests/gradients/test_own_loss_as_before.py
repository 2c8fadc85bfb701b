"""What a loss of the module's own leaves behind, checkpoints, and losses that cannot be read."""

import lightning.pytorch as L
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from stride_lightning import TracInCallback, attribute
from tests.helpers.gradient_models import check_same_condition, close_scores, condition_of
from tests.helpers.own_losses import QUIET, ask, brute_force, built, loader, numbers
from tests.helpers.own_losses_together import VAE, Contrastive
from tests.helpers.own_means import Absolute, Penalised
from tests.helpers.own_shapes import TiedFunction
from tests.helpers.own_weighted import ClassWeights


class Busy(Absolute):
    """Leaves traces wherever a step can."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(4), nn.Dropout(0.5)
        self.seen, self.last, self.count = [], None, 0
        self.register_buffer("moving", torch.zeros(2))

    def training_step(self, batch, batch_idx):
        x = self.drop(self.norm(batch[0]))
        outputs = self.net(x)
        self.seen.append(batch_idx)
        self.last, self.count = outputs, self.count + 1
        self.moving.mul_(0.9).add_(0.1 * outputs.detach().mean(0))
        torch.rand(1)
        self.log("loss", outputs.sum())
        batch[0].add_(1)  # its own inputs
        return F.l1_loss(outputs, batch[1])


@pytest.mark.parametrize("method", ["grad-dot", "ekfac", "trak", "influence-cg"])
@pytest.mark.parametrize("cls", [Busy, VAE, Contrastive, TiedFunction], ids=lambda cls: cls.__name__)
def test_the_module_is_as_before(cls, method):
    model, data = built(cls), cls.data(13, 0)
    before, attributes = condition_of(model), {name: vars(model).get(name) for name in ("seen", "last", "count")}
    inputs = [value.clone() for value in data.tensors]
    ask(model, data, data, method, **({} if method == "grad-dot" else {"damping": 1.0}))
    check_same_condition(before, model)
    assert {name: vars(model).get(name) for name in attributes} == attributes
    assert all(map(torch.equal, data.tensors, inputs))


@pytest.mark.parametrize("number", [0, 3, 20, 40])
def test_the_module_is_as_before_after_an_error(number):
    class Failing(Busy):
        def training_step(self, batch, batch_idx):
            if len(calls) == number:
                raise RuntimeError("in the middle")
            calls.append(None)
            loss = super().training_step(batch, batch_idx)
            return loss

    calls = []
    model, data = built(Failing), numbers(13, 0)
    before = condition_of(model)
    with pytest.raises((ValueError, RuntimeError), match="in the middle"):
        ask(model, data, data)
    check_same_condition(before, model)
    assert (model.seen, model.last, model.count) == ([], None, 0)


# ---- checkpoints --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [Absolute, ClassWeights, VAE], ids=lambda cls: cls.__name__)
def test_checkpoints_are_means_over_weights(cls, tmp_path):
    """Weights are exchanged under the plan, which was made at others."""
    models, train, queries = [built(cls, seed) for seed in (1, 2)], cls.data(13, 0), cls.data(5, 1)
    for number, model in enumerate(models):
        torch.save(model.state_dict(), tmp_path / f"{number}.pt")
    scores = ask(built(cls), train, queries, checkpoints=tmp_path).scores
    each = [ask(model, train, queries).scores for model in models]
    close_scores(scores, sum(each) / 2)
    if cls is not VAE:
        close_scores(scores, sum(brute_force(model, train, queries) for model in models) / 2)


class Trained(Penalised):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05)


def test_records_of_tracin(tmp_path):
    model, train, queries = built(Trained), numbers(16, 0), numbers(5, 1)
    callback = TracInCallback(dirpath=tmp_path / "records", every_n_epochs=1)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(max_epochs=2, callbacks=[callback], default_root_dir=tmp_path, **options)
    weights = []

    class Noting(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            weights.append({name: value.clone() for name, value in pl_module.state_dict().items()})

    trainer.callbacks.append(Noting())
    trainer.fit(model, loader(Trained, train))
    expected = 0
    for state in weights:
        other = built(Trained)
        other.load_state_dict(state)
        expected = expected + 0.05 * brute_force(other, train, queries)
    attribution = attribute(
        model, loader(Trained, queries), train_data=loader(Trained, train), method="tracin", **QUIET
    )
    close_scores(attribution.scores, expected)
    assert len(attribution.metadata["checkpoints"]) == 2
    assert "the penalty on weights belongs to no example" in attribution.metadata["loss"]


# ---- what cannot be read ------------------------------------------------------------------------------------------


class NotFinite(Absolute):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * float("nan")


class Never(Absolute):
    def training_step(self, batch, batch_idx):
        return None


class Vector(Absolute):
    def training_step(self, batch, batch_idx):
        return (self.net(batch[0]) - batch[1]).abs().mean(1)


class Detached(Absolute):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx).detach()


BAD = {
    NotFinite: "returned nan as its loss",
    Never: "returned None for all",
    Vector: "expected a loss",
    Detached: "without gradient",
}


@pytest.mark.parametrize("cls", BAD, ids=lambda cls: cls.__name__)
def test_a_step_without_a_loss_is_refused(cls):
    data = numbers(13, 0)
    with pytest.raises(ValueError, match=f"training_step of {cls.__name__}.*{BAD[cls]}"):
        ask(built(cls), data, data)


@pytest.mark.parametrize("batch_size", [7, 256])
@pytest.mark.parametrize("kind", ["training example", "query"])
def test_an_example_that_is_not_finite_is_named(kind, batch_size):
    """L1 has a gradient there all the same: its sign."""
    wrong, right = numbers(100, 0), numbers(9, 1)
    train, queries = (wrong, right) if kind == "training example" else (right, wrong)
    for number in (1, 3):  # the third is among those that are looked at first
        wrong.tensors[1][1:4, 0] = 0
        wrong.tensors[1][number, 0] = float("nan")
        with pytest.raises(ValueError, match=f"The loss is not finite for {kind} {number}. Check"):
            ask(built(Absolute), train, queries, batch_size=batch_size)


def test_examples_that_cannot_be_read_alone_are_named_as_a_batch():
    class Rooted(Absolute):
        """The root of a sum over the batch, less than it is for a single example."""

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + 0 * (9.5 - batch[2].sum()).sqrt()

    data = numbers(9, 0)
    parts = [TensorDataset(*data.tensors, torch.full((9,), value)) for value in (1.0, 1.2)]
    with pytest.raises(ValueError, match="The loss of a batch, or an output of it, is not finite for query 0, query 1"):
        ask(built(Rooted), parts[0], parts[1])


class TiedContrastive(Contrastive):
    """A weight that no module uses, so that rows cannot be told apart, and a loss of all examples together."""

    def __init__(self):
        super().__init__()
        self.other = nn.Linear(4, 3)

    def training_step(self, batch, batch_idx):
        return self.loss_from(self.one(batch[0]), F.linear(batch[1], self.other.weight))


def test_a_coupled_loss_whose_rows_cannot_be_told_apart_is_refused():
    data = TiedContrastive.data(13, 0)
    expected = r"training_step of TiedContrastive does not tell .* apart \(the loss uses.*couples them.*`loss=`"
    with pytest.raises(ValueError, match=expected):
        ask(built(TiedContrastive), data, data)


class Temperate(Contrastive):
    """The same loss at a temperature that is learnt and belongs to no layer."""

    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.zeros(()))

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * self.temperature.exp()


def test_examples_have_no_share_in_a_temperature():
    data = Contrastive.data(13, 0)
    with_one = ask(built(Temperate), data, data)
    torch.testing.assert_close(with_one.scores, ask(built(Contrastive), data, data).scores, rtol=1e-5, atol=1e-7)
    assert "no share in the gradient of temperature" in with_one.metadata["loss"]
