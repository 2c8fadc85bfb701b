"""Kills runs of `retrain` at every file operation and at random moments, and resumes them; run by test_parts.py.

    python kill_retrain.py FOLDER

A process of its own, because forking is only safe where no other thread runs: everything is imported and done once in
the parent, in one thread, and each run is a fork of it. It prints one JSON object; what must hold is asserted there.
"""

import hashlib
import json
import os
import random
import shutil
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset

from stride_lightning.retraining import batches, together
from stride_lightning.retraining.retrain import retrain
from stride_lightning.storage import records
from tests.helpers.kill_writer import finish, fork, kill_after, operations_of

NUM_SUBSETS, CHUNK = 5, 2


def run(path, *, pause=0.0, memory_budget=None):
    """The same run each time, in three parts of two models and one; returns digest of the result and steps trained."""
    x = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    data, steps = TensorDataset(x, (x[:, 0] > 0).long()), []
    step = together.Ensemble.step

    def counted(*args, **kwargs):
        steps.append(1)
        time.sleep(pause)
        return step(*args, **kwargs)

    together.Ensemble.step = counted
    batches.chunk_size = lambda num_models, *rest: CHUNK if memory_budget is None else 1
    try:
        truth = retrain(
            partial(nn.Linear, 3, 2),
            data,
            train_data=data,
            batch_size=4,
            max_epochs=2,
            num_subsets=NUM_SUBSETS,
            num_seeds=1,
            optimizer=partial(torch.optim.SGD, lr=0.3, momentum=0.5),
            path=path,
            show_progress=False,
        )
    finally:
        together.Ensemble.step = step
    content = truth.masks.numpy().tobytes() + truth.losses_by_seed.numpy().tobytes()
    return {"digest": hashlib.sha256(content).hexdigest(), "steps": len(steps), "chunk": truth.metadata["chunk_size"]}


def in_fork(action):
    """Run in a child to its end; what it returns."""
    receive, send = os.pipe()
    pid = os.fork()
    if not pid:
        status = 1
        try:
            os.write(send, json.dumps(action()).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(send)
    with os.fdopen(receive, "rb") as pipe:
        text = pipe.read()
    _, status = os.waitpid(pid, 0)
    if status:
        raise RuntimeError(f"the child failed with wait status {status}")
    return json.loads(text)


def state_of(folder):
    """What a killed run left: how many parts, whether the result is there."""
    parts = [path.name for path in records.find_records(folder / "truth.parts")]
    return {"parts": sum(name.startswith("part") for name in parts), "result": (folder / "truth").exists()}


def resume(folder, *, again=True, **how):
    left = state_of(folder)
    resumed = in_fork(lambda: run(folder / "truth", **how))
    visible = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    second = in_fork(lambda: run(folder / "truth")) if again else {**resumed, "steps": 0}
    return {
        **left,
        **resumed,
        "visible": visible,
        "again": second["steps"],
        "kept": second["digest"] == resumed["digest"],
    }


def operations(root):
    """Children killed after the k-th file operation: each that makes or removes a name, and every ninth of the others.

    That a record appears whole or not at all, after whatever operation, is shown by kill_writer.py.
    """
    (root / "all").mkdir()
    chosen, trace = operations_of(partial(run, root / "all" / "truth"), 9)
    outcomes = []
    for k in chosen:
        folder = root / str(k)
        folder.mkdir()
        killed, _ = finish(*fork(partial(run, folder / "truth"), last=k))
        outcomes.append({"k": k, "killed": killed, **resume(folder, again=k % 5 == 0)})
        shutil.rmtree(folder)
    return {"outcomes": outcomes, "trace": trace}


def moments(root):
    """Children killed at random moments of training that is slowed down, some of them twice before they may finish."""
    rng, outcomes, started = random.Random(0), [], time.monotonic()
    in_fork(lambda: run(root / "timed", pause=0.01))
    duration = time.monotonic() - started  # on a busy machine a run takes many times as long
    for trial in range(10):
        folder = root / str(trial)
        folder.mkdir()
        for _ in range(1 + (trial % 3 == 0)):
            kill_after(partial(run, folder / "truth", pause=0.01), rng.uniform(0, duration))
        outcomes.append(resume(folder, again=trial % 5 == 0, memory_budget=1 if trial % 2 else None))
        shutil.rmtree(folder)
    return {"outcomes": outcomes}


if __name__ == "__main__":
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    whole = in_fork(lambda: run(None))
    seen = {"whole": whole, "warm": run(None)}
    for kind in (operations, moments):
        (root / kind.__name__).mkdir()
        seen[kind.__name__] = kind(root / kind.__name__)
    print(json.dumps(seen))
