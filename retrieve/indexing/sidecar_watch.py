"""Have the sidecars beside a store's videos changed? Asked every few seconds, so nothing is listed twice."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from svb.data.feature_store import FeatureStore, shard_names
from svb.errors import SvbError
from svb.retrieve.indexing.index_source import state_of
from svb.retrieve.indexing.sidecars import sidecars_in

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
        self._folders: list[Path] = []
        self._listed: dict[Path, tuple[int, list[Path]]] = {}

    def states(self) -> list[Any]:
        """Return size and time of every sidecar. A folder that nothing came to or went from is not listed again."""
        shards = shard_names(self._store)
        if shards != self._shards:
            try:
                records = FeatureStore(self._store).records.values()
            except (SvbError, OSError):  # whoever reads it next tells; the folders are those it had
                return self._states_in(self._folders)
            self._shards, self._folders = shards, sorted({Path(record.source_path).parent for record in records})
        return self._states_in(self._folders)

    def _states_in(self, folders: Iterable[Path]) -> list[Any]:
        return [state_of(sidecar) for folder in folders for sidecar in self._sidecars_in(folder)]

    def _sidecars_in(self, folder: Path) -> list[Path]:
        try:
            mtime_ns = folder.stat().st_mtime_ns
        except OSError:  # it is gone, for now
            return []
        known_ns, sidecars = self._listed.get(folder, (-1, []))
        if mtime_ns == known_ns:
            return sidecars
        sidecars = sidecars_in(folder)
        if time.time() - mtime_ns / 1e9 > SETTLED_SECONDS:
            self._listed[folder] = (mtime_ns, sidecars)
        return sidecars
