"""Hooks that move batches see the stage that they are moved in."""

import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from stride_lightning import attribute
from stride_lightning.data.sources import resolve_queries, resolve_train_data
from stride_lightning.data.transfer import transferred
from tests.helpers.models import Classifier, build, classification_data, make_trainer
from tests.helpers.tiny import CPU, read

DATA = classification_data(20)


class ByTrainer(LightningDataModule):
    """Lightning's own idiom: only training batches are changed."""

    def train_dataloader(self):
        return DataLoader(DATA, 4)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return (batch[0] + 3 if self.trainer.training else batch[0]), batch[1]


class Noisy(ByTrainer):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch[0] + torch.rand_like(batch[0]), batch[1]


class ByMode(Classifier):
    def on_before_batch_transfer(self, batch, dataloader_idx):
        return (batch[0] + 3 if self.training else batch[0]), batch[1]


def fitted(folder, data, kind=Classifier):
    model = build(kind)
    trainer = make_trainer(folder)
    trainer.fit(model, data) if isinstance(data, DataLoader) else trainer.fit(model, datamodule=data)
    return model


@pytest.mark.parametrize("is_attached", [True, False])
def test_training_batches_are_those_of_training(tmp_path, is_attached):
    """Also where no Trainer is attached, as in a second process; queries are not of training."""
    data = ByTrainer()
    if is_attached:
        fitted(tmp_path, data)
        stage = data.trainer.state.stage
    train = resolve_train_data(data)
    for examples, shift in ((train, 3), (resolve_queries(DATA, beside=train), 0)):
        assert read(examples)[0].equal(DATA.tensors[0] + shift)
        assert data.trainer.state.stage == stage if is_attached else data.trainer is None


@pytest.mark.parametrize("is_attached", [True, False])
def test_the_mode_of_the_model_is_that_of_training(tmp_path, is_attached):
    model = fitted(tmp_path, DataLoader(DATA, 4), ByMode) if is_attached else build(ByMode)
    model.eval()
    attributes = dict(vars(model))
    train = resolve_train_data(DATA, model=model)
    assert read(train)[0].equal(DATA.tensors[0] + 3)
    assert read(resolve_queries(DATA, model, train))[0].equal(DATA.tensors[0])
    assert vars(model) == attributes


def test_what_hooks_draw_belongs_to_the_examples():
    train = resolve_train_data(Noisy())
    random_state = torch.get_rng_state()
    one, seven = (read(train, size)[0] for size in (1, 7))
    assert one.equal(seven)
    assert len((one - DATA.tensors[0])[:, 0].unique()) == 20
    ways = (([3, 5], 1), ([5], 1), ([5], 2))
    drawn = [next(train.drawn([torch.tensor(places)], seed, CPU))[0] for places, seed in ways]
    assert drawn[0][1:].equal(drawn[1])
    assert not drawn[1].equal(drawn[2])
    assert torch.get_rng_state().equal(random_state)


def test_an_error_leaves_the_stage_as_it_was():
    class Failing(ByTrainer):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            raise RuntimeError("out of luck")

    data = Failing()
    with pytest.raises(RuntimeError, match="out of luck"):
        transferred(torch.ones(2), CPU, (data, None), is_training=True)
    assert data.trainer is None


def test_a_hook_that_asks_for_more_than_the_stage_says_so():
    class Asking(ByTrainer):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch[0] * self.trainer.estimated_stepping_batches, batch[1]

    with pytest.raises(AttributeError, match=r"reads `trainer.estimated_stepping_batches`, but no Trainer is attached"):
        read(resolve_train_data(Asking()))


def test_scores_are_of_the_batches_of_training(tmp_path):
    shifted = [(x + 3, y) for x, y in DATA]
    model, options = fitted(tmp_path, ByTrainer()), {"method": "grad-dot", "show_progress": False}
    expected = attribute(model, DATA, train_data=shifted, **options).scores
    torch.testing.assert_close(attribute(model, DATA, train_data=ByTrainer(), **options).scores, expected)
