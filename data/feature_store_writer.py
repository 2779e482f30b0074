"""The one writer of a feature store: collects finished videos and publishes them as immutable shards."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from svb.config import fingerprint, require_same
from svb.data.description import publish_description
from svb.data.feature_store import FeatureStore, live_shards, read_store_description
from svb.data.publish import lock_folder, remove_leftovers
from svb.data.shard import VideoRecord, VideoRows, write_shard
from svb.errors import InputError, StoreError

SHARD_VIDEOS = 256
SHARD_BYTES = 512 * 2**20
SHARD_SECONDS = 30.0


class FeatureStoreWriter:
    """Adds videos to a store, which it creates where there is none.

    A video that was added is safe once its shard is published: after 256 videos, 512 MB or 30 s,
    whichever is first. Use it as a context manager: leaving it publishes the rest, also after an error.

    Args:
        path: The store's folder.
        settings: What shapes every row; must equal the store's.
        provenance: What does not shape rows but is worth recording, such as versions and device.

    Raises:
        MismatchError: The store was made with other settings.
        StoreError: Another process is writing to the store, or it is damaged.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], provenance: Mapping[str, Any]) -> None:
        self.path = path
        (path / "shards").mkdir(parents=True, exist_ok=True)
        self._lock = lock_folder(path)
        try:
            self._description = _open_or_create(path, settings, provenance)
            remove_leftovers(path)
            remove_leftovers(path / "shards")
            _remove_replaced(path)
        except BaseException:
            os.close(self._lock)
            raise
        self._feature_sizes = {
            name: int(backbone["feature_size"]) for name, backbone in settings["backbones"].items()
        }
        self._records: list[VideoRecord] = []
        self._rows: list[dict[str, VideoRows]] = []
        self._bytes = 0
        self._oldest_added = 0.0

    def __enter__(self) -> FeatureStoreWriter:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.publish()
        finally:
            os.close(self._lock)

    def add(self, record: VideoRecord, rows: Mapping[str, VideoRows]) -> None:
        """Take one finished video; `rows` by backbone, empty for a failed one."""
        if not self._records:
            self._oldest_added = time.monotonic()
        self._records.append(record)
        self._rows.append(dict(rows))
        self._bytes += sum(video.features.nbytes + video.times_seconds.nbytes for video in rows.values())
        self.publish_if_due()

    def publish_if_due(self) -> None:
        """Publish what was added if it is many, large or old enough."""
        if self._records and (
            len(self._records) >= SHARD_VIDEOS
            or self._bytes >= SHARD_BYTES
            or time.monotonic() - self._oldest_added >= SHARD_SECONDS
        ):
            self.publish()

    def publish(self) -> None:
        """Publish all videos added so far as one shard."""
        if not self._records:
            return
        names = [path.name for path in (self.path / "shards").glob("[0-9]*.h5")]
        sequence = 1 + max((int(name.split("-")[0]) for name in names), default=0)
        self._write(sequence, self._records, self._rows, replaces=())
        self._records, self._rows, self._bytes = [], [], 0

    def compact(self) -> None:
        """Merge neighbouring small shards and leave out superseded records.

        The merged shard is published before the small ones are removed, and takes the sequence number
        of the last of them, so that at no moment a record is lost or its order changes.
        """
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
        records, rows = current_content(store, group)
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
    ) -> None:
        key = hashlib.sha256(repr((sequence, replaces, [r.video_id for r in records])).encode()).hexdigest()
        path = self.path / "shards" / f"{sequence:06d}-{key[:8]}.h5"
        write_shard(path, self._description, records, rows, self._feature_sizes, replaces)


def current_content(store: FeatureStore, shards: list[int]) -> tuple[list[VideoRecord], list[dict[str, VideoRows]]]:
    """Return the records of some shards that were not superseded, and their rows by backbone."""
    records: list[VideoRecord] = []
    rows: list[dict[str, VideoRows]] = []
    for s in shards:
        shard_rows = store.shards[s].video_rows(store.backbones)
        for v, record in enumerate(store.shards[s].records):
            if store.is_current(s, v):
                records.append(record)
                rows.append(shard_rows[v])
    return records, rows


def export_store(store: FeatureStore, path: Path) -> Path:
    """Write a store as one HDF5 file of the same layout, which `FeatureStore` reads like the folder.

    Everything is held in memory once. Returns `path`.

    Raises:
        InputError: There is a file at `path` already.
    """
    if path.exists():
        raise InputError(f"{path} exists - remove it, or name another file with -o")
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
