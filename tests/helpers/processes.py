"""Two processes that share work, as a distributed run starts them, and one that kills its children."""

import atexit
import contextlib
import json
import multiprocessing
import os
import pickle
import socket
import subprocess
import sys
import traceback
from functools import cache
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributed as dist

CAN_FORK = hasattr(os, "fork")
needs_fork = pytest.mark.skipif(not CAN_FORK, reason="kills forked children")


def start(number, port, *, group=False):
    """Lightning's own environment variables: a trainer's launcher finds the processes there; or a group at once."""
    os.environ |= {"LOCAL_RANK": str(number), "NODE_RANK": "0", "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    if group:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=number, world_size=2)


def run_two(target, folder):
    """Run ``target(number, port, folder)`` in two processes; what each saved as ``rank{number}.pt``."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    numbers = {_host(number): number for number in range(2)}
    for host, number in numbers.items():
        host.send((pickle.dumps((target, number, port, folder)), dict(os.environ), os.getcwd()))
    errors, running = {}, set(numbers)
    while running:
        for host in wait(running):
            running.remove(host)
            if error := host.recv():
                errors[numbers[host]] = error
                for other in running:  # it may wait for ever for the one that has failed
                    other.send(None)
    assert not errors, "\n".join(f"Rank {number}: {error}" for number, error in errors.items())
    return [torch.load(folder / f"rank{number}.pt") for number in range(2)]


@cache
def _host(number):
    """The way to a process that has imported what is slow to import, and forks for every run of a rank.

    Each rank has a host of its own: in each, strings have other hashes and sets other orders.
    """
    here, there = multiprocessing.Pipe()
    multiprocessing.get_context("spawn").Process(target=_serve, args=(there,), name=f"host of rank {number}").start()
    there.close()
    atexit.register(here.close)  # which ends the host
    return here


def _serve(jobs):
    import lightning.pytorch  # noqa: F401

    import stride_lightning  # noqa: F401

    context = multiprocessing.get_context("fork" if CAN_FORK else "spawn")
    with contextlib.suppress(EOFError):
        while True:
            if job := jobs.recv():
                jobs.send(_outcome(context, jobs, job))


def _outcome(context, jobs, job):
    """What went wrong in a run, which ends early where its host is told something, or left."""
    here, there = multiprocessing.Pipe(duplex=False)
    process = context.Process(target=_run, args=(there, *job))
    process.start()
    there.close()
    if jobs in wait([here, jobs]):
        process.kill()
    try:
        error = here.recv()
    except EOFError:
        error = ""
    if error:
        process.kill()
    process.join()
    return error or (process.exitcode and f"ended with exit code {process.exitcode}")


def _run(outcome, run, environ, folder):
    os.chdir(folder)
    os.environ.clear()
    os.environ |= environ
    np.random.seed()  # noqa: NPY002  # as if this process had imported NumPy itself
    try:
        target, *arguments = pickle.loads(run)
        target(*arguments)
        if dist.is_initialized():  # a process whose peer has gone may be aborted while it clears up
            dist.barrier()
            dist.destroy_process_group()
    except BaseException:
        outcome.send(traceback.format_exc())
        raise
    outcome.send("")


def what_helper_saw(script, folder):
    """What a script of this folder, run in a process of its own, prints as JSON."""
    helpers = Path(__file__).parent
    env = os.environ | {"PYTHONPATH": str(helpers.parents[1]), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(helpers / script), str(folder)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
