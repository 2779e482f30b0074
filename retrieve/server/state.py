"""What the server keeps warm: the newest snapshot of the index, the threads that search it, workers and caches."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from svb.errors import StoreError
from svb.retrieve.server.child_processes import WorkerPool
from svb.retrieve.server.http import BusyError
from svb.retrieve.server.kept_files import KeptFiles
from svb.retrieve.server.options import ServeOptions
from svb.retrieve.server.uploads import Uploads
from svb.retrieve.server.video_files import Pictures, Previews, Probes
from svb.retrieve.stored.ivf_file import DECISION
from svb.retrieve.stored.manifest import read_manifest

if TYPE_CHECKING:
    from svb.retrieve.searching.searcher import Searcher

logger = logging.getLogger(__name__)

T = TypeVar("T")

PICTURES_AT_ONCE, PICTURES_WAITING = 2, 500
PREVIEWS_AT_ONCE, PREVIEWS_WAITING = 1, 8

RETRY_SECONDS = 1.0
# A request waits this long for a newer generation to be opened, before it searches the last one.
PATIENCE_SECONDS = 2.0

# Inode, size and time of two files: the manifest, and the file that says how to search the moments.
_Signature = tuple[tuple[int, int, int], tuple[int, int, int]]


class ServerState:
    """What the routes work with.

    Args:
        index: The index's folder.
        cache: The folder for files that can be made again.
        open_searcher: Opens the index as it is on disk; see `Snapshots`.
        options: How the index is served.
    """

    def __init__(
        self,
        index: Path,
        cache: Path,
        open_searcher: Callable[[Searcher | None], Searcher],
        options: ServeOptions,
    ) -> None:
        self.index, self.options = index, options
        self.snapshots = Snapshots(open_searcher, index)
        self.searches = SearchThreads(options.threads, options.max_searches)
        self.uploads = Uploads(options.max_upload_bytes, options.uploads_at_once)
        # With two pools, a video that takes minutes to embed does not hold up posters, nor posters a video.
        self.embedders = WorkerPool(1, options.uploads_at_once, options.upload_seconds)
        self.decoders = WorkerPool(PICTURES_AT_ONCE, PICTURES_WAITING, options.picture_seconds)
        self.probes = Probes(self.decoders)
        self._kept_pictures = KeptFiles(cache / "pictures", options.picture_cache_bytes)
        self.pictures = Pictures(self._kept_pictures, self.decoders)
        self._kept_previews = KeptFiles(
            cache / "previews",
            options.preview_cache_bytes,
            max_made=PREVIEWS_AT_ONCE + PREVIEWS_WAITING,
            ends_unwatched=True,
        )
        self.previews = Previews(self._kept_previews, PREVIEWS_AT_ONCE, options.preview_seconds)

    async def search(self, function: Callable[[Searcher], T]) -> T:
        """Run a function over the newest snapshot on a thread for searches, and return its result.

        If the files of this snapshot disappear because the next generation is committed, the next one is searched.
        """
        searcher = await self.snapshots.newest()
        try:
            return await self.searches.run(lambda: function(searcher))
        except (StoreError, FileNotFoundError):
            newer = await self.snapshots.newest()
            if newer is searcher:
                raise
            return await self.searches.run(lambda: function(newer))

    async def close(self) -> None:
        """End all work and every child process."""
        await self._kept_previews.close()
        await asyncio.gather(self.embedders.close(), self.decoders.close())
        await self._kept_pictures.close()
        self.snapshots.close()
        await asyncio.to_thread(self.searches.close)


class Snapshots:
    """Gives out the newest whole snapshot of the index; for one event loop.

    For each request it looks at inode, size and time of the files that a new generation or a new approximate index
    changes, which costs less than reading the request's head. A running request keeps its snapshot.

    Args:
        open_searcher: Opens the index as it is on disk. It gets the last snapshot, if there is one, and may use its
            loaded model again.
        index: The index's folder.

    Attributes:
        current: The newest whole snapshot.
        problem: Why the newest generation on disk is not served; None if it is.
    """

    def __init__(self, open_searcher: Callable[[Searcher | None], Searcher], index: Path) -> None:
        self._open, self._index = open_searcher, index
        self._thread = ThreadPoolExecutor(1, "svb-open")
        self._seen = self._opened = self._signature()
        self._tried_at = time.monotonic()
        self._opening: asyncio.Task[None] | None = None
        self.problem: str | None = None
        self.current = open_searcher(None)

    async def newest(self) -> Searcher:
        """Return the newest whole snapshot; open it first if the index has changed."""
        if self._opening is None and self._is_due():
            self._tried_at = time.monotonic()
            self._opening = asyncio.create_task(self._refresh())
        if self._opening is not None:
            await asyncio.wait({self._opening}, timeout=PATIENCE_SECONDS)
        return self.current

    def close(self) -> None:
        """End the thread that opens snapshots."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _is_due(self) -> bool:
        if self._signature() != self._seen:
            return True
        # Files that could not be opened may have been replaced meanwhile, or repaired in place.
        return self.problem is not None and time.monotonic() - self._tried_at > RETRY_SECONDS

    async def _refresh(self) -> None:
        seen = self._signature()
        try:
            opened = await asyncio.get_running_loop().run_in_executor(self._thread, self._open_if_changed, seen)
        except Exception as error:  # whatever is wrong with the new files: the old ones are whole
            problem = f"{type(error).__name__}: {error}"
            if problem != self.problem:
                logger.warning("still serving generation %d: %s", self.current.generation, problem)
            self.problem = problem
        else:
            if opened is not None:
                if opened.generation != self.current.generation:
                    logger.info("serving generation %d, after %d", opened.generation, self.current.generation)
                self.current, self._opened = opened, seen
            self.problem = None
        finally:
            self._seen, self._opening = seen, None

    def _open_if_changed(self, seen: _Signature) -> Searcher | None:
        if seen[1] == self._opened[1] and read_manifest(self._index) == self.current.manifest:
            return None
        return self._open(self.current)

    def _signature(self) -> _Signature:
        return _signature_of(self._index / "manifest.json"), _signature_of(self._index / "cache" / DECISION)


class SearchThreads:
    """A fixed number of threads that search, and a queue with a limit.

    Each search runs on one core: many searches at once finish sooner than each of them on all cores.

    Args:
        num_threads: How many searches run at once.
        max_searches: How many may run or wait at once.
    """

    def __init__(self, num_threads: int, max_searches: int) -> None:
        self._executor = ThreadPoolExecutor(num_threads, "svb-search", initializer=_use_one_core)
        self._max_searches = max_searches
        self._under_way: set[Future[Any]] = set()

    @property
    def in_flight(self) -> int:
        """The number of searches that run or wait."""
        return len(self._under_way)

    async def run(self, function: Callable[[], T]) -> T:
        """Return a function's result; the function never runs if it is cancelled while it waits.

        Raises:
            BusyError: Too many searches run or wait.
        """
        if self.in_flight >= self._max_searches:
            raise BusyError(f"{self.in_flight} searches run or wait - try again in a moment")
        loop = asyncio.get_running_loop()
        future = self._executor.submit(function)
        self._under_way.add(future)
        try:
            return await asyncio.wrap_future(future)
        finally:
            # A search that nobody waits for counts until it is done.
            future.add_done_callback(lambda done: _soon(loop, lambda: self._under_way.discard(done)))

    def close(self) -> None:
        """Wait for running searches, and drop those that have not started."""
        self._executor.shutdown(wait=True, cancel_futures=True)


def _signature_of(path: Path) -> tuple[int, int, int]:
    try:
        stat = path.stat()
    except OSError:
        return (0, 0, 0)
    return (stat.st_ino, stat.st_size, stat.st_mtime_ns)


def _use_one_core() -> None:
    import faiss

    # FAISS's OpenMP keeps this number per thread.
    faiss.omp_set_num_threads(1)


def _soon(loop: asyncio.AbstractEventLoop, function: Callable[[], None]) -> None:
    if loop.is_closed():
        return
    loop.call_soon_threadsafe(function)
