"""Training on with and without examples, against a plain loop."""

import copy
import re
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

from stride_lightning import Classification, Regression
from stride_lightning.model.weights import weight_hash
from stride_lightning.retraining import ensemble
from stride_lightning.retraining.further_training import further_train
from stride_lightning.runtime.randomness import mix, seed_all
from tests.helpers.models import Augmented
from tests.retraining import cases, further
from tests.retraining.cases import NUM_QUERIES, NUM_TRAIN, Net, half_squares, in_double, mlp, numbers, points, sgd
from tests.retraining.further import BATCH, LEFT_OUT, SPREAD, ask, batches_of, by_hand, check, make_net

SGD = partial(torch.optim.SGD, lr=0.2, momentum=0.7)


def dropout():
    return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 3))


NETWORKS = cases.NETWORKS | {"dropout": (dropout, points, F.cross_entropy, cases.cross_entropies)}


@pytest.mark.parametrize(
    ("network", "optimizer"),
    [*(("classes", name) for name in cases.OPTIMIZERS), *((name, "momentum") for name in [*NETWORKS][1:])],
)
def test_effects_are_those_of_a_plain_loop(network, optimizer):
    (build, data, loss, measure), optimize = NETWORKS[network], lambda m: cases.OPTIMIZERS[optimizer](m.parameters())
    data, queries, model = in_double(data()), in_double(data(NUM_QUERIES, seed=1)), make_net(build, optimize, loss)
    result = ask(model, batches_of(data), queries)
    assert result.metadata["one_by_one_because"] is None
    assert result.metadata["optimizer"] == repr(optimize(model))
    check(result, by_hand(model, data, queries, measure))


@pytest.mark.parametrize("how", [{"shuffle": False}, {"drop_last": True}, {"shuffle": False, "drop_last": True}])
def test_batches_are_the_loaders(how):
    model, data, queries = make_net(mlp), in_double(points()), in_double(points(NUM_QUERIES, seed=1))
    expected = by_hand(model, data, queries, **how)
    check(ask(model, batches_of(data, **how), queries), expected)
    assert not expected.allclose(by_hand(model, data, queries), atol=1e-5)  # or this would show nothing


def test_a_batch_size_that_is_passed_and_a_dataset_that_has_none():
    model, data = make_net(mlp), in_double(points())
    expected = ask(model, batches_of(data), data)
    result = ask(model, data, data, batch_size=BATCH)
    assert (result.metadata["batch_size"], result.metadata["shuffle"], result.metadata["drop_last"]) == (9, True, False)
    assert result.effects_by_seed.equal(expected.effects_by_seed)
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
    result = ask(model, batches_of(data), data, optimizer=adam)
    check(result, by_hand(model, data, data, optimizer=lambda m: adam(m.parameters())))


def test_a_plain_module_trains_on_the_tasks_loss():
    """Half the squared error, where mse_loss is all of it."""
    data, optimizer = in_double(numbers()), partial(torch.optim.SGD, lr=0.1)
    torch.manual_seed(0)
    model = mlp(1).double()
    result = ask(model, batches_of(data), data, optimizer=optimizer)
    half = lambda m, part: half_squares(m(part[0]), part[1]).mean()  # noqa: E731
    expected = by_hand(model, data, data, half_squares, optimizer=lambda m: optimizer(m.parameters()), step=half)
    check(result, expected)
    with pytest.raises(TypeError, match=r"Sequential is no LightningModule.*Pass `optimizer=`, such as"):
        ask(model, batches_of(data), data)


def test_the_noise_of_a_regression_scales_what_is_measured_but_not_training():
    model, data = make_net(partial(mlp, 1), loss=F.mse_loss), in_double(numbers())
    result = ask(model, batches_of(data), data, task=Regression(noise_std=0.5))
    check(result, 4 * by_hand(model, data, data, half_squares))


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
    result = further_train(model, data, train_data=data, batch_size=NUM_TRAIN, optimizer=optimizer, num_seeds=1)
    torch.testing.assert_close(result.effects_by_seed[0, 0].T, expected, rtol=1e-3, atol=1e-3 * expected.abs().max())
    assert (result.effects().diagonal() > 0).all()  # every example helps itself


def test_single_precision_is_the_same_to_rounding():
    model, data = make_net(mlp), points()
    expected = ask(model, batches_of(in_double(data)), in_double(data)).effects_by_seed
    result = ask(model.float(), batches_of(data), data).effects_by_seed
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), expected, rtol=1e-3, atol=1e-5)


def test_many_steps_are_traced(monkeypatch):
    traced, original = [], ensemble.capture
    monkeypatch.setattr(ensemble, "capture", lambda *args: traced.append(original(*args)) or traced[-1])
    model, data, queries = make_net(mlp), in_double(points()), in_double(points(4, seed=1))
    monkeypatch.setattr("tests.retraining.further.EPOCHS", [2, 18])
    result = ask(model, batches_of(data), queries, epochs=[2, 18], left_out=[3, 8])
    assert len(traced) == 2  # batches of 9 and of 7
    assert None not in traced
    check(result, by_hand(model, data, queries, left_out=[3, 8]), tolerance=1e-8)


# ---- what does not matter ---------------------------------------------------------------------------------------


KINDS = {
    "plain": (mlp, F.cross_entropy, lambda data: data),
    "dropout": (dropout, F.cross_entropy, lambda data: data),
    "augmented": (mlp, F.cross_entropy, Augmented),
    "spread": (dropout, SPREAD, lambda data: data),
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
    everything = ask(model, data, queries, left_out=None, epochs=3, num_seeds=1)
    threads = torch.get_num_threads()
    with cases.threads(1 if threads > 1 else 2):
        threaded = ask(model, data, queries, num_seeds=1)
    sizes = [result.metadata["chunk_size"] for result in (whole, chunked)]
    assert sizes[1] == (4 if name == "spread" else 1)  # one by one, every example is a chunk of its own anyway
    assert sizes[0] == 4 or threads > 1
    same = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)
    assert permuted.left_out.tolist() == [17, 24, 4, 0]
    same(permuted.effects_by_seed, whole.effects_by_seed[:, :, [2, 3, 0, 1]])
    same(chunked.effects_by_seed, whole.effects_by_seed)
    same(threaded.effects_by_seed, whole.effects_by_seed[:1])
    assert everything.left_out.tolist() == list(range(NUM_TRAIN))
    same(everything.effects_by_seed[0, 0, LEFT_OUT], whole.effects_by_seed[0, 1])
    assert not whole.effects_by_seed[0].allclose(whole.effects_by_seed[1], atol=1e-4)  # seeds differ
    other = ask(model, data, queries, seed=1, num_seeds=1)
    same(other.effects_by_seed[0], whole.effects_by_seed[1])


@pytest.mark.parametrize("loss", [F.mse_loss, nn.HuberLoss(delta=0.5)], ids=["together", "one by one"])
def test_dropout_is_the_same_with_and_without(loss):
    """The last example's gradient is zero: nothing happens where it is left out."""
    bare = lambda: nn.Sequential(nn.Linear(4, 16, False), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 1, False))  # noqa: E731
    data = in_double(numbers())
    for tensor in data.tensors:
        tensor[-1] = 0
    model = make_net(bare, loss=loss)
    result = ask(model, batches_of(data), data, left_out=[NUM_TRAIN - 1, 3])
    assert (result.metadata["one_by_one_because"] is None) is (loss is F.mse_loss)
    assert (result.effects_by_seed[:, :, 0] == 0).all()
    assert result.effects_by_seed[:, :, 1].abs().mean() > 1e-4


@pytest.mark.filterwarnings("ignore:Two reads of one example")
def test_an_augmented_example_is_left_out_as_it_is_read_in_that_epoch():
    model, plain, queries = make_net(mlp), in_double(points()), in_double(points(4, seed=1))
    data = Augmented(plain)

    def read(seed, epoch):
        examples = []
        for position in range(NUM_TRAIN):
            seed_all(mix(mix(seed, epoch), position))
            examples.append(data[position])
        return [torch.stack(column) for column in zip(*examples, strict=True)]

    check(ask(model, batches_of(data), queries), by_hand(model, plain, queries, read=read))


# ---- BatchNorm, and what trains one by one ----------------------------------------------------------------------


def test_batchnorm_keeps_its_statistics_and_trains_together():
    model, data, queries = make_net(cases.batchnorm), in_double(points()), in_double(points(NUM_QUERIES, seed=1))
    model.network[1].running_mean += 0.3
    model.network[1].running_var *= 1.7
    before = weight_hash(model)
    result = ask(model.train(), batches_of(data), queries)
    assert result.metadata["one_by_one_because"] is None
    check(result, by_hand(model, data, queries, mode=further.frozen_statistics))
    assert weight_hash(model) == before
    assert all(module.training for module in model.modules())


class Batch(Net):
    """A training_step without batch_idx, that returns a dictionary."""

    def training_step(self, batch):
        loss = self.loss(self(batch[0]), batch[1]) + 0.05 * self.network[0].weight.square().sum()
        self.log("loss", loss)
        return {"loss": loss, "more": 1}


OWN = r"it trains on the module's own loss \(training_step computes another loss than a classification"
ALONE = {
    "recurrent": (cases.LastState, F.cross_entropy, Net, r"vectorise it, likely by network\.lstm \(LSTM\)"),
    "spread": (mlp, SPREAD, Net, OWN),
    "batchnorm": (cases.batchnorm, SPREAD, Net, OWN),
    "penalty": (mlp, F.cross_entropy, Batch, "its training_step returns another loss"),
}


@pytest.mark.parametrize("name", ALONE)
def test_what_cannot_train_together_trains_one_by_one_by_its_training_step(name, capsys):
    network, loss, kind, reason = ALONE[name]
    model, data, queries = make_net(network, loss=loss, kind=kind), in_double(points()), in_double(points(4, seed=1))
    result = ask(model, batches_of(data), queries, show_progress=True)
    assert re.search(reason, result.metadata["one_by_one_because"])
    assert f"train one by one, because {result.metadata['one_by_one_because']}." in capsys.readouterr().err

    def step(m, batch):
        m.log = lambda *_: None
        return m.training_step(batch)["loss"] if kind is Batch else m.training_step(batch, 0)

    measure = further.spread_losses if loss is SPREAD else cases.cross_entropies
    check(result, by_hand(model, data, queries, measure, step=step, mode=further.frozen_statistics))


def test_a_module_inside_that_logs_is_not_heard_either():
    class Outer(Net):
        def __init__(self, inner):
            super().__init__(inner.network, sgd)
            self.inner = inner

        def training_step(self, batch, batch_idx):
            return self.inner.training_step(batch, batch_idx)

    model, data = make_net(mlp, loss=SPREAD), in_double(points())
    result = ask(Outer(model), batches_of(data), data)
    assert "training_step" in result.metadata["one_by_one_because"]
    check(result, by_hand(model, data, data, further.spread_losses))


def test_double_weights_and_single_data_fit_one_by_one_too():
    """As a Trainer with precision="64-true" makes them fit."""
    model, data = make_net(mlp, loss=SPREAD), points()
    expected = ask(model, batches_of(in_double(data)), in_double(data)).effects()
    torch.testing.assert_close(ask(model, batches_of(data), data).effects(), expected)
    assert ask(make_net(mlp), batches_of(data), data).metadata["one_by_one_because"] is None


# ---- losses close to zero ---------------------------------------------------------------------------------------


class OneByOne(torch.optim.SGD):
    """Of a class of its own, so that copies train one by one."""


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, OneByOne], ids=["together", "one by one"])
def test_effects_on_confidently_classified_queries_are_not_quantised(optimizer):
    data = TensorDataset(points().tensors[0], (points().tensors[0][:, 0] > 0).long())
    x = torch.zeros(5, 4)
    x[:, 0] = torch.linspace(20, 21, 5)
    queries = TensorDataset(x, torch.ones(5, dtype=torch.long))
    slow = lambda m: optimizer(m.parameters(), lr=0.03)  # noqa: E731
    single = make_net(lambda: nn.Linear(4, 2), slow).float()
    with torch.no_grad():
        single.network.weight.copy_(torch.tensor([[-0.5, 0, 0, 0], [0.5, 0, 0, 0]]))
        single.network.bias.zero_()
        assert 0 < cases.cross_entropies(single.double().network(x.double()), queries.tensors[1]).max() < 3e-9
    expected = ask(copy.deepcopy(single), batches_of(in_double(data)), in_double(queries), epochs=1).effects_by_seed
    result = ask(single.float(), batches_of(data), queries, epochs=1).effects_by_seed
    assert result.dtype == torch.float32
    assert (result.diff(dim=-1) != 0).all()
    assert expected.abs().max() < 1e-8
    torch.testing.assert_close(result.double(), expected, rtol=1e-3, atol=0)


@pytest.mark.filterwarnings(r"ignore:The training_step of Net minimises another loss than Weighted\(\)")
def test_a_tasks_loss_that_holds_single_precision_weights_is_measured_in_that():
    class Weighted(Classification):
        def loss(self, outputs, encoded, dim=-1):
            return F.cross_entropy(outputs, encoded.argmax(-1), torch.tensor([1.0, 2, 5]), reduction="none")

    data = points()
    result = ask(make_net(mlp).float(), batches_of(data), data, task=Weighted(), optimizer=SGD)
    assert result.effects().abs().max() > 1e-4
