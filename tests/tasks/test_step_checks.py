"""What a loss depends on besides batch and weights: said, or refused with the cause."""

import time

import lightning.pytorch as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from stride_lightning import TracInCallback
from stride_lightning.model.checkpoints import load_checkpoint
from stride_lightning.storage.records import find_records, read_info
from stride_lightning.tasks.moments import moment_of
from stride_lightning.tasks.step_checks import check_step, depends_on_moment
from stride_lightning.tasks.training_step import Moment, TrainingStep
from tests.helpers.models import Classifier, build, classification_data, train
from tests.tasks.test_training_step import BATCH, KEYS, X, Y, cross_entropy, make

OTHER = ((X[:2], Y[:2]), KEYS[:2])


def checked(step, moment=None, **attributes):
    model = make(step, **attributes)
    return check_step(TrainingStep(model, moment), [(BATCH, KEYS), OTHER])


def test_an_ordinary_step_has_nothing_to_say():
    assert checked(lambda self, batch, i: cross_entropy(self, batch)) == []
    assert checked(lambda self, batch, i: cross_entropy(self, batch) * torch.rand(())) == []


def test_a_sample_of_the_batch_is_no_other_loss():
    """It is drawn for the examples until another batch shows that it has the same size there."""

    def step(self, batch, i):
        rows = torch.randint(len(batch[0]), (12,))
        return F.cross_entropy(self.net(batch[0][rows]), batch[1][rows])

    assert checked(step) == []


def test_dependence_on_batch_idx_is_said():
    assert checked(lambda self, b, i: cross_entropy(self, b) * (i + 1)) == [
        "it depends on batch_idx; it is read at batch_idx=0"
    ]
    assert checked(lambda self, b, i: cross_entropy(self, b) if i == 0 else None) != []


MOMENTS = {
    "epoch": lambda self, b, i: cross_entropy(self, b) * (1 + self.current_epoch),
    "step": lambda self, b, i: cross_entropy(self, b) * min(1.0, self.global_step / 100),
    "every other step": lambda self, b, i: cross_entropy(self, b) * (1 + self.global_step % 2),
    "list": lambda self, b, i: cross_entropy(self, b) * [1.0, 1.0, 1.0, 1.0, 1.0][self.trainer.current_epoch],
    "gradient only": lambda self, b, i: (
        cross_entropy(self, b) + (self.net.bias - self.net.bias.detach()).sum() * self.current_epoch
    ),
}


@pytest.mark.parametrize("name", MOMENTS)
def test_dependence_on_the_moment_is_said(name):
    (note,) = checked(MOMENTS[name], Moment(4, 79))
    assert note == "it changes during training; it is taken at the last step (epoch 4, step 79)"
    with pytest.raises(ValueError, match=r"depends on the epoch or the step of training.*loss=fn"):
        checked(lambda self, b, i: cross_entropy(self, b) + (1 + self.current_epoch) * self.net.bias.sum())


def test_reading_the_moment_is_no_dependence():
    def step(self, batch, i):
        if self.current_epoch % 5 == 0:
            self.log("loss", 1.0)
        return cross_entropy(self, batch)

    model = make(step)
    assert not depends_on_moment(TrainingStep(model), BATCH, KEYS)


def test_skipping_everything_is_refused():
    with pytest.raises(ValueError, match="returned None for all of 2 batches"):
        checked(lambda self, batch, i: None)
    assert checked(lambda self, b, i: cross_entropy(self, b) if len(b[0]) < 5 else None) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_refused(value):
    with pytest.raises(ValueError, match=rf"returned {value} as its loss of a batch.*loss=fn"):
        checked(lambda self, b, i: cross_entropy(self, b) * value)


STREAM = iter(range(10**6))


@pytest.mark.parametrize(
    "step",
    [
        lambda self, b, i: cross_entropy(self, b) * torch.rand((), generator=fresh()),
        lambda self, b, i: cross_entropy(self, b) * (time.perf_counter_ns() % 1000 + 1),
        lambda self, b, i: cross_entropy(self, b) + self.net.bias.sum() * next(STREAM),
    ],
    ids=["generator", "time", "counter"],
)
def test_what_no_seed_controls_is_refused(step):
    with pytest.raises(ValueError, match=r"another loss when it runs again.*generator of its own"):
        checked(step)


def fresh():
    generator = torch.Generator()
    generator.seed()
    return generator


def test_a_generator_that_the_module_holds_is_said():
    (note,) = checked(
        lambda self, b, i: cross_entropy(self, b) * torch.rand((), generator=self.rng), rng=torch.Generator()
    )
    assert "generator that it holds" in note


# ---- the moment of the last step ---------------------------------------------------------------------------------


class Noted(Classifier):
    """Notes what its steps see."""

    def training_step(self, batch, batch_idx):
        t = self.trainer
        self.last = Moment(
            *(self.current_epoch, self.global_step, t.max_epochs, t.num_training_batches),
            t.estimated_stepping_batches,
        )
        return F.cross_entropy(self(batch[0]), batch[1])


class Compare(L.Callback):
    """Compares at every hook after a step."""

    def __init__(self):
        self.pairs = []

    def compare(self, trainer, pl_module, *_):
        self.pairs.append((moment_of(pl_module, None), pl_module.last))

    on_train_batch_end = on_train_epoch_end = on_train_end = on_validation_start = compare


@pytest.mark.parametrize(
    "options", [{"max_epochs": 3}, {"max_steps": 5, "max_epochs": -1}, {"max_epochs": 2, "accumulate_grad_batches": 2}]
)
def test_the_moment_of_an_attached_trainer(options, tmp_path):
    model, compare = build(Noted), Compare()
    trainer = train(model, DataLoader(classification_data(), 20), tmp_path, compare, **options)
    if "accumulate_grad_batches" not in options:  # else a step may be under way
        assert compare.pairs
        assert all(one == other for one, other in compare.pairs)
    assert moment_of(model, None) == model.last
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    fresh = build(Noted)
    saved = moment_of(fresh, load_checkpoint(tmp_path / "after.ckpt"))
    assert (saved.current_epoch, saved.global_step) == (model.last.current_epoch, model.last.global_step)


def test_the_moment_of_checkpoints_along_training(tmp_path):
    class Save(L.Callback):
        def __init__(self):
            self.seen = {}

        def save(self, trainer, pl_module, when):
            path = tmp_path / f"{len(self.seen)}-{when}.ckpt"
            trainer.save_checkpoint(path)
            self.seen[path] = pl_module.last

        def on_train_batch_end(self, trainer, pl_module, *_):
            self.save(trainer, pl_module, "batch")

        def on_train_epoch_end(self, trainer, pl_module):
            self.save(trainer, pl_module, "epoch")

        def on_train_end(self, trainer, pl_module):
            self.save(trainer, pl_module, "end")

    save = Save()
    train(build(Noted), DataLoader(classification_data(), 20), tmp_path, save, max_epochs=2)
    assert len(save.seen) == 9
    for path, last in save.seen.items():
        moment = moment_of(build(Noted), load_checkpoint(path))
        assert (moment.current_epoch, moment.global_step) == (last.current_epoch, last.global_step), path.name


def test_the_moment_of_records(tmp_path):
    model, callback = build(Noted), TracInCallback(every_n_epochs=1)
    train(model, DataLoader(classification_data(), 20), tmp_path, callback, max_epochs=2)
    moments = [moment_of(build(Noted), read_info(path)) for path in find_records(callback.dirpath)]
    assert {moment.current_epoch for moment in moments} == {0, 1}
    assert moments[-1] == model.last


def test_bare_weights_have_no_moment(tmp_path):
    model = build(Classifier)
    assert moment_of(model, None) is None
    assert moment_of(model, model.state_dict()) is None
    assert moment_of(nn.Linear(1, 1), None) is None
    train(model, DataLoader(TensorDataset(X, Y), 3), tmp_path, max_epochs=0)
    assert moment_of(model, None) is None
