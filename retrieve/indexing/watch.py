"""`svb index --watch`: work is done again whenever what it depends on changes, until the process is stopped."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from svb.data.feature_store import FeatureStore, shard_names
from svb.errors import InputError, Interrupted, StoreError, SvbError
from svb.interrupts import deferred_interrupts
from svb.retrieve.indexing.index_config import state_of
from svb.retrieve.indexing.sidecars import find_sidecars

logger = logging.getLogger(__name__)

# A failure that may pass, such as a full disk, is tried again after this time.
RETRY_SECONDS = 60.0
# Longest time before a signal is seen.
SLICE_SECONDS = 0.2
# A file that is added within a tick of the clock after a listing leaves the folder's time unchanged.
SETTLED_SECONDS = 2.0


def watch(
    work: Callable[[], None],
    watched: Callable[[], object],
    seconds: float,
) -> None:
    """Do work, and do it again after every change, until SIGINT or SIGTERM.

    A failure of the first time is raised. Later, a damaged or missing file, a full disk or another writer is
    reported, and the work is tried again with the next change or after a minute; what the user must decide, such
    as another model, ends it.

    Args:
        work: What to do.
        watched: Returns a value that differs after a change.
        seconds: Time between two looks.

    Raises:
        Interrupted: By a signal, which is how it ends; nothing is left half-done.
    """
    seen = watched()
    work()
    retry_at: float | None = None
    with deferred_interrupts() as interrupted:
        logger.info(f"watching: looking for changes every {seconds:g} s")
        while _wait(seconds, interrupted):
            try:
                now = watched()
                if now == seen and (retry_at is None or time.monotonic() < retry_at):
                    continue
                seen, retry_at = now, None
                work()
            except (StoreError, InputError, OSError) as error:
                if retry_at is not None and time.monotonic() < retry_at:
                    continue  # reported already
                retry_at = time.monotonic() + RETRY_SECONDS
                logger.info(f"{error} - trying again when something changes, or in {RETRY_SECONDS:g} s")
        raise Interrupted(interrupted(), "told to stop watching; run the same command again to go on")


def _wait(seconds: float, interrupted: Callable[[], int]) -> bool:
    """Wait, and return whether to go on: False as soon as a signal comes."""
    until = time.monotonic() + seconds
    while not interrupted() and time.monotonic() < until:
        time.sleep(min(SLICE_SECONDS, max(until - time.monotonic(), 0)))
    return not interrupted()


class SidecarWatch:
    """Looks at the folders that hold a store's videos.

    Args:
        store: The store's folder.
    """

    def __init__(self, store: Path) -> None:
        self._store = store
        self._shards: list[str] | None = None
        self._videos: dict[Path, list[Path]] = {}
        self._listed: dict[Path, tuple[int, list[Path]]] = {}

    def states(self) -> list[Any]:
        """Return size and time of every sidecar. A folder that has not changed is not listed again."""
        shards = shard_names(self._store)
        if shards != self._shards:
            try:
                records = FeatureStore(self._store).records.values()
            except (SvbError, OSError):  # the next reader reports it; the folders stay as they were
                return self._states()
            self._shards, self._videos, self._listed = shards, {}, {}
            for path in sorted({Path(record.source_path) for record in records}):
                self._videos.setdefault(path.parent, []).append(path)
        return self._states()

    def _states(self) -> list[Any]:
        return [state_of(sidecar) for folder in self._videos for sidecar in self._sidecars_in(folder)]

    def _sidecars_in(self, folder: Path) -> list[Path]:
        try:
            mtime_ns = folder.stat().st_mtime_ns
        except OSError:  # it is gone for now
            return []
        known_ns, sidecars = self._listed.get(folder, (-1, []))
        if mtime_ns == known_ns:
            return sidecars
        found = find_sidecars(self._videos[folder])
        sidecars = sorted({sidecar for of_video in found.values() for sidecar in of_video})
        if time.time() - mtime_ns / 1e9 > SETTLED_SECONDS:
            self._listed[folder] = (mtime_ns, sidecars)
        return sidecars
