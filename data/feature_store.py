"""A feature store for reading: a folder of shards, or the single file that `svb export` writes."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from svb.data.description import read_description
from svb.data.fusion import fuse, fused_settings, split_name
from svb.data.rows import REMOVED, FrameFeatures, VideoRecord, VideoRows
from svb.data.shard import Shard, hash_array
from svb.errors import InputError, StoreError


class FeatureStore:
    """The videos and features of a store, as they were when it was opened.

    Attributes:
        path: The folder or single file.
        settings: What shaped every row: backbones, decoder, sampling, preprocessing.
        fingerprint: The fingerprint of `settings`.
        records: The newest record of every video, by `video_id`, sorted; without videos that were removed.

    Raises:
        InputError: There is no store at `path`.
        StoreError: A file of the store is damaged or of a newer format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.is_dir():
            self.description = read_store_description(path)
            self.shards = live_shards(path)
        elif path.is_file():
            shard = Shard(path)
            self.description, self.shards = shard.store, [shard]
        else:
            raise InputError(f"no feature store at {path} - make one with `svb extract VIDEOS -o {path}`")
        self.settings: dict[str, Any] = self.description["settings"]
        self.fingerprint: str = self.description["fingerprint"]
        self._place: dict[str, tuple[int, int]] = {}
        for s, shard in enumerate(self.shards):
            if shard.store.get("fingerprint") != self.fingerprint:
                raise StoreError(
                    f"{shard.path} was made with other settings than {path} (fingerprint "
                    f"{shard.store.get('fingerprint')}, not {self.fingerprint}) - move it out of the store"
                )
            for v, record in enumerate(shard.records):
                self._place[record.video_id] = (s, v)
        newest = {video_id: self.shards[s].records[v] for video_id, (s, v) in sorted(self._place.items())}
        self.records: dict[str, VideoRecord] = {
            video_id: record for video_id, record in newest.items() if record.status != REMOVED
        }

    @property
    def backbones(self) -> list[str]:
        return list(self.settings["backbones"])

    @property
    def video_ids(self) -> list[str]:
        """The ids of all videos that have features, sorted."""
        return [video_id for video_id, record in self.records.items() if record.usable]

    def is_current(self, shard: int, video: int) -> bool:
        """Tell whether a shard's record has not been superseded by a newer one."""
        return self._place[self.shards[shard].records[video].video_id] == (shard, video)

    def status_counts(self) -> Counter[str]:
        """Return how many videos ended with each status."""
        return Counter(record.status for record in self.records.values())

    def only_backbone(self, backbone: str | None = None) -> str:
        """Return the backbone of that name, which may be a fused one, or the only one there is.

        Raises:
            InputError: The store does not hold it, or holds several and none was named.
        """
        held = ", ".join(self.backbones)
        if backbone is None and len(self.backbones) == 1:
            return self.backbones[0]
        if backbone is None:
            raise InputError(
                f"{self.path} holds several backbones ({held}) - choose one with --backbone, or fuse them with "
                f"--backbone {'+'.join(self.backbones)}"
            )
        if not split_name(backbone, self.backbones):
            raise InputError(
                f"{self.path} holds no features of {backbone!r}, only {held} - name one of them, or several "
                "different ones joined by +"
            )
        return backbone

    def video_settings(self, backbone: str) -> dict[str, Any]:
        """Return what shaped a backbone's rows: runs and indexes store it; see `svb.data.fusion`."""
        held = self.settings["backbones"]
        parts = {name: held[name] for name in split_name(backbone, held)}
        return {
            "backbone": backbone,
            "backbone_settings": held[backbone] if backbone in held else fused_settings(parts),
            "sampling": self.settings["sampling"],
            "decoder": self.settings["decoder"],
            "batch_size": self.settings["batch_size"],
        }

    def shard_of(self, video_id: str) -> Path:
        """Return the file that holds a video's newest record."""
        return self.shards[self._place[video_id][0]].path

    def rows_of(self, video_id: str) -> dict[str, VideoRows]:
        """Return one video's rows by backbone; an empty dict for a failed video."""
        s, v = self._place[video_id]
        return self.shards[s].rows_of(v, self.backbones)

    def load(self, backbone: str, video_ids: Sequence[str] | None = None) -> FrameFeatures:
        """Read the features of many videos into memory, each shard once.

        Args:
            backbone: A fused one is aligned in time and joined, see `svb.data.fusion`.
            video_ids: The videos in the order wanted; all usable ones, sorted, by default.

        Raises:
            InputError: A video has no features in this store.
            StoreError: A value is not finite, naming the first bad video.
        """
        return fuse([self._load(name, video_ids) for name in split_name(backbone, self.backbones)])

    def _load(self, backbone: str, video_ids: Sequence[str] | None) -> FrameFeatures:
        wanted = self.video_ids if video_ids is None else list(video_ids)
        places = [self._usable_place(video_id) for video_id in wanted]
        shard_offsets = [shard.offsets(backbone) for shard in self.shards]
        counts = [int(shard_offsets[s][v + 1] - shard_offsets[s][v]) for s, v in places]
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        feature_size = int(self.settings["backbones"][backbone]["feature_size"])
        features = np.empty((offsets[-1], feature_size), np.float16)
        times_seconds = np.empty(offsets[-1], np.float64)
        by_shard: dict[int, list[int]] = {}
        for position, (s, _) in enumerate(places):
            by_shard.setdefault(s, []).append(position)
        for s, positions in by_shard.items():
            shard_features = self.shards[s].features(backbone)
            shard_times = self.shards[s].times_seconds(backbone)
            for position in positions:
                v = places[position][1]
                source = slice(shard_offsets[s][v], shard_offsets[s][v + 1])
                target = slice(offsets[position], offsets[position + 1])
                features[target], times_seconds[target] = shard_features[source], shard_times[source]
            del shard_features, shard_times  # or two large shards would be in memory
        loaded = FrameFeatures(wanted, features, times_seconds, offsets)
        self._require_finite(loaded, backbone)
        return loaded

    def _require_finite(self, loaded: FrameFeatures, backbone: str) -> None:
        # Row sums in float32 are finite exactly when all float16 values are, and need no mask as large as the
        # features.
        bad = np.flatnonzero(~np.isfinite(loaded.features.sum(axis=1, dtype=np.float32)))
        if bad.size:
            video_id = loaded.video_ids[int(np.searchsorted(loaded.offsets, bad[0], side="right")) - 1]
            raise StoreError(
                f"{self.path}: features of {backbone} hold NaN or infinity, first in video {video_id!r} - move "
                f"{self.shard_of(video_id)} away and run `svb extract` again: only its videos are extracted again"
            )

    def _usable_place(self, video_id: str) -> tuple[int, int]:
        record = self.records.get(video_id)
        if record is None or not record.usable:
            state = "is not in" if record is None else f"ended as {record.status!r} in"
            raise InputError(f"video {video_id!r} {state} {self.path} - extract it, or leave it out")
        return self._place[video_id]


class GrowingRecords:
    """The records of a store folder that several processes add to; each shard is read once.

    Attributes:
        records: The newest record of every video seen so far, by `video_id`.
    """

    def __init__(self, folder: Path) -> None:
        self.records: dict[str, VideoRecord] = {}
        self._folder = folder
        self._read: set[str] = set()

    def refresh(self) -> None:
        """Read the shards that were published since the last call."""
        for name in shard_names(self._folder):
            if name not in self._read:
                self._read.add(name)
                shard = Shard(self._folder / "shards" / name)
                self.records.update({record.video_id: record for record in shard.records})


def read_store_description(folder: Path) -> dict[str, Any]:
    """Return a store folder's store.json; errors as `svb.data.description.read_description`."""
    make = f"svb extract VIDEOS -o {folder}"
    return read_description(folder / "store.json", kind="a feature store", make=make)


def live_shards(folder: Path) -> list[Shard]:
    """Return the shards of a store folder in the order they were published, without replaced ones.

    A kill between publishing a compacted shard and removing the small ones leaves both; the compacted
    one says what it replaces.
    """
    shards: list[Shard] = []
    for path in _shard_paths(folder):
        try:
            shards.append(Shard(path))
        except StoreError:
            if path.exists():
                raise
            return live_shards(folder)  # a writer has replaced it since it was listed
    replaced = {name for shard in shards for name in shard.replaces}
    return [shard for shard in shards if shard.path.name not in replaced]


def shard_names(folder: Path) -> list[str]:
    """Return the names of the files in a store folder that are shards, sorted; none if it is not one."""
    shards = folder / "shards"
    names = os.listdir(shards) if shards.is_dir() else []  # noqa: PTH208 - a glob takes twenty times as long
    return sorted(name for name in names if name[0].isdigit() and name.endswith(".h5"))


def _shard_paths(folder: Path) -> list[Path]:
    return [folder / "shards" / name for name in shard_names(folder)]


def verify_store(path: Path) -> list[str]:
    """Return what is wrong with a store's shards, a line each; empty when it is whole.

    Checked: every shard opens, its offsets ascend from 0 to its number of rows, a video has rows exactly if
    it did not fail, features and times are finite and are the bytes that were written, and every row has the
    backbone's size.

    Raises:
        InputError, StoreError: There is no store at `path`, or it cannot be opened at all.
    """
    problems = _unreadable_shards(path)
    if problems:
        return problems
    store = FeatureStore(path)
    for shard in store.shards:
        for backbone, settings in store.settings["backbones"].items():
            problems += _shard_problems(shard, backbone, int(settings["feature_size"]))
    return problems


def _unreadable_shards(folder: Path) -> list[str]:
    problems: list[str] = []
    for path in _shard_paths(folder):
        try:
            Shard(path)
        except StoreError as error:
            if path.exists():
                problems.append(str(error))
    return problems


def _shard_problems(shard: Shard, backbone: str, feature_size: int) -> list[str]:
    place = f"{shard.path}, {backbone}"
    try:
        offsets = shard.offsets(backbone)
        features, times_seconds = shard.features(backbone), shard.times_seconds(backbone)
    except StoreError as error:
        return [str(error)]
    counts = np.diff(offsets)
    if features.shape[1:] != (feature_size,):
        return [f"{place}: features of shape {features.shape}, expected rows of {feature_size}"]
    problems = [
        f"{place}: {name} are not what was written"
        for name, array in (("features", features), ("times_seconds", times_seconds), ("offsets", offsets))
        if shard.checksum(backbone, name) != hash_array(array)
    ]
    problems += [
        f"{place}: video {record.video_id!r} is {record.status} and has {count} rows"
        for record, count in zip(shard.records, counts, strict=True)
        if record.usable != (count > 0)
    ]
    bad = ~np.isfinite(features).all(axis=1) | ~np.isfinite(times_seconds)
    bad_videos = np.unique(np.searchsorted(offsets, np.flatnonzero(bad), side="right") - 1)
    return problems + [f"{place}: video {shard.records[v].video_id!r} holds NaN or infinity" for v in bad_videos]
