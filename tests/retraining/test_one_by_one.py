"""A fresh Trainer for every subset: its batches, its hooks, its epochs."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from stride_lightning.retraining.batches import batch_order
from stride_lightning.retraining.one_by_one import train_alone
from stride_lightning.retraining.recipe import Recipe
from stride_lightning.retraining.retrain import retrain
from stride_lightning.retraining.together import Together
from stride_lightning.tasks.measures import function_identity
from stride_lightning.tasks.own_loss import OwnLoss
from tests.helpers.models import make_trainer
from tests.retraining import cases
from tests.retraining.cases import NUM_QUERIES, Net, by_hand, mlp, plain_net, points, sgd, some_masks
from tests.retraining.further import SPREAD, spread_losses

QUERIES = points(NUM_QUERIES, seed=1)


def recipe_of(model_fn=plain_net, **more):
    how = {"train_data": points(), "max_epochs": 3, "batch_size": 9} | more
    return Recipe(model_fn, QUERIES, **how)


class Watching(Net):
    """Notes what a Trainer shows it."""

    seen = None

    def __init__(self):
        super().__init__(mlp(), sgd)

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, batch[0][:, 0].tolist()))
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(("size", "drop_last"), [(9, False), (9, True), (2, False)])
def test_batches_are_those_of_the_whole_order_without_the_others(size, drop_last):
    """Also where the number of batches that hold an example of the subset changes from epoch to epoch."""
    data, mask = points(), some_masks(1, fraction=0.2)[0]
    loader = DataLoader(data, size, shuffle=True, drop_last=drop_last)
    recipe = recipe_of(Watching, train_data=loader, batch_size=None, max_epochs=4)
    Watching.seen = []
    train_alone(recipe, mask, 2)
    expected = []
    for epoch in range(4):
        batches = [places[mask[places]] for places in batch_order(25, size, True, drop_last, 2, epoch)]
        expected += [(epoch, data.tensors[0][places, 0].tolist()) for places in batches if len(places)]
    assert Watching.seen == expected
    counts = [sum(epoch == number for epoch, _ in expected) for number in range(4)]
    assert size == 9 or counts[0] < max(counts) or len(set(counts)) > 1  # or this would show less


@pytest.mark.parametrize("size", [9, 2])
@pytest.mark.parametrize("is_given", [False, True], ids=["default", "own trainer"])
def test_losses_are_those_of_a_plain_loop(size, is_given, tmp_path):
    trainer = (lambda: make_trainer(tmp_path, max_epochs=3)) if is_given else None
    recipe, masks = recipe_of(batch_size=size, trainer_fn=trainer), some_masks(2, fraction=0.3)
    losses = torch.stack([train_alone(recipe, mask, 1) for mask in masks])
    expected = by_hand(plain_net, points(), QUERIES, masks, 1, max_epochs=3, batch_size=size)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)


def test_a_plain_module_and_an_optimizer_of_its_own():
    optimizer = lambda parameters: torch.optim.Adam(parameters, lr=0.05)  # noqa: E731
    expected_fn = lambda: Net(mlp(), lambda model: optimizer(model.parameters()))  # noqa: E731
    masks, how = some_masks(2), {"max_epochs": 3, "batch_size": 9}
    expected = by_hand(expected_fn, points(), QUERIES, masks, 0, **how)
    for kind in (mlp, plain_net):  # in place of its configure_optimizers
        recipe = recipe_of(kind, optimizer=optimizer)
        losses = torch.stack([train_alone(recipe, mask, 0) for mask in masks])
        torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)


def spread_rows(model, batch):
    return spread_losses(model(batch[0]), batch[1])


OWN = {
    "own": (lambda: Net(mlp(), sgd, SPREAD), {}, SPREAD),
    "by name": (lambda: Net(mlp(), sgd), {"task": OwnLoss()}, F.cross_entropy),
    "a function": (lambda: Net(mlp(), sgd, SPREAD), {"loss": spread_rows}, SPREAD),
}


@pytest.mark.parametrize("name", OWN)
def test_losses_of_the_modules_own(name):
    model_fn, more, loss = OWN[name]
    queries, masks, how = points(NUM_QUERIES, seed=1), cases.some_masks(2), {"max_epochs": 2, "batch_size": 9}
    truth = retrain(model_fn, queries, train_data=points(), masks=masks, num_seeds=1, **how, **more)
    assert "it trains on" in truth.metadata["one_by_one_because"]
    assert truth.measure == {"name": "loss", "direction": "lowers"}
    measure = cases.cross_entropies if name == "by name" else spread_losses
    expected = by_hand(lambda: Net(mlp(), sgd, loss), points(), queries, masks, 0, measure=measure, **how)
    torch.testing.assert_close(truth.losses, expected, rtol=1e-4, atol=1e-4)
    functions = truth.metadata.get("functions", {})
    assert functions == ({"loss": function_identity(spread_rows)} if name == "a function" else {})


def test_a_plain_module_trains_on_a_function():
    make, optimizer = partial(mlp, 3), partial(torch.optim.SGD, lr=0.1)
    queries, masks, how = points(NUM_QUERIES, seed=1), cases.some_masks(2), {"max_epochs": 2, "batch_size": 9}
    more = {"loss": spread_rows, "optimizer": optimizer, "measure": lambda m, b: -spread_rows(m, b)}
    truth = retrain(make, queries, train_data=points(), masks=masks, num_seeds=1, **how, **more)
    same = lambda: Net(mlp(), lambda m: optimizer(m.parameters()), SPREAD)  # noqa: E731
    expected = by_hand(same, points(), queries, masks, 0, measure=spread_losses, **how)
    torch.testing.assert_close(truth.losses, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(truth.values, -truth.losses)


def test_a_trainer_that_has_trained_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, max_epochs=3)
    recipe = recipe_of(trainer_fn=lambda: trainer)
    train_alone(recipe, some_masks(1)[0], 0)
    with pytest.raises(ValueError, match="`trainer_fn` returned a Trainer that has trained before"):
        train_alone(recipe, some_masks(1)[0], 0)


def test_a_trainer_for_other_epochs_is_refused(tmp_path):
    with pytest.raises(ValueError, match="makes a Trainer for 5 epochs, but `max_epochs` is 3"):
        train_alone(recipe_of(trainer_fn=lambda: make_trainer(tmp_path, max_epochs=5)), some_masks(1)[0], 0)


def test_random_states_are_left_alone_and_do_not_matter():
    recipe, mask = recipe_of(), some_masks(1)[0]
    torch.manual_seed(1)
    first, after = train_alone(recipe, mask, 0), torch.rand(2)
    torch.manual_seed(1)
    assert after.equal(torch.rand(2))
    assert first.equal(train_alone(recipe, mask, 0))


class DoublingModel(Net):
    """Doubles the inputs on the device; twice would be four times. Data modules are in test_retrain.py."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return 2 * batch[0], batch[1]


def test_hooks_of_the_model_are_applied_to_data_once():
    recipe, masks = recipe_of(lambda: DoublingModel(mlp(), sgd)), some_masks(2)
    data, queries = (TensorDataset(2 * data.tensors[0], data.tensors[1]) for data in (points(), QUERIES))
    expected = by_hand(plain_net, data, queries, masks, 0, max_epochs=3, batch_size=9)
    alone = torch.stack([train_alone(recipe, mask, 0) for mask in masks])
    torch.testing.assert_close(alone, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(Together(recipe, 0).train(masks, 0), expected, rtol=1e-4, atol=1e-5)


def test_evaluation_is_in_eval_mode():
    """With dropout after the last layer, where most losses of training are log 3."""

    def with_dropout():
        model = plain_net()
        model.network.append(torch.nn.Dropout(0.99))
        return model

    losses = train_alone(recipe_of(with_dropout), some_masks(1)[0], 0)
    assert ((losses - torch.tensor(3.0).log()).abs() > 1e-4).all()
