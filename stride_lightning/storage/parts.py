"""Long work in parts, each of which is on disk when it is done: a killed run loses only the part it was at."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from stride_lightning.runtime.distributed import barrier, broadcast_object, gather_objects, rank, world_size
from stride_lightning.runtime.parallel import each_in_a_thread
from stride_lightning.runtime.progress import counting, expect
from stride_lightning.runtime.randomness import preserved_random_state
from stride_lightning.storage.records import RecordError, find_records, read_record, remove_record, write_record
from stride_lightning.storage.stored import Stored

#: About how many parts of each thread's work are stored one by one, and the fewest items in one.
NUM_PARTS, SMALLEST_PART = 16, 16

Finished = TypeVar("Finished", bound=Stored)


class Work:
    """Long work on many items under several seeds, done chunk by chunk; the caller computes one chunk.

    With a path, a finished chunk is a part on disk, and a killed run goes on from the parts on disk. The values of a
    chunk must depend on its seed and items alone. In a distributed run every rank does a share of the chunks and all
    get the whole. Several runs of the same work may share one path: each computes the parts that are missing.

    Args:
        path: Where the result will be written; the parts go to ``<path>.parts``. None keeps them in memory.
        plan: Plain values that decide the work: a run is continued only if they are the same. A finished result has
            them among its metadata.
        tensors: Tensors that decide the work, likewise; a finished result has them as attributes.

    Example:
        >>> work = Work(None, {}, {})
        >>> squares = torch.arange(5) ** 2
        >>> work.run(lambda seed, items, tick: seed + squares[items], seeds=[0, 100], num_items=5, largest=2)
        tensor([[  0,   1,   4,   9,  16],
                [100, 101, 104, 109, 116]])
    """

    def __init__(self, path: str | Path | None, plan: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.path = None if path is None else Path(path)
        self.folder = None if path is None else Path(f"{self.path}.parts")
        self.plan, self.tensors = dict(plan), dict(tensors)
        #: Items of a chunk; known once the work has begun.
        self.chunk_size = 0

    def finished(self, kind: type[Finished]) -> Finished | None:
        """The result, if it stands at the path already; parts that a killed run left beside it are deleted.

        Raises:
            ValueError: If it is the result of other work, naming what differs.
            RecordError: If it is damaged.
        """
        if self.path is None or not self.path.exists():
            return None
        result = kind.load(self.path)
        decisive = {name: result.metadata.get(name) for name in self.plan}
        tensors = {name: getattr(result, name) for name in self.tensors}
        if differing := differences(decisive, self.plan, tensors, self.tensors):
            raise ValueError(
                f"{self.path} holds the result of other work, which differs in {differing}. Choose another path, or "
                "delete it."
            )
        self._remove_parts()
        return result

    def run(
        self,
        compute: Callable[[int, slice, Callable[[int], Any]], Tensor],
        *,
        seeds: Sequence[int],
        num_items: int,
        largest: int,
        num_threads: int = 1,
        dim: int = 0,
        ticks: Callable[[int], int] = lambda num_items: num_items,
        description: str = "",
        show_progress: bool = False,
    ) -> Tensor:
        """Compute the chunks that are not on disk yet.

        Args:
            compute: Computes a chunk of a seed: ``(seed, items, tick) -> values``, and calls ``tick`` as it goes on.
            seeds: Seeds, ``S`` of them.
            num_items: Items under every seed, ``n`` of them.
            largest: Most items of a chunk.
            num_threads: Chunks computed at once.
            dim: Dimension of the values along which the items of a chunk lie.
            ticks: Steps of the progress bar for a chunk of so many items.
            description: Text of the progress bar.
            show_progress: Show it.

        Returns:
            The values of all chunks, with the seeds as first dimension and ``n`` items after ``dim`` others.

        Raises:
            ValueError: If ``<path>.parts`` holds parts of other work, naming what differs.
            RecordError: If something there is damaged.
        """
        total = len(seeds) * num_items
        size = min(largest, -(-total // num_threads))  # at least one chunk for every thread
        if self.path is not None:  # a kill loses a part, but small ones cost time
            size = min(size, max(SMALLEST_PART, -(-total // (NUM_PARTS * num_threads))))
        self.chunk_size = size = self._begin(size)
        starts = range(0, num_items, size)
        chunks = [(seed, slice(start, min(start + size, num_items))) for seed in seeds for start in starts]
        lengths = [ticks(items.stop - items.start) for _, items in chunks]
        mine = range(rank(), len(chunks), world_size())
        expect(description, sum(lengths))
        with counting(sum(lengths), description, show_progress) as bar, preserved_random_state():

            def values_of(number: int) -> Tensor:
                return compute(*chunks[number], bar.update)

            def stored(number: int) -> Tensor:
                if (values := self._read(number)) is not None:
                    bar.skip(lengths[number])
                    return values
                self._write(number, values := values_of(number))
                return values

            if self.folder is None:
                computed = gather_objects(each_in_a_thread(values_of, mine, num_threads))
                values = [computed[number % world_size()][number // world_size()] for number in range(len(chunks))]
            else:
                here = dict(zip(mine, each_in_a_thread(stored, mine, num_threads), strict=True))
                barrier()
                values = [here[n] if n in here else self._read_of_other_rank(n) for n in range(len(chunks))]
        return torch.cat(values, dim).unflatten(dim, (len(seeds), num_items)).movedim(dim, 0).contiguous()

    def keep(self, result: Finished) -> Finished:
        """Write the result where it was to stand, unless another run has just done so, and delete the parts."""
        if self.path is not None:
            path = result.save(self.path)
            if path != self.path:
                self.plan = {name: self.plan[name] for name in self.plan.keys() & result.metadata.keys()}
                with contextlib.suppress(ValueError):  # the result of other work there stays, and so does this one
                    self.finished(type(result))
                    if rank() == 0:
                        remove_record(path)
            self._remove_parts()
        return result

    def _begin(self, chunk_size: int) -> int:
        """Write the plan, or compare it with that of the run that began the work, whose chunk size counts then."""
        size = broadcast_object(chunk_size)  # ranks may have other numbers of threads
        if self.folder is None:
            return size
        if rank() == 0 and not _plans(self.folder):
            plan = {**self.plan, "chunk_size": size}
            write_record(self.folder, "plan", {"kind": "plan", "plan": plan}, {"plan": self.tensors})
        barrier()
        record = read_record(_plans(self.folder)[0])
        plan = dict(record.info["plan"])
        size = plan.pop("chunk_size")
        if differing := differences(plan, self.plan, record.tensors("plan"), self.tensors):
            raise ValueError(
                f"{self.folder} holds the finished parts of other work, which differs in {differing}. Choose another "
                "path, or delete the folder to begin anew."
            )
        return size

    def _part(self, number: int) -> Path:
        assert self.folder is not None
        return self.folder / f"part={number}"

    def _read(self, number: int) -> Tensor | None:
        """The values of a part; None if it is not on disk, as when another run has finished and deleted the parts."""
        part = self._part(number)
        try:
            return read_record(part).tensors("values")["values"]
        except (FileNotFoundError, RecordError):
            if os.path.lexists(part):
                raise
            return None

    def _read_of_other_rank(self, number: int) -> Tensor:
        if (values := self._read(number)) is None:
            raise RecordError(f"Part {number} has vanished from {self.folder}. Run again to compute it anew.")
        return values

    def _write(self, number: int, values: Tensor) -> None:
        part, info = self._part(number), {"kind": "part", "number": number}
        try:
            write_record(part.parent, part.name, info, {"values": {"values": values}})
        except FileNotFoundError:
            assert self.path is not None
            if not self.path.exists():  # else another run has finished, and deleted the parts meanwhile
                raise

    def _remove_parts(self) -> None:
        barrier()
        if rank() == 0 and self.folder is not None:
            remove_parts(self.folder)
        barrier()


def remove_parts(folder: Path) -> None:
    """Delete a folder of parts and the leftovers of killed writers.

    The plan goes last, so that a deletion that is interrupted leaves a folder that the next run understands.
    """
    plans = _plans(folder)
    for path in [*(path for path in find_records(folder) if path not in plans), *plans]:
        with contextlib.suppress(FileNotFoundError):  # another run deletes them, too
            remove_record(path)
    for left in folder.glob(".*.part-*"):
        shutil.rmtree(left, ignore_errors=True)
    with contextlib.suppress(OSError):  # something else was put there
        folder.rmdir()


def differences(
    stored: Mapping[str, Any],
    wanted: Mapping[str, Any],
    stored_tensors: Mapping[str, Tensor],
    wanted_tensors: Mapping[str, Tensor],
) -> str:
    """The differences of two plans in words; empty if there are none."""
    differing = []
    for name in sorted(stored.keys() | wanted.keys()):
        before, now = (json.loads(json.dumps(plan.get(name))) for plan in (stored, wanted))  # tuples become lists
        if before != now:
            is_long = isinstance(before, dict | list) or len(f"{before}{now}") > 200
            differing.append(name if is_long else f"{name} ({before!r} there, {now!r} now)")
    for name in sorted(stored_tensors.keys() | wanted_tensors.keys()):
        one, other = stored_tensors.get(name), wanted_tensors.get(name)
        if one is None or other is None or one.shape != other.shape or not torch.equal(one, other.cpu()):
            differing.append(name)
    return ", ".join(differing)


def _plans(folder: Path) -> list[Path]:
    """The plan of a folder of parts; more than one where several runs began at the same moment."""
    return [path for path in find_records(folder) if path.name.startswith("plan")]
