"""The index as it is now: a snapshot of one generation is searched, and replaced when the next one is whole."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from svb.retrieve.stored.ivf_file import DECISION
from svb.retrieve.stored.manifest import read_manifest

if TYPE_CHECKING:
    from svb.retrieve.searching.searcher import Searcher

RETRY_SECONDS = 1.0
# A request waits so long for a newer generation to be opened, before it is content with the last one.
PATIENCE_SECONDS = 2.0

_log = logging.getLogger("svb.server")
# Of the manifest, and of the decision how moments are searched.
_Signature = tuple[tuple[int, int, int], tuple[int, int, int]]


class Snapshots:
    """Gives out the newest whole snapshot; for one event loop.

    A new index, or an approximate one that was made for it, is noticed by inode, size and time of the file that
    tells of it: with every request, for it costs less than that request's head. A request under way keeps the
    snapshot that it has.

    Args:
        open_searcher: Opens the index as it is on disk; called with the snapshot before, if there is one, whose
            loaded model may serve on.
        index: The index's folder.

    Attributes:
        current: The newest whole snapshot.
        problem: Why the newest state on disk is not the one that is served; None where it is.
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
        """Return the newest whole snapshot, opened now where the index has changed."""
        if self._opening is None and self._is_due():
            self._tried_at = time.monotonic()
            self._opening = asyncio.create_task(self._refresh())
        if self._opening is not None:
            await asyncio.wait({self._opening}, timeout=PATIENCE_SECONDS)
        return self.current

    def close(self) -> None:
        """Let go of the thread that opens snapshots."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _is_due(self) -> bool:
        if self._signature() != self._seen:
            return True
        # What could not be opened may have been replaced while it was read, or was mended in place.
        return self.problem is not None and time.monotonic() - self._tried_at > RETRY_SECONDS

    async def _refresh(self) -> None:
        seen = self._signature()
        try:
            opened = await asyncio.get_running_loop().run_in_executor(self._thread, self._open_if_changed, seen)
        except Exception as error:  # whatever is wrong with the new files, the old ones are whole
            problem = f"{type(error).__name__}: {error}"
            if problem != self.problem:
                _log.warning("generation %d is served on: %s", self.current.generation, problem)
            self.problem = problem
        else:
            if opened is not None:
                if opened.generation != self.current.generation:
                    _log.info("generation %d is served, after %d", opened.generation, self.current.generation)
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


def _signature_of(path: Path) -> tuple[int, int, int]:
    try:
        stat = path.stat()
    except OSError:
        return (0, 0, 0)
    return (stat.st_ino, stat.st_size, stat.st_mtime_ns)
