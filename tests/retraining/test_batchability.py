"""What keeps models from training together: said why, and trained one by one with the right result all the same."""

import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from stride_lightning.data.examples import Examples
from stride_lightning.retraining.batchability import check_separate, check_vectorises, loss_factor
from stride_lightning.retraining.optimizers import CannotBatch
from stride_lightning.retraining.recipe import Recipe
from stride_lightning.retraining.retrain import retrain
from stride_lightning.retraining.together import Together
from stride_lightning.tasks.likelihoods import Classification, Regression
from tests.helpers.models import make_trainer
from tests.retraining import cases
from tests.retraining.cases import LastState, Net, batchnorm, by_hand, mlp, plain_net, points, sgd, some_masks

BATCH = 13  # and 12: BatchNorm needs two examples
EPOCHS = 2


def check_reason(model_fn, reason):
    recipe = Recipe(model_fn, points(), train_data=points(), max_epochs=EPOCHS, batch_size=BATCH)
    with pytest.raises(CannotBatch, match=reason):
        Together(recipe, 0)


def net(optimize=sgd, network=mlp, **methods):
    """A Net whose class has further methods."""
    kind = type("Own", (Net,), methods)
    return lambda: kind(network(), optimize)


def step(change):
    """A training step with another loss: ``change(model, outputs, targets)``."""
    return lambda model, batch, batch_idx: change(model, model(batch[0]), batch[1])


class ZeroHead(nn.Sequential):
    """Its last layer starts at zero, as in many published models: at first every loss is log 3."""

    def __init__(self):
        super().__init__(*mlp())
        nn.init.zeros_(self[2].weight)
        nn.init.zeros_(self[2].bias)


class Contrasting(nn.Module):
    """Takes the mean of the batch off, without any layer that is known for it."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(x - x.mean(0))


class Checkpointed(Contrasting):
    """Keeps no activations."""

    def forward(self, x):
        return checkpoint(self.layer, x, use_reentrant=False)


class Lengthwise(Contrasting):
    """Depends on how many examples there are, but not on which."""

    def forward(self, x):
        return self.layer(x) / len(x)


def plateau(model):
    optimizer = sgd(model)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": lr_scheduler.ReduceLROnPlateau(optimizer)}}


def two_optimizers(model):
    first, second = (torch.optim.SGD(model.network[i].parameters(), lr=0.1) for i in (0, 2))
    return [first, second]


def with_total_steps(model):
    optimizer = sgd(model)
    total = model.trainer.estimated_stepping_batches
    return {"optimizer": optimizer, "lr_scheduler": lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=total)}


def foreign(model):
    return torch.optim.SGD([*model.parameters(), nn.Parameter(torch.ones(1))], lr=0.1)


def smoothed(weight=None, smoothing=0.0):
    return step(lambda model, o, y: F.cross_entropy(o, y, weight=weight, label_smoothing=smoothing))


WEIGHTS = torch.tensor([1.0, 2.0, 5.0])
OTHER_LOSS = (
    "returns another loss than the mean of the classification loss over examples .does it have label smoothing, weights"
    "|it trains on the module's own loss"
)
NO_STEP = "training_step cannot be called without a Trainer|it trains on the module's own loss"
REASONS = {
    "batchnorm": (net(network=batchnorm), r"depends on the others in its batch, likely by network.1 \(BatchNorm1d\)"),
    "mean of the batch": (net(network=Contrasting), "depends on the others in its batch$"),
    "size of the batch": (net(network=Lengthwise), "depends on the others in its batch$"),
    "checkpointing": (net(network=Checkpointed), "it runs activation checkpointing, which torch.func does not"),
    "lstm": (net(network=LastState), r"torch.func cannot vectorise it, likely by network.lstm \(LSTM\): "),
    "control flow": (net(network=cases.Deciding), "torch.func cannot vectorise it: .*data-dependent control flow"),
    "manual": (lambda: cases.Manual(mlp(), sgd), r"it uses manual optimization \(automatic_optimization=False\)"),
    "weights": (net(training_step=smoothed(WEIGHTS)), OTHER_LOSS),
    "weights from zero": (net(network=ZeroHead, training_step=smoothed(WEIGHTS)), OTHER_LOSS),
    "sum": (net(training_step=step(lambda m, o, y: F.cross_entropy(o, y, reduction="sum"))), OTHER_LOSS),
    "penalty": (
        net(training_step=step(lambda m, o, y: F.cross_entropy(o, y) + 0.01 * m.network[0].weight.square().sum())),
        OTHER_LOSS,
    ),
    "penalty while training": (
        net(training_step=step(lambda m, o, y: F.cross_entropy(o, y) + 0.1 * m.training * o.square().mean())),
        OTHER_LOSS,
    ),
    "noise": (net(training_step=lambda m, b, i: F.cross_entropy(m(b[0] + torch.randn_like(b[0])), b[1])), OTHER_LOSS),
    "warm-up": (net(training_step=step(lambda m, o, y: F.cross_entropy(o, y) * (1 + m.current_epoch))), NO_STEP),
    "number of steps": (net(training_step=step(lambda m, o, y: F.cross_entropy(o, y) / (1 + m.global_step))), NO_STEP),
    "batch number": (net(training_step=lambda m, b, i: F.cross_entropy(m(b[0]), b[1]) * (1 + i)), OTHER_LOSS),
    "no loss": (net(training_step=lambda m, b, i: None), NO_STEP),
    "rmsprop": (net(lambda m: torch.optim.RMSprop(m.parameters())), "RMSprop is not one of the optimizers that train"),
    "lbfgs": (net(lambda m: torch.optim.LBFGS(m.parameters())), r"LBFGS is not .* \(SGD, Adam, AdamW\)"),
    "two optimizers": (net(two_optimizers), "configure_optimizers returns 2 optimizers and 0 schedulers"),
    "no optimizer": (net(lambda m: None), "configure_optimizers returns 0 optimizers"),
    "plateau": (net(plateau), "its ReduceLROnPlateau needs a metric that only a Trainer monitors"),
    "needs a trainer": (net(with_total_steps), r"configure_optimizers needs a Trainer \(RuntimeError: "),
    "foreign parameters": (net(foreign), "its optimizer has parameters that are not the model's"),
    **{
        f"hook {name}": (net(**{name: lambda self, *args, **kwargs: None}), f"hooks that only a Trainer calls: {name}$")
        for name in (
            *("backward", "optimizer_step", "optimizer_zero_grad", "lr_scheduler_step", "configure_gradient_clipping"),
            *("on_fit_start", "on_train_start", "on_train_epoch_start", "on_train_batch_start", "on_train_batch_end"),
            *("on_before_zero_grad", "on_before_backward", "on_after_backward", "on_before_optimizer_step"),
            *("on_train_epoch_end", "on_train_end", "on_fit_end", "configure_callbacks", "setup"),
        )
    },
}


@pytest.mark.parametrize("case", REASONS)
def test_what_cannot_train_together_says_why(case):
    check_reason(*REASONS[case])


@pytest.mark.filterwarnings("ignore")  # for users, torch's warning about its weights is no error
def test_an_lstm_can_be_vectorised_with_its_gradient_but_not_alone():
    reason = r"torch.func cannot vectorise it, likely by network.lstm \(LSTM\): Batching rule not implemented"
    check_reason(net(network=LastState), reason)


def frozen_statistics():
    network = batchnorm()
    network[1].eval()
    return network


TOGETHER = {
    "plain": net(),
    "validation hooks": net(on_validation_epoch_end=lambda self: None, validation_step=lambda self, b, i: None),
    "logs": net(training_step=step(lambda m, o, y: (m.log_dict({"a": o.mean()}), F.cross_entropy(o, y))[1])),
    "no batch number": net(training_step=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])),
    "in a dict": net(training_step=step(lambda m, o, y: {"loss": F.cross_entropy(o, y), "other": o})),
    "multiple": net(training_step=step(lambda m, o, y: 10 * F.cross_entropy(o, y))),
    "smoothing": net(training_step=smoothed(smoothing=0.1)),
    "smoothing from zero": net(network=ZeroHead, training_step=smoothed(smoothing=0.1)),
    "frozen batchnorm": net(network=frozen_statistics),
}


@pytest.mark.filterwarnings("ignore:Found . module.s. in eval mode")
@pytest.mark.parametrize("case", TOGETHER)
def test_what_can_train_together(case):
    model_fn, data, masks = TOGETHER[case], points(), some_masks(3)
    truth = retrain(model_fn, data, train_data=data, masks=masks, max_epochs=EPOCHS, batch_size=BATCH, num_seeds=1)
    assert truth.metadata["one_by_one_because"] is None

    factor, smoothing = (10 if case == "multiple" else 1), 0.1 * case.startswith("smoothing")

    def loss(model, x, y):
        return factor * F.cross_entropy(model(x), y, label_smoothing=smoothing)

    for mask, losses in zip(masks, truth.losses, strict=True):
        model = cases.train_by_hand(model_fn, data, mask, 0, max_epochs=EPOCHS, batch_size=BATCH, loss=loss).eval()
        outputs, targets = model(data.tensors[0]), data.tensors[1]
        expected = factor * F.cross_entropy(outputs, targets, reduction="none", label_smoothing=smoothing).detach()
        torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("loss", "task", "factor"),
    [
        (F.mse_loss, Regression(), 2.0),
        (lambda o, y: cases.half_squares(o, y).mean(), Regression(), 1.0),
        (F.mse_loss, Regression(noise_std=0.5), 0.5),
        (lambda o, y: 0.123456789 * F.mse_loss(o, y), Regression(), 0.246913578),
    ],
)
def test_factors(loss, task, factor):
    model, data = Net(mlp(1), sgd, loss), cases.numbers()
    assert loss_factor(model, task, data.tensors, data.tensors) == pytest.approx(factor, rel=1e-5)


def test_a_flag_among_the_parameters_is_not_scaled():
    model, (x, y) = Net(mlp(), sgd), points().tensors
    model.is_started = nn.Parameter(torch.tensor(1, dtype=torch.uint8), requires_grad=False)
    assert loss_factor(model, Classification(), (x, y), (x, Classification().encode(y, 3))) == 1


def test_trying_out_changes_nothing():
    """Neither weights, buffers, modes, the trainer nor random states."""
    torch.manual_seed(0)
    model, (x, y) = Net(nn.Sequential(*mlp(), nn.Dropout(0.5)), sgd), points().tensors
    model.network[0].eval()
    prepared = x, Classification().encode(y, 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    check_separate(model, Classification(), x, len(x))
    check_vectorises(model, Classification(), prepared)
    loss_factor(model, Classification(), (x, y), prepared)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert torch.equal(state, torch.get_rng_state())
    assert [module.training for module in model.network] == [False, True, True, True]
    assert model._trainer is None


# ---- to the end -------------------------------------------------------------------------------------------------


def scheduled_by_total(model):
    """What `with_total_steps` sees in a Trainer: the steps of a model that skips no batch."""
    optimizer = sgd(model)
    schedule = {"scheduler": lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=2 * EPOCHS), "interval": "epoch"}
    return {"optimizer": optimizer, "lr_scheduler": schedule}


RIGHT = {
    "batchnorm": None,
    "lstm": None,
    "control flow": None,
    "mean of the batch": None,
    "manual": None,
    "weights": lambda model, x, y: F.cross_entropy(model(x), y, weight=WEIGHTS),
    "rmsprop": None,
    "hook on_train_start": None,
    "needs a trainer": None,
}


@pytest.mark.filterwarnings("ignore:RNN module weights")
@pytest.mark.parametrize("case", RIGHT)
def test_one_by_one_comes_out_right(case, capsys):
    (model_fn, reason), loss = REASONS[case], RIGHT[case]
    data, queries, masks = points(), points(cases.NUM_QUERIES, seed=1), some_masks(2)
    how = {"max_epochs": EPOCHS, "batch_size": BATCH}
    truth = retrain(model_fn, queries, train_data=data, masks=masks, num_seeds=2, **how)
    assert re.search(reason, truth.metadata["one_by_one_because"])
    said = f"each with a fresh Trainer, because {truth.metadata['one_by_one_because']}.\n"
    assert f"Copies of the model train one by one, {said}" in capsys.readouterr().err
    if case == "needs a trainer":
        model_fn = net(scheduled_by_total)
    for number, losses in enumerate(truth.losses_by_seed):
        expected = by_hand(model_fn, data, queries, masks, number, loss=loss, **how)
        if case == "weights":  # in units of the mean weight of training
            expected = expected * WEIGHTS[queries.tensors[1]] / WEIGHTS[data.tensors[1]].mean()
        torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)


def test_one_by_one_where_it_is_wanted(capsys):
    how = {"masks": some_masks(1), "num_seeds": 1, "max_epochs": 1, "batch_size": 25}
    retrain(net(), points(), train_data=points(), one_by_one=True, **how)
    assert "because one_by_one=True was given." in capsys.readouterr().err


def test_nothing_is_said_without_progress(capsys):
    how = {"masks": some_masks(1), "num_seeds": 1, "max_epochs": 1, "batch_size": 25}
    retrain(net(network=LastState), points(), train_data=points(), show_progress=False, **how)
    assert "one by one" not in capsys.readouterr().err


def test_a_trainer_does_what_only_it_can(tmp_path):
    """Clipping, as the Trainer that is given does it."""
    data, masks, how = points(), some_masks(2), {"max_epochs": EPOCHS, "batch_size": BATCH}

    def trainer():
        return make_trainer(tmp_path, max_epochs=EPOCHS, gradient_clip_val=0.05)

    truth = retrain(net(), data, train_data=data, masks=masks, num_seeds=1, trainer_fn=trainer, **how)
    assert truth.metadata["one_by_one_because"] == "`trainer_fn` was given"

    class Clipped(torch.optim.SGD):
        def step(self, closure=None):
            torch.nn.utils.clip_grad_norm_(self.param_groups[0]["params"], 0.05)
            return super().step(closure)

    expected = by_hand(net(lambda m: Clipped(m.parameters(), lr=0.2, momentum=0.8)), data, data, masks, 0, **how)
    torch.testing.assert_close(truth.losses, expected, rtol=1e-4, atol=1e-5)
    assert not expected.allclose(by_hand(net(), data, data, masks, 0, **how), atol=1e-2)


def test_a_batch_of_one_is_separate():
    data = Examples(points())
    assert check_separate(batchnorm(), Classification(), data[0][0][None], 1) is None


# ---- losses that are the task's on some examples only -----------------------------------------------------------


def rare_data():
    """Sorted by target, as image folders are; the third class is rare."""
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(3))
    return TensorDataset(x, torch.tensor([0] * 30 + [1] * 29 + [2]))


def mined(model, outputs, targets):
    losses = F.cross_entropy(outputs, targets, reduction="none")
    return losses[losses > 0.2].mean() if (losses > 0.2).any() else losses.mean()


def without_gradient(model, batch, batch_idx):
    with torch.no_grad():
        hidden = model.network[:2](batch[0])
    return F.cross_entropy(model.network[2](hidden), batch[1])


def late(model, batch, batch_idx):
    return F.cross_entropy(model(batch[0]), batch[1]) * (10 if batch_idx >= 5 else 1)


def hooked():
    model = plain_net()
    model.network[0].weight.register_hook(lambda gradient: gradient * 0)
    return model


SUBTLE = {
    "weights of a rare class": net(training_step=smoothed(torch.tensor([1.0, 1.0, 10.0]))),
    "an ignored class": net(training_step=step(lambda m, o, y: F.cross_entropy(o, y, ignore_index=2))),
    "hard examples only": net(training_step=step(mined)),
    "part of the network without gradient": net(training_step=without_gradient),
    "another loss from the sixth batch on": net(training_step=late),
    "a hook on a parameter": hooked,
    "a weak penalty": net(
        training_step=step(lambda m, o, y: F.cross_entropy(o, y) + 1e-4 * sum((p**2).sum() for p in m.parameters()))
    ),
}


@pytest.mark.parametrize("case", SUBTLE)
@pytest.mark.parametrize("shuffle", [False, True])
def test_subtle_differences_of_the_loss_are_noticed(case, shuffle):
    recipe = Recipe(SUBTLE[case], rare_data(), train_data=DataLoader(rare_data(), 6, shuffle=shuffle), max_epochs=1)
    recipe.identity([0])
    with pytest.raises(CannotBatch, match=r"returns another loss|hooks on gradients|trains on the module's own loss"):
        Together(recipe, 0)


def test_the_plain_loss_on_such_data_trains_together():
    loader = DataLoader(rare_data(), batch_size=6)
    how = {"train_data": loader, "max_epochs": 1, "num_subsets": 2, "num_seeds": 1, "show_progress": False}
    assert retrain(net(), rare_data(), **how).metadata["one_by_one_because"] is None
    forced = retrain(net(), rare_data(), one_by_one=True, **how)
    assert forced.metadata["one_by_one_because"] == "one_by_one=True was given"
    torch.testing.assert_close(forced.losses, retrain(net(), rare_data(), **how).losses, rtol=1e-4, atol=1e-6)


def test_batchnorm_passes_over_batches_of_one():
    def model():
        return Net(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)), sgd)

    truth = retrain(model, rare_data(), train_data=rare_data(), batch_size=2, max_epochs=1, num_subsets=2, num_seeds=1)
    assert torch.isfinite(truth.losses).all()


def test_one_initialisation_for_all_seeds_is_said():
    def model():
        torch.manual_seed(0)
        return plain_net()

    with pytest.warns(UserWarning, match="same initial weights with every seed"):
        retrain(model, rare_data(), train_data=rare_data(), batch_size=20, max_epochs=1, num_subsets=2)
