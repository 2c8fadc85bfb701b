"""What every callback does, whatever it records."""

import random
import re
from contextlib import nullcontext

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader, SubsetRandomSampler

from stride_lightning import FurtherTrainingCallback, StrideCallback, TracInCallback, attribute
from stride_lightning.data.loading import NoPositionsError
from stride_lightning.model.weights import weight_hash
from stride_lightning.storage.records import find_records, read_info
from tests.helpers import models
from tests.helpers.models import Classifier, ConvNet, Dicts, build, hooks_of, loader, make_trainer, train
from tests.helpers.runs import fit_in_the_other_tree

DATA, QUERIES = models.classification_data(), models.classification_data(5, seed=1)
#: By the name of the method that reads its records: a callback and what makes it write one, at the end.
CALLBACKS = {
    "stride": (StrideCallback, {"num_subsets": 8, "statistics_every_n_steps": 1, "fit_operators": True}),
    "tracin": (TracInCallback, {"every_n_epochs": 100}),
    "further-training": (
        FurtherTrainingCallback,
        {"left_out": [12, 3, 30], "num_seeds": 1, "optimizer": lambda p: torch.optim.SGD(p, lr=0.1)},
    ),
}
every_callback = pytest.mark.parametrize("name", CALLBACKS)
pytestmark = pytest.mark.filterwarnings(
    "ignore:You're resuming from a checkpoint that ended before the epoch ended",
    "ignore:Checkpoint directory .* exists and is not empty",
)


def callback_of(name, queries=QUERIES, **options):
    kind, needed = CALLBACKS[name]
    return kind(*[queries] * (name == "further-training"), **needed | options)


def found_by(name, model, **options):
    """The record that attribute() finds."""
    options = {"train_data": loader(DATA), "method": name, "show_progress": False} | options
    return attribute(model, QUERIES, **options).metadata["record"]


def names_in(folder):
    return [path.name for path in find_records(folder)]


def is_untouched(model):
    """Neither hooks nor modes nor optimizers tell that a callback was there."""
    hooks = [hook for optimizer in model.trainer.optimizers for hook in optimizer._optimizer_step_post_hooks]
    return hooks_of(model) == hooks == [] and all(module.training for module in model.modules())


@pytest.fixture(scope="module", params=CALLBACKS)
def recorded(request, tmp_path_factory):
    """A finished run with a logger: its name, model, trainer and callback."""
    folder, model, callback = tmp_path_factory.mktemp("run"), build(Classifier), callback_of(request.param)
    return request.param, model, train(model, DATA, folder, callback, logger=CSVLogger(folder)), callback


def test_the_record_lies_in_the_log_folder_and_names_what_it_is_of(recorded):
    name, model, trainer, callback = recorded
    (path,) = find_records(f"{trainer.log_dir}/{name}")
    assert callback.records == [path]
    info = read_info(path)
    assert path.name == "step=8"
    assert (info["kind"], info["step"], info["model"], info["weights"]) == (name, 8, "Classifier", weight_hash(model))
    assert name == "tracin" or info["task"] == "Classification()"
    assert info["data"]["num_examples"] == len(DATA)


def test_state_survives_weights_only_loading_and_attribute_finds_the_record(recorded, tmp_path):
    name, model, trainer, callback = recorded
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    state = torch.load(tmp_path / "run.ckpt", weights_only=True)["callbacks"][callback.state_key]
    assert state == callback.state_dict()
    other = callback_of(name)
    assert other.state_key == callback.state_key
    other.load_state_dict(state)
    assert other.records == callback.records
    expected = str(callback.records[-1])
    if name != "tracin":  # whose scores are of several records
        assert found_by(name, model) == expected
        assert found_by(name, build(Classifier, seed=1), ckpt_path=tmp_path / "run.ckpt") == expected
        assert found_by(name, model, record=callback.records[0]) == expected


@every_callback
def test_a_folder_of_ones_own_and_names_that_are_taken(name, tmp_path):
    for _ in range(2):
        train(build(Classifier), DATA, tmp_path, callback_of(name, dirpath=tmp_path / "elsewhere"), max_epochs=1)
    assert names_in(tmp_path / "elsewhere") == ["step=4", "step=4-v1"]
    assert not (tmp_path / name).exists()


@every_callback
def test_several_instances(name, tmp_path):
    others = [callback_of(other) for other in CALLBACKS if other != name]
    one, two = callback_of(name), callback_of(name, dirpath=tmp_path / "two")
    train(build(Classifier), DATA, tmp_path, one, *others, two)
    assert len({callback.state_key for callback in (one, two, *others)}) == 4
    assert (one.records, two.records) == ([tmp_path / name / "step=8"], [tmp_path / "two" / "step=8"])
    for folder in ("two", *CALLBACKS):
        assert names_in(tmp_path / folder) == ["step=8"]


@every_callback
def test_weights_that_a_callback_listed_before_swaps_in(name, tmp_path):
    """As weight averaging does, at the end."""

    class Averaging(L.Callback):
        def on_train_end(self, trainer, pl_module):
            with torch.no_grad():
                for weight in pl_module.parameters():
                    weight.mul_(0.5)

    frequent = {} if name == "further-training" else {"every_n_epochs": 1}
    model, callback = build(Classifier), callback_of(name, **frequent)
    make_trainer(tmp_path, Averaging(), callback, max_epochs=1).fit(model, loader(DATA))
    assert read_info(callback.records[-1])["weights"] == weight_hash(model)


@every_callback
def test_train_indices_of_a_sampler(name, tmp_path):
    chosen = [30, 4, 22, 12, 1, 3, 8, 13]
    sampled = DataLoader(DATA, 4, sampler=SubsetRandomSampler(chosen))
    callback = callback_of(name, train_indices=chosen)
    model = build(Classifier)
    train(model, sampled, tmp_path, callback)
    assert read_info(callback.records[0])["data"]["num_examples"] == 8
    assert name == "tracin" or found_by(name, model, train_indices=chosen) == str(callback.records[0])


@every_callback
def test_a_task_of_ones_own(name, tmp_path):
    callback = callback_of(name, queries=Dicts(QUERIES), task=models.DictTask())
    train(build(models.DictClassifier), Dicts(DATA), tmp_path, callback)
    assert name == "tracin" or read_info(callback.records[0])["task"] == "DictTask()"


@every_callback
def test_the_other_lightning(name, tmp_path):
    """The package ``pytorch_lightning``, whose classes are others."""
    callback = callback_of(name)
    model = fit_in_the_other_tree(callback, DATA, tmp_path)
    assert names_in(tmp_path / name) == ["step=4"]
    assert read_info(callback.records[0])["weights"] == weight_hash(model)
    assert name == "tracin" or found_by(name, model) == str(callback.records[0])


@every_callback
@pytest.mark.parametrize(
    ("kind", "data", "options"),
    [
        (Classifier, DATA, {}),
        (ConvNet, models.picture_data(), {}),
        (ConvNet, models.Augmented(models.picture_data()), {}),
        (Classifier, DATA, {"precision": "bf16-mixed", "accumulate_grad_batches": 3}),
    ],
    ids=["dropout", "batchnorm", "augmentation", "bf16-mixed and accumulation"],
)
@pytest.mark.filterwarnings("ignore:Two reads of one example")
def test_training_is_bit_identical(name, tmp_path, kind, data, options):
    """Final weights, random numbers of all kinds, and what a callback listed later sees."""
    after = []

    class Later(L.Callback):
        def on_train_end(self, trainer, pl_module):
            momentum = [state["momentum_buffer"].clone() for state in trainer.optimizers[0].state.values()]
            gradients = [p.grad.clone() for p in pl_module.parameters() if p.grad is not None]
            tensors = [torch.rand(3), *momentum, *gradients]
            plain = weight_hash(pl_module), pl_module.training, random.random(), np.random.rand()  # noqa: NPY002
            after.append((plain, tensors, set(vars(pl_module))))

    queries = QUERIES if kind is Classifier else models.picture_data(3, seed=5)
    frequent = {} if name == "further-training" else {"every_n_train_steps": 2, "every_n_epochs": 1}
    callback = callback_of(name, queries=queries, **frequent)
    for callbacks in ([], [callback]):
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        model = build(kind, **({"dropout": 0.4} if kind is Classifier else {}))
        train(model, data, tmp_path, *callbacks, Later(), **options)
    (plain, tensors, attributes), watched = after
    assert watched[0] == plain
    assert all(one.equal(other) for one, other in zip(watched[1], tensors, strict=True))
    assert watched[2] == attributes
    assert is_untouched(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert callback.records


@every_callback
def test_modes_are_left_alone(name, tmp_path):
    """A part that the user keeps in eval mode stays so, the rest trains."""
    seen = []

    class Frozen(ConvNet):
        def on_train_batch_start(self, batch, batch_idx):
            self.network[1].eval()

        def training_step(self, batch, batch_idx):
            if isinstance(self._trainer, L.Trainer):  # not where the callback reads the loss
                seen.append([module.training for module in self.modules()].count(False) + len(hooks_of(self)))
            return super().training_step(batch, batch_idx)

        def on_train_end(self):
            seen.append([module.training for module in self.modules()].count(False))

    train(build(Frozen), models.picture_data(), tmp_path, callback_of(name, queries=models.picture_data(2, seed=5)))
    assert len(seen) >= 2 * 3 + 1
    assert set(seen) == {1}


@every_callback
@pytest.mark.parametrize("evaluated", [False, True], ids=["training", "evaluated"])
def test_nothing_is_left_behind_by_an_exception(name, tmp_path, evaluated):
    """In a training step, or in a pass of the callback's own, where there is one while training goes on."""

    class Failing(Classifier):
        fails = False

        def on_train_batch_start(self, batch, batch_idx):
            self.fails = self.global_step >= 3

        def forward(self, inputs):
            if self.fails and self.training is not evaluated:
                raise RuntimeError("out of luck")
            return super().forward(inputs)

    model, outcome = build(Failing, dropout=0.4), pytest.raises(RuntimeError, match="out of luck")
    with nullcontext() if evaluated and name == "tracin" else outcome:
        train(model, DATA, tmp_path, callback_of(name))
    assert evaluated or names_in(tmp_path / name) == []
    assert is_untouched(model)


@every_callback
def test_validation_a_datamodule_and_accumulated_batches(name, tmp_path):
    """Accumulated batches are one step."""
    model, callback = build(models.Validated), callback_of(name, queries=models.Data())
    options = {"num_sanity_val_steps": 2, "val_check_interval": 0.5, "accumulate_grad_batches": 2}
    make_trainer(tmp_path, callback, max_epochs=3, **options).fit(model, models.Data())
    assert [path.name for path in callback.records] == ["step=6"]
    info = read_info(callback.records[0])
    assert (info["step"], info["weights"]) == (6, weight_hash(model))


@every_callback
def test_fast_dev_run_writes_nothing_and_still_refuses(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    callback = callback_of(name)
    train(build(Classifier), DATA, tmp_path, callback, fast_dev_run=True)
    assert callback.records == list(tmp_path.iterdir()) == []
    with nullcontext() if name == "tracin" else pytest.raises(NoPositionsError, match="of all of them"):
        both = CombinedLoader({"a": loader(DATA), "b": loader(DATA)})
        train(build(models.OfTwoLoaders), both, tmp_path, callback_of(name), fast_dev_run=True)


@every_callback
@pytest.mark.parametrize("steps", [4, 6], ids=["epoch's end", "mid-epoch"])
def test_resume(name, tmp_path, steps):
    frequent = {} if name == "further-training" else {"every_n_train_steps": 4}

    def fit(seed, **options):
        keep = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=steps, save_top_k=-1, filename="{step}")
        model, callback = build(Classifier, seed=seed), callback_of(name, **frequent)
        train(model, DATA, tmp_path, callback, keep, enable_checkpointing=True, **options)
        return model, callback

    fit(0)
    model, callback = fit(1, max_epochs=3, ckpt_path=tmp_path / "kept" / f"step={steps}.ckpt")
    names = [re.sub("-v1$", "", path.name) for path in callback.records]
    assert names == (["step=12"] if name == "further-training" else ["step=4", "step=8", "step=12"])
    info = read_info(callback.records[-1])
    assert (info["step"], info["weights"]) == (12, weight_hash(model))


@every_callback
def test_resume_at_the_end_writes_nothing_more_and_a_second_fit_on_the_same_trainer_does(name, tmp_path):
    model, callback, resumed = build(Classifier), callback_of(name), callback_of(name)
    trainer = train(model, DATA, tmp_path, callback)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    train(build(Classifier), DATA, tmp_path, resumed, ckpt_path=tmp_path / "end.ckpt")
    assert names_in(tmp_path / name) == [path.name for path in resumed.records] == ["step=8"]
    trainer.fit_loop.max_epochs = 4
    trainer.fit(model, loader(DATA))
    assert [path.name for path in callback.records] == ["step=8", "step=16"]
    assert read_info(callback.records[1])["weights"] == weight_hash(model)
    trainer.fit(model, loader(DATA))  # nothing left to train
    assert names_in(tmp_path / name) == ["step=8", "step=16"]


@every_callback
def test_loaders_that_are_made_anew_are_said(name, tmp_path, caplog):
    """Records are about the examples of the first one."""
    said = "makes new loaders on the way"
    with caplog.at_level("INFO"):
        train(build(Classifier), DATA, tmp_path, callback_of(name))
        assert said not in caplog.text
        train(build(Classifier), DATA, tmp_path, callback_of(name), reload_dataloaders_every_n_epochs=1)
    assert said in caplog.text
