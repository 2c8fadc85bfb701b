"""The loss of a training_step without its Trainer: whose examples have shares, and which hooks are not called."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from tests.retraining.cases import NUM_TRAIN, Net, in_double, mlp, points
from tests.retraining.further import SMOOTHED, ask, batches_of, make_net


def by_class(num=NUM_TRAIN):
    """In the order of their classes: the first batch holds one class alone."""
    x, y = points(num).tensors
    order = y.argsort(stable=True)
    return in_double(TensorDataset(x[order], y[order]))


class NoisyStep(Net):
    """Dropout that is no module, and noise that is always there."""

    noise = 0.0

    def training_step(self, batch, batch_idx):
        x = F.dropout(batch[0], 0.3, self.training) + self.noise * torch.randn_like(batch[0])
        return self.loss(self.network(x), batch[1])


class NoisierStep(NoisyStep):
    noise = 0.1


class Pairwise(Net):
    """A loss of pairs of examples."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + torch.cdist(*2 * [self(batch[0])]).mean()


WEIGHTED = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 5.0]).double())


@pytest.mark.parametrize(
    ("kind", "loss"),
    [
        (Net, WEIGHTED),
        (NoisyStep, WEIGHTED),
        (Pairwise, F.cross_entropy),
        (Net, nn.CrossEntropyLoss(reduction="sum", label_smoothing=0.1)),
    ],
    ids=["class weights", "under dropout", "pairs", "sum"],
)
@pytest.mark.parametrize("data", [by_class, lambda: in_double(points())], ids=["sorted", "mixed"])
def test_a_loss_that_is_not_a_mean_over_examples_is_refused(kind, loss, data):
    with pytest.raises(
        ValueError, match=r"must return the mean of its examples' losses.*class weights.*Task of your own"
    ):
        ask(make_net(mlp, loss=loss, kind=kind), batches_of(data()), data())


@pytest.mark.parametrize("kind", [Net, NoisyStep, NoisierStep])
def test_a_loss_that_is_a_mean_over_examples_passes_whatever_is_drawn(kind):
    data = by_class()
    result = ask(make_net(mlp, loss=SMOOTHED, kind=kind), batches_of(data), data)
    assert "training_step" in result.metadata["one_by_one_because"]


def test_a_training_step_that_takes_no_single_example_is_refused():
    class Squeezing(Net):
        def training_step(self, batch, batch_idx):
            return SMOOTHED(self(batch[0]).squeeze(0), batch[1])

    data = in_double(points())
    with pytest.raises(ValueError, match=r"training_step of Squeezing, because it fails on a single example"):
        ask(make_net(mlp, kind=Squeezing), batches_of(data), data)


HOOKS = [
    *("backward", "optimizer_step", "optimizer_zero_grad", "configure_gradient_clipping", "on_before_backward"),
    *("on_after_backward", "on_before_optimizer_step", "on_before_zero_grad"),
]


@pytest.mark.parametrize("name", HOOKS)
def test_hooks_that_change_gradients_are_warned_of(name):
    data, kind = in_double(points()), type("Hooked", (Net,), {name: lambda self, *_, **__: None})
    inherited = type("Inherits", (kind,), {"on_train_start": lambda self: None})
    with pytest.warns(UserWarning, match=f"Inherits overrides {name}. Further training does not call these hooks"):
        result = ask(make_net(mlp, kind=inherited), batches_of(data), data)
    assert result.effects_by_seed.equal(ask(make_net(mlp), batches_of(data), data).effects_by_seed)


def test_what_cannot_be_copied_is_refused_with_a_hint():
    model, data = make_net(mlp), in_double(points())
    model.last_outputs = model(data.tensors[0])
    with pytest.raises(ValueError, match=r"Net cannot be copied.*Detach or delete them"):
        ask(model, batches_of(data), data)


def test_a_loss_without_gradient_is_refused():
    class Detached(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx).detach()

    data = in_double(points())
    with pytest.raises(ValueError, match="it returned a loss without gradient"):
        ask(make_net(mlp, kind=Detached), batches_of(data), data)
