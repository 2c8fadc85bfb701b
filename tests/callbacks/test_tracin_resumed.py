"""Runs with TracInCallback that are resumed, killed and moved."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from stride_lightning.callbacks.tracin import TracInCallback
from stride_lightning.storage.records import find_records, read_record
from tests.callbacks.test_tracin import IN_ORDER, info_of, names_in, steps_of, trajectory_of
from tests.helpers.models import Classifier, Validated, build, classification_data, loader, make_trainer, train
from tests.helpers.schedules import Stepped, TensorRate

DATA = classification_data()
pytestmark = pytest.mark.filterwarnings(
    "ignore:You're resuming from a checkpoint that ended before the epoch ended",
    "ignore:Checkpoint directory .* exists and is not empty",
)


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
    keys = ("step", "weights", "learning_rates", "epoch", "data", "model")
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
    removed = pytest.warns(UserWarning, match="1 records of the run that is resumed are damaged or no longer")
    with removed if "save_last_k" in options else nullcontext():  # what the checkpoint lists was removed later on
        fit(tmp_path, second, saved=tmp_path / "kept" / f"step={saved}.ckpt", seed=1)
    assert same_records(second, whole)
    assert find_records(tmp_path / "tracin") == second.records
    assert [trajectory_of(path) for path in second.records] == [trajectory_of(path) for path in whole.records]
    assert len({info["run"] for info in info_of(second)}) == 1
    reused = [path for path in second.records if path in before]
    assert len(reused) >= 1
    assert all(path.stat().st_mtime_ns == before[path] for path in reused)


def test_an_abandoned_path_is_left_alone_and_not_used(tmp_path):
    first, second = (TracInCallback(every_n_train_steps=2) for _ in range(2))
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
    """Saved by another callback, before our hook."""

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
    assert steps_of(second) == [4, 8, 12]
    assert find_records(tmp_path / "tracin") == second.records
    assert [info["learning_rates"]["network.0.bias"] for info in info_of(second)] == [0.1, 0.05, 0.025]


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


def test_state_holds_plain_values(tmp_path):
    callback = TracInCallback()
    train(build(TensorRate), DATA, tmp_path, callback)
    state = callback.state_dict()
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
