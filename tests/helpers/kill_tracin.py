"""Kills fits with TracInCallback at file operations and at random moments, and resumes them; run by test_tracin.py.

    python kill_tracin.py FOLDER

A process of its own, because forking is only safe where no other thread runs: everything is imported and done once in
the parent, in one thread, and each fit is a fork of it. It prints one JSON object; what must hold is asserted there.
"""

import json
import logging
import random
import shutil
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from stride_lightning.callbacks.tracin import TracInCallback
from stride_lightning.storage.records import find_records, read_record
from tests.helpers.kill_retrain import in_fork
from tests.helpers.kill_writer import finish, fork, kill_after, operations_of
from tests.helpers.models import build, classification_data, loader, train
from tests.helpers.schedules import Stepped

EVERY = 3


def run(folder, pause=0.0):
    """The same fit each time: 12 steps, records at every third and checkpoints at every fourth, from the newest."""

    class Slow(Stepped):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            time.sleep(pause)

    keep = ModelCheckpoint(folder / "kept", every_n_train_steps=4, save_top_k=-1, filename="{step}")
    callback = TracInCallback(folder / "records", every_n_train_steps=EVERY)
    data = loader(classification_data(), shuffle=False)
    saved = newest(folder)
    options = {"max_epochs": -1, "max_steps": 12, "enable_checkpointing": True, "ckpt_path": saved}
    train(build(Slow, seed=0 if saved is None else 1), data, folder, callback, keep, **options)
    return {"path": [path.name for path in callback.records], "resumed": saved is not None}


def newest(folder):
    return max((folder / "kept").glob("*.ckpt"), key=step_of, default=None)


def step_of(path):
    return int(Path(path).name.split("=")[1].split(".")[0].split("-")[0])


def digests(folder):
    """SHA-256 of the files of each record, all verified."""
    return {path.name: dict(read_record(path).checksums) for path in find_records(folder / "records")}


def state_of(folder, callback_path):
    """The records of the run that is told of, and all there are."""
    infos = [read_record(folder / "records" / name).info for name in callback_path]
    if [entry["name"] for entry in infos[-1]["trajectory"]] != callback_path or len({i["run"] for i in infos}) != 1:
        raise RuntimeError(f"{infos[-1]['trajectory']} of {[i['run'] for i in infos]}, expected {callback_path}")
    return {
        "records": [[info["step"], info["weights"], info["learning_rates"]] for info in infos],
        "path": [name.removesuffix("-v1") for name in callback_path],
        "names": sorted(digests(folder)),
    }


def resume(folder, *, killed):
    """Fit to the end after a kill; also what of the records before is no longer as it was."""
    before, saved = digests(folder), newest(folder)
    fit = in_fork(lambda: run(folder))
    after = digests(folder)
    outcome = state_of(folder, fit["path"])
    lost = [name for name, sums in before.items() if after.get(name) != sums]
    taken = [name for name in before if name in fit["path"] and saved is not None and step_of(name) > step_of(saved)]
    seen = {"killed": killed, "resumed": fit["resumed"], "lost": lost, "left": len(before)}
    return {**outcome, **seen, "taken over": len(taken)}


def operations(root):
    """Children killed after the k-th file operation: each that makes or removes a name, and every tenth."""
    outcomes = []
    for k in operations_of(partial(run, root / "all"), 10)[0]:
        folder = root / str(k)
        killed, _ = finish(*fork(partial(run, folder), last=k))
        outcomes.append(resume(folder, killed=killed))
        shutil.rmtree(folder)
    return outcomes


def moments(root):
    """Children killed at random moments, every third of them twice before they may finish."""
    rng, outcomes = random.Random(0), []
    for trial in range(12):
        folder = root / str(trial)
        for _ in range(1 + (trial % 3 == 0)):
            killed, _ = kill_after(partial(run, folder, pause=0.02), rng.uniform(0.1, 0.5))
        outcomes.append(resume(folder, killed=killed))
        shutil.rmtree(folder)
    return outcomes


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    root = Path(sys.argv[1])
    whole = run(root / "whole")
    seen = {"whole": state_of(root / "whole", whole["path"])}
    for kind in (operations, moments):
        (root / kind.__name__).mkdir()
        seen[kind.__name__] = kind(root / kind.__name__)
    print(json.dumps(seen))
