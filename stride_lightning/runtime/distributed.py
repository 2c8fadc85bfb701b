"""Work shared between processes: each rank does a slice, and every rank gets the whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

Value = TypeVar("Value")


class RankError(RuntimeError):
    """Another rank failed in a block that all ranks leave together."""


class _Block:
    """What the ranks in a block know of each other."""

    def __init__(self) -> None:
        # Made at the start: a rank that runs out of memory may have no room for it later.
        self._count = torch.zeros((), dtype=torch.int32, device=_device())
        self.failure: RankError | None = None

    def meet(self, problem: str = "") -> None:
        """Wait until every rank meets the others, with its problem if it has one; a rank without one raises."""
        if self.failure is None:
            dist.all_reduce(self._count.fill_(bool(problem)))
            if not self._count.item():
                return
            problems: list[str] = [""] * dist.get_world_size()
            dist.all_gather_object(problems, problem)
            texts = [f"Rank {number} failed: {text}" for number, text in enumerate(problems) if text]
            self.failure = RankError(" ".join(texts))
        if not problem:
            raise self.failure


_block: ContextVar[_Block | None] = ContextVar("block", default=None)


@contextmanager
def leaving_together() -> Iterator[None]:
    """A block in which no rank waits for one that has failed: if one leaves with an error, all do.

    Every rank enters it. Before each collective of this module, and at the end of the block, the ranks exchange
    whether one has failed: the others learn of an error where they wait for the rank that had it. Other collectives
    need a :func:`meet` before them, and must not fail on one rank alone. Outside a distributed run this does nothing.

    Raises:
        RankError: On the ranks that did not fail, saying which did and why.
    """
    if world_size() == 1 or _block.get() is not None:
        yield
        return
    block = _Block()
    token = _block.set(block)
    try:
        yield
    except Exception as error:  # not KeyboardInterrupt: the launcher ends every rank then
        if block.failure is None:
            block.meet(f"{type(error).__name__}: {error}")
        raise
    else:
        block.meet()
    finally:
        _block.reset(token)


def is_running() -> bool:
    """Whether this process belongs to a group of processes, be it alone there."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's rank; 0 outside a distributed run."""
    return dist.get_rank() if is_running() else 0


def world_size() -> int:
    """Number of processes; 1 outside a distributed run."""
    return dist.get_world_size() if is_running() else 1


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


def meet() -> None:
    """In a block that ranks leave together, wait until every rank is here, and leave if one has failed.

    Call it before a collective that is not of this module.
    """
    if (block := _block.get()) is not None:
        block.meet()


def barrier() -> None:
    """Wait until every rank is here."""
    if is_running():
        meet()
        dist.barrier()


def broadcast_object(value: Value) -> Value:
    """Rank 0's (picklable) value, on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    meet()
    dist.broadcast_object_list(box, src=0, device=_device())
    return box[0]


def gather_objects(value: Value) -> list[Value]:
    """Every rank's (picklable) value, on every rank."""
    values = [value] * world_size()
    if len(values) > 1:
        meet()
        dist.all_gather_object(values, value)
    return values


def all_equal(value: object) -> bool:
    """Whether every rank holds the same (picklable) value."""
    return all(other == value for other in gather_objects(value))


def _summed(whole: Tensor) -> Tensor:
    """The sum over the ranks, which may be written into the tensor."""
    shared = whole if (device := _device()) is None else whole.to(device)
    meet()
    dist.all_reduce(shared)
    return shared.to(whole.device)


def _device() -> torch.device | None:
    """The device whose memory the backend moves, if it moves no other: NCCL does."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else None
