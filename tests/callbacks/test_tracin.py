"""TracInCallback on real Trainers."""

import csv
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, SubsetRandomSampler

from stride_lightning import Classification, StrideCallback
from stride_lightning.callbacks.tracin import TracInCallback
from stride_lightning.data.examples import Examples
from stride_lightning.data.reading import fingerprint_of
from stride_lightning.model.weights import weight_hash
from stride_lightning.storage.records import find_records, read_info, read_record, write_record
from tests.helpers.models import (
    Augmented,
    Classifier,
    ConvNet,
    DictClassifier,
    Dicts,
    DictTask,
    Validated,
    build,
    classification_data,
    hooks_of,
    loader,
    make_trainer,
    picture_data,
    train,
)
from tests.helpers.runs import callbacks_of, fit_in_the_other_tree, run_cli, write_config
from tests.helpers.schedules import OneCycle, Stepped, TensorRate, TwoGroups, TwoOptimizers, by_hand
from tests.runtime.test_distributed import run_two, start

DATA = classification_data()
IN_ORDER = loader(DATA, shuffle=False)
NAMES = ["network.0.bias", "network.0.weight", "network.2.bias", "network.2.weight"]
pytestmark = pytest.mark.filterwarnings(
    "ignore:You're resuming from a checkpoint that ended before the epoch ended",
    "ignore:Checkpoint directory .* exists and is not empty",
)


def info_of(callback):
    return [read_info(path) for path in callback.records]


def steps_of(callback):
    return [info["step"] for info in info_of(callback)]


def names_in(folder):
    return [path.name for path in find_records(folder)]


def trajectory_of(path):
    return [entry["name"] for entry in read_info(path)["trajectory"]]


# ---- weights and learning rates, against training by hand -----------------------------------------------------------


@pytest.mark.parametrize("kind", [Classifier, Stepped, OneCycle, TwoGroups, TensorRate])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_weights_and_rates_are_those_of_training_by_hand(tmp_path, kind, accumulate):
    callback = TracInCallback(every_n_train_steps=1)
    train(build(kind), IN_ORDER, tmp_path, callback, accumulate_grad_batches=accumulate)
    states, rates = by_hand(build(kind), DATA, accumulate=accumulate)
    assert steps_of(callback) == list(range(1, len(states) + 1))
    assert kind is Classifier or len({tuple(of_step.values()) for of_step in rates}) > 1
    for path, state, of_step in zip(callback.records, states, rates, strict=True):
        record = read_record(path)
        assert record.groups == ("weights",)
        saved = record.tensors("weights")
        assert sorted(saved) == NAMES
        for name in NAMES:
            torch.testing.assert_close(saved[name], state[name], rtol=0, atol=1e-6)
        assert record.info["learning_rates"] == of_step


def test_two_optimizers(tmp_path):
    """Two steps a batch; records at 2, 4 and 6 where every third is asked for: the first seen past 3 is 4."""
    for every, steps in ((1, [2, 4, 6, 8]), (3, [4, 6, 8])):
        callback = TracInCallback(tmp_path / str(every), every_n_train_steps=every)
        train(build(TwoOptimizers), IN_ORDER, tmp_path, callback, max_epochs=1)
        assert steps_of(callback) == steps
        states, rates = by_hand(build(TwoOptimizers), DATA, epochs=1)
        for path, info in zip(callback.records, info_of(callback), strict=True):
            assert info["learning_rates"] == rates[info["step"] - 1]
            saved = read_record(path).tensors("weights")
            torch.testing.assert_close(saved, states[info["step"] - 1], rtol=0, atol=1e-6)
    assert info_of(callback)[-1]["learning_rates"]["network.2.bias"] == 0.01 * 0.5**3


def test_rates_set_late_and_bare_optimizers(tmp_path):
    """Hooks of the module that run after callbacks, and steps that Lightning does not see."""

    class Late(Classifier):
        def on_before_optimizer_step(self, optimizer):
            optimizer.param_groups[0]["lr"] = 0.5 / (self.global_step + 1)

        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.optimizers().param_groups[0]["lr"] = 7.0

    class Bare(TwoOptimizers):
        def optimizers(self):
            return super().optimizers(use_pl_optimizer=False)

    callback = TracInCallback(every_n_train_steps=1)
    train(build(Late), DATA, tmp_path, callback, max_epochs=1)
    assert [info["learning_rates"]["network.0.bias"] for info in info_of(callback)] == [0.5, 0.25, 0.5 / 3, 0.125]
    bare = TracInCallback(tmp_path / "bare")
    train(build(Bare), IN_ORDER, tmp_path, bare, max_epochs=1)
    assert info_of(bare)[0]["learning_rates"] == by_hand(build(TwoOptimizers), DATA, epochs=1)[1][-1]


def test_only_trainable_parameters_that_an_optimizer_holds_have_rates(tmp_path):
    class Partly(Classifier):
        def configure_optimizers(self):
            self.network[0].bias.requires_grad_(False)
            return torch.optim.SGD([*self.network[0].parameters(), self.network[2].weight], lr=0.3)

    class Unfrozen(Classifier):
        def configure_optimizers(self):
            return torch.optim.SGD(self.network[2].parameters(), lr=0.1)

        def on_train_epoch_end(self):
            self.optimizers().add_param_group({"params": self.network[0].parameters(), "lr": 0.7})

    callback = TracInCallback()
    train(build(Partly), DATA, tmp_path, callback)
    assert info_of(callback)[0]["learning_rates"] == {"network.0.weight": 0.3, "network.2.weight": 0.3}
    assert sorted(read_record(callback.records[0]).tensors("weights")) == NAMES
    later = TracInCallback(tmp_path / "later", every_n_train_steps=100)  # the end, right after a group is added
    train(build(Unfrozen), DATA, tmp_path, later, max_epochs=1)
    rates = info_of(later)[0]["learning_rates"]
    assert (rates["network.2.weight"], rates["network.0.weight"]) == (0.1, 0.7)


def test_buffers_are_saved_and_compiled_names_are_plain(tmp_path):
    model, callback = build(ConvNet), TracInCallback()
    model.network[0] = torch.compile(model.network[0], backend=lambda graph, inputs: graph.forward)
    train(model, picture_data(), tmp_path, callback, max_epochs=1)
    record = read_record(callback.records[0])
    saved = record.tensors("weights")
    assert sorted(saved) == sorted(build(ConvNet).state_dict())
    assert saved["network.1.running_var"].equal(model.network[1].running_var)
    assert saved["network.0.weight"].equal(model.network[0].weight)
    assert set(record.info["learning_rates"]) == {name for name, _ in build(ConvNet).named_parameters()}
    assert record.info["weights"] == weight_hash(model)


# ---- the record -----------------------------------------------------------------------------------------------------


def test_record_names_what_it_is_of(tmp_path, monkeypatch):
    reads = []
    read = Examples.batches
    monkeypatch.setattr(Examples, "batches", lambda self, *args: reads.append(args[0]) or read(self, *args))
    model, callback = build(Classifier), TracInCallback()
    trainer = train(model, DATA, tmp_path, callback, logger=CSVLogger(tmp_path), max_epochs=3)
    assert callback.records == find_records(f"{trainer.log_dir}/tracin")
    assert [path.name for path in callback.records] == ["step=4", "step=8", "step=12"]
    infos = info_of(callback)
    last = infos[-1]
    assert (last["kind"], last["model"], last["task"]) == ("tracin", "Classifier", "Classification()")
    assert [info["epoch"] for info in infos] == [0, 1, 2]
    assert last["weights"] == weight_hash(model)
    assert last["trajectory"] == [{"name": f"step={step}", "step": step} for step in (4, 8, 12)]
    assert infos[0]["trajectory"] == last["trajectory"][:1]
    assert {"torch", "lightning", "stride-lightning"} <= last["versions"].keys()
    assert len({info["run"] for info in infos}) == 1
    assert last["data"] == fingerprint_of(Examples(DATA), Classification())
    # One example and the first batch; by the callback, once; by the line above.
    assert reads == [1, 64, 1024, 1024]


def test_rates_reach_every_logger(tmp_path):
    def logged(kind):
        loggers = [CSVLogger(tmp_path, name=f"{kind.__name__}{number}") for number in range(2)]
        train(build(kind), IN_ORDER, tmp_path, TracInCallback(tmp_path / kind.__name__), logger=loggers)
        found = []
        for logger in loggers:
            with open(f"{logger.log_dir}/metrics.csv") as file:
                rows = [row for row in csv.DictReader(file) if any(row[key] for key in row if "tracin" in key)]
            found.append(
                [(int(row["step"]), {k: float(v) for k, v in row.items() if v and "tracin" in k}) for row in rows]
            )
        assert found[0] == found[1]
        return found[0]

    assert logged(Stepped) == [(4, {"tracin/learning_rate": 0.1}), (8, {"tracin/learning_rate": 0.05})]
    step, rates = logged(TwoGroups)[0]  # the fourth step is the first after the schedule's
    assert step == 4
    assert rates == pytest.approx({"tracin/learning_rate/0": 0.001, "tracin/learning_rate/1": 0.02})


# ---- when records are written ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, [4, 8, 12, 16, 20]),
        ({"every_n_epochs": 2}, [8, 16, 20]),
        ({"every_n_train_steps": 8}, [8, 16, 20]),
        ({"every_n_train_steps": 8, "every_n_epochs": 2}, [8, 16, 20]),
        ({"every_n_train_steps": 7, "every_n_epochs": 3}, [7, 12, 14, 20]),
        ({"every_n_epochs": 100}, [20]),
        ({"save_last_k": 2}, [16, 20]),
        ({"save_last_k": 3}, [12, 16, 20]),
    ],
)
def test_steps(tmp_path, options, steps):
    callback = TracInCallback(**options)
    train(build(Classifier), DATA, tmp_path, callback, max_epochs=5)
    assert steps_of(callback) == steps
    assert callback.records == find_records(tmp_path / "tracin")
    assert trajectory_of(callback.records[-1]) == [f"step={step}" for step in steps]
    assert len({info["weights"] for info in info_of(callback)}) == len(steps)


def test_each_record_knows_those_that_are_kept_beside_it(tmp_path):
    callback = TracInCallback(save_last_k=4)
    train(build(Classifier), DATA, tmp_path, callback, max_epochs=5)
    first = ["step=4", "step=8", "step=12"]  # before the first was removed
    assert trajectory_of(tmp_path / "tracin/step=12") == first
    assert trajectory_of(tmp_path / "tracin/step=20") == [*first[1:], "step=16", "step=20"]


def test_the_end_is_recorded_again_if_averaging_changed_the_weights(tmp_path):
    model, callback = build(Classifier), TracInCallback()
    train(model, DATA, tmp_path, WeightAveraging(use_buffers=False), callback)
    assert [path.name for path in callback.records] == ["step=4", "step=8", "step=8-v1"]
    assert trajectory_of(callback.records[-1]) == ["step=4", "step=8", "step=8-v1"]
    assert info_of(callback)[-1]["weights"] == weight_hash(model)


def test_a_stop_in_the_middle_is_recorded_and_an_exception_is_not(tmp_path):
    callback = TracInCallback(every_n_epochs=1)
    train(build(Classifier), DATA, tmp_path, callback, max_steps=6, max_epochs=-1)
    assert steps_of(callback) == [4, 6]

    class Failing(Classifier):
        def training_step(self, batch, batch_idx):
            if self.global_step == 6:
                raise RuntimeError("out of luck")
            return super().training_step(batch, batch_idx)

    model, callback = build(Failing), TracInCallback(tmp_path / "failed")
    with pytest.raises(RuntimeError, match="out of luck"):
        train(model, DATA, tmp_path, callback)
    assert names_in(tmp_path / "failed") == ["step=4"]
    assert not model.optimizers().optimizer._optimizer_step_post_hooks


def test_diverged_weights_are_not_recorded(tmp_path):
    class Diverging(Classifier):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if self.global_step == 6:
                self.network[0].weight.data[0, 0] = torch.nan

    callback = TracInCallback()
    with pytest.warns(UserWarning, match=r"no record at step 8: weights or learning rates are not finite"):
        train(build(Diverging), DATA, tmp_path, callback)
    assert steps_of(callback) == [4]


def test_masks_of_minus_infinity_are_no_reason(tmp_path):
    class Masked(Classifier):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.full((2,), -torch.inf))

    callback = TracInCallback()
    train(build(Masked), DATA, tmp_path, callback)
    assert steps_of(callback) == [4, 8]


def test_fast_dev_run_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(build(Classifier), DATA, tmp_path, TracInCallback(every_n_train_steps=1), fast_dev_run=True)
    assert list(tmp_path.iterdir()) == []


def test_second_fit_goes_on_and_another_trainer_begins_anew(tmp_path):
    model, callback = build(Stepped), TracInCallback(tmp_path / "records")
    trainer = train(model, DATA, tmp_path, callback)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(model, loader(DATA))
    assert [path.name for path in callback.records] == ["step=4", "step=8", "step=12"]
    assert trajectory_of(callback.records[-1]) == ["step=4", "step=8", "step=12"]
    run = read_info(callback.records[0])["run"]
    trainer.fit(model, loader(DATA))  # nothing left to train
    assert len(names_in(tmp_path / "records")) == 3
    train(build(Classifier, seed=1), DATA, tmp_path, callback)
    assert [path.name for path in callback.records] == ["step=4-v1", "step=8-v1"]
    assert trajectory_of(callback.records[-1]) == ["step=4-v1", "step=8-v1"]
    assert read_info(callback.records[0])["run"] != run


# ---- training goes on as if it were not there -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "data", "options"),
    [
        (OneCycle, DATA, {}),
        (ConvNet, picture_data(), {}),
        (ConvNet, Augmented(picture_data()), {"accumulate_grad_batches": 3}),
        (TensorRate, DATA, {"precision": "bf16-mixed"}),
    ],
    ids=["schedule", "batchnorm", "augmentation", "bf16-mixed"],
)
@pytest.mark.filterwarnings("ignore:Two reads of one example")
def test_training_is_bit_identical(tmp_path, kind, data, options):
    def trajectory(folder, *callbacks):
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        model = build(kind)
        trainer = train(model, data, folder, *callbacks, **options)
        drawn = torch.rand(3).tolist(), random.random(), np.random.rand()  # noqa: NPY002
        return weight_hash(model), drawn, hooks_of(model), trainer.optimizers[0]

    callback = TracInCallback(every_n_train_steps=1, every_n_epochs=1)
    plain, watched = trajectory(tmp_path / "without"), trajectory(tmp_path / "with", callback)
    assert plain[:3] == watched[:3]
    assert watched[2] == []
    assert not watched[3]._optimizer_step_post_hooks
    assert len(callback.records) > 1


# ---- resume ---------------------------------------------------------------------------------------------------------


class Stop(Exception):
    """In place of a kill; real ones are below."""


def fit(folder, *callbacks, kind=Stepped, stop=None, saved=None, every=4, seed=0, data=IN_ORDER, **options):
    """12 steps in the order of the data, with a checkpoint every few steps; or until step ``stop``."""

    class Stopping(kind):
        def on_train_batch_start(self, batch, batch_idx):
            if self.global_step == stop:
                raise Stop

    model = build(Stopping, seed=seed)
    keep = ModelCheckpoint(folder / "kept", every_n_train_steps=every, save_top_k=-1, filename="{step}")
    settings = {"enable_checkpointing": True, "max_epochs": 3, "ckpt_path": saved, **options}
    try:
        return model, train(model, data, folder, *callbacks, keep, **settings)
    except Stop:
        return model, None


def same_records(callback, other):
    keys = ("step", "weights", "learning_rates", "epoch", "data", "task", "model")
    one, two = ([{key: info[key] for key in keys} for info in info_of(each)] for each in (callback, other))
    return one == two


@pytest.mark.parametrize("saved", [4, 8])
@pytest.mark.parametrize("options", [{}, {"every_n_train_steps": 2}, {"every_n_train_steps": 3, "save_last_k": 2}])
def test_a_run_that_is_resumed_leaves_what_an_uninterrupted_one_does(tmp_path, saved, options):
    """What was written after the checkpoint is taken over: nothing twice, nothing missing."""
    whole, first, second = (TracInCallback(**options) for _ in range(3))
    fit(tmp_path / "whole", whole)
    fit(tmp_path, first, stop=11)
    before = {path: path.stat().st_mtime_ns for path in find_records(tmp_path / "tracin")}
    checkpoint = tmp_path / "kept" / f"step={saved}.ckpt"
    if "save_last_k" in options:  # what the checkpoint lists was removed later on
        with pytest.warns(UserWarning, match="1 records of the run that is resumed are damaged or no longer"):
            fit(tmp_path, second, saved=checkpoint, seed=1)
    else:
        fit(tmp_path, second, saved=checkpoint, seed=1)
    assert same_records(second, whole)
    assert find_records(tmp_path / "tracin") == second.records
    assert [trajectory_of(path) for path in second.records] == [trajectory_of(path) for path in whole.records]
    assert len({info["run"] for info in info_of(second)}) == 1
    kept = [path for path in second.records if path in before]
    assert len(kept) >= 1
    assert all(path.stat().st_mtime_ns == before[path] for path in kept)


def test_an_abandoned_path_is_left_alone_and_not_used(tmp_path):
    first, second = TracInCallback(every_n_train_steps=2), TracInCallback(every_n_train_steps=2)
    fit(tmp_path, first, stop=9)
    before = {path: read_record(path).checksums for path in find_records(tmp_path / "tracin")}
    other = loader(classification_data(), batch_size=16, shuffle=True)
    fit(tmp_path, second, saved=tmp_path / "kept/step=4.ckpt", data=other)
    names = ["step=2", "step=4", "step=6-v1", "step=8-v1", "step=10", "step=12"]
    assert [path.name for path in second.records] == names
    assert trajectory_of(second.records[-1]) == names
    assert {path: read_record(path).checksums for path in before} == before
    assert names_in(tmp_path / "tracin") == ["step=2", "step=4", "step=6", "step=8", *names[2:]]


def test_equal_weights_after_an_abandoned_path_are_written_again(tmp_path):
    """Training that moves nothing gives the same weights, but not the same records before them."""

    def callback(n):
        return TracInCallback(tmp_path / "records", every_n_train_steps=n)

    class Still(Classifier):
        def __init__(self):
            super().__init__(lr=0.0)

    fit(tmp_path, callback(2), kind=Still, stop=9)
    second = callback(4)
    fit(tmp_path, second, kind=Still, saved=tmp_path / "kept/step=4.ckpt")
    assert [path.name for path in second.records] == ["step=2", "step=4", "step=8-v1", "step=12"]


def test_a_checkpoint_from_before_the_record_of_its_step(tmp_path):
    """Saved by the module in the middle of its step, or at the end of validation, before our hooks."""

    class Early(Stepped):
        def on_before_zero_grad(self, optimizer):
            if self.global_step == 6 and not (tmp_path / "early.ckpt").exists():
                self.trainer.save_checkpoint(tmp_path / "early.ckpt")

    class Keen(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 6:
                trainer.save_checkpoint(tmp_path / "keen.ckpt")

    whole, first, second = (TracInCallback(tmp_path / name, every_n_train_steps=2) for name in ("w", "r", "r"))
    fit(tmp_path / "whole", whole)
    fit(tmp_path, Keen(), first, stop=7)
    assert names_in(tmp_path / "r") == ["step=2", "step=4", "step=6"]
    second.load_state_dict(torch.load(tmp_path / "keen.ckpt")["callbacks"][first.state_key])
    assert [path.name for path in second.records] == ["step=2", "step=4"]
    shutil.rmtree(tmp_path / "r/step=6")
    fit(tmp_path, second, saved=tmp_path / "keen.ckpt")
    assert [path.name for path in second.records] == [f"step={step}" for step in range(2, 13, 2)]
    assert info_of(second)[2]["weights"] == info_of(whole)[2]["weights"]
    assert info_of(second)[2]["learning_rates"] == info_of(whole)[2]["learning_rates"]


def test_a_checkpoint_of_validation(tmp_path):
    class Checked(Stepped, Validated):
        pass

    def validated(callback, *, last, saved=None):
        keep = ModelCheckpoint(tmp_path / "kept", save_top_k=-1, filename="{step}", save_on_train_epoch_end=False)
        torch.manual_seed(0)
        trainer = make_trainer(tmp_path, callback, keep, enable_checkpointing=True, max_epochs=last)
        trainer.fit(build(Checked), IN_ORDER, loader(DATA, shuffle=False), ckpt_path=saved)

    first, second = TracInCallback(), TracInCallback()
    validated(first, last=2)
    state = torch.load(tmp_path / "kept/step=4.ckpt")["callbacks"][first.state_key]
    assert state["records"] == []  # the record of the epoch came after it
    validated(second, last=3, saved=tmp_path / "kept/step=4.ckpt")
    assert names_in(tmp_path / "tracin") == ["step=4", "step=8", "step=12"]
    assert find_records(tmp_path / "tracin") == second.records
    assert [info["learning_rates"]["network.0.bias"] for info in info_of(second)] == [0.1, 0.05, 0.025]


def test_resume_at_the_end_writes_nothing_more(tmp_path):
    trainer = train(build(Classifier), DATA, tmp_path, TracInCallback())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    callback = TracInCallback()
    train(build(Classifier), DATA, tmp_path, callback, ckpt_path=tmp_path / "end.ckpt")
    assert names_in(tmp_path / "tracin") == ["step=4", "step=8"]
    assert [path.name for path in callback.records] == ["step=4", "step=8"]


def test_a_resumed_run_stays_in_its_folder(tmp_path, monkeypatch):
    """Loggers make a folder for each version, and the working directory may be another."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    first, second = TracInCallback(), TracInCallback()
    fit(Path("."), first, stop=5, every=4, logger=CSVLogger("logs"))
    monkeypatch.chdir(tmp_path / "elsewhere")
    fit(tmp_path, second, saved=tmp_path / "kept/step=4.ckpt", logger=CSVLogger("logs"))
    folder = tmp_path / "logs/lightning_logs/version_0/tracin"
    assert second.records == [folder / f"step={step}" for step in (4, 8, 12)]
    assert second.state_dict()["dirpath"] == str(folder)
    assert not list((tmp_path / "elsewhere").rglob("tracin"))


def test_a_relative_folder_in_another_working_directory(tmp_path, monkeypatch):
    """The user asks for another folder; the records before stay, and are found from there."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    first, second = TracInCallback("records"), TracInCallback("records")
    fit(tmp_path, first, stop=9)
    assert first.records == find_records(tmp_path / "records")
    monkeypatch.chdir(tmp_path / "elsewhere")
    fit(tmp_path, second, saved=tmp_path / "kept/step=8.ckpt")
    folder = tmp_path / "elsewhere/records"
    assert second.records == [tmp_path / "records/step=4", folder / "step=8", folder / "step=12"]
    assert trajectory_of(second.records[-1]) == ["../../records/step=4", "step=8", "step=12"]


def test_records_that_were_moved_away(tmp_path):
    first, second, third = (TracInCallback(every_n_train_steps=4) for _ in range(3))
    fit(tmp_path, first, stop=9)
    (tmp_path / "other").mkdir()
    shutil.move(tmp_path / "tracin", tmp_path / "moved")
    resume = {"saved": tmp_path / "kept/step=8.ckpt"}
    with pytest.warns(UserWarning, match=r"2 records of the run that is resumed .*tracin/step=4, .*step=8\. Training"):
        fit(tmp_path, second, **resume)
    assert steps_of(second) == [8, 12]
    assert trajectory_of(second.records[-1]) == ["step=8", "step=12"]
    # Moved to where the resumed run looks, they are found.
    shutil.move(tmp_path / "moved", tmp_path / "other" / "tracin")
    shutil.rmtree(tmp_path / "tracin")
    fit(tmp_path, third, default_root_dir=tmp_path / "other", **resume)
    assert find_records(tmp_path / "other/tracin") == third.records
    assert steps_of(third) == [4, 8, 12]


def test_a_damaged_record_is_neither_listed_nor_taken_over(tmp_path):
    first, second = TracInCallback(every_n_train_steps=4), TracInCallback(every_n_train_steps=4)
    fit(tmp_path, first, stop=9)
    for step, file in ((4, "record.json"), (8, "weights.safetensors")):
        path = tmp_path / f"tracin/step={step}" / file
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.warns(UserWarning, match="1 records of the run that is resumed are damaged or no longer where"):
        fit(tmp_path, second, saved=tmp_path / "kept/step=4.ckpt")
    assert [path.name for path in second.records] == ["step=4-v1", "step=8-v1", "step=12"]


def test_another_runs_record_is_not_taken_over(tmp_path):
    """A run killed before its first checkpoint begins anew, with the same weights, and is another run."""
    first, second = TracInCallback(), TracInCallback()
    fit(tmp_path, first, stop=5)
    fit(tmp_path, second)
    assert [path.name for path in second.records] == ["step=4-v1", "step=8", "step=12"]
    assert info_of(first)[0]["weights"] == info_of(second)[0]["weights"]


def test_a_callback_that_joins_later_says_so(tmp_path):
    fit(tmp_path, stop=9)
    callback = TracInCallback(every_n_train_steps=2)
    with pytest.warns(UserWarning, match="Training starts at step 8, and its checkpoint holds no state of this TracIn"):
        fit(tmp_path, callback, saved=tmp_path / "kept/step=8.ckpt")
    assert steps_of(callback) == [8, 10, 12]


def test_a_run_goes_on_with_another_frequency(tmp_path):
    fit(tmp_path, TracInCallback(every_n_epochs=1), stop=5)
    callback = TracInCallback(every_n_train_steps=3)
    fit(tmp_path, callback, saved=tmp_path / "kept/step=4.ckpt")
    assert steps_of(callback) == [4, 6, 9, 12]


def test_state_survives_weights_only_loading(tmp_path):
    model, callback = build(TensorRate), TracInCallback()
    trainer = train(model, DATA, tmp_path, callback)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    state = torch.load(tmp_path / "run.ckpt", weights_only=True)["callbacks"][callback.state_key]
    assert state == callback.state_dict()
    assert state.keys() == {"dirpath", "records", "run", "learning_rates", "due_epoch"}
    assert all(type(rate) is float for _, rates in state["learning_rates"] for rate in rates)


# ---- real kills -----------------------------------------------------------------------------------------------------


def test_kills_and_resumes(tmp_path):
    """SIGKILL after file operations and at random moments; what is left equals an uninterrupted run's."""
    script = Path(__file__).parents[1] / "helpers" / "kill_tracin.py"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parents[2])}
    command = [sys.executable, str(script), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    whole = seen["whole"]
    assert [step for step, *_ in whole["records"]] == [3, 6, 9, 12]
    assert len({weights for _, weights, _ in whole["records"]}) == 4
    outcomes = seen["operations"] + seen["moments"]
    for outcome in outcomes:
        assert outcome["lost"] == [], outcome
        assert outcome["records"] == whole["records"], outcome
        assert outcome["path"] == whole["path"], outcome
        if outcome["resumed"]:  # else there was no checkpoint yet, and another run began
            assert outcome["names"] == whole["names"], outcome
    killed = [outcome for outcome in outcomes if outcome["killed"]]
    assert len(killed) >= 0.5 * len(outcomes)  # a fast machine may be done before a moment comes
    assert len({outcome["left"] for outcome in killed}) >= 4  # kills fell before and after each of the records
    assert sum(outcome["taken over"] > 0 for outcome in killed) >= 3


# ---- two processes ----------------------------------------------------------------------------------------------


def fit_on_two(number, port, folder):
    start(number, port)
    found = {}
    for name, saved in {"first": None, "resumed": folder / "end.ckpt"}.items():
        callback = TracInCallback(folder / "records", every_n_train_steps=2)
        model = build(ConvNet)
        trainer = make_trainer(folder, callback, strategy="ddp", devices=2, max_epochs=2 + (saved is not None))
        trainer.fit(model, loader(picture_data(), batch_size=8), ckpt_path=saved)
        found[name] = {"hash": weight_hash(model), "state": callback.state_dict(), "steps": trainer.global_step}
        trainer.save_checkpoint(folder / "end.ckpt")
    torch.save(found, folder / f"rank{number}.pt")


@pytest.mark.distributed
def test_rank_zero_writes_and_all_know(tmp_path):
    first, second = run_two(fit_on_two, tmp_path)
    for name, steps in {"first": [2, 4, 6], "resumed": [2, 4, 6, 8, 9]}.items():
        here, there = first[name], second[name]
        assert here["hash"] != there["hash"]  # statistics of BatchNorm differ
        assert here["state"] == there["state"]
        infos = [read_info(path) for path in here["state"]["records"]]
        assert [info["step"] for info in infos] == steps
        assert here["steps"] == steps[-1]
        assert infos[-1]["weights"] == here["hash"]
        assert {info["run"] for info in infos} == {here["state"]["run"]}
    assert first["resumed"]["state"]["records"] == [str(path) for path in find_records(tmp_path / "records")]


# ---- what is refused, before the first step -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_epochs": 0}, "`every_n_epochs` must be an integer of at least 1, got 0"),
        ({"every_n_train_steps": 0.5}, "`every_n_train_steps` must be an integer of at least 1, got 0.5"),
        ({"save_last_k": 0}, r"`save_last_k` must be -1 \(keep all\) or positive, got 0"),
        ({"save_last_k": -2}, "`save_last_k` must be -1"),
        ({"task": Classification}, "task"),
    ],
)
def test_arguments(options, message):
    with pytest.raises(MisconfigurationException, match=message):
        TracInCallback(**options)


def test_data_and_optimizers_that_cannot_work(tmp_path):
    stepped = []

    class Counting(Classifier):
        def training_step(self, batch, batch_idx):
            stepped.append(batch_idx)
            return super().training_step(batch, batch_idx)

    class NoOptimizer(Counting):
        def configure_optimizers(self):
            return None

    class NoRate(Counting):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            del optimizer.param_groups[0]["lr"]
            return optimizer

    several = CombinedLoader([loader(DATA), loader(DATA)])
    sampled = DataLoader(DATA, 8, sampler=SubsetRandomSampler(range(10)))
    for kind, data, message in (
        (Counting, several, "expected one DataLoader over one map-style dataset"),
        (Counting, sampled, "SubsetRandomSampler.*`train_indices=`"),
        (Counting, Dicts(DATA), "TracInCallback cannot work with this model and data.*task"),
        (NoRate, DATA, "A parameter group of SGD has no 'lr', which TracIn weights by"),
    ):
        model = build(kind)
        with pytest.raises(MisconfigurationException, match=re.compile(message, re.DOTALL)):
            train(model, data, tmp_path, TracInCallback())
    with (
        pytest.warns(UserWarning, match="`LightningModule.configure_optimizers` returned `None`"),
        pytest.raises(MisconfigurationException, match="no optimizer, so there are no learning rates"),
    ):
        train(build(NoOptimizer), DATA, tmp_path, TracInCallback())
    assert stepped == []
    assert not (tmp_path / "tracin").exists()


def test_train_indices_and_a_task_of_ones_own(tmp_path):
    chosen = [5, 3, 40, 22]
    sampled = DataLoader(Dicts(DATA), 2, sampler=SubsetRandomSampler(chosen))
    callback = TracInCallback(task=DictTask(), train_indices=chosen)
    train(build(DictClassifier), sampled, tmp_path, callback)
    info = info_of(callback)[0]
    assert info["task"] == "DictTask()"
    assert info["data"] == fingerprint_of(Examples(Dicts(DATA), positions=torch.tensor(chosen)), DictTask())


# ---- beside others ------------------------------------------------------------------------------------------------


def test_beside_stride_and_another_of_its_kind(tmp_path):
    one, two, stride = TracInCallback(), TracInCallback(tmp_path / "two", every_n_epochs=2), StrideCallback()
    train(build(Classifier), DATA, tmp_path, one, stride, two)
    assert steps_of(one) == [4, 8]
    assert steps_of(two) == [8]
    assert names_in(tmp_path / "stride") == ["step=8"]


def test_other_things_in_the_folder(tmp_path):
    folder = tmp_path / "records"
    write_record(folder, "step=4", {"kind": "stride", "weights": "w"}, {})
    (folder / "step=8").mkdir()
    callback = TracInCallback(folder)
    train(build(Classifier), DATA, tmp_path, callback)
    assert [path.name for path in callback.records] == ["step=4-v1", "step=8-v1"]


CALLBACK = """
- class_path: stride_lightning.callbacks.tracin.TracInCallback
  init_args:
    every_n_train_steps: 3
    save_last_k: 2
    task:
      class_path: stride_lightning.Classification
"""


def test_yaml(tmp_path, monkeypatch):
    config = write_config(tmp_path, CALLBACK)
    (callback,) = callbacks_of(run_cli(monkeypatch, tmp_path, "fit", "--config", config), TracInCallback)
    assert callback.every_n_epochs is None
    assert steps_of(callback) == [3, 4]


def test_pytorch_lightning_trainer(tmp_path):
    callback = TracInCallback()
    fit_in_the_other_tree(callback, DATA, tmp_path, lr=0.25)
    assert info_of(callback)[0]["learning_rates"] == {"network.weight": 0.25, "network.bias": 0.25}
