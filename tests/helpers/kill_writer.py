"""Kills writers of records at every step and looks at what is left; run by tests/test_records.py as its own process.

    python kill_writer.py FOLDER

A fresh process, because forking is only safe where no other thread runs: this one imports `records` and nothing else of
the library. It prints one JSON object; what must hold of it is asserted by the test.
"""

import builtins
import io
import json
import os
import random
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path

import torch

from stride_lightning.storage import files, records

NAME = "step=1"
LOADED = sorted(module for module in ("lightning", "pytorch_lightning", "torchmetrics") if module in sys.modules)


def tensors_of(seed, size):
    generator = torch.Generator().manual_seed(seed)
    return {"basis": {"fc": torch.rand(size, generator=generator)}, "design": {"rows": torch.ones(7, dtype=torch.bool)}}


class Counter:
    """Stops this process dead right after its `last`-th file operation."""

    def __init__(self, last):
        self.last, self.trace = last, []

    def tick(self, operation):
        self.trace.append(operation)
        if len(self.trace) == self.last:
            os.kill(os.getpid(), signal.SIGKILL)

    def wrap(self, owner, name):
        original = getattr(owner, name)

        def counted(*args, **kwargs):
            result = original(*args, **kwargs)
            self.tick(name)
            return result

        setattr(owner, name, counted)

    def install(self):
        counter = self

        class HalfWrites(io.FileIO):  # unbuffered: each write reaches the file, and a kill can fall between two halves
            def write(self, content):
                half = len(content) // 2
                for part in (content[:half], content[half:]):
                    super().write(part)
                    counter.tick("write")
                return len(content)

            def close(self):
                was_open = not self.closed
                super().close()
                if was_open:
                    counter.tick("close")

        def counted_open(path, mode):
            file = HalfWrites(path, mode.replace("b", ""))
            counter.tick("open")
            return file

        files.open = counted_open  # shadows the builtin in that module only
        for name in ("mkdir", "fsync", "rename", "unlink", "rmdir"):
            self.wrap(os, name)


def fork(action, last=None):
    """Start `action` in a child; returns (pid, pipe that delivers one byte at its start and its trace at its end)."""
    receive, send = os.pipe()
    pid = os.fork()
    if pid:
        os.close(send)
        return pid, receive
    status = 1
    try:
        counter = Counter(last)
        if last is not None:
            counter.install()
        os.write(send, b"!")
        action()
        os.write(send, json.dumps(counter.trace).encode())
        status = 0
    finally:
        os._exit(status)


def finish(pid, receive):
    """Whether the child was killed, and its trace if not; a child that failed by itself is an error here."""
    _, status = os.waitpid(pid, 0)
    with builtins.open(receive, "rb") as pipe:
        text = pipe.read().lstrip(b"!")
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    if not killed and os.WEXITSTATUS(status) != 0:
        raise RuntimeError(f"the child failed with wait status {status}")
    return killed, json.loads(text) if text else []


def kill_after(action, span):
    """Kill `action` in a child at a random moment within a span of seconds; as `finish`."""
    pid, receive = fork(action)
    os.read(receive, 1)
    time.sleep(span)
    os.kill(pid, signal.SIGKILL)  # harmless if it has ended: it is not waited for yet
    return finish(pid, receive)


def operations_of(action, every):
    """Numbers of its file operations: each that makes or removes a name, every n-th of the others; and all names."""
    _, trace = finish(*fork(action, last=10**9))
    naming = [k for k, name in enumerate(trace, 1) if name in ("mkdir", "rename", "unlink", "rmdir")]
    return sorted({*naming, *range(1, len(trace) + 1, every)}), trace


def look(folder, expected):
    """'whole' or 'absent'; anything else raises."""
    paths = records.find_records(folder)
    visible = [name for name in os.listdir(folder) if not name.startswith(".")]
    if visible != [path.name for path in paths]:
        raise RuntimeError(f"visible {visible}, but records {paths}")
    if not paths:
        return "absent"
    record = records.read_record(paths[0])
    for group, named in expected.items():
        for name, tensor in record.tensors(group).items():
            torch.testing.assert_close(tensor, named[name], rtol=0, atol=0)
    if [path.name for path in paths] != [NAME] or record.groups != tuple(sorted(expected)):
        raise RuntimeError(f"unexpected {paths} with {record.groups}")
    return "whole"


def steps(root, *, remove=False):
    """One child for each k, killed after its k-th operation, until a child lives to the end."""
    expected, outcomes, leftovers = tensors_of(0, 5000), [], 0
    for k in range(1, 1000):
        folder = root / str(k)
        folder.mkdir()
        action = partial(records.write_record, folder, NAME, {}, expected)
        if remove:
            action = partial(records.remove_record, action())
        killed, trace = finish(*fork(action, last=k))
        outcomes.append(look(folder, expected))
        leftovers += any(".part-" in name for name in os.listdir(folder))
        if not killed:
            return {"outcomes": outcomes, "trace": trace, "leftovers": leftovers, "left": os.listdir(folder)}
    raise RuntimeError("no child came to the end")


def removal(root):
    """The same for `remove_record`."""
    return steps(root, remove=True)


def moments(root):
    """Children killed at random moments; the moments drift towards where both outcomes are equally likely."""
    expected, rng, outcomes, inside = tensors_of(1, 500_000), random.Random(0), [], 0
    span = 0.005  # seconds; a measured duration would not do: it changes several-fold with the machine's load
    for trial in range(40):
        folder = root / str(trial)
        folder.mkdir()
        kill_after(partial(records.write_record, folder, NAME, {}, expected), rng.uniform(0, 2 * span))
        outcomes.append(look(folder, expected))
        span *= 0.8 if outcomes[-1] == "whole" else 1.25
        inside += any(".part-" in name for name in os.listdir(folder))
        shutil.rmtree(folder)
    return {"outcomes": outcomes, "inside": inside}


def race(root):
    """Four writers, ten records each, all under one name."""

    def write(writer):
        for i in range(10):
            records.write_record(root, NAME, {"by": [writer, i]}, {"basis": {"fc": torch.full((50,), writer)}})

    for child in [fork(lambda writer=writer: write(writer)) for writer in range(4)]:
        finish(*child)
    written = [records.read_record(path) for path in records.find_records(root)]
    for record in written:
        torch.testing.assert_close(record.tensors("basis")["fc"], torch.full((50,), record.info["by"][0]))
    by = [record.info["by"] for record in written]
    return {"names": [record.path.name for record in written], "by": by, "left": os.listdir(root)}


if __name__ == "__main__":
    seen = {"loaded": LOADED}
    for kind in (steps, removal, moments, race):
        root = Path(sys.argv[1]) / kind.__name__
        root.mkdir()
        seen[kind.__name__] = kind(root)
    print(json.dumps(seen))
