"""further_train() as users call it: what becomes of their model, their data, their mistakes."""

import copy
import random as python_random
from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, SubsetRandomSampler, TensorDataset

from stride_lightning import Regression
from tests.helpers.models import hooks_of, make_trainer
from tests.retraining.cases import NUM_TRAIN, Net, batchnorm, in_double, mlp, numbers, points, random, sgd
from tests.retraining.further import SPREAD, ask, batches_of, by_hand, check, make_net

SGD = partial(torch.optim.SGD, lr=0.2, momentum=0.7)

# ---- the caller's model -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [F.cross_entropy, SPREAD], ids=["together", "one by one"])
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
        result = ask(model, batches_of(data), data, ckpt_path=ckpt_path)
        assert result.effects_by_seed.equal(expected.effects_by_seed)
        assert result.metadata["weights"] == expected.metadata["weights"]
    first = ask(model, batches_of(data), data, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert first.metadata["weights"] != expected.metadata["weights"]
    assert not first.effects_by_seed.allclose(expected.effects_by_seed, atol=1e-5)
    assert all(value.equal(halved[name]) for name, value in model.state_dict().items())
    assert not halved["network.0.weight"].equal(trained["network.0.weight"])


# ---- data and arguments -----------------------------------------------------------------------------------------


def test_positions_are_those_in_the_dataset():
    data, queries, chosen = in_double(points()), in_double(points(4, seed=1)), [20, 3, 11, 7, 0, 15, 22, 9, 2, 13, 5]
    model = make_net(mlp)
    part = TensorDataset(*(tensor[chosen] for tensor in data.tensors))
    expected = ask(model, part, queries, left_out=[2, 0, 10], batch_size=4)
    left_out = [chosen[2], chosen[0], chosen[10]]
    sampled = DataLoader(data, 4, sampler=SubsetRandomSampler(chosen))
    assert ask(model, sampled, queries, left_out=None).left_out.tolist() == sorted(chosen)
    result = ask(model, sampled, queries, left_out=left_out, train_indices=chosen)
    assert result.left_out.tolist() == left_out
    assert result.effects_by_seed.equal(expected.effects_by_seed)
    of_subset = ask(model, Subset(data, chosen), queries, left_out=[2, 0, 10], batch_size=4)
    assert of_subset.effects().equal(result.effects())
    everything = ask(model, sampled, queries, left_out=None, train_indices=chosen)
    assert everything.left_out.tolist() == chosen
    assert everything.effects()[:, [2, 0, 10]].allclose(result.effects(), atol=1e-12)
    with pytest.raises(ValueError, match=r"\[1\] are not among the 11 training examples"):
        ask(model, sampled, queries, left_out=[3, 1], train_indices=chosen)


def test_several_loaders_with_a_loss():
    data, queries, model = in_double(points()), in_double(points(4, seed=1)), make_net(mlp)

    def row_losses(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    parts = [Subset(data, range(10)), Subset(data, range(10, NUM_TRAIN))]
    how = {"left_out": [3, 12], "loss": row_losses}
    result = ask(model, [DataLoader(part, 4) for part in parts], queries, **how)
    assert result.effects().equal(ask(model, DataLoader(data, 4), queries, **how).effects())


def test_by_default_a_hundred_are_left_out():
    model, data = make_net(partial(mlp, 2)), TensorDataset(random(250, 4).double(), torch.arange(250) % 2)
    result = ask(model, DataLoader(data, 50), Subset(data, range(2)), left_out=None, epochs=1, num_seeds=1)
    assert len(result.left_out.unique()) == 100
    assert (result.left_out[0], result.left_out[-1]) == (0, 249)
    assert set(result.left_out.diff().tolist()) == {2, 3}


ARGUMENTS = {
    "unknown": ({"left_out": [3, 25]}, ValueError, r"\[25\] are not among the 25 training examples"),
    "negative": ({"left_out": [-1]}, ValueError, r"\[-1\] are not among the 25 training examples"),
    "twice": ({"left_out": [3, 3]}, ValueError, "it repeats some"),
    "none": ({"left_out": []}, ValueError, "`left_out` must name at least one example"),
    "fractions": ({"left_out": [0.5]}, TypeError, r"integer positions in the training dataset, got torch\.float32"),
    "mask": ({"left_out": torch.ones(25, dtype=torch.bool)}, TypeError, r"integer positions.*got torch\.bool"),
    "no epochs": ({"epochs": 0}, ValueError, "`epochs` must be an integer of at least 1, got 0"),
    "not one": ({"epochs": []}, ValueError, r"`epochs` must be an integer or a list of at least one, got \[\]"),
    "half": ({"epochs": 1.5}, ValueError, r"`epochs` must be an integer of at least 1, got 1\.5"),
    "some wrong": ({"epochs": [2, 0]}, ValueError, r"`epochs` must be an integer of at least 1, got 0"),
    "no seeds": ({"num_seeds": 0}, ValueError, "`num_seeds` must be an integer of at least 1, got 0"),
    "half a seed": ({"num_seeds": 1.5}, ValueError, r"`num_seeds` must be an integer of at least 1, got 1\.5"),
    "true seeds": ({"num_seeds": True}, ValueError, "`num_seeds` must be an integer of at least 1, got True"),
    "true": ({"epochs": True}, ValueError, "`epochs` must be an integer of at least 1, got True"),
    "text": ({"left_out": "abc"}, TypeError, r"`left_out` must be integer positions.*such as \[3, 17\], got 'abc'"),
    "made": (
        {"optimizer": torch.optim.SGD(mlp().parameters(), lr=0.1)},
        TypeError,
        r"got an instance of SGD\..*pass a function such as functools\.partial\(torch\.optim\.SGD, lr=",
    ),
    "a name": ({"optimizer": "sgd"}, TypeError, r"`optimizer` must be a function.*got 'sgd'.*functools\.partial"),
    "a class": ({"model": Net}, TypeError, "`model` must be the final model.*got the class Net: make an instance"),
    "no model": ({"model": None}, TypeError, "`model` must be the final model.*got None"),
    "no batch": ({"batch_size": 0}, ValueError, "`batch_size` must be an integer of at least 1, got 0"),
    "class": ({"task": Regression}, TypeError, "`task` must be an instance of Task"),
    "no optimizer": ({"optimizer": lambda p: "sgd"}, TypeError, "must return a torch optimizer, got str"),
    "no labels": ({"queries": TensorDataset(points().tensors[0].double())}, ValueError, "has no targets, so losses"),
    "labels": (
        {"queries": TensorDataset(random(2, 4).double(), torch.tensor([0, 7]))},
        ValueError,
        r"^Query 1 .* takes 0\.\.2",
    ),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_that_cannot_work_are_refused(name):
    more, error, message = ARGUMENTS[name]
    data = in_double(points())
    with pytest.raises(error, match=message):
        ask(**({"model": make_net(mlp), "data": batches_of(data), "queries": data} | more))


@pytest.mark.parametrize("loss", [F.cross_entropy, SPREAD], ids=["together", "one by one"])
def test_queries_without_a_finite_loss_are_named_before_training(loss):
    data, queries = in_double(points()), in_double(points())
    queries.tensors[0][3, 1] = queries.tensors[0][7, 0] = torch.nan
    with pytest.raises(ValueError, match=r"Query 3 has NaN in its loss before any .* Likewise 7\."):
        ask(make_net(mlp, loss=loss), batches_of(data), queries)


def test_data_with_nan_is_asked_about():
    data = in_double(points())
    data.tensors[0][20] = torch.nan
    with pytest.raises(ValueError, match="Training example 20 has NaN in its outputs"):
        ask(make_net(mlp), batches_of(data), in_double(points(4, seed=1)))


def test_a_batch_size_that_is_not_known():
    with pytest.raises(
        ValueError, match=r"do not say their batch size.*DataLoader with a batch_size, or `batch_size=`"
    ):
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


class NeedsSteps(Net):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1 / self.trainer.estimated_stepping_batches)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: make_net(mlp, kind=NeedsSteps), "configure_optimizers needs a Trainer"),
        (lambda: make_net(mlp, lambda m: torch.optim.LBFGS(m.parameters())), "LBFGS computes the loss several times"),
        (lambda: make_net(mlp, lambda m: None), "configure_optimizers returns no optimizer"),
    ],
)
def test_an_optimizer_that_cannot_be_used_is_refused_with_a_hint(model, reason):
    data = in_double(points())
    with pytest.raises(ValueError, match=rf"{reason}.*Pass `optimizer=`, such as functools\.partial"):
        ask(model(), batches_of(data), data)
    assert ask(model(), batches_of(data), data, optimizer=SGD).effects().shape == (NUM_TRAIN, 4)


def on_plateau(m):
    optimizer = sgd(m)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}


ALONE = {
    "RMSprop": (lambda m: torch.optim.RMSprop(m.parameters(), lr=0.01), "RMSprop is not one of the optimizers"),
    "two": (
        lambda m: [
            torch.optim.SGD(m.network[0].parameters(), lr=0.1),
            torch.optim.Adam(m.network[2].parameters(), lr=0.02),
        ],
        "Several is not one of the optimizers",
    ),
    "plateau": (on_plateau, None),
}


@pytest.mark.parametrize("name", ALONE)
def test_any_optimizer_steps_and_schedules_are_left_out(name):
    optimize, reason = ALONE[name]
    model, data = make_net(mlp, optimize), in_double(points())
    result = ask(model, batches_of(data), data)
    assert reason is None or reason in result.metadata["one_by_one_because"]

    class Both:
        def __init__(self, made):
            self.made = made

        def zero_grad(self):
            for each in self.made:
                each.zero_grad()

        def step(self):
            for each in self.made:
                each.step()

    plain = {"two": lambda m: Both(optimize(m)), "plateau": sgd}.get(name, optimize)
    check(result, by_hand(model, data, data, optimizer=plain))
