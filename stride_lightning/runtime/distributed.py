"""Work shared between processes: each rank does a slice, and every rank gets the whole."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

Value = TypeVar("Value")


def rank() -> int:
    """This process's rank; 0 outside a distributed run."""
    return dist.get_rank() if _running() else 0


def world_size() -> int:
    """Number of processes; 1 outside a distributed run."""
    return dist.get_world_size() if _running() else 1


def shard(length: int) -> slice:
    """The contiguous slice of ``range(length)`` that belongs to this rank; sizes differ by at most one."""
    size, extra = divmod(length, world_size())
    start = rank() * size + min(rank(), extra)
    return slice(start, start + size + (rank() < extra))


def gather(part: Tensor, length: int, dim: int = 0) -> Tensor:
    """Concatenate the ranks' shards along ``dim``, to the whole ``length``, on every rank."""
    if world_size() == 1:
        return part
    moved = part.movedim(dim, 0).contiguous()
    whole = moved.new_zeros(length, *moved.shape[1:])
    whole[shard(length)] = moved
    return _summed(whole).movedim(0, dim)


def total(part: Tensor) -> Tensor:
    """The sum of the ranks' tensors, on every rank."""
    return part if world_size() == 1 else _summed(part.clone())


def barrier() -> None:
    """Wait until every rank is here."""
    if _running():
        dist.barrier()


def broadcast_object(value: Value) -> Value:
    """Rank 0's (picklable) value, on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else None
    dist.broadcast_object_list(box, src=0, device=device)
    return box[0]


def gather_objects(value: Value) -> list[Value]:
    """Every rank's (picklable) value, on every rank."""
    values = [value] * world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def all_equal(value: object) -> bool:
    """Whether every rank holds the same (picklable) value."""
    return all(other == value for other in gather_objects(value))


def _summed(whole: Tensor) -> Tensor:
    """The sum over the ranks; it may overwrite the tensor."""
    shared = whole.cuda() if dist.get_backend() == "nccl" else whole  # NCCL moves device memory only
    dist.all_reduce(shared)
    return shared.to(whole.device)


def _running() -> bool:
    return dist.is_available() and dist.is_initialized()
