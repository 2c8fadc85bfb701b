"""Training on with and without examples, against a plain loop; and what becomes of the caller's model."""

import copy
import random as python_random
from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, Subset, SubsetRandomSampler, TensorDataset

from stride_lightning import Classification, Regression
from stride_lightning.model.weights import weight_hash
from stride_lightning.retraining.further_training import further_train
from stride_lightning.retraining.recipe import batch_order
from stride_lightning.runtime.randomness import mix, seed_all
from tests.helpers.models import Augmented, hooks_of, make_trainer
from tests.retraining.cases import (
    NUM_QUERIES,
    NUM_TRAIN,
    LastState,
    Net,
    Tied,
    batchnorm,
    conv,
    cross_entropies,
    frozen,
    half_squares,
    in_double,
    logistic_losses,
    mean_logistic_loss,
    mlp,
    numbers,
    pictures,
    points,
    random,
    sgd,
    tokens,
    words,
    yes_or_no,
)

BATCH, EPOCHS, SEEDS, LEFT_OUT = 9, [1, 3], [0, 1], [4, 0, 17, 24]
SMOOTHED = nn.CrossEntropyLoss(label_smoothing=0.2)


def make_net(network, optimize=sgd, loss=F.cross_entropy, kind=Net):
    """In double precision, with the same weights every time."""
    torch.manual_seed(3)
    return kind(network(), optimize, loss).double()


def batches_of(data, **more):
    return DataLoader(data, BATCH, **({"shuffle": True} | more))


def ask(model, data, queries, **more):
    how = {"left_out": LEFT_OUT, "epochs": EPOCHS, "num_seeds": len(SEEDS), "show_progress": False}
    return further_train(model, queries, train_data=data, **(how | more))


def train_on(model, data, queries, place, seed, *, measure, step=None, mode=nn.Module.train, **how):
    """Losses of the queries after the epochs, trained on by a plain loop without the example at a place."""
    model, (x, y), n = copy.deepcopy(model), data.tensors, len(data)
    optimizer, found, steps = how.get("optimizer", lambda m: m.optimize(m))(model), [], 0
    for epoch in range(EPOCHS[-1]):
        mode(model)
        for batch in batch_order(n, BATCH, how.get("shuffle", True), how.get("drop_last", False), seed, epoch):
            torch.manual_seed(mix(seed, epoch, steps))  # dropout
            loss_of = partial(step or (lambda m, part: m.loss(m(part[0]), part[1])), model)
            loss = loss_of((x[batch], y[batch]))
            if place is not None:
                loss = loss - loss_of((x[[place]], y[[place]])) / n
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps += 1
        if epoch + 1 in EPOCHS:
            with torch.no_grad():
                found.append(measure(model.eval()(queries.tensors[0]), queries.tensors[1]))
    return torch.stack(found)


def by_hand(model, data, queries, measure=cross_entropies, left_out=LEFT_OUT, **how):
    """Loss without the example minus loss with it, shape ``(seeds, epochs, examples, queries)``."""
    effects = []
    for seed in SEEDS:
        whole = train_on(model, data, queries, None, seed, measure=measure, **how)
        without = [train_on(model, data, queries, place, seed, measure=measure, **how) for place in left_out]
        effects.append(torch.stack(without, 1) - whole[:, None])
    return torch.stack(effects)


def check(found, expected, tolerance=1e-10):
    assert expected.abs().amax((0, 2, 3)).min() > 1e-4  # or this would show nothing
    assert found.effects_by_seed.dtype == torch.float64
    torch.testing.assert_close(found.effects_by_seed, expected, rtol=tolerance, atol=tolerance)


NETWORKS = {
    "classes": (mlp, points, F.cross_entropy, cross_entropies),
    "squares": (partial(mlp, 1), numbers, F.mse_loss, half_squares),
    "one logit": (partial(mlp, 1), yes_or_no, mean_logistic_loss, logistic_losses),
    "conv": (conv, pictures, F.cross_entropy, cross_entropies),
    "tokens": (tokens, words, F.cross_entropy, cross_entropies),
    "tied": (Tied, points, F.cross_entropy, cross_entropies),
    "frozen": (frozen, points, F.cross_entropy, cross_entropies),
}
SGD = partial(torch.optim.SGD, lr=0.2, momentum=0.7)
OPTIMIZERS = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.3),
    "momentum": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda model: torch.optim.Adam(model.parameters(), lr=0.02),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.3),
    "dampening": lambda model: torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, dampening=0.3),
}


@pytest.mark.parametrize(
    ("network", "optimizer"),
    [*(("classes", name) for name in OPTIMIZERS), *((name, "momentum") for name in NETWORKS if name != "classes")],
)
def test_effects_are_those_of_a_plain_loop(network, optimizer):
    build, data, loss, measure = NETWORKS[network]
    model, optimize = make_net(build, OPTIMIZERS[optimizer], loss), OPTIMIZERS[optimizer]
    data, queries = in_double(data()), in_double(data(NUM_QUERIES, seed=1))
    found = ask(model, batches_of(data), queries)
    assert found.metadata["one_by_one_because"] is None
    assert found.metadata["optimizer"] == repr(optimize(model))
    check(found, by_hand(model, data, queries, measure))


@pytest.mark.parametrize("how", [{"shuffle": False}, {"drop_last": True}, {"shuffle": False, "drop_last": True}])
def test_batches_are_the_loaders(how):
    model, data, queries = make_net(mlp), in_double(points()), in_double(points(NUM_QUERIES, seed=1))
    expected = by_hand(model, data, queries, **how)
    check(ask(model, batches_of(data, **how), queries), expected)
    assert not expected.allclose(by_hand(model, data, queries), atol=1e-5)  # or this would show nothing


def test_a_batch_size_that_is_passed_and_a_dataset_that_has_none():
    model, data = make_net(mlp), in_double(points())
    expected = ask(model, batches_of(data), data)
    found = ask(model, data, data, batch_size=BATCH)
    assert (found.metadata["batch_size"], found.metadata["shuffle"], found.metadata["drop_last"]) == (9, True, False)
    assert found.effects_by_seed.equal(expected.effects_by_seed)
    assert ask(model, DataLoader(data, 3, shuffle=True), data, batch_size=BATCH).effects().equal(expected.effects())


def scheduled(kind, model, interval="step"):
    optimizer = SGD(model.parameters())
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": kind(optimizer), "interval": interval}}


SCHEDULES = {
    "step": (partial(lr_scheduler.StepLR, step_size=1, gamma=0.1), 0.2),
    "warm-up": (partial(lr_scheduler.LinearLR, start_factor=0.01, total_iters=5), 0.2),
    "lambda": (partial(lr_scheduler.LambdaLR, lr_lambda=lambda step: (step + 1) / 10), 0.2),
    "cycle": (partial(lr_scheduler.OneCycleLR, max_lr=0.5, total_steps=50, cycle_momentum=False), 0.5 / 25),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_left_out_and_the_learning_rate_is_the_initial_one(name):
    kind, lr = SCHEDULES[name]
    model, data, queries = make_net(mlp, partial(scheduled, kind)), in_double(points()), in_double(points(4, seed=1))
    began = model.configure_optimizers()["optimizer"].param_groups[0]["lr"]
    assert (abs(began - lr) < 1e-12) is (name in ("step", "cycle"))  # the other two begin at another
    constant = lambda m: SGD(m.parameters(), lr=lr)  # noqa: E731
    check(ask(model, batches_of(data), queries), by_hand(model, data, queries, optimizer=constant))


def test_an_optimizer_that_is_passed_takes_the_place_of_the_models():
    model, data, adam = make_net(mlp), in_double(points()), partial(torch.optim.Adam, lr=0.03)
    found = ask(model, batches_of(data), data, optimizer=adam)
    check(found, by_hand(model, data, data, optimizer=lambda m: adam(m.parameters())))


def test_a_plain_module_trains_on_the_tasks_loss():
    """Half the squared error, where mse_loss is all of it."""
    data, optimizer = in_double(numbers()), partial(torch.optim.SGD, lr=0.1)
    torch.manual_seed(0)
    model = mlp(1).double()
    found = ask(model, batches_of(data), data, optimizer=optimizer)
    half = lambda m, part: half_squares(m(part[0]), part[1]).mean()  # noqa: E731
    expected = by_hand(model, data, data, half_squares, optimizer=lambda m: optimizer(m.parameters()), step=half)
    check(found, expected)
    with pytest.raises(TypeError, match=r"Sequential is no LightningModule.*Pass `optimizer=`, such as"):
        ask(model, batches_of(data), data)


def test_the_noise_of_a_regression_scales_what_is_measured_but_not_training():
    model, data = make_net(partial(mlp, 1), loss=F.mse_loss), in_double(numbers())
    found = ask(model, batches_of(data), data, task=Regression(noise_std=0.5))
    check(found, 4 * by_hand(model, data, data, half_squares))


@pytest.mark.parametrize("network", ["classes", "squares", "one logit"])
def test_one_tiny_step_on_everything_gives_the_dot_product_of_gradients(network):
    """Effect = lr / n times the product of the query's gradient with the example's: positive for a helpful one."""
    build, data, loss, measure = NETWORKS[network]
    model, data, lr = make_net(build, loss=loss), in_double(data()), 1e-5
    parameters = [*model.parameters()]

    def gradients(loss_of):
        rows = []
        for i in range(NUM_TRAIN):
            grads = torch.autograd.grad(loss_of(model(data.tensors[0][[i]]), data.tensors[1][[i]]), parameters)
            rows.append(torch.cat([grad.flatten() for grad in grads]))
        return torch.stack(rows)

    expected = gradients(measure) @ gradients(loss).T * lr / NUM_TRAIN
    optimizer = partial(torch.optim.SGD, lr=lr)
    found = further_train(model, data, train_data=data, batch_size=NUM_TRAIN, optimizer=optimizer, num_seeds=1)
    torch.testing.assert_close(found.effects_by_seed[0, 0].T, expected, rtol=1e-3, atol=1e-3 * expected.abs().max())
    assert (found.effects().diagonal() > 0).all()  # every example helps itself


def test_single_precision_is_the_same_to_rounding():
    model, data = make_net(mlp), points()
    expected = ask(model, batches_of(in_double(data)), in_double(data)).effects_by_seed
    found = ask(model.float(), batches_of(data), data).effects_by_seed
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-5)


def test_many_steps_are_traced(monkeypatch):
    traced = []
    from stride_lightning.retraining import ensemble

    original = ensemble.capture
    monkeypatch.setattr(ensemble, "capture", lambda *args: traced.append(original(*args)) or traced[-1])
    model, data, queries = make_net(mlp), in_double(points()), in_double(points(4, seed=1))
    monkeypatch.setattr("tests.retraining.test_leaving_out.EPOCHS", [2, 18])
    found = ask(model, batches_of(data), queries, epochs=[2, 18], left_out=[3, 8])
    assert len(traced) == 2  # batches of 9 and of 7
    assert None not in traced
    check(found, by_hand(model, data, queries, left_out=[3, 8]), tolerance=1e-8)


# ---- what does not matter ---------------------------------------------------------------------------------------


def dropout():
    return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 3))


KINDS = {
    "plain": (mlp, F.cross_entropy, lambda data: data),
    "dropout": (dropout, F.cross_entropy, lambda data: data),
    "augmented": (mlp, F.cross_entropy, Augmented),
    "smoothed": (dropout, SMOOTHED, lambda data: data),
}


@pytest.mark.filterwarnings("ignore:Two reads of one example")
@pytest.mark.parametrize("name", KINDS)
def test_neither_chunks_nor_threads_nor_the_order_nor_the_random_state_matter(name):
    network, loss, wrap = KINDS[name]
    model, data, queries = make_net(network, loss=loss), batches_of(wrap(in_double(points()))), in_double(points(4))
    whole = ask(model, data, queries, memory_budget=2**40)
    torch.manual_seed(99)
    chunked = ask(model, data, queries, memory_budget=1)
    permuted = ask(model, data, queries, left_out=[17, 24, 4, 0], memory_budget=2**13)
    everything = ask(model, data, queries, left_out=None, epochs=3)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        threaded = ask(model, data, queries)
        assert torch.get_num_threads() == (1 if threads > 1 else 2)
    finally:
        torch.set_num_threads(threads)
    sizes = [found.metadata["chunk_size"] for found in (whole, chunked)]
    assert sizes[1] == (4 if name == "smoothed" else 1)  # one by one, every example is a chunk of its own anyway
    assert sizes[0] == 4 or threads > 1
    same = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)
    assert permuted.left_out.tolist() == [17, 24, 4, 0]
    same(permuted.effects_by_seed, whole.effects_by_seed[:, :, [2, 3, 0, 1]])
    same(chunked.effects_by_seed, whole.effects_by_seed)
    same(threaded.effects_by_seed, whole.effects_by_seed)
    assert everything.left_out.tolist() == list(range(NUM_TRAIN))
    same(everything.effects_by_seed[:, 0, LEFT_OUT], whole.effects_by_seed[:, 1])
    assert not whole.effects_by_seed[0].allclose(whole.effects_by_seed[1], atol=1e-4)  # seeds differ
    other = ask(model, data, queries, seed=1, num_seeds=1)
    same(other.effects_by_seed[0], whole.effects_by_seed[1])


def test_dropout_is_that_of_a_plain_loop():
    model, data, queries = make_net(dropout), in_double(points()), in_double(points(NUM_QUERIES, seed=1))
    check(ask(model, batches_of(data), queries), by_hand(model, data, queries))


@pytest.mark.parametrize("loss", [F.mse_loss, nn.HuberLoss(delta=0.5)], ids=["together", "one by one"])
def test_dropout_is_the_same_with_and_without(loss):
    """The last example's gradient is zero: nothing happens where it is left out."""
    bare = lambda: nn.Sequential(nn.Linear(4, 16, False), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 1, False))  # noqa: E731
    data = in_double(numbers())
    for tensor in data.tensors:
        tensor[-1] = 0
    model = make_net(bare, loss=loss)
    found = ask(model, batches_of(data), data, left_out=[NUM_TRAIN - 1, 3])
    assert (found.metadata["one_by_one_because"] is None) is (loss is F.mse_loss)
    assert (found.effects_by_seed[:, :, 0] == 0).all()
    assert found.effects_by_seed[:, :, 1].abs().mean() > 1e-4
    off = ask(make_net(lambda: bare()[:2].append(nn.Identity()).append(bare()[3]), loss=loss), batches_of(data), data)
    assert off.metadata["batch_size"] == BATCH


@pytest.mark.filterwarnings("ignore:Two reads of one example")
def test_an_augmented_example_is_left_out_as_it_is_read_in_that_epoch():
    model, plain, queries = make_net(mlp), in_double(points()), in_double(points(4, seed=1))
    data = Augmented(plain)
    found = ask(model, batches_of(data), queries)
    effects = []
    for seed in SEEDS:
        losses = []
        for left_out in (None, *LEFT_OUT):
            trained, rows = copy.deepcopy(model), []
            optimizer = sgd(trained)
            for epoch in range(EPOCHS[-1]):
                read = []
                for position in range(NUM_TRAIN):
                    seed_all(mix(mix(seed, epoch), position))
                    read.append(data[position])
                x, y = (torch.stack(column) for column in zip(*read, strict=True))
                for batch in batch_order(NUM_TRAIN, BATCH, True, False, seed, epoch):
                    loss = F.cross_entropy(trained(x[batch]), y[batch])
                    if left_out is not None:
                        loss = loss - F.cross_entropy(trained(x[[left_out]]), y[[left_out]]) / NUM_TRAIN
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                if epoch + 1 in EPOCHS:
                    with torch.no_grad():
                        rows.append(cross_entropies(trained(queries.tensors[0]), queries.tensors[1]))
            losses.append(torch.stack(rows))
        effects.append(torch.stack(losses[1:], 1) - losses[0][:, None])
    check(found, torch.stack(effects))


# ---- BatchNorm, and what trains one by one ----------------------------------------------------------------------


def frozen_statistics(model):
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.eval()


def test_batchnorm_keeps_its_statistics_and_trains_together():
    model, data, queries = make_net(batchnorm), in_double(points()), in_double(points(NUM_QUERIES, seed=1))
    model.network[1].running_mean += 0.3
    model.network[1].running_var *= 1.7
    before = weight_hash(model)
    found = ask(model.train(), batches_of(data), queries)
    assert found.metadata["one_by_one_because"] is None
    check(found, by_hand(model, data, queries, mode=frozen_statistics))
    assert weight_hash(model) == before
    assert all(module.training for module in model.modules())


class Batch(Net):
    """A training_step without batch_idx, that returns a dictionary."""

    def training_step(self, batch):
        loss = self.loss(self(batch[0]), batch[1]) + 0.05 * self.network[0].weight.square().sum()
        self.log("loss", loss)
        return {"loss": loss, "more": 1}


ALONE = {
    "recurrent": (LastState, F.cross_entropy, Net, r"vectorise it, likely by network\.lstm \(LSTM\)"),
    "smoothing": (mlp, SMOOTHED, Net, "its training_step returns another loss.*label smoothing"),
    "batchnorm": (batchnorm, SMOOTHED, Net, "its training_step returns another loss.*label smoothing"),
    "penalty": (mlp, F.cross_entropy, Batch, "its training_step returns another loss"),
}


@pytest.mark.parametrize("name", ALONE)
def test_what_cannot_train_together_trains_one_by_one_by_its_training_step(name, capsys):
    network, loss, kind, reason = ALONE[name]
    model, data, queries = make_net(network, loss=loss, kind=kind), in_double(points()), in_double(points(4, seed=1))
    found = ask(model, batches_of(data), queries, show_progress=True)
    from re import search

    assert search(reason, found.metadata["one_by_one_because"])
    assert f"train on one by one, because {found.metadata['one_by_one_because']}." in capsys.readouterr().err

    def step(m, batch):
        m.log = lambda *_: None
        return m.training_step(batch)["loss"] if kind is Batch else m.training_step(batch, 0)

    check(found, by_hand(model, data, queries, step=step, mode=frozen_statistics))


def test_a_module_inside_that_logs_is_not_heard_either():
    class Outer(Net):
        def __init__(self, inner):
            super().__init__(inner.network, sgd)
            self.inner = inner

        def training_step(self, batch, batch_idx):
            return self.inner.training_step(batch, batch_idx)

    model, data = make_net(mlp, loss=SMOOTHED), in_double(points())
    found = ask(Outer(model), batches_of(data), data)
    assert "training_step" in found.metadata["one_by_one_because"]
    check(found, by_hand(model, data, data))


def test_double_weights_and_single_data_fit_one_by_one_too():
    """As a Trainer with precision="64-true" makes them fit."""
    model, data = make_net(mlp, loss=SMOOTHED), points()
    torch.testing.assert_close(
        ask(model, batches_of(data), data).effects(), ask(model, batches_of(in_double(data)), in_double(data)).effects()
    )
    assert ask(make_net(mlp), batches_of(data), data).metadata["one_by_one_because"] is None


class AsksForTheEpoch(Net):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) / (1 + self.current_epoch)


class ByHand(Net):
    def __init__(self, *args):
        super().__init__(*args)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.manual_backward(super().training_step(batch, batch_idx))
        self.optimizers().step()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (AsksForTheEpoch, "AsksForTheEpoch cannot be trained on by its training_step without a Train"),
        (ByHand, r"ByHand optimizes by hand \(automatic_optimization=False\), so it has no loss to take.*Pass further"),
    ],
)
def test_a_training_step_that_needs_its_trainer_is_refused_with_a_way_out(kind, message):
    model, data = make_net(mlp, kind=kind), in_double(points())
    with pytest.raises(ValueError, match=message):
        ask(model, batches_of(data), data)
    found = ask(model.network, batches_of(data), data, optimizer=SGD)  # the way out
    check(found, by_hand(make_net(mlp, lambda m: SGD(m.parameters())), data, data))


# ---- losses of which an example has no share ----------------------------------------------------------------------


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
        ValueError, match=r"is not the mean of the losses of its examples \(class weights\?\).*task of your own"
    ):
        ask(make_net(mlp, loss=loss, kind=kind), batches_of(data()), data())


@pytest.mark.parametrize("kind", [Net, NoisyStep, NoisierStep])
def test_a_loss_that_is_a_mean_over_examples_passes_whatever_is_drawn(kind):
    data = by_class()
    found = ask(make_net(mlp, loss=SMOOTHED, kind=kind), batches_of(data), data)
    assert "training_step" in found.metadata["one_by_one_because"]


def test_a_training_step_that_takes_no_single_example_is_refused():
    class Squeezing(Net):
        def training_step(self, batch, batch_idx):
            return SMOOTHED(self(batch[0]).squeeze(0), batch[1])

    data = in_double(points())
    with pytest.raises(ValueError, match=r"Squeezing cannot be trained on.*does not take a single example"):
        ask(make_net(mlp, kind=Squeezing), batches_of(data), data)


HOOKS = {
    "backward": lambda self, loss: loss.backward(),
    "optimizer_step": lambda self, *args: None,
    "optimizer_zero_grad": lambda self, *args: None,
    "configure_gradient_clipping": lambda self, *args, **kwargs: None,
    "on_before_backward": lambda self, loss: None,
    "on_after_backward": lambda self: None,
    "on_before_optimizer_step": lambda self, optimizer: None,
    "on_before_zero_grad": lambda self, optimizer: None,
}


@pytest.mark.parametrize("name", HOOKS)
def test_hooks_that_change_gradients_are_warned_of(name):
    data, kind = in_double(points()), type("Hooked", (Net,), {name: HOOKS[name]})
    inherited = type("Inherits", (kind,), {"on_train_start": lambda self: None})
    with pytest.warns(UserWarning, match=f"Inherits overrides {name}. Further training does not call them; effects"):
        found = ask(make_net(mlp, kind=inherited), batches_of(data), data)
    assert found.effects_by_seed.equal(ask(make_net(mlp), batches_of(data), data).effects_by_seed)


# ---- single examples, and losses close to zero ----------------------------------------------------------------------


class Sentences(torch.utils.data.Dataset):
    """Dictionaries as a tokenizer gives them, padded; the first word tells the label."""

    def __init__(self, num, seed=0):
        draw = torch.Generator().manual_seed(seed)
        self.words = torch.randint(3, 20, (num, 5), generator=draw)
        self.mask = (torch.arange(5) < torch.randint(2, 6, (num, 1), generator=draw)).long()

    def __len__(self):
        return len(self.words)

    def __getitem__(self, i):
        words = self.words[i] * self.mask[i]
        return {"input_ids": words, "attention_mask": self.mask[i], "labels": self.words[i, 0] % 2}


class SentenceTask(Classification):
    def inputs(self, batch):
        return {name: batch[name] for name in ("input_ids", "attention_mask")}

    def targets(self, batch):
        return batch["labels"]

    def outputs(self, model, inputs):
        return model(**inputs).logits


@pytest.mark.filterwarnings("ignore")
def test_a_transformer_that_looks_at_the_values_of_its_mask_trains_one_by_one():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(
        **sizes, intermediate_size=16, max_position_embeddings=8, hidden_dropout_prob=0, attention_probs_dropout_prob=0
    )
    model, data, queries = transformers.BertForSequenceClassification(config).double(), Sentences(12), Sentences(3, 1)
    how = {"left_out": [4, 0], "optimizer": partial(torch.optim.SGD, lr=0.1), "task": SentenceTask(), "num_seeds": 1}
    found = ask(model, DataLoader(data, 5, shuffle=True), queries, **how)
    assert found.metadata["one_by_one_because"].startswith("torch.func cannot vectorise single examples: ")
    assert len(found.metadata["one_by_one_because"]) < 210

    def losses(trained, places, read=data):
        batch = torch.utils.data.default_collate([read[int(i)] for i in places])
        return F.cross_entropy(trained(**SentenceTask().inputs(batch)).logits, batch["labels"], reduction="none")

    values = []
    for place in (None, 4, 0):
        trained, rows = copy.deepcopy(model), []
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
        for epoch in range(EPOCHS[-1]):
            for batch in batch_order(12, 5, True, False, 0, epoch):
                loss = losses(trained, batch).mean()
                if place is not None:
                    loss = loss - losses(trained, [place]).mean() / 12
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            if epoch + 1 in EPOCHS:
                rows.append(losses(trained.eval(), range(3), queries).detach())
        values.append(torch.stack(rows))
    check(found, (torch.stack(values[1:], 1) - values[0][:, None])[None])


@pytest.mark.parametrize("smoothing", [0.0, 0.2], ids=["together", "one by one"])
def test_effects_on_confidently_classified_queries_are_not_quantised(smoothing):
    data = TensorDataset(points().tensors[0], (points().tensors[0][:, 0] > 0).long())
    x = torch.zeros(5, 4)
    x[:, 0] = torch.linspace(20, 21, 5)
    queries = TensorDataset(x, torch.ones(5, dtype=torch.long))
    slow = lambda m: torch.optim.SGD(m.parameters(), lr=0.03)  # noqa: E731
    single = make_net(lambda: nn.Linear(4, 2), slow, nn.CrossEntropyLoss(label_smoothing=smoothing)).float()
    with torch.no_grad():
        single.network.weight.copy_(torch.tensor([[-0.5, 0, 0, 0], [0.5, 0, 0, 0]]))
        single.network.bias.zero_()
        assert 0 < cross_entropies(single.double().network(x.double()), queries.tensors[1]).max() < 3e-9
    expected = ask(copy.deepcopy(single), batches_of(in_double(data)), in_double(queries), epochs=1).effects_by_seed
    found = ask(single.float(), batches_of(data), queries, epochs=1).effects_by_seed
    assert found.dtype == torch.float32
    assert (found.diff(dim=-1) != 0).all()
    assert expected.abs().max() < 1e-8
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=0)


def test_a_tasks_loss_that_holds_single_precision_weights_is_measured_in_that():
    class Weighted(Classification):
        def loss(self, outputs, encoded, dim=-1):
            return F.cross_entropy(outputs, encoded.argmax(-1), torch.tensor([1.0, 2, 5]), reduction="none")

    data = points()
    found = ask(make_net(mlp).float(), batches_of(data), data, task=Weighted(), optimizer=SGD)
    assert found.effects().abs().max() > 1e-4


class NeedsSteps(Net):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1 / self.trainer.estimated_stepping_batches)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: make_net(mlp, kind=NeedsSteps), "configure_optimizers needs a Trainer"),
        (lambda: make_net(mlp, lambda m: torch.optim.RMSprop(m.parameters())), "RMSprop is not one of the optimizers"),
        (lambda: make_net(mlp, lambda m: [sgd(m), sgd(m)]), "returns 2 optimizers and 0 schedulers"),
    ],
)
def test_an_optimizer_that_cannot_be_used_is_refused_with_a_hint(model, reason):
    data = in_double(points())
    with pytest.raises(ValueError, match=rf"{reason}.*Pass `optimizer=`, such as functools\.partial"):
        ask(model(), batches_of(data), data)
    assert ask(model(), batches_of(data), data, optimizer=SGD).effects().shape == (NUM_TRAIN, 4)


def test_what_cannot_be_copied_is_refused_with_a_hint():
    model, data = make_net(mlp), in_double(points())
    model.last_outputs = model(data.tensors[0])
    with pytest.raises(ValueError, match=r"Net cannot be copied.*Detach or drop them"):
        ask(model, batches_of(data), data)


# ---- the caller's model -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [F.cross_entropy, SMOOTHED], ids=["together", "one by one"])
def test_the_model_is_as_it_was(tmp_path, loss):
    model = make_net(lambda: batchnorm().append(nn.Dropout(0.1)), loss=loss).float()
    trainer = make_trainer(tmp_path, max_epochs=1)
    trainer.fit(model, batches_of(points()))
    model.train()
    model.network[2].eval()
    model.network[0].bias.requires_grad_(False)
    seen = []
    model.network[0].register_forward_hook(lambda *_: seen.append(1))
    model.network[3].weight.grad = torch.ones(3, 6)
    modes = [module.training for module in model.modules()]
    before, names = copy.deepcopy(model.state_dict()), set(vars(model))
    for draw in (torch.manual_seed, np.random.seed, python_random.seed):
        draw(5)
    expected = torch.rand(3).tolist(), np.random.rand(3).tolist(), python_random.random()  # noqa: NPY002
    for draw in (torch.manual_seed, np.random.seed, python_random.seed):
        draw(5)
    ask(model, batches_of(points()), points())
    drawn = torch.rand(3).tolist(), np.random.rand(3).tolist(), python_random.random()  # noqa: NPY002
    assert drawn == expected
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()].count(False) == 1
    assert len(hooks_of(model)) == 1
    assert set(vars(model)) == names
    assert model.trainer is trainer
    assert model.network[3].weight.grad.equal(torch.ones(3, 6))
    assert model.network[0].weight.grad is not None
    assert trainer.model is model


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_checkpoints(tmp_path):
    model, data = make_net(mlp).float(), points()
    keep = ModelCheckpoint(tmp_path, save_last=True, every_n_epochs=1, save_top_k=-1, filename="{epoch}")
    make_trainer(tmp_path, keep, max_epochs=2, enable_checkpointing=True).fit(model, batches_of(data))
    trained = copy.deepcopy(model.state_dict())
    expected = ask(model, batches_of(data), data)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    halved = copy.deepcopy(model.state_dict())
    for ckpt_path in ("best", "last", tmp_path / "epoch=1.ckpt"):
        found = ask(model, batches_of(data), data, ckpt_path=ckpt_path)
        assert found.effects_by_seed.equal(expected.effects_by_seed)
        assert found.metadata["weights"] == expected.metadata["weights"]
    first = ask(model, batches_of(data), data, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert first.metadata["weights"] != expected.metadata["weights"]
    assert not first.effects_by_seed.allclose(expected.effects_by_seed, atol=1e-5)
    assert all(value.equal(halved[name]) for name, value in model.state_dict().items())
    assert not halved["network.0.weight"].equal(trained["network.0.weight"])


# ---- data and arguments -----------------------------------------------------------------------------------------


def test_positions_are_those_in_the_dataset():
    data, queries, chosen = in_double(points()), in_double(points(4, seed=1)), [20, 3, 11, 7, 0, 15, 22, 9, 2, 13, 5]
    model = make_net(mlp)
    own = TensorDataset(*(tensor[chosen] for tensor in data.tensors))
    expected = ask(model, own, queries, left_out=[2, 0, 10], batch_size=4)
    left_out = [chosen[2], chosen[0], chosen[10]]
    sampled = DataLoader(data, 4, sampler=SubsetRandomSampler(chosen))
    with pytest.raises(ValueError, match=r"SubsetRandomSampler.*`train_indices=`"):
        ask(model, sampled, queries)
    found = ask(model, sampled, queries, left_out=left_out, train_indices=chosen)
    assert found.left_out.tolist() == left_out
    assert found.effects_by_seed.equal(expected.effects_by_seed)
    assert ask(model, Subset(data, chosen), queries, left_out=[2, 0, 10], batch_size=4).effects().equal(found.effects())
    everything = ask(model, sampled, queries, left_out=None, train_indices=chosen)
    assert everything.left_out.tolist() == chosen
    assert everything.effects()[:, [2, 0, 10]].allclose(found.effects(), atol=1e-12)
    with pytest.raises(ValueError, match=r"\[1\] are not among the 11 training examples"):
        ask(model, sampled, queries, left_out=[3, 1], train_indices=chosen)


def test_by_default_a_hundred_are_left_out():
    model, data = make_net(partial(mlp, 2)), TensorDataset(random(250, 4).double(), torch.arange(250) % 2)
    found = ask(model, DataLoader(data, 50), Subset(data, range(2)), left_out=None, epochs=1, num_seeds=1)
    assert len(found.left_out.unique()) == 100
    assert (found.left_out[0], found.left_out[-1]) == (0, 249)
    assert set(found.left_out.diff().tolist()) == {2, 3}


ARGUMENTS = {
    "unknown": ({"left_out": [3, 25]}, ValueError, r"\[25\] are not among the 25 training examples"),
    "negative": ({"left_out": [-1]}, ValueError, r"\[-1\] are not among the 25 training examples"),
    "twice": ({"left_out": [3, 3]}, ValueError, "some stand twice"),
    "none": ({"left_out": []}, ValueError, "`left_out` names no example"),
    "fractions": ({"left_out": [0.5]}, TypeError, r"integer positions in the training dataset, got torch\.float32"),
    "mask": ({"left_out": torch.ones(25, dtype=torch.bool)}, TypeError, r"integer positions.*got torch\.bool"),
    "no epochs": ({"epochs": 0}, ValueError, "`epochs` must be one or several integers of at least 1, got 0"),
    "not one": ({"epochs": []}, ValueError, r"`epochs` must be one or several integers of at least 1, got \[\]"),
    "half": ({"epochs": 1.5}, ValueError, r"`epochs` must be one or several integers of at least 1, got 1\.5"),
    "some wrong": ({"epochs": [2, 0]}, ValueError, r"`epochs` must be one or several.*got \[2, 0\]"),
    "no seeds": ({"num_seeds": 0}, ValueError, "`num_seeds` must be an integer of at least 1, got 0"),
    "half a seed": ({"num_seeds": 1.5}, ValueError, r"`num_seeds` must be an integer of at least 1, got 1\.5"),
    "true seeds": ({"num_seeds": True}, ValueError, "`num_seeds` must be an integer of at least 1, got True"),
    "true": ({"epochs": True}, ValueError, "`epochs` must be one or several integers of at least 1, got True"),
    "text": ({"left_out": "abc"}, TypeError, r"`left_out` must be integer positions.*such as \[3, 17\], got 'abc'"),
    "made": (
        {"optimizer": torch.optim.SGD(mlp().parameters(), lr=0.1)},
        TypeError,
        r"got an instance of SGD\..*pass functools\.partial\(torch\.optim\.SGD, lr=",
    ),
    "a name": ({"optimizer": "sgd"}, TypeError, r"`optimizer` must be a function.*got 'sgd'.*functools\.partial"),
    "a class": ({"model": Net}, TypeError, "`model` must be the final model.*got the class Net; make an instance"),
    "no model": ({"model": None}, TypeError, "`model` must be the final model.*got None"),
    "no batch": ({"batch_size": 0}, ValueError, "`batch_size` must be an integer of at least 1, got 0"),
    "class": ({"task": Regression}, TypeError, "`task` must be an instance of Task"),
    "no optimizer": ({"optimizer": lambda p: "sgd"}, TypeError, "must return a torch optimizer, got str"),
    "no labels": ({"queries": TensorDataset(points().tensors[0].double())}, ValueError, "has no targets, so losses"),
    "labels": ({"queries": TensorDataset(random(2, 4).double(), torch.tensor([0, 7]))}, ValueError, r"lie in 0\.\.2"),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_that_cannot_work_are_refused(name):
    more, error, message = ARGUMENTS[name]
    data = in_double(points())
    with pytest.raises(error, match=message):
        ask(**({"model": make_net(mlp), "data": batches_of(data), "queries": data} | more))


@pytest.mark.parametrize("loss", [F.cross_entropy, SMOOTHED], ids=["together", "one by one"])
def test_queries_without_a_finite_loss_are_named_before_training(loss):
    data, queries = in_double(points()), in_double(points())
    queries.tensors[0][3, 1] = queries.tensors[0][7, 0] = torch.nan
    with pytest.raises(ValueError, match=r"^Query 3 has NaN in its loss before .*check its input .* Likewise 7\.$"):
        ask(make_net(mlp, loss=loss), batches_of(data), queries)


def test_data_with_nan_is_asked_about():
    data = in_double(points())
    data.tensors[0][20] = torch.nan
    with pytest.raises(ValueError, match="Lower the learning rate; or does the data hold NaN"):
        ask(make_net(mlp), batches_of(data), in_double(points(4, seed=1)))


def test_a_batch_size_that_is_not_known():
    with pytest.raises(ValueError, match=r"batch size cannot be told.*DataLoader with a batch_size, or `batch_size=`"):
        ask(make_net(mlp), in_double(points()), in_double(points()))


@pytest.mark.parametrize("loss", [F.mse_loss, nn.HuberLoss(delta=1e9)], ids=["together", "one by one"])
def test_divergence_names_example_query_epoch_and_seed(loss):
    data = in_double(numbers())
    diverging = lambda model: torch.optim.SGD(model.parameters(), lr=1e30)  # noqa: E731
    deep = lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 1))  # noqa: E731
    with pytest.raises(
        ValueError, match=r"without example 4 gave .* query 0, after \d epoch\(s\) with seed 7.*Lower the l"
    ):
        ask(make_net(deep, diverging, loss), batches_of(data), data, epochs=[1, 2, 3, 4], seed=7)
