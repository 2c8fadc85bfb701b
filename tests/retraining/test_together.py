"""Models trained together against a plain loop that trains each alone."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader

from stride_lightning.retraining import together as module
from stride_lightning.retraining.batches import batch_order
from stride_lightning.retraining.one_by_one import train_alone
from stride_lightning.retraining.optimizers import CannotBatch
from stride_lightning.retraining.recipe import Recipe
from stride_lightning.retraining.retrain import retrain
from stride_lightning.retraining.together import Together
from stride_lightning.tasks import likelihoods as tasks
from tests.helpers.models import Augmented
from tests.retraining import cases
from tests.retraining.cases import NUM_QUERIES, NUM_TRAIN, Net, by_hand, in_double, mlp, plain_net, points, sgd


def scheduled(make, kind, model, **more):
    optimizer = make(model.parameters())
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": kind(optimizer), **more} if more else kind(optimizer)}


def grouped(model):
    weights, biases = ([p for p in model.parameters() if (p.ndim > 1) is large] for large in (True, False))
    return torch.optim.AdamW([{"params": weights, "weight_decay": 0.2}, {"params": biases, "lr": 0.03}], lr=0.01)


SGD, ADAM = partial(torch.optim.SGD, lr=0.2, momentum=0.7), cases.OPTIMIZERS["adam"]
STEP_LR = partial(lr_scheduler.StepLR, step_size=1, gamma=0.4)
ONE_CYCLE = partial(lr_scheduler.OneCycleLR, max_lr=0.3, total_steps=20)
OPTIMIZERS = {
    **{name: lambda model, make=make: make(model.parameters()) for name, make in cases.OPTIMIZERS.items()},
    "groups": grouped,
    "every epoch": lambda model: scheduled(SGD, STEP_LR, model),
    "every other epoch": lambda model: scheduled(ADAM, STEP_LR, model, frequency=2),
    "one cycle": lambda model: scheduled(SGD, ONE_CYCLE, model, interval="step"),
    "one cycle of adam": lambda model: scheduled(ADAM, ONE_CYCLE, model, interval="step"),
    "every other step": lambda model: scheduled(SGD, STEP_LR, model, interval="step", frequency=2),
}
EPOCHS, BATCH = 4, 9  # three batches of 9, 9 and 7


@pytest.fixture
def trained(monkeypatch):
    """The ensembles that were trained, whose weights are not rounded to 32 bits as losses are."""
    ensembles, original = [], module.Ensemble

    def make(*args, **kwargs):
        ensembles.append(original(*args, **kwargs))
        return ensembles[-1]

    monkeypatch.setattr(module, "Ensemble", make)
    return ensembles


def double_net(network, optimize, loss):
    return Net(network(), optimize, loss).double()


def check_by_hand(trained, model_fn, data, queries, masks, measure=cases.cross_entropies, tolerance=1e-10, **how):
    """Weights and losses of every model, for two seeds."""
    recipe = Recipe(model_fn, queries, train_data=data, **how)
    together = Together(recipe, 0)
    together.check_steps(masks, [0, 1])
    for number, seed in enumerate([0, 1]):
        losses = together.train(masks, seed)
        for k, mask in enumerate(masks):
            model = cases.train_by_hand(model_fn, data, mask, seed, **how)
            for name, value in trained[number].parameters.items():
                expected = dict(model.named_parameters())[name].detach()
                torch.testing.assert_close(value[k], expected, rtol=tolerance, atol=tolerance)
                assert not expected.allclose(dict(recipe.initial_model(seed).named_parameters())[name])
            with torch.no_grad():
                expected = measure(model.eval()(queries.tensors[0]), queries.tensors[1])
            torch.testing.assert_close(
                losses[k], expected.float(), rtol=max(tolerance, 1e-6), atol=max(tolerance, 1e-6)
            )
    return together


@pytest.mark.parametrize(
    ("network", "optimizer"),
    [*(("classes", name) for name in OPTIMIZERS), *((name, "momentum") for name in [*cases.NETWORKS][1:])],
)
def test_weights_and_losses_are_those_of_each_alone(trained, network, optimizer):
    build, data, loss, measure = cases.NETWORKS[network]
    model_fn = partial(double_net, build, OPTIMIZERS[optimizer], loss)
    queries, masks = in_double(data(NUM_QUERIES, seed=1)), cases.some_masks(3)
    check_by_hand(trained, model_fn, in_double(data()), queries, masks, measure, max_epochs=EPOCHS, batch_size=BATCH)


@pytest.mark.parametrize("how", [{"shuffle": False}, {"drop_last": True}, {"shuffle": False, "drop_last": True}])
def test_batches_are_the_loaders(trained, how):
    model_fn, data = partial(double_net, mlp, sgd, F.cross_entropy), in_double(points())
    recipe = Recipe(model_fn, data, train_data=DataLoader(data, BATCH, **({"shuffle": True} | how)), max_epochs=EPOCHS)
    masks = cases.some_masks(3)
    losses = Together(recipe, 0).train(masks, 0)
    expected = by_hand(model_fn, data, data, masks, 0, max_epochs=EPOCHS, batch_size=BATCH, **how)
    torch.testing.assert_close(losses, expected.float(), rtol=1e-6, atol=1e-6)
    other = by_hand(model_fn, data, data, masks, 0, max_epochs=EPOCHS, batch_size=BATCH)
    assert not losses.allclose(other.float(), rtol=1e-3, atol=1e-3)  # or this would show nothing


def test_many_steps_are_traced(trained):
    model_fn, data, masks = partial(double_net, mlp, sgd, F.cross_entropy), in_double(points()), cases.some_masks(3)
    together = check_by_hand(trained, model_fn, data, data, masks, max_epochs=20, batch_size=BATCH, tolerance=1e-8)
    kernels = list(together.recipe.kernels.values())
    assert len(kernels) == 2  # batches of 9 and of 7
    assert None not in kernels


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "every epoch"])
def test_batches_without_any_example_are_skipped(trained, optimizer):
    """Batches of two, of which every subset misses some, from the first step on."""
    model_fn = partial(double_net, mlp, OPTIMIZERS[optimizer], F.cross_entropy)
    data, masks = in_double(points()), cases.some_masks(4, fraction=0.4)
    missed = [~masks[:, batch].any(1) for batch in batch_order(NUM_TRAIN, 2, True, False, 0, 0)]
    assert missed[0].any()
    assert not missed[0].all()
    check_by_hand(trained, model_fn, data, data, masks, max_epochs=2, batch_size=2)


@pytest.mark.parametrize(
    ("optimizer", "named"),
    [("adam", "Adam"), ("adamw amsgrad", "AdamW"), ("dampening", "SGD"), ("one cycle", "OneCycleLR")],
)
def test_where_steps_are_counted_none_may_be_skipped(optimizer, named, capsys):
    model_fn = partial(double_net, mlp, OPTIMIZERS[optimizer], F.cross_entropy)
    data, masks = in_double(points()), cases.some_masks(3, fraction=0.2)
    how = {"max_epochs": 1, "batch_size": 2}
    truth = retrain(model_fn, data, train_data=data, masks=masks, num_seeds=1, **how)
    reason = f"some batches have no example of some subsets, and {named} depends on its number of steps"
    assert truth.metadata["one_by_one_because"] == reason
    assert f"one by one, each with a fresh Trainer, because {reason}." in capsys.readouterr().err
    expected = by_hand(model_fn, data, data, masks, 0, **how)
    torch.testing.assert_close(truth.losses, expected.float(), rtol=1e-6, atol=1e-6)


def test_dampening_of_one_group_counts_too():
    def optimize(model):
        return torch.optim.SGD([{"params": list(model.parameters()), "dampening": 0.5}], lr=0.1, momentum=0.9)

    recipe = Recipe(lambda: Net(mlp(), optimize), points(), train_data=points(), max_epochs=1, batch_size=2, task=None)
    with pytest.raises(CannotBatch, match="SGD depends on its number of steps"):
        Together(recipe, 0).check_steps(cases.some_masks(3, 0.2), [0])


def margin(model, batch):
    outputs, targets = model(batch[0]), batch[1][:, None]
    others = outputs.scatter(1, targets, -torch.inf).logsumexp(1)
    return outputs.gather(1, targets)[:, 0] - others


def odds(outputs, targets):
    p = outputs.softmax(1).gather(1, targets[:, None])[:, 0]
    return -(p / (1 - p)).log()


def signed_margin(model, batch):
    return ((2 * batch[1] - 1) * model(batch[0]))[:, 0]


def signed(outputs, targets):
    return (outputs * (1 - 2 * targets))[:, 0]


def one_logit():
    return Net(mlp(1), sgd, cases.mean_logistic_loss)


OPTIMIZER = partial(torch.optim.SGD, lr=0.1)
MEASURED = {
    "margins": (lambda: Net(mlp(), sgd), points, {"measure": margin}, odds),
    "margins of one logit": (one_logit, cases.yes_or_no, {"measure": signed_margin}, signed),
    # Half the squared error, where a LightningModule with mse_loss trains on all of it.
    "a plain module": (partial(mlp, 1), cases.numbers, {"optimizer": OPTIMIZER}, cases.half_squares),
    # The noise scales what is measured, but not training.
    "noise": (
        lambda: Net(mlp(1), sgd, F.mse_loss),
        cases.numbers,
        {"task": tasks.Regression(noise_std=0.5)},
        lambda outputs, targets: 4 * cases.half_squares(outputs, targets),
    ),
}


@pytest.mark.parametrize("name", MEASURED)
def test_what_is_trained_on_and_what_is_measured(name):
    model_fn, data, more, measure = MEASURED[name]
    queries, masks, how = data(NUM_QUERIES, seed=1), cases.some_masks(3), {"max_epochs": 2, "batch_size": BATCH}
    truth = retrain(model_fn, queries, train_data=data(), masks=masks, num_seeds=1, **more, **how)
    assert truth.metadata["one_by_one_because"] is None
    if name == "a plain module":
        mean = lambda outputs, targets: cases.half_squares(outputs, targets).mean()  # noqa: E731
        model_fn = lambda: Net(mlp(1), lambda m: OPTIMIZER(m.parameters()), mean)  # noqa: E731
    expected = by_hand(model_fn, data(), queries, masks, 0, measure=measure, **how)
    torch.testing.assert_close(truth.losses, expected, rtol=1e-4, atol=1e-4)


# ---- chunks, threads, order, dropout ----------------------------------------------------------------------------


def dropout_net():
    return Net(nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 3)), sgd)


class Functional(nn.Module):
    """Dropout as a function, as attention does it."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 16), nn.Linear(16, 3)

    def forward(self, x):
        return self.second(F.dropout(torch.tanh(self.first(x)), 0.5, self.training))


KINDS = {
    "plain": (plain_net, points),
    "dropout": (dropout_net, points),
    "augmented": (plain_net, lambda: Augmented(points())),
}


def ask(kind, masks, **more):
    model_fn, data = KINDS[kind]
    how = {"train_data": data(), "max_epochs": 3, "batch_size": BATCH, "num_seeds": 2, "masks": masks} | more
    return retrain(model_fn, points(NUM_QUERIES, seed=1), show_progress=False, **how)


@pytest.mark.filterwarnings("ignore:Two reads of one example")
@pytest.mark.parametrize("kind", KINDS)
def test_neither_chunks_nor_threads_nor_the_order_of_subsets_matter(kind):
    masks, threads = cases.some_masks(7), torch.get_num_threads()
    whole = ask(kind, masks, memory_budget=2**40)
    assert whole.metadata["one_by_one_because"] is None
    torch.testing.assert_close(whole.losses_by_seed[0, 0], ask(kind, masks[:1]).losses_by_seed[0, 0])
    chunked = ask(kind, masks, memory_budget=1)
    assert chunked.metadata["chunk_size"] == 1
    assert whole.metadata["chunk_size"] == 7 if kind != "plain" else whole.metadata["chunk_size"] >= 7
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1))
    permuted = ask(kind, masks[order], memory_budget=3 * 2**12)
    assert 1 < permuted.metadata["chunk_size"] < 7
    others = [chunked.losses_by_seed, permuted.losses_by_seed[:, order.argsort()]]
    if kind == "plain":  # the others train in one thread
        with cases.threads(1 if threads > 1 else 2):
            others.append(ask(kind, masks).losses_by_seed)
    for other in others:
        torch.testing.assert_close(other, whole.losses_by_seed, rtol=1e-4, atol=1e-5)
    assert not whole.losses_by_seed[0].allclose(whole.losses_by_seed[1], atol=1e-2)


def test_functional_dropout_is_a_random_loss_of_the_modules_own():
    how = {"max_epochs": 1, "batch_size": BATCH, "num_seeds": 1, "masks": cases.some_masks(1)}
    truth = retrain(lambda: Net(Functional(), sgd), points(), train_data=points(), show_progress=False, **how)
    assert "the module's own loss" in truth.metadata["one_by_one_because"]


def test_dropout_is_on_shared_by_all_and_in_one_thread():
    kind, masks, data = "dropout", cases.some_masks(1).expand(3, -1), points()
    recipe = Recipe(KINDS[kind][0], data, train_data=data, max_epochs=3, batch_size=BATCH)
    together = Together(recipe, 0)
    assert recipe.is_random
    assert recipe.num_threads == 1
    losses = together.train(masks, 0)
    torch.testing.assert_close(losses[1:], losses[:1].expand(2, -1))  # one subset three times, one mask of dropout
    off = by_hand(lambda: KINDS[kind][0]().eval(), data, data, masks[:1], 0, max_epochs=3, batch_size=BATCH)
    assert not losses[:1].allclose(off, atol=1e-2)


def test_global_random_numbers_do_not_matter_and_are_left_alone():
    masks = cases.some_masks(3)
    torch.manual_seed(1)
    first, after = ask("dropout", masks), torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(3))
    assert first.losses_by_seed.equal(ask("dropout", masks).losses_by_seed)


def test_several_threads_where_nothing_is_random():
    with cases.threads(2):
        recipe = Together(Recipe(plain_net, points(), train_data=points(), max_epochs=1, batch_size=5), 0).recipe
        assert not recipe.is_random
        assert recipe.num_threads == 2


# ---- against a Trainer ------------------------------------------------------------------------------------------


def eval_dropout():
    """Dropout that is off, as a frozen part of a model has it: a Trainer leaves the modes of layers alone."""
    model = dropout_net()
    model.network[2].eval()
    return model


@pytest.mark.filterwarnings("ignore:Found . module.s. in eval mode")
@pytest.mark.parametrize("name", ["classes", "squares", "frozen", "every other step", "adamw amsgrad", "empty", "eval"])
def test_a_trainer_gives_the_same(name):
    network, data, loss, _ = cases.NETWORKS.get(name, cases.NETWORKS["classes"])
    model_fn = lambda: Net(network(), OPTIMIZERS.get(name, sgd), loss)  # noqa: E731
    model_fn = eval_dropout if name == "eval" else model_fn
    masks, size = (cases.some_masks(3), BATCH) if name != "empty" else (cases.some_masks(3, fraction=0.2), 2)
    recipe = Recipe(model_fn, data(NUM_QUERIES, seed=1), train_data=data(), max_epochs=3, batch_size=size)
    together = Together(recipe, 0).train(masks, 1)
    alone = torch.stack([train_alone(recipe, mask, 1) for mask in masks])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


# ---- the order of batches ---------------------------------------------------------------------------------------


def test_orders():
    for epoch in range(3):
        batches = batch_order(25, 9, True, False, 0, epoch)
        assert [len(batch) for batch in batches] == [9, 9, 7]
        assert sorted(torch.cat(batches).tolist()) == list(range(25))
        assert [len(batch) for batch in batch_order(25, 9, True, True, 0, epoch)] == [9, 9]
        assert torch.cat(batch_order(25, 9, False, False, 0, epoch)).equal(torch.arange(25))
    assert [len(batch) for batch in batch_order(5, 9, True, True, 0, 0)] == [5]  # not dropped: it is all there is
    orders = {tuple(torch.cat(batch_order(25, 9, True, False, *key)).tolist()) for key in [(0, 0), (0, 1), (1, 0)]}
    assert len(orders) == 3
