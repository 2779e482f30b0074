"""Have the sidecars beside a store's videos changed? Asked every few seconds, so nothing is listed twice."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from svb.data.feature_store import FeatureStore, shard_names
from svb.errors import SvbError
from svb.retrieve.indexing.index_source import state_of
from svb.retrieve.indexing.sidecars import find_sidecars

# A file that comes within a clock's tick of a listing leaves the folder's time as the listing saw it.
SETTLED_SECONDS = 2.0


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
        """Return size and time of every sidecar. A folder that nothing came to or went from is not listed again."""
        shards = shard_names(self._store)
        if shards != self._shards:
            try:
                records = FeatureStore(self._store).records.values()
            except (SvbError, OSError):  # whoever reads it next tells; the folders are those it had
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
        except OSError:  # it is gone, for now
            return []
        known_ns, sidecars = self._listed.get(folder, (-1, []))
        if mtime_ns == known_ns:
            return sidecars
        found = find_sidecars(self._videos[folder])
        sidecars = sorted({sidecar for of_video in found.values() for sidecar in of_video})
        if time.time() - mtime_ns / 1e9 > SETTLED_SECONDS:
            self._listed[folder] = (mtime_ns, sidecars)
        return sidecars
