"""A program that test_index_stops kills: `svb index` that ends itself at the n-th of its writes.

    python index_killed.py

Torch is loaded once; then every line of the input is a run in a process of its own: a list in JSON of SOURCE,
STORE, OUT and n, or -1 for a run that nothing disturbs. It says the run's exit code, and how many writes it made.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from functools import wraps
from multiprocessing import shared_memory
from pathlib import Path
from typing import Any

import numpy as np

# What changes a disk: kills fall before each of these, or in the middle of an array that is written.
STEPS = ("replace", "rename", "fsync", "unlink", "rmdir", "mkdir")
SEGMENT_VIDEOS = 6


class Killer:
    """Counts writes, and kills the process at the n-th."""

    def __init__(self, n: int, counter: memoryview) -> None:
        self._n, self._counter = n, counter

    def is_next(self) -> bool:
        self._counter[0:4] = (count := int.from_bytes(self._counter[0:4], "little") + 1).to_bytes(4, "little")
        return count == self._n

    def before(self, step: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(step)
        def counted(*arguments: Any, **options: Any) -> Any:
            if self.is_next():
                os.kill(os.getpid(), signal.SIGKILL)
            return step(*arguments, **options)

        return counted

    def within(self, save: Callable[..., None]) -> Callable[..., None]:
        @wraps(save)
        def counted(path: Path, array: Any) -> None:
            save(path, array)
            if self.is_next():
                os.truncate(path, path.stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        return counted


def run(source: str, store: str, out: str, n: int, counter: memoryview) -> None:
    from indexes import index

    from svb.retrieve.indexing import embed_segment

    embed_segment.SEGMENT_VIDEOS = SEGMENT_VIDEOS
    killer = Killer(n, counter)
    for name in STEPS:
        setattr(os, name, killer.before(getattr(os, name)))
    np.save = killer.within(np.save)
    index(source, out, store=Path(store), prune=True)


def serve() -> None:
    import torch

    from svb.retrieve.indexing import make_pools, tune_ivf  # noqa: F401 - loaded once for all
    from svb.retrieve.model import source  # noqa: F401 - loaded once for all

    torch.set_num_threads(1)  # a process of several threads cannot be forked
    shared = shared_memory.SharedMemory(create=True, size=4)
    for line in sys.stdin:
        shared.buf[0:4] = bytes(4)
        process_id = os.fork()
        if process_id == 0:
            try:
                run(*json.loads(line), shared.buf)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(process_id, 0)
        print(os.waitstatus_to_exitcode(status), int.from_bytes(shared.buf[0:4], "little"), flush=True)
    shared.unlink()


if __name__ == "__main__":
    serve()
