"""Memory that a decode worker and the main process share: frames cross without passing through a pipe.

It is an unnamed file in memory: /dev/shm, which containers keep small, is not used, and nothing is left
behind whatever kills the two processes.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Callable
from multiprocessing import reduction
from typing import Any

import numpy as np
from numpy.typing import NDArray

# How many chunks of frames a worker may be ahead of the backbones. Memory that is never written to is not taken.
SLOTS = 4
# The largest chunk that crosses here: one frame of 4K. What is larger goes through the pipe, and costs more.
SLOT_BYTES = 32 * 2**20


class FrameMemory:
    """`SLOTS` places for chunks of frames; sent to a spawned process it is the same memory there."""

    def __init__(self, descriptor: int | None = None) -> None:
        if descriptor is None:
            descriptor = _unnamed_file()
            os.ftruncate(descriptor, SLOTS * SLOT_BYTES)
        self._descriptor = descriptor
        self._map = mmap.mmap(descriptor, SLOTS * SLOT_BYTES)

    def __reduce__(self) -> tuple[Callable[[Any], FrameMemory], tuple[object]]:
        return _attached, (reduction.DupFd(self._descriptor),)

    def view(self, slot: int, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """Return a slot as an array of a shape, uint8; no copy."""
        size = int(np.prod(shape))
        return np.frombuffer(self._map, np.uint8, size, offset=slot * SLOT_BYTES).reshape(shape)

    def close(self) -> None:
        """Give up the file; the memory itself goes with the last array that looks into it."""
        os.close(self._descriptor)


def _attached(duplicate: Any) -> FrameMemory:
    return FrameMemory(duplicate.detach())


def _unnamed_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("svb-frames")
    with tempfile.TemporaryFile() as file:  # macOS
        return os.dup(file.fileno())
