"""The threads that search: a fixed number, and a queue that ends somewhere."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from svb.retrieve.server.refusals import BusyError

T = TypeVar("T")


class SearchPool:
    """Runs searches, each on one core: many at once finish sooner so than each of them on all cores.

    Args:
        num_threads: How many run at once.
        max_searches: How many may run or wait at once.
    """

    def __init__(self, num_threads: int, max_searches: int) -> None:
        self._executor = ThreadPoolExecutor(num_threads, "svb-search", initializer=_use_one_core)
        self._max_searches = max_searches
        self._under_way: set[Future[Any]] = set()

    @property
    def in_flight(self) -> int:
        """How many run or wait."""
        return len(self._under_way)

    async def run(self, function: Callable[[], T]) -> T:
        """Return what a function returns; cancelled while it waits, it is not run.

        Raises:
            BusyError: Too many run or wait.
        """
        if self.in_flight >= self._max_searches:
            raise BusyError(f"{self.in_flight} searches run or wait - try again in a moment")
        loop = asyncio.get_running_loop()
        future = self._executor.submit(function)
        self._under_way.add(future)
        try:
            return await asyncio.wrap_future(future)
        finally:
            # One that runs though nobody waits for it counts until it is done.
            future.add_done_callback(lambda done: _soon(loop, lambda: self._under_way.discard(done)))

    def close(self) -> None:
        """Let what runs end, and drop what waits."""
        self._executor.shutdown(wait=True, cancel_futures=True)


def _use_one_core() -> None:
    import faiss

    # FAISS's OpenMP keeps this number a thread.
    faiss.omp_set_num_threads(1)


def _soon(loop: asyncio.AbstractEventLoop, function: Callable[[], None]) -> None:
    if loop.is_closed():
        return
    loop.call_soon_threadsafe(function)
