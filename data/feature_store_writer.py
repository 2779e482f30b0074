"""The writer of a feature store: collects finished videos and publishes them as immutable shards."""

from __future__ import annotations

import hashlib
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from svb.config import fingerprint, require_same
from svb.data.description import publish_description
from svb.data.feature_store import FeatureStore, live_shards, read_store_description, shard_names
from svb.data.publish import FolderLock, remove_leftovers
from svb.data.rows import REMOVED, VideoRecord, VideoRows
from svb.data.shard import Shard, write_shard
from svb.errors import StoreError

SHARD_VIDEOS = 256
SHARD_BYTES = 512 * 2**20
SHARD_SECONDS = 30.0


class FeatureStoreWriter:
    """Adds videos to a store, which it creates where there is none.

    A video that was added is safe once its shard is published: after 256 videos, 512 MB or 30 s,
    whichever is first. Use it as a context manager: leaving it publishes the rest, also after an error.

    Args:
        settings: What shapes every row; must equal the store's.
        provenance: What does not shape rows but is worth recording, such as versions and device.
        shared: Other writers that are `shared` too may add to the store at the same time.

    Attributes:
        on_published: Called with the ids of videos that are safe now.

    Raises:
        MismatchError: The store was made with other settings.
        StoreError: Another process is writing to the store, or it is damaged.
    """

    def __init__(
        self, path: Path, settings: Mapping[str, Any], provenance: Mapping[str, Any], *, shared: bool = False
    ) -> None:
        self.path = path
        (path / "shards").mkdir(parents=True, exist_ok=True)
        self._lock = FolderLock(path)
        # Writers that share a store must not name a shard alike.
        self._name = f"{socket.gethostname()} {os.getpid()}" if shared else ""
        self._is_shared = shared
        self.on_published: Callable[[list[str]], None] = lambda video_ids: None
        try:
            if self._lock.take(shared_with_others=shared):
                self._description = _open_or_create(path, settings, provenance)
                remove_leftovers(path)
                remove_leftovers(path / "shards")
                _remove_replaced(path)
                if shared:
                    self._lock.share()
            else:
                self._description = _open_or_create(path, settings, provenance)
        except BaseException:
            self._lock.close()
            raise
        self._feature_sizes = {
            name: int(backbone["feature_size"]) for name, backbone in settings["backbones"].items()
        }
        self._records: list[VideoRecord] = []
        self._rows: list[dict[str, VideoRows]] = []
        self._bytes = 0
        self._oldest_added = 0.0
        self._places: dict[str, tuple[Path, int]] = {}

    def __enter__(self) -> FeatureStoreWriter:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.publish()
        finally:
            self._lock.close()

    def add(self, record: VideoRecord, rows: Mapping[str, VideoRows]) -> None:
        """Add one finished video; `rows` by backbone, empty for a failed one."""
        if not self._records:
            self._oldest_added = time.monotonic()
        self._records.append(record)
        self._rows.append(dict(rows))
        self._bytes += sum(video.features.nbytes + video.times_seconds.nbytes for video in rows.values())
        self.publish_if_due()

    def remove(self, record: VideoRecord) -> None:
        """Take a video out of the store; its rows go when its shard is next merged."""
        self.add(removal_of(record), {})

    def added(self, video_id: str) -> tuple[VideoRecord, dict[str, VideoRows]] | None:
        """Return the record and rows that this writer was given for a video, or None."""
        for record, rows in zip(reversed(self._records), reversed(self._rows), strict=True):
            if record.video_id == video_id:
                return record, rows
        if video_id not in self._places:
            return None
        path, v = self._places[video_id]
        shard = Shard(path)
        return shard.records[v], shard.rows_of(v, list(self._feature_sizes))

    def publish_if_due(self) -> None:
        """Publish what was added if there is enough of it, or it is old enough."""
        if self._records and (
            len(self._records) >= SHARD_VIDEOS
            or self._bytes >= SHARD_BYTES
            or time.monotonic() - self._oldest_added >= SHARD_SECONDS
        ):
            self.publish()

    def publish(self) -> None:
        """Publish all videos added so far as one shard.

        Raises:
            StoreError: The shard cannot be written, or the store is gone.
        """
        if not self._records:
            return
        if not (self.path / "store.json").exists():
            raise StoreError(
                f"{self.path} is gone or was emptied while it was written to - bring it back, or run the same "
                "command again to start another"
            )
        sequence = 1 + max((int(name.split("-")[0]) for name in shard_names(self.path)), default=0)
        path = self._write(sequence, self._records, self._rows, replaces=())
        self._places |= {record.video_id: (path, v) for v, record in enumerate(self._records)}
        published = [record.video_id for record in self._records]
        self._records, self._rows, self._bytes = [], [], 0
        self.on_published(published)

    def compact(self) -> None:
        """Merge neighbouring small shards and leave out superseded records.

        The merged shard is published before the small ones are removed, and takes the sequence number
        of the last of them, so that at no moment a record is lost or its order changes. If others write to the
        store too, the last writer does it.
        """
        if self._is_shared and not self._lock.take_alone():
            return
        remove_leftovers(self.path / "shards")  # killed writers that shared the store left them
        self._places.clear()  # they name shards that will be gone
        store = FeatureStore(self.path)
        group: list[int] = []
        group_videos = group_bytes = 0
        for s, shard in enumerate(store.shards):
            videos, size_bytes = len(shard.records), shard.path.stat().st_size
            fits = group_videos + videos <= SHARD_VIDEOS and group_bytes + size_bytes <= SHARD_BYTES
            if group and not fits:
                self._merge(store, group)
                group, group_videos, group_bytes = [], 0, 0
            group.append(s)
            group_videos += videos
            group_bytes += size_bytes
        self._merge(store, group)

    def _merge(self, store: FeatureStore, group: list[int]) -> None:
        if len(group) < 2:
            return
        records, rows = current_content(store, group, older=range(group[0]))
        merged = [store.shards[s].path for s in group]
        sequence = int(merged[-1].name.split("-")[0])
        self._write(sequence, records, rows, replaces=[path.name for path in merged])
        for path in merged:
            path.unlink()

    def _write(
        self,
        sequence: int,
        records: list[VideoRecord],
        rows: list[dict[str, VideoRows]],
        replaces: tuple[str, ...] | list[str],
    ) -> Path:
        ids = [record.video_id for record in records]
        key = hashlib.sha256(repr((sequence, replaces, ids, self._name)).encode()).hexdigest()
        path = self.path / "shards" / f"{sequence:06d}-{key[:8]}.h5"
        write_shard(path, self._description, records, rows, self._feature_sizes, replaces)
        return path


def removal_of(record: VideoRecord) -> VideoRecord:
    """Return the record that takes a video's earlier ones out of a store."""
    return replace(record, status=REMOVED, error="", codec="")


def current_content(
    store: FeatureStore, shards: Sequence[int], older: Sequence[int] = ()
) -> tuple[list[VideoRecord], list[dict[str, VideoRows]]]:
    """Return the records of some shards that were not superseded, and their rows by backbone.

    A removal is kept only while a shard of `older` still holds what it removes.
    """
    held = {record.video_id for s in older for record in store.shards[s].records}
    records: list[VideoRecord] = []
    rows: list[dict[str, VideoRows]] = []
    for s in shards:
        shard_rows = store.shards[s].video_rows(store.backbones)
        for v, record in enumerate(store.shards[s].records):
            if store.is_current(s, v) and (record.status != REMOVED or record.video_id in held):
                records.append(record)
                rows.append(shard_rows[v])
    return records, rows


def export_store(store: FeatureStore, path: Path) -> Path:
    """Write a store as one HDF5 file of the same layout, which `FeatureStore` reads like the folder.

    The whole store is in memory meanwhile. Returns `path`.
    """
    records, rows = current_content(store, list(range(len(store.shards))))
    sizes = {name: int(backbone["feature_size"]) for name, backbone in store.settings["backbones"].items()}
    write_shard(path, store.description, records, rows, sizes)
    return path


def _open_or_create(path: Path, settings: Mapping[str, Any], provenance: Mapping[str, Any]) -> dict[str, Any]:
    if (path / "store.json").exists():
        description = read_store_description(path)
        require_same(
            description["settings"],
            settings,
            what=f"the feature store {path}",
            do_next="Give the options it was made with, or write to another folder with -o.",
        )
        return description
    if any((path / "shards").glob("[0-9]*.h5")):
        raise StoreError(f"{path} has shards but no store.json - restore it, or write to another folder")
    description = {
        "format": "svb feature store",
        "fingerprint": fingerprint(settings),
        "settings": dict(settings),
        "provenance": dict(provenance),
    }
    publish_description(path / "store.json", description)
    return read_store_description(path)


def _remove_replaced(path: Path) -> None:
    live = {shard.path for shard in live_shards(path)}
    for shard_path in (path / "shards").glob("[0-9]*.h5"):
        if shard_path not in live:
            shard_path.unlink()
