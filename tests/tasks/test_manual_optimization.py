"""Manual optimization: the losses that are handed over, one for each optimizer, and nothing that trains."""

import re
from types import SimpleNamespace

import lightning.pytorch as L
import pytest
import pytorch_lightning as PL
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from stride_lightning.model.weights import weight_hash
from stride_lightning.tasks.own_loss import OwnLoss
from stride_lightning.tasks.training_step import TrainingStep
from tests.helpers.models import train

X = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
BATCH, KEYS = (X,), torch.arange(6)


def make(step, *, num_optimizers=2, schedulers=False, base=L.LightningModule):
    """A module with a generator and a discriminator; ``step(self, x)``."""

    class Pair(base):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            torch.manual_seed(0)
            self.g, self.d = nn.Linear(2, 3), nn.Linear(3, 1)

        def training_step(self, batch, batch_idx):
            return step(self, batch[0])

        def made(self, x):
            return self.g(x[:, :2])

        def g_loss(self, x):
            return F.softplus(-self.d(self.made(x))).mean()

        def d_loss(self, x):
            return (F.softplus(-self.d(x)) + F.softplus(self.d(self.made(x).detach()))).mean()

        def configure_optimizers(self):
            if num_optimizers == 1:
                return torch.optim.SGD(self.parameters(), 0.1)
            pair = [torch.optim.Adam(self.g.parameters(), 0.1), torch.optim.SGD(self.d.parameters(), 0.2)]
            if schedulers:
                return pair, [torch.optim.lr_scheduler.StepLR(each, 1) for each in pair]
            return pair

    return Pair()


def plain(self, x):
    og, od = self.optimizers()
    og.zero_grad()
    self.manual_backward(self.g_loss(x))
    og.step()
    od.zero_grad()
    self.manual_backward(self.d_loss(x))
    od.step()


def toggled(self, x):
    og, od = self.optimizers()
    self.toggle_optimizer(og)
    self.manual_backward(self.g_loss(x))
    self.clip_gradients(og, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
    og.step()
    og.zero_grad()
    self.untoggle_optimizer(og)
    with self.toggled_optimizer(od):
        self.manual_backward(self.d_loss(x))
        od.step()
        od.zero_grad()
    for scheduler in self.lr_schedulers() or []:
        scheduler.step()
        assert scheduler.get_last_lr()


def by_closures(self, x):
    for optimizer, loss in zip(self.optimizers(), (self.g_loss, self.d_loss), strict=True):

        def closure(optimizer=optimizer, loss=loss):
            value = loss(x)
            optimizer.zero_grad()
            self.manual_backward(value)
            return value

        with optimizer.toggle_model(sync_grad=True):
            assert optimizer.step(closure=closure).requires_grad


def in_parts(self, x):
    og, od = self.optimizers()
    od.zero_grad()
    for real in (True, False):
        scores = self.d(x) if real else self.d(self.made(x).detach())
        self.manual_backward(F.softplus(-scores if real else scores).mean())
    od.step()
    og.zero_grad()
    self.manual_backward(self.g_loss(x))
    og.step()


def accumulating(self, x):
    og, od = self.optimizers()
    self.toggle_optimizer(og)
    self.manual_backward(self.g_loss(x) / 4)
    self.untoggle_optimizer(og)
    self.toggle_optimizer(od)
    self.manual_backward(self.d_loss(x) / 4)
    self.untoggle_optimizer(od)
    if self.global_step % 4 == 3:
        og.step(), od.step(), og.zero_grad(), od.zero_grad()


@pytest.mark.parametrize("base", [L.LightningModule, PL.LightningModule])
@pytest.mark.parametrize("step", [plain, toggled, by_closures, in_parts, accumulating])
def test_the_losses_of_two_optimizers(step, base):
    model = make(step, schedulers=step is toggled, base=base)
    before = weight_hash(model), [parameter.requires_grad for parameter in model.parameters()]
    factor = 4 if step is accumulating else 1
    for number, expected in enumerate((model.g_loss(X), model.d_loss(X))):
        loss = OwnLoss(optimizer_idx=number).of(model)(BATCH, KEYS)
        torch.testing.assert_close(factor * loss, expected)
        torch.testing.assert_close(factor * slope(loss, model), slope(expected, model))
    assert (weight_hash(model), [parameter.requires_grad for parameter in model.parameters()]) == before
    assert all(parameter.grad is None for parameter in model.parameters())


def slope(loss, model):
    options = {"allow_unused": True, "materialize_grads": True}
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, model.parameters(), **options)])


@pytest.mark.parametrize("step", [plain, toggled, by_closures])
def test_several_losses_are_listed(step):
    model = make(step)
    with pytest.raises(ValueError, match="loss=fn") as caught:
        TrainingStep(model)(BATCH, KEYS)
    message = str(caught.value)
    for part in (
        r"hands 2 losses to manual_backward",
        r"optimizer 0 \(Adam of g\): 1\.\d+",
        r"optimizer 1 \(SGD of d\)",
    ):
        assert re.search(part, message), message
    assert "OwnLoss(optimizer_idx=0)" in message
    with pytest.raises(ValueError, match=r"OwnLoss\(optimizer_idx=2\) is none of them"):
        TrainingStep(model, optimizer_idx=2)(BATCH, KEYS)


def single(self, x):
    optimizer = self.optimizers()
    optimizer.zero_grad()
    self.manual_backward(self.d_loss(x))
    optimizer.step()
    self.lr_schedulers()


def without_optimizers(self, x):
    self.manual_backward(self.d_loss(x))


def weighted(self, x):
    self.manual_backward(F.softplus(self.d(x)).flatten(), torch.ones(len(x)))


def the_same_for_both(self, x):
    loss = self.d_loss(x)
    self.manual_backward(loss)
    for optimizer in self.optimizers():
        optimizer.step()


@pytest.mark.parametrize(
    ("step", "num_optimizers"), [(single, 1), (without_optimizers, 1), (weighted, 1), (the_same_for_both, 2)]
)
def test_one_loss_needs_no_choice(step, num_optimizers):
    model = make(step, num_optimizers=num_optimizers)
    loss = TrainingStep(model)(BATCH, KEYS)
    expected = F.softplus(model.d(X)).sum() if step is weighted else model.d_loss(X)
    torch.testing.assert_close(loss, expected)


def nothing_handed(self, x):
    return self.d_loss(x)


def backward_itself(self, x):
    optimizer = self.optimizers()
    optimizer.zero_grad()
    self.d_loss(x).backward()
    optimizer.step()


def handed_constant(self, x):
    self.manual_backward(self.d_loss(x).detach())


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (nothing_handed, r"hands no loss to self\.manual_backward.*loss=fn"),
        (backward_itself, r"calls backward\(\) itself"),
        (handed_constant, "a loss without gradient"),
    ],
)
def test_a_step_that_hands_over_no_loss_is_refused(step, message):
    model = make(step, num_optimizers=1)
    before = weight_hash(model)
    with pytest.raises(ValueError, match=message):
        TrainingStep(model)(BATCH, KEYS)
    assert weight_hash(model) == before
    assert all(parameter.grad is None for parameter in model.parameters())


def clipping(self, x):
    """A critic whose weights the step itself clips, after its loss was handed over and before."""
    optimizer = self.optimizers()
    for parameter in self.d.parameters():
        parameter.data.clamp_(-0.1, 0.1)
    self.manual_backward(self.d(x).mean() - self.d(self.made(x).detach()).square().mean())
    optimizer.step()
    with torch.no_grad():
        for parameter in self.d.parameters():
            parameter.clamp_(-0.01, 0.01)


def test_weights_that_a_step_clips():
    model = make(clipping, num_optimizers=1)
    before = weight_hash(model)
    loss = TrainingStep(model)(BATCH, KEYS)
    assert weight_hash(model) == before
    gradients = slope(loss, model)
    for parameter in model.d.parameters():
        parameter.data.clamp_(-0.1, 0.1)
    torch.testing.assert_close(
        gradients, slope(model.d(X).mean() - model.d(model.made(X).detach()).square().mean(), model)
    )


def test_a_fitted_module_keeps_its_optimizers(tmp_path):
    model = make(toggled, schedulers=True)
    trainer = train(model, DataLoader(TensorDataset(X), 3), tmp_path, max_epochs=2)
    before = weight_hash(model), str([each.state_dict() for each in trainer.optimizers])
    schedulers = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
    loss = TrainingStep(model, optimizer_idx=1)(BATCH, KEYS)
    torch.testing.assert_close(loss, model.d_loss(X))
    assert (weight_hash(model), str([each.state_dict() for each in trainer.optimizers])) == before
    assert [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs] == schedulers
    assert trainer.global_step == 8


@pytest.mark.parametrize(
    "form",
    [
        lambda o, s: None,
        lambda o, s: o,
        lambda o, s: [o],
        lambda o, s: ([o], [s]),
        lambda o, s: ([o], [{"scheduler": s, "interval": "step"}]),
        lambda o, s: {"optimizer": o, "lr_scheduler": s},
        lambda o, s: {"optimizer": o, "lr_scheduler": {"scheduler": s}},
        lambda o, s: ({"optimizer": o}, {"optimizer": o, "lr_scheduler": s}),
    ],
    ids=["none", "one", "list", "two lists", "dictionaries", "dictionary", "nested", "several"],
)
def test_forms_of_configure_optimizers(form):
    from stride_lightning.tasks.manual_optimization import configured

    optimizer = torch.optim.SGD([torch.ones(1, requires_grad=True)], 0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    made = form(optimizer, scheduler)
    optimizers, schedulers = configured(SimpleNamespace(configure_optimizers=lambda: made))
    assert all(each is optimizer for each in optimizers)
    assert all(each is scheduler for each in schedulers)
    text = str(made)
    assert len(optimizers) == text.count("SGD (")
    assert len(schedulers) == text.count("StepLR object")
