"""Two processes that share work, as a distributed run starts them, and one that kills its children."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed as dist

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked children")


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
    torch.multiprocessing.spawn(_end_together, (target, port, folder), nprocs=2)
    return [torch.load(folder / f"rank{number}.pt") for number in range(2)]


def _end_together(number, target, port, folder):
    """A process whose peer has gone may be aborted while it clears up."""
    target(number, port, folder)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def what_helper_saw(script, folder):
    """What a script of this folder, run in a process of its own, prints as JSON."""
    helpers = Path(__file__).parent
    env = os.environ | {"PYTHONPATH": str(helpers.parents[1]), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(helpers / script), str(folder)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
