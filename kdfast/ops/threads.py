"""Row work on a CPU: as many threads as PyTorch uses take blocks from a queue, one thread per block.

Within an operation, PyTorch divides the work evenly and waits for the slowest thread. That happens thousands of times
per step, and costs a time slice each time another process has that core. Here a thread that gets less of its core takes
fewer blocks. A block's result does not depend on the number of threads or on which of them took it.
"""

from __future__ import annotations

import ctypes
import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from functools import lru_cache
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


def map_on_threads(solve: Callable[[T], R], blocks: Sequence[T]) -> list[R]:
    """Return [solve(block) for block in blocks], without gradients, each block on one thread.

    Raises what `solve` raises, after all threads have stopped. A single block runs on PyTorch's own threads."""
    threads = min(torch.get_num_threads(), len(blocks))
    pool = _pool(torch.get_num_threads()) if threads > 1 else None
    if pool is None:
        return [solve(block) for block in blocks]
    inference, left = torch.is_inference_mode_enabled(), deque(range(len(blocks)))
    results: dict[int, R] = {}

    def take() -> None:
        with torch.inference_mode(inference), torch.no_grad():
            while left:
                try:
                    i = left.popleft()
                except IndexError:  # another thread has taken the last one
                    return
                results[i] = solve(blocks[i])

    running: list[Future[None]] = []
    try:
        with suppress(RuntimeError):  # no thread can start, as while the interpreter shuts down
            for _ in range(threads):
                running.append(pool.submit(take))
        for each in running:
            each.result()
        take()
    finally:
        left.clear()
        wait(running)
    return [results[i] for i in range(len(blocks))]


@lru_cache(maxsize=4)
def _pool(threads: int) -> ThreadPoolExecutor | None:
    """Return threads on which PyTorch's operations are single-threaded, or None if its OpenMP cannot be set that way.
    torch.set_num_threads would affect every other new thread of the process as well."""
    pool = ThreadPoolExecutor(threads, "kdfast", _use_one_thread)
    with suppress(RuntimeError):
        if pool.submit(torch.get_num_threads).result() == 1:
            return pool
    return None


def _use_one_thread() -> None:
    torch.get_num_threads()  # a thread's first call sets the number, so make it before ours
    with suppress(AttributeError):
        ctypes.CDLL(None).omp_set_num_threads(1)


os.register_at_fork(after_in_child=_pool.cache_clear)  # a child does not have the parent's threads
