"""How this process asks the system for memory."""

from __future__ import annotations

import contextlib
import ctypes
import sys


def keep_freed_memory() -> None:
    """Have glibc keep what is freed for the next request instead of giving it back to the system.

    A network on the CPU frees and asks for the same hundreds of megabytes with every batch. Each time the
    system would hand them out anew, page by page and zeroed, which takes as long as EfficientNet-lite0
    itself. Threads that are started later share the memory: glibc's further arenas would give it back all
    the same. Elsewhere than on glibc nothing happens.
    """
    if sys.platform != "linux":
        return
    mmap_threshold, trim_threshold, arena_max = -3, -1, -8  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_ARENA_MAX
    with contextlib.suppress(AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, (1 << 31) - 1)
        libc.mallopt(arena_max, 1)
