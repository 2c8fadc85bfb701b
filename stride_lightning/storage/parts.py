"""Long work in parts: each is on disk when it is done, so that a killed run loses only the one it was at."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch import distributed as dist

from stride_lightning.runtime.distributed import barrier, rank, world_size
from stride_lightning.runtime.parallel import each_in_a_thread
from stride_lightning.storage.records import (
    RecordError,
    find_records,
    read_info,
    read_record,
    remove_record,
    write_record,
)

Tensors: TypeAlias = dict[str, Tensor]


class Parts:
    """The finished parts of a piece of work, beside the place where its result will stand.

    Parts are numbered, and what a part gives depends on its number alone. In a distributed run every rank does a share
    and all get every part. Several runs of the same work may share one folder: each takes the parts that are not there.

    Args:
        path: Where the result will be written; the parts go to ``<path>.parts``. None keeps them in memory.
        plan: Plain values that decide the work: a run is continued only if they are the same.
        tensors: Tensors that decide the work, likewise.
        free: Names in ``plan`` that may differ; what is on disk counts, because the numbers follow from it.

    Raises:
        ValueError: If ``<path>.parts`` holds parts of other work, naming what differs.
        RecordError: If something there is damaged.

    Example:
        >>> parts = Parts(None, {"seed": 0}, {})
        >>> [part["square"].item() for part in parts.do(3, lambda i: {"square": torch.tensor(i * i)})]
        [0, 1, 4]
    """

    def __init__(
        self, path: Path | None, plan: Mapping[str, Any], tensors: Tensors, *, free: tuple[str, ...] = ()
    ) -> None:
        self.folder = None if path is None else path.with_name(path.name + ".parts")
        self.plan = dict(plan)
        if self.folder is None:
            return
        if rank() == 0 and not any(info.get("kind") == "plan" for info in self._infos().values()):
            write_record(self.folder, "plan", {"kind": "plan", "plan": self.plan}, {"plan": tensors})
        barrier()
        stored = next(path for path, info in self._infos().items() if info.get("kind") == "plan")
        record = read_record(stored)
        kept = {name: record.info["plan"].get(name) for name in free}
        self.plan |= kept
        differing = differences(record.info["plan"], self.plan, record.tensors("plan"), tensors)
        if differing:
            raise ValueError(
                f"{self.folder} holds the finished parts of other work, which differs in {differing}. Choose another "
                "path, or delete the folder to begin anew."
            )

    def do(
        self,
        count: int,
        compute: Callable[[int], Tensors],
        done: Callable[[int], None] = lambda number: None,
        *,
        num_threads: int = 1,
    ) -> list[Tensors]:
        """All parts in order; those that are not there yet are computed.

        Args:
            count: Number of parts.
            compute: Computes a part by its number.
            done: Told of every part that was found instead of computed.
            num_threads: Parts computed at once.
        """
        mine = range(rank(), count, world_size())
        if self.folder is None:
            computed = each_in_a_thread(compute, mine, num_threads)
            return _exchanged(dict(zip(mine, computed, strict=True)), count)

        def ensure(number: int) -> None:
            if self._find(number) is not None:
                done(number)
            else:
                info = {"kind": "part", "number": number}
                write_record(self._folder(), f"part={number}", info, {"values": compute(number)})

        each_in_a_thread(ensure, mine, num_threads)
        barrier()
        return [self._read(number) for number in range(count)]

    def remove(self) -> None:
        """Delete the parts, once the result stands elsewhere."""
        barrier()
        if self.folder is not None and rank() == 0:
            remove_parts(self.folder)

    def _find(self, number: int) -> Path | None:
        path = self._folder() / f"part={number}"
        return path if os.path.lexists(path) else None

    def _read(self, number: int) -> Tensors:
        path = self._find(number)
        if path is None:
            raise RecordError(f"Part {number} has vanished from {self.folder}. Run again to compute it anew.")
        return read_record(path).tensors("values")

    def _folder(self) -> Path:
        assert self.folder is not None
        return self.folder

    def _infos(self) -> dict[Path, dict[str, Any]]:
        return {path: read_info(path) for path in find_records(self._folder()) if path.name.startswith("plan")}


def remove_parts(folder: Path) -> None:
    """Delete a folder of parts, the plan last: what is left of an interrupted deletion is still understood.

    What killed writers left in it goes too.
    """
    records = find_records(folder)
    for path in sorted(records, key=lambda path: path.name.startswith("plan")):
        remove_record(path)
    for left in folder.glob(".*.part-*"):
        shutil.rmtree(left, ignore_errors=True)
    with contextlib.suppress(OSError):  # something else was put there
        folder.rmdir()


def check_same_work(
    path: Path, stored: Mapping[str, Any], asked: Mapping[str, Any], stored_tensors: Tensors, asked_tensors: Tensors
) -> None:
    """Refuse a finished result of other work; of the same work, delete what parts a killed run left.

    Args:
        path: Where the result stands.
        stored: Plain values that decided it, perhaps among others.
        asked: Those that are asked for now.
        stored_tensors: Tensors that decided it.
        asked_tensors: Those that are asked for now.

    Raises:
        ValueError: Naming what differs.
    """
    decisive = {name: stored.get(name) for name in asked}
    differing = differences(decisive, asked, stored_tensors, asked_tensors)
    if differing:
        raise ValueError(
            f"{path} holds the result of other work, which differs in {differing}. Choose another path, or delete it."
        )
    if rank() == 0:
        remove_parts(path.with_name(path.name + ".parts"))
    barrier()


def differences(
    stored: Mapping[str, Any], asked: Mapping[str, Any], stored_tensors: Tensors, asked_tensors: Tensors
) -> str:
    """What differs between two plans, in words; empty if nothing does."""
    found = []
    for name in sorted(stored.keys() | asked.keys()):
        before, now = _plain(stored.get(name)), _plain(asked.get(name))
        if before != now:
            long = isinstance(before, dict | list) or len(f"{before}{now}") > 200
            found.append(f"{name}" if long else f"{name} ({before!r} there, {now!r} asked for)")
    for name in sorted(stored_tensors.keys() | asked_tensors.keys()):
        one, other = stored_tensors.get(name), asked_tensors.get(name)
        if one is None or other is None or one.shape != other.shape or not torch.equal(one, other.cpu()):
            found.append(name)
    return ", ".join(found)


def _plain(value: Any) -> Any:
    """As it comes back from JSON."""
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, dict) else value


def _exchanged(mine: dict[int, Tensors], count: int) -> list[Tensors]:
    shares: list[Any] = [mine]
    if world_size() > 1:
        shares = [None] * world_size()
        dist.all_gather_object(shares, mine)
    every = {number: part for share in shares for number, part in share.items()}
    return [every[number] for number in range(count)]
