"""The loss of a training_step without its Trainer: what is refused, and which hooks are not called."""

import pytest
import torch
from torch.nn import functional as F

from stride_lightning import Classification
from tests.retraining.cases import Net, in_double, mlp, points
from tests.retraining.further import SPREAD, ask, batches_of, make_net


class NoisyStep(Net):
    """Dropout that is no module, and noise that is always there."""

    noise = 0.0

    def training_step(self, batch, batch_idx):
        x = F.dropout(batch[0], 0.3, self.training) + self.noise * torch.randn_like(batch[0])
        return self.loss(self.network(x), batch[1])


class NoisierStep(NoisyStep):
    noise = 0.1


@pytest.mark.parametrize("kind", [Net, NoisyStep, NoisierStep])
def test_a_loss_that_is_a_mean_over_examples_passes_whatever_is_drawn(kind):
    data, queries = in_double(points()), in_double(points(2, seed=1))  # few: losses that draw are measured often
    result = ask(make_net(mlp, loss=SPREAD, kind=kind), batches_of(data), queries, left_out=[4], epochs=1, num_seeds=1)
    assert "training_step" in result.metadata["one_by_one_because"]


def test_a_training_step_that_takes_no_single_example_has_differences_of_batches():
    class Squeezing(Net):
        def training_step(self, batch, batch_idx):
            return SPREAD(self(batch[0]).squeeze(0), batch[1])

    data = in_double(points())
    with pytest.warns(UserWarning, match="minimises another loss than Classification"):  # at single examples
        result = ask(make_net(mlp, kind=Squeezing), batches_of(data), data, task=Classification())
    assert result.metadata["own_loss"]["kind"] == "coupled"


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


class Detached(Net):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx).detach()


class Failing(Net):
    def training_step(self, batch, batch_idx):
        raise RuntimeError("no such thing")


REFUSED = {
    Detached: "The training_step of Detached returned a loss without gradient. Compute it without .detach()",
    Failing: r"The loss of Failing cannot be computed: OwnLoss\(\) failed.*RuntimeError: no such thing.*Pass `loss=fn`",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_loss_that_cannot_be_computed_is_refused_with_a_way_out(kind):
    data = in_double(points())
    with pytest.raises(ValueError, match=REFUSED[kind]):
        ask(make_net(mlp, kind=kind), batches_of(data), data)
    ask(make_net(mlp, kind=kind), batches_of(data), data, loss=row_losses)  # the way out


def row_losses(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")
