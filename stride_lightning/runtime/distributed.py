"""Sharing work between processes: each rank does a slice, all get the whole."""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributed as dist


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
    """Concatenate the ranks' shards of a tensor whose whole length along ``dim`` is ``length``, on every rank."""
    if world_size() == 1:
        return part
    moved = part.movedim(dim, 0).contiguous()
    whole = moved.new_zeros(length, *moved.shape[1:])
    whole[shard(length)] = moved
    if dist.get_backend() == "nccl":  # which moves device memory only
        whole = whole.cuda()
    dist.all_reduce(whole)
    return whole.to(part.device).movedim(0, dim)


def total(part: Tensor) -> Tensor:
    """The sum of the ranks' tensors, on every rank."""
    if world_size() == 1:
        return part
    whole = part.cuda() if dist.get_backend() == "nccl" else part.clone()
    dist.all_reduce(whole)
    return whole.to(part.device)


def barrier() -> None:
    """Wait until every rank is here."""
    if _running():
        dist.barrier()


def broadcast_object(value: object) -> object:
    """Rank 0's value, on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else None
    dist.broadcast_object_list(box, src=0, device=device)
    return box[0]


def all_equal(value: object) -> bool:
    """Whether every rank holds the same (picklable) value."""
    if world_size() == 1:
        return True
    values: list[object] = [None] * world_size()
    dist.all_gather_object(values, value)
    return all(other == value for other in values)


def _running() -> bool:
    return dist.is_available() and dist.is_initialized()
