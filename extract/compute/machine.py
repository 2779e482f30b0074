"""What this process uses of its machine: the cores, how batches share them, and memory that is kept."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def available_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share_of_cores() -> int:
    """Return this process's share of them, where a launcher started several processes on this machine."""
    beside = os.environ.get("LOCAL_WORLD_SIZE", "1")
    cores = available_cores()
    return max(1, cores // int(beside)) if beside.isdecimal() and int(beside) else cores


@contextlib.contextmanager
def cores_for_batches(device: torch.device, compile: bool = False) -> Iterator[tuple[Executor | None, int]]:
    """Yield what runs batches, and how many of them may run at once.

    Every core of a CPU has a batch of its own: cores that share one wait for each other at every layer, and
    longer where decoders want the cores too. Features then do not depend on the number of cores. What is compiled
    runs on all cores at once.
    """
    import torch

    if device.type != "cpu" or compile:
        yield None, 1
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as executor:
            yield executor, threads
    finally:
        torch.set_num_threads(threads)


def keep_freed_memory() -> None:
    """Have glibc keep what is freed for the next request instead of giving it back to the system.

    A network on the CPU frees and requests the same hundreds of megabytes with every batch. The system would
    zero them and hand them out again page by page each time, which takes as long as EfficientNet-lite0 itself.
    Threads that start later share the memory, because glibc's other arenas would give it back. Without glibc
    nothing happens.
    """
    if sys.platform != "linux":
        return
    mmap_threshold, trim_threshold, arena_max = -3, -1, -8  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_ARENA_MAX
    with contextlib.suppress(AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, (1 << 31) - 1)
        libc.mallopt(arena_max, 1)
