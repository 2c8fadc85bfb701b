"""Two processes that share work, as a distributed run starts them."""

import os
import socket

import torch
from torch import distributed as dist


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
