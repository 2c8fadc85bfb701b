"""The loss that training_step gives: what the step sees, what it gives, and that nothing stays."""

import copy

import lightning.pytorch as L
import numpy as np
import pytest
import pytorch_lightning as PL
import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from stride_lightning.model.weights import weight_hash
from stride_lightning.runtime.row_draws import row_draws
from stride_lightning.tasks.own_loss import FunctionLoss, OwnLoss
from stride_lightning.tasks.training_step import Moment, TrainingStep, training_mode
from tests.helpers.models import Classifier, ConvNet, build, classification_data, hooks_of, picture_data, train

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 2, 1, 0])
KEYS = torch.tensor([5, 9, 0, 77, 13, 2])
BATCH = (X, Y)


def make(training_step, base=L.LightningModule, **attributes):
    """A module of a linear layer with this step."""
    torch.manual_seed(0)
    model = type("Stepper", (base,), {"training_step": training_step})()
    model.net = nn.Linear(4, 3)
    model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), 0.1)
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


def cross_entropy(self, batch):
    return F.cross_entropy(self.net(batch[0]), batch[1])


def gradient(loss, model):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, model.parameters(), retain_graph=True)])


# ---- the loss ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [L.LightningModule, PL.LightningModule])
def test_the_loss_is_that_of_training_step(base):
    model = make(lambda self, batch, batch_idx: cross_entropy(self, batch), base)
    loss = TrainingStep(model)(BATCH, KEYS)
    assert loss.shape == ()
    expected = cross_entropy(model, BATCH)
    assert torch.equal(loss, expected)
    assert torch.equal(gradient(loss, model), gradient(expected, model))


def only(self, batch):
    return cross_entropy(self, batch)


def indexed(self, batch, batch_idx):
    return cross_entropy(self, batch) + batch_idx


def with_loader(self, batch, batch_idx, dataloader_idx):
    return cross_entropy(self, batch) + batch_idx + dataloader_idx


def with_default(self, batch, batch_idx, weight=1.0):
    return weight * cross_entropy(self, batch)


def with_keywords(self, batch, batch_idx, **kwargs):
    assert not kwargs
    return cross_entropy(self, batch) + batch_idx


def with_rest(self, *args):
    assert len(args) == 2
    return cross_entropy(self, args[0]) + args[1]


def as_dictionary(self, batch, batch_idx):
    return {"loss": cross_entropy(self, batch), "outputs": 1}


def of_one_element(self, batch, batch_idx):
    return cross_entropy(self, batch).reshape(1)


@pytest.mark.parametrize(
    "step", [only, indexed, with_loader, with_default, with_keywords, with_rest, as_dictionary, of_one_element]
)
def test_every_form_of_step(step):
    model = make(step)
    assert torch.equal(TrainingStep(model)(BATCH, KEYS), cross_entropy(model, BATCH))


def test_a_step_that_skips():
    assert TrainingStep(make(lambda self, batch, i: None))(BATCH, KEYS) is None


@pytest.mark.parametrize(
    ("step", "message"),
    {
        "float": (lambda s, b, i: cross_entropy(s, b).item(), r"returned float, expected a loss.*without \.item\(\)"),
        "rows": (lambda s, b, i: F.cross_entropy(s.net(b[0]), b[1], reduction="none"), r"shape \(6,\).*Take the mean"),
        "detached": (lambda s, b, i: cross_entropy(s, b).detach(), r"a loss without gradient"),
        "no grad": (lambda s, b, i: torch.no_grad()(cross_entropy)(s, b), r"a loss without gradient"),
        "another key": (lambda s, b, i: {"total": 1}, r"a dictionary without a 'loss' \(its keys: total\)"),
        "tuple": (lambda s, b, i: (cross_entropy(s, b), 1), r"returned tuple, expected a loss"),
        "backward": (lambda s, b, i: cross_entropy(s, b).backward(), r"calls backward\(\) itself"),
        "iterator": (lambda s, dataloader_iter: None, r"takes `dataloader_iter`.*loss=fn"),
    }.values(),
    ids=("float", "rows", "detached", "no grad", "another key", "tuple", "backward", "iterator"),
)
def test_what_is_no_loss_is_refused(step, message):
    model = make(step)
    before = weight_hash(model)
    with pytest.raises(ValueError, match=message):
        TrainingStep(model)(BATCH, KEYS)
    assert weight_hash(model) == before
    assert model.net.weight.grad is None


def test_errors_of_the_step_pass():
    def fail(self, batch, batch_idx):
        self.new = 1
        raise KeyError("of the user")

    model = make(fail)
    with pytest.raises(KeyError, match="of the user"):
        TrainingStep(model)(BATCH, KEYS)
    assert not hasattr(model, "new")


def test_functions_see_the_same():
    def fn(model, batch):
        model.log("x", 1.0)
        noise = torch.randn(len(batch[0]), 3)
        return (model.net(batch[0]) * noise).sum(1) + model.trainer.current_epoch

    model = make(indexed)
    loss = FunctionLoss(fn).of(model, Moment(current_epoch=2))
    parts = [loss((X[i : i + 1], Y[i : i + 1]), KEYS[i : i + 1]) for i in range(6)]
    torch.testing.assert_close(loss(BATCH, KEYS), sum(parts))


# ---- random numbers ----------------------------------------------------------------------------------------------


def noisy(self, batch, batch_idx):
    x, y = batch
    t = torch.randint(0, 100, (len(x),))
    hidden = F.dropout(self.net(x + torch.randn_like(x) * t[:, None] / 100), 0.3)
    return F.cross_entropy(hidden + torch.distributions.Normal(hidden, 1.0).rsample(), y)


def test_random_numbers_belong_to_examples():
    model = make(noisy)
    step = OwnLoss().of(model)
    rows = torch.stack([gradient(step((X[i : i + 1], Y[i : i + 1]), KEYS[i : i + 1], 1), model) for i in range(6)])
    order = torch.tensor([4, 0, 3])
    for places in (torch.arange(6), order):
        whole = gradient(step((X[places], Y[places]), KEYS[places], 1), model)
        torch.testing.assert_close(whole, rows[places].mean(0))
    other = gradient(step(BATCH, KEYS, 2), model)
    assert not torch.allclose(other, rows.mean(0), rtol=1e-2)


def test_two_batch_sizes_settle_what_belongs_to_the_batch():
    model = make(lambda self, batch, i: cross_entropy(self, batch) * (1 + torch.rand(1)))
    step = TrainingStep(model)
    step(BATCH, KEYS), step((X[:1], Y[:1]), KEYS[:1])
    rows = torch.stack([gradient(step((X[i : i + 1], Y[i : i + 1]), KEYS[i : i + 1]), model) for i in range(6)])
    torch.testing.assert_close(gradient(step(BATCH, KEYS), model), rows.mean(0))


def test_generators_after_a_step_are_as_before():
    def step(self, batch, i):
        noise = torch.rand(3, generator=self.rng) + torch.rand(3) + float(np.random.rand())  # noqa: NPY002
        return cross_entropy(self, batch) + (self.net.bias * noise).sum()

    model = make(step, rng=torch.Generator().manual_seed(3))
    states = torch.get_rng_state(), model.rng.get_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    one, other = TrainingStep(model)(BATCH, KEYS), TrainingStep(model)(BATCH, KEYS)
    assert torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert torch.equal(model.rng.get_state(), states[1])
    assert np.random.get_state()[1].tolist() == states[2]  # noqa: NPY002


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_is_off(reentrant):
    """Else the graph would draw other numbers when it runs again."""

    def step(self, batch, i):
        x = batch[0].clone().requires_grad_()
        hidden = checkpoint(lambda x: F.dropout(self.net(x) * self.net(x), 0.3), x, use_reentrant=reentrant)
        return F.cross_entropy(hidden, batch[1])

    model = make(step)
    own, calls = TrainingStep(model), []
    handle = model.net.register_forward_hook(lambda *_: calls.append(1))
    rows = torch.stack([gradient(own((X[i : i + 1], Y[i : i + 1]), KEYS[i : i + 1]), model) for i in range(6)])
    torch.testing.assert_close(gradient(own(BATCH, KEYS), model), rows.mean(0))
    assert len(calls) == 14
    handle.remove()
    loss = checkpoint(lambda x: calls.append(1) or model.net(x), X.clone().requires_grad_(), use_reentrant=reentrant)
    loss.sum().backward()
    assert len(calls) == 16, "outside it is on"


# ---- mode --------------------------------------------------------------------------------------------------------


def test_training_mode_without_dropout_and_batch_statistics():
    seen = []
    layers = [nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4), nn.SyncBatchNorm(4), nn.AlphaDropout(0.5)]
    layers += [nn.InstanceNorm1d(4, track_running_stats=True), nn.LayerNorm(4)]
    model = make(lambda self, b, i: self.look() or self.net[0](b[0]).mean(), look=None)
    model.net = nn.Sequential(*layers)
    model.look = lambda: seen.append([model.training, *[module.training for module in model.net]])
    model.eval()
    TrainingStep(model)(BATCH, KEYS)
    TrainingStep(model, mode="eval")(BATCH, KEYS)
    assert seen == [[True, True, False, False, False, False, False, True], [False] * 8]
    assert not any(module.training for module in model.modules())
    assert layers[1].p == 0.5


class Instance(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.InstanceNorm1d(2, track_running_stats=True)

    def forward(self, x):
        return self.norm(x.reshape(len(x), 2, 2)).flatten(1)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 4, num_layers=2, dropout=0.5, batch_first=True)

    def forward(self, x):
        return self.lstm(x[:, None].expand(-1, 3, -1))[0][:, -1]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True)

    def forward(self, x):
        x = x[:, None] * torch.arange(1, 4)[:, None]
        return self.attention(x, x, x)[0].mean(1)


class Gpt(nn.Module):
    def __init__(self):
        super().__init__()
        from transformers import GPT2Config, GPT2Model

        config = GPT2Config(vocab_size=8, n_positions=4, n_embd=4, n_layer=1, n_head=2)
        self.model = GPT2Model(config)

    def forward(self, x):
        return self.model(inputs_embeds=x[:, None].expand(-1, 3, -1)).last_hidden_state[:, -1]


class Bart(nn.Module):
    def __init__(self):
        super().__init__()
        from transformers import BartConfig
        from transformers.models.bart.modeling_bart import BartEncoderLayer

        config = BartConfig(d_model=4, encoder_attention_heads=2, encoder_ffn_dim=4, attention_dropout=0.5)
        config._attn_implementation = "eager"
        self.model = BartEncoderLayer(config)

    def forward(self, x):
        output = self.model(x[:, None].expand(-1, 3, -1), attention_mask=None)
        return (output[0] if isinstance(output, tuple) else output)[:, -1]


LAYERS = {
    "dropout": lambda: nn.Dropout(0.5),
    "batch norm": lambda: nn.BatchNorm1d(4),
    "instance norm": Instance,
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)),
    "older spectral norm": lambda: nn.utils.spectral_norm(nn.Linear(4, 4)),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
    "LSTM": Recurrent,
    "attention": Attention,
    "transformer": lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.5, batch_first=True),
    "GPT-2": Gpt,
    "BART": Bart,
}


def through(layer):
    """A layer that is called on one vector per example, between two others."""
    torch.manual_seed(0)
    model = make(lambda self, b, i: F.cross_entropy(self.head(self.layer(self.net(b[0])[:, [0, 1, 2, 0]])), b[1]))
    model.layer = layer
    model.head = nn.Linear(4, 3)
    return model


@pytest.mark.filterwarnings("ignore:.torch.nn.utils")
@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_deterministic_and_stay_as_they_are(name):
    layer = LAYERS[name]()
    model = through(layer if name != "transformer" else Wrapped(layer))
    for _, buffer in model.named_buffers():
        if buffer.is_floating_point() and buffer.ndim:
            buffer.data.uniform_(0.5, 1.5)
    before, attributes = weight_hash(model), [sorted(vars(module)) for module in model.modules()]
    step = TrainingStep(model)
    losses = [step(BATCH, KEYS, draw) for draw in range(2)]
    assert torch.equal(*losses), "no dropout"
    rows = torch.stack([gradient_or_zero(step((X[i : i + 1], Y[i : i + 1]), KEYS[i : i + 1]), model) for i in range(6)])
    torch.testing.assert_close(gradient_or_zero(losses[0], model), rows.mean(0), rtol=1e-4, atol=1e-6)
    assert weight_hash(model) == before
    assert [sorted(vars(module)) for module in model.modules()] == attributes
    assert all(module.training for module in model.modules())


class Wrapped(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x[:, None])[:, 0]


def gradient_or_zero(loss, model):
    options = {"allow_unused": True, "materialize_grads": True}
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, model.parameters(), **options)])


def test_training_mode_alone():
    model = build(ConvNet)
    training_mode(model)
    assert model.training
    assert not model.network[1].training
    assert not model.network[5].training


# ---- the Trainer -------------------------------------------------------------------------------------------------


def test_the_moment():
    seen = []

    def step(self, batch, i):
        t = self.trainer
        seen.append((self.current_epoch, self.global_step, t.current_epoch, t.global_step, t.max_epochs))
        seen.append((t.num_training_batches, t.estimated_stepping_batches, t.training, t.is_global_zero))
        return cross_entropy(self, batch)

    TrainingStep(make(step), Moment(3, 40, 5, 10, 50))(BATCH, KEYS)
    assert seen == [(3, 40, 3, 40, 5), (10, 50, True, True)]


def test_the_state_is_that_of_a_fit_under_way(tmp_path):
    """A Trainer forgets its stage when the fit is over."""

    def step(self, batch, i):
        if self.trainer.state.stage != "train" or self.trainer.state.fn != "fit":
            return None
        return cross_entropy(self, batch)

    model = make(step)
    assert TrainingStep(model)(BATCH, KEYS) is not None
    train(model, DataLoader(TensorDataset(X, Y), 3), tmp_path, max_epochs=1)
    assert TrainingStep(model)(BATCH, KEYS) is not None


def test_a_module_that_lost_its_trainer(tmp_path):
    """Some packages take it away after a fit."""

    def step(self, batch, i):
        self.log("step", float(self.global_step))
        return cross_entropy(self, batch)

    model = make(step)
    train(model, DataLoader(TensorDataset(X, Y), 3), tmp_path, max_epochs=1)
    vars(model).pop("_trainer")
    assert torch.equal(TrainingStep(model)(BATCH, KEYS), cross_entropy(model, BATCH))
    assert "_trainer" not in vars(model)


def test_what_only_a_trainer_has_is_refused_by_name():
    model = make(lambda self, batch, i: cross_entropy(self, batch) * self.trainer.datamodule_scale)
    with pytest.raises(ValueError, match=r"reads `trainer\.datamodule_scale`, but no Trainer is attached.*loss=fn"):
        TrainingStep(model, Moment())(BATCH, KEYS)

    class Property(L.LightningModule):  # torch replaces its error by another
        @property
        def scale(self):
            return self.trainer.max_steps

    model = make(lambda self, batch, i: cross_entropy(self, batch) * self.scale, Property)
    with pytest.raises(ValueError, match=r"reads `trainer\.max_steps`"):
        TrainingStep(model)(BATCH, KEYS)


def test_what_every_trainer_on_one_process_says():
    def step(self, batch, i):
        trainer = self.trainer
        assert not isinstance(trainer.strategy, DDPStrategy)
        assert trainer.strategy.root_device == batch[0].device
        assert (trainer.callbacks, trainer.early_stopping_callback, trainer.precision) == ([], None, "32-true")
        trainer.callbacks.append("mine")
        return trainer.strategy.reduce(cross_entropy(self, batch))

    model = make(step)
    for _ in range(2):
        assert torch.equal(TrainingStep(model)(BATCH, KEYS), cross_entropy(model, BATCH))


def test_a_probe_for_an_attribute_is_no_error():
    model = make(lambda self, batch, i: cross_entropy(self, batch) * (2 if hasattr(self.trainer, "other") else 1))
    assert torch.equal(TrainingStep(model)(BATCH, KEYS), cross_entropy(model, BATCH))


def everything(self, batch, batch_idx):
    loss = cross_entropy(self, batch)
    self.log("loss", loss)
    self.log_dict({"a": 1.0}, on_epoch=True)
    self.print("nothing")
    self.logger.experiment.add_scalar("a", 1.0)
    self.logger.log_metrics({"a": 1.0}, step=self.global_step)
    for logger in self.loggers:
        logger.experiment.config["a"] = 2
        with logger.experiment.run() as run:
            run.log(1)
        assert list(logger.experiment) == []
        assert f"{logger.log_dict}"
    self.trainer.should_stop = True
    self.trainer.save_checkpoint("never")
    self.trainer.callbacks if hasattr(self.trainer, "callbacks") else None
    self.trainer.logger.log_hyperparams({"a": 1})
    rate = self.optimizers().param_groups[0]["lr"]
    self.optimizers().param_groups[0]["lr"] = 17.0
    assert self.lr_schedulers() is None
    return loss + self.all_gather(loss).mean() * 0 + rate * 0


def test_nothing_is_logged_and_the_trainer_is_only_read(tmp_path, capsys):
    model = make(everything)
    loss = TrainingStep(model)(BATCH, KEYS)
    assert torch.equal(loss, cross_entropy(model, BATCH))
    assert model._trainer is None
    assert not {"log", "print", "optimizers"} & set(vars(model))

    model = make(lambda self, batch, i: cross_entropy(self, batch))
    trainer = train(model, DataLoader(TensorDataset(X, Y), 3), tmp_path, max_epochs=2)
    type(model).training_step = everything
    logged = dict(trainer.logged_metrics)
    capsys.readouterr()
    before = trainer.should_stop, trainer.optimizers[0].param_groups[0]["lr"], weight_hash(model)
    TrainingStep(model, Moment())(BATCH, KEYS)
    assert (trainer.should_stop, trainer.optimizers[0].param_groups[0]["lr"], weight_hash(model)) == before
    assert trainer.logged_metrics == logged
    assert capsys.readouterr().out == ""
    assert model.trainer is trainer
    assert not list(tmp_path.rglob("never"))


def test_an_attached_trainer_tells_the_rest(tmp_path):
    model = make(lambda self, batch, i: cross_entropy(self, batch) * self.trainer.max_steps)
    type(model).training_step = lambda self, batch, i: cross_entropy(self, batch)
    train(model, DataLoader(TensorDataset(X, Y), 3), tmp_path, max_epochs=1)
    type(model).training_step = lambda self, batch, i: cross_entropy(self, batch) * self.trainer.max_steps
    torch.testing.assert_close(TrainingStep(model)(BATCH, KEYS), -cross_entropy(model, BATCH))


def test_children_that_are_lightning_modules_see_the_same():
    class Child(L.LightningModule):
        def forward(self, x):
            self.log("inside", 1.0)
            return x * (1 + self.current_epoch)

    model = make(lambda self, batch, i: F.cross_entropy(self.child(self.net(batch[0])), batch[1]))
    model.child = Child()
    loss = TrainingStep(model, Moment(current_epoch=2))(BATCH, KEYS)
    assert torch.equal(loss, F.cross_entropy(3 * model.net(X), Y))
    assert model.child._trainer is None


def test_no_autocast():
    model = make(indexed)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = TrainingStep(model)(BATCH, KEYS)
    assert torch.equal(loss, cross_entropy(model, BATCH))


def test_in_inference_mode_and_without_gradients():
    model = make(indexed)
    with torch.inference_mode():
        loss = TrainingStep(model)(BATCH, KEYS)
    assert loss.requires_grad
    with torch.no_grad():
        assert TrainingStep(model)(BATCH, KEYS).requires_grad


# ---- nothing stays -----------------------------------------------------------------------------------------------


def test_steps_do_not_see_each_other():
    def step(self, batch, i):
        self.count += 1
        self.outputs.append(batch[0])
        self.ema.mul_(0.5).add_(batch[0].mean(0), alpha=0.5)
        return cross_entropy(self, batch) * self.count * len(self.outputs) + self.net(self.ema).sum()

    model = make(step, count=0, outputs=[])
    model.register_buffer("ema", torch.zeros(4))
    own = TrainingStep(model)
    assert torch.equal(own(BATCH, KEYS), own(BATCH, KEYS))
    assert (model.count, model.outputs, model.ema.tolist()) == (0, [], [0] * 4)


def test_the_batch_stays_as_it_is():
    def step(self, batch, i):
        batch["x"].mul_(2)
        y = batch.pop("y")
        batch["extra"] = 1
        return F.cross_entropy(self.net(batch["x"]), y)

    model, batch = make(step), {"x": X.clone(), "y": Y}
    one, other = TrainingStep(model)(batch, KEYS), TrainingStep(model)(batch, KEYS)
    assert torch.equal(one, other)
    assert list(batch) == ["x", "y"]
    assert torch.equal(batch["x"], X)
    torch.testing.assert_close(gradient(one, model), gradient(F.cross_entropy(model.net(2 * X), Y), model))


@pytest.mark.parametrize("kind", [Classifier, ConvNet])
def test_a_trained_module_is_as_before(kind, tmp_path):
    data = classification_data() if kind is Classifier else picture_data()
    model = build(kind)
    trainer = train(model, DataLoader(data, 20), tmp_path, max_epochs=1)
    model.train()
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    before = weight_hash(model), copy.deepcopy(trainer.optimizers[0].state_dict()), set(vars(model)), hooks_of(model)
    TrainingStep(model)(next(iter(DataLoader(data, 20))), torch.arange(20))
    assert (weight_hash(model), set(vars(model)), hooks_of(model)) == (before[0], *before[2:])
    assert str(trainer.optimizers[0].state_dict()) == str(before[1])
    for parameter, expected in zip(model.parameters(), gradients, strict=True):
        assert (parameter.grad is None and expected is None) or torch.equal(parameter.grad, expected)


def test_under_vmap_and_functional_call():
    """As where a module is run again for every example with parameters of its own."""
    model = make(indexed)
    step, names = TrainingStep(model), [name for name, _ in model.named_parameters()]

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x, y):
            return step((x[None], y[None]), torch.zeros(1, dtype=torch.long))

    wrapped = Loss()
    parameters = {f"model.{name}": value.detach() for name, value in model.named_parameters()}

    def loss(parameters, x, y):
        return torch.func.functional_call(wrapped, parameters, (x, y))

    rows = torch.func.vmap(torch.func.grad(loss), (None, 0, 0), randomness="different")(parameters, X, Y)
    flat = torch.cat([rows[f"model.{name}"].flatten(1) for name in names], 1)
    for i in range(6):
        expected = gradient(cross_entropy(model, (X[i : i + 1], Y[i : i + 1])), model)
        torch.testing.assert_close(flat[i], expected)


def test_row_draws_and_steps_agree():
    """A step draws what a block of row_draws draws."""
    model = make(lambda self, batch, i: (self.net(batch[0]) * torch.randn(len(batch[0]), 3)).sum())
    loss = TrainingStep(model)(BATCH, KEYS, 3)
    with row_draws(KEYS, 3):
        assert torch.equal(loss, (model.net(X) * torch.randn(6, 3)).sum())
