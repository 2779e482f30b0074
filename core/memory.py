"""How this process asks the system for memory."""

from __future__ import annotations

import contextlib
import ctypes
import sys


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
