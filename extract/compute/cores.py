"""The cores of a machine: how many this process may use, and how batches share them."""

from __future__ import annotations

import contextlib
import os
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

    On the CPU every core has a batch of its own: cores that share one wait for each other at every layer, and
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
