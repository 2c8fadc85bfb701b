"""Independent chunks of work, one thread each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from typing import TypeVar

import torch

from stride_lightning.runtime.progress import track

Item = TypeVar("Item")
Result = TypeVar("Result")


def num_workers(device: torch.device) -> int:
    """Number of threads for chunks: torch's number on a CPU, one elsewhere."""
    return torch.get_num_threads() if device.type == "cpu" else 1


def even_slices(length: int, largest: int, device: torch.device) -> list[slice]:
    """Cut ``range(length)`` into slices of at most ``largest`` that keep all threads equally busy.

    Example:
        >>> even_slices(5, 10, torch.device("meta"))
        [slice(0, 5, None)]
    """
    workers = num_workers(device)
    count = -(-length // largest)
    count = min(length, -(-count // workers) * workers)
    bounds = [length * i // count for i in range(count + 1)] if count else [0]
    return [slice(start, stop) for start, stop in pairwise(bounds)]


def map_chunks(
    function: Callable[[Item], Result],
    chunks: Sequence[Item],
    device: torch.device,
    description: str,
    *,
    show_progress: bool = True,
) -> Iterator[Result]:
    """Apply a function to independent chunks and yield the results in order, with a progress bar.

    On a CPU each thread works on one chunk at a time. An iteration is many products too small to share: beside another
    process, the wait for a second thread in each takes many times as long as the work. The function runs without
    gradients and must not draw random numbers.
    """
    workers = min(num_workers(device), len(chunks))
    function = torch.no_grad()(function)  # gradient mode belongs to a thread: switched off in each
    if workers <= 1:
        yield from track(map(function, chunks), description, len(chunks), show=show_progress)
        return
    with _pool(workers) as pool:
        yield from track(pool.map(function, chunks), description, len(chunks), show=show_progress)


def each_in_a_thread(function: Callable[[Item], Result], items: Sequence[Item], num_threads: int) -> list[Result]:
    """Apply a function to every item, several at once, each on one core; results in order.

    After an error or Ctrl-C no further item begins. Several threads must not draw from the global random generators;
    with one thread the calling thread does all.

    Example:
        >>> each_in_a_thread(lambda x: x + 1, [1, 2, 3], num_threads=2)
        [2, 3, 4]
    """
    if num_threads <= 1 or len(items) <= 1:
        return [function(item) for item in items]
    with _pool(min(num_threads, len(items))) as pool:
        return list(pool.map(function, items))


@contextmanager
def _pool(num_threads: int) -> Iterator[ThreadPoolExecutor]:
    """Threads of one core each; at the end no further item begins."""
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(before)  # the workers' setting reaches this thread's BLAS too
