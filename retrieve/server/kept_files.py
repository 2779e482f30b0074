"""Files that can be made again: each is made once, and kept in a folder that does not grow beyond a size."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, Generic, TypeVar

from svb.data.publish import ASIDE_PREFIX
from svb.retrieve.server.http import BusyError

T = TypeVar("T")

# The key of a video's content, and what the file shows of it. Other files in the folder belong to somebody else.
NAME = re.compile(r"[0-9a-f]{32}(-n?[0-9]+)*\.(jpg|mp4)")
# A file aside that is older was left by a killed server; a younger one may still be written by another server.
_ASIDE_SECONDS = 3600.0


class SingleFlight(Generic[T]):
    """Does each piece of work once for everyone who asks for it while it runs; for one event loop.

    Args:
        max_running: How many pieces of work may run or wait at once; None for any number.
        ends_unwatched: Whether work is cancelled once nobody waits for it; otherwise it goes on.
    """

    def __init__(self, max_running: int | None = None, *, ends_unwatched: bool = False) -> None:
        self._max_running, self._ends_unwatched = max_running, ends_unwatched
        self._by_name: dict[str, asyncio.Task[T]] = {}
        self._running: set[asyncio.Task[T]] = set()  # includes cancelled work that has not ended yet
        self._waiting: Counter[asyncio.Task[T]] = Counter()

    async def do(self, name: str, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Return the result of the work of a name; start it if it is not running.

        Raises:
            BusyError: It is not running, and too much other work is running.
        """
        task = self._by_name.get(name) or self._start(name, work)
        self._waiting[task] += 1
        try:
            return await asyncio.shield(task)
        finally:
            self._waiting[task] -= 1
            if not self._waiting[task]:
                del self._waiting[task]
                if self._ends_unwatched and not task.done():
                    self._by_name.pop(name, None)  # a request that comes while this ends starts it again
                    task.cancel()

    async def close(self) -> None:
        """Wait until all work has ended; cancel it first if unwatched work is cancelled anyway."""
        for task in list(self._running) if self._ends_unwatched else []:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    def _start(self, name: str, work: Callable[[], Coroutine[Any, Any, T]]) -> asyncio.Task[T]:
        if self._max_running is not None and len(self._running) >= self._max_running:
            raise BusyError(f"{len(self._running)} files are being made - try again in a minute")
        task = self._by_name[name] = asyncio.create_task(work())
        self._running.add(task)
        task.add_done_callback(lambda done: self._forget(name, done))
        return task

    def _forget(self, name: str, task: asyncio.Task[T]) -> None:
        self._running.discard(task)
        if self._by_name.get(name) is task:
            del self._by_name[name]
        if not task.cancelled():
            task.exception()  # everybody who asked may have left: nobody else takes this error


class KeptFiles:
    """A folder of files that can be made again; it removes those used longest ago when they take too much space.

    Args:
        folder: The folder, which is made if it is missing. Only files whose names match `NAME` are ever removed.
        max_bytes: Most space that the files may take together.
        max_made, ends_unwatched: How files are made; see `SingleFlight`.

    Attributes:
        max_bytes: As given.
    """

    def __init__(
        self, folder: Path, max_bytes: int, *, max_made: int | None = None, ends_unwatched: bool = False
    ) -> None:
        self._folder = folder
        self.max_bytes = max_bytes
        self._making: SingleFlight[Path] = SingleFlight(max_made, ends_unwatched=ends_unwatched)
        folder.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        self._total_bytes = sum(size for _, size, _ in self._files())

    async def get(self, name: str, make: Callable[[Path], Awaitable[None]]) -> Path:
        """Return the file of a name, which counts as used now; make it if it is not there.

        Args:
            name: Matches `NAME`.
            make: Writes the file to a given path.

        Raises:
            BusyError: Too many files are being made.
        """
        path = self._folder / name
        try:
            os.utime(path)
        except OSError:
            return await self._making.do(name, lambda: self._make(path, make))
        return path

    async def close(self) -> None:
        """Wait for the files that are being made; see `SingleFlight.close`."""
        await self._making.close()

    async def _make(self, path: Path, make: Callable[[Path], Awaitable[None]]) -> Path:
        descriptor, aside = tempfile.mkstemp(prefix=ASIDE_PREFIX, suffix=path.suffix, dir=self._folder)
        os.close(descriptor)
        try:
            await make(Path(aside))
            # The file is not synced: if a power cut destroys it, it is made again.
            Path(aside).replace(path)
        finally:
            Path(aside).unlink(missing_ok=True)
        self._total_bytes += path.stat().st_size
        if self._total_bytes > self.max_bytes:
            self._make_room(path)
        return path

    def _make_room(self, newest: Path) -> None:
        """Remove files down to nine tenths of the limit; otherwise every new file would look at all of them."""
        files = sorted(self._files())
        self._total_bytes = sum(size for _, size, _ in files)
        for _, size, path in files:
            if self._total_bytes <= 0.9 * self.max_bytes:
                return
            if path != newest:
                path.unlink(missing_ok=True)
                self._total_bytes -= size

    def _files(self) -> list[tuple[int, int, Path]]:
        """Return `(mtime_ns, size_bytes, path)` of every kept file."""
        with os.scandir(self._folder) as entries:
            kept = [
                entry for entry in entries if NAME.fullmatch(entry.name) and entry.is_file(follow_symlinks=False)
            ]
        stats = []
        for entry in kept:
            with contextlib.suppress(FileNotFoundError):  # another server of the index makes room too
                stats.append((entry.stat(), Path(entry.path)))
        return [(stat.st_mtime_ns, stat.st_size, path) for stat, path in stats]


class CacheFolder:
    """The folder of files that can be made again: an index's `cache/`, or a temporary folder if that is read-only.

    Attributes:
        path: The folder.
    """

    def __init__(self, index: Path) -> None:
        self.path = index / "cache"
        self._is_temporary = not _is_writable(self.path)
        if self._is_temporary:
            self.path = Path(tempfile.mkdtemp(prefix="svb-cache-"))

    def close(self) -> None:
        """Remove the folder if it is temporary."""
        if self._is_temporary:
            shutil.rmtree(self.path, ignore_errors=True)


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _remove_leftovers(folder: Path) -> None:
    for leftover in folder.glob(f"{ASIDE_PREFIX}*"):
        with contextlib.suppress(OSError):
            if leftover.stat().st_mtime < time.time() - _ASIDE_SECONDS:
                leftover.unlink()
