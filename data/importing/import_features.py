"""`svb import`: features that another tool made -> a feature store.

A video's rows can be stored if they are numbers, `(T, F)` with T and F at least 1 and F the same for all videos,
finite and within float16, with ascending times.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from svb.data.feature_store import FeatureStore
from svb.data.feature_store_writer import FeatureStoreWriter
from svb.data.importing.files import FILES, layout_of_file
from svb.data.importing.folders import FOLDERS, layout_of_folder
from svb.data.importing.found import EXPECTED, FoundRows, FoundVideo, Source, reading
from svb.data.publish import hash_file
from svb.data.rows import VideoRecord, VideoRows
from svb.data.shard import group_name
from svb.data.text import mtime_ns_of, plain_name, storable_text
from svb.errors import InputError, UsageError

logger = logging.getLogger(__name__)

LAYOUTS = {**FOLDERS, **FILES}
FLOAT16_MAX = 65504.0
# Such a store names this as its decoder, weights and precision.
IMPORTED = "imported"


def import_features(
    source: Path | str,
    out: Path | str,
    *,
    backbone: str,
    layout: str | None = None,
    array: str | None = None,
    fps: float | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Make a feature store of features that another tool made, or add what is new to it.

    The store is published in shards as it grows, so what was imported stays. A video whose file has changed is
    imported again.

    Args:
        source: A folder or file; see `FOLDERS` and `FILES`.
        out: The store's folder.
        backbone: The name of the network that made the features.
        layout: One of `LAYOUTS`; told from the source by default.
        array: The name of the features, if a video has several arrays.
        fps: Rows a second for a source without times: row i is at i / fps. 1 by default.
        on_progress: Called with the number of videos that are done and of all, if that is known.

    Returns:
        `out`.

    Raises:
        InputError: The source is of no known layout, or a video in it cannot be stored; names it.
        MismatchError: The store was made with other settings.
        StoreError: The store is damaged or being written by another process.
        UsageError: An option makes no sense.
    """
    source, out = Path(source), Path(out)
    _check_request(source, out, backbone, fps)
    layout, found = _find_videos(source, layout, array)
    logger.info(f"importing {source} into {out} as {backbone}: {LAYOUTS[layout][0]}")
    stored = FeatureStore(out) if (out / "store.json").exists() else None
    first = next(found.videos, None)
    if first is None:
        raise InputError(f"{source} holds no videos - expected {LAYOUTS[layout][0]}")
    feature_size = _stored_size(stored, backbone) or _features(first.read(), first.place).shape[1]
    settings = _settings(backbone, feature_size, array, fps)
    provenance = {
        "source": str(source.absolute()),
        "layout": layout,
        "versions": {name: version(name) for name in ("svb-video", "h5py", "numpy")},
    }
    intake = _Intake(source, {} if stored is None else stored.records, feature_size, fps)
    with FeatureStoreWriter(out, settings, provenance) as writer:
        for done, video in enumerate(itertools.chain([first], found.videos), start=1):
            taken = intake.take(video)
            if taken is not None:
                record, rows = taken
                writer.add(record, {backbone: rows})
            if found.num_videos is not None:
                on_progress(done, found.num_videos)
        writer.publish()
        writer.compact()
    intake.say_counts()
    return out


def _check_request(source: Path, out: Path, backbone: str, fps: float | None) -> None:
    if not backbone.strip() or storable_text(backbone) != backbone or group_name(backbone) in (".", "videos"):
        raise UsageError(f"{backbone!r} cannot name a backbone - expected a name such as s3d:howto100m")
    if fps is not None and not (math.isfinite(fps) and fps > 0):
        raise UsageError(f"{fps} rows a second - expected a number above 0")
    if out.exists() and (not out.is_dir() or source.resolve() == out.resolve()):
        raise InputError(
            f"{out} is {'a file' if out.is_file() else 'the source itself'} - name another folder with -o"
        )


def _find_videos(source: Path, layout: str | None, array: str | None) -> tuple[str, Source]:
    """Return a source's layout, which is told from it where none is given, and its videos."""
    if not source.exists():
        raise InputError(f"no such file or folder: {source} - {EXPECTED}")
    if layout is not None and layout not in LAYOUTS:
        raise UsageError(f"unknown layout {layout!r} - expected one of {', '.join(LAYOUTS)}")
    if layout is not None and (layout in FOLDERS) != source.is_dir():
        wanted, is_there = ("a folder", "a file") if layout in FOLDERS else ("a file", "a folder")
        raise InputError(f"{source} is {is_there} - {layout} is {wanted}: {LAYOUTS[layout][0]}")
    _refuse_a_store(source)
    layout = layout or (layout_of_folder(source) if source.is_dir() else layout_of_file(source, array))
    return layout, LAYOUTS[layout][1](source, array)


def _refuse_a_store(source: Path) -> None:
    is_store = (source / "store.json").is_file()
    if not is_store and source.is_file() and h5py.is_hdf5(source):
        with reading(str(source)), h5py.File(source, "r", locking=False) as file:
            is_store = "videos" in file and "store" in file.attrs
    if is_store:
        raise InputError(f"{source} is a feature store already - give it to `svb train` or any command as it is")


def _stored_size(stored: FeatureStore | None, backbone: str) -> int | None:
    held = {} if stored is None else stored.settings["backbones"].get(backbone, {})
    return int(held["feature_size"]) if held else None


def _settings(backbone: str, feature_size: int, array: str | None, fps: float | None) -> dict[str, Any]:
    """Return what shaped the rows, as far as it is known, with the fields that a store's readers need."""
    return {
        "backbones": {
            backbone: {
                "feature_size": feature_size,
                # This is not a hash of weights, so no text encoder shares a space with imported features.
                "weights_hash": IMPORTED,
                "precision": IMPORTED,
                "imported": True,
                "array": array or "",
            }
        },
        "sampling": {"times": "of the source, else row i at i / fps", "fps": fps or 1.0},
        "decoder": {"name": IMPORTED, "version": "1"},
        "batch_size": 0,
    }


@dataclass
class _Intake:
    """Decides whether a video is new, and checks it."""

    source: Path
    records: Mapping[str, VideoRecord]
    feature_size: int
    fps: float | None
    seen: set[str] = field(default_factory=set)
    counts: Counter[str] = field(default_factory=Counter)

    def take(self, video: FoundVideo) -> tuple[VideoRecord, VideoRows] | None:
        """Return the record and rows of a video that is new or has changed.

        Raises:
            InputError: It cannot be stored, appears twice in the source, or the store has another one of that id.
        """
        stat, video_id = video.file.stat(), storable_text(video.video_id)
        if video_id not in self.records:  # a copy may spell its accents in another way
            video_id = self._stored_spelling.get(plain_name(video_id), video_id)
        self._require_new(video_id, video)
        record = self.records.get(video_id)
        source_path = storable_text(str(video.file.absolute()))
        if record is not None and (source_path, stat.st_size, mtime_ns_of(stat)) == (
            record.source_path,
            record.size_bytes,
            record.mtime_ns,
        ):
            self.counts["unchanged"] += 1
            return None
        found = video.read()
        rows = VideoRows(_features(found, video.place), self._times_seconds(found, video.place))
        if rows.features.shape[1] != self.feature_size:
            raise InputError(
                f"{video.place}: rows of {rows.features.shape[1]} numbers, where those before have "
                f"{self.feature_size} - one backbone gives rows of one size: import the others into another store"
            )
        content_hash = hash_file(video.file) if video.is_whole_file else _hash_rows(rows)
        if record is not None and record.content_hash == content_hash:
            self.counts["unchanged"] += 1
            return None
        if record is not None and record.source_path != source_path:
            raise InputError(
                f"{video.place}: the store holds other features of {video_id!r}, from {record.source_path} - "
                "import these into another store, or under another video_id"
            )
        self.counts["new" if record is None else "changed"] += 1
        self.counts["rows"] += len(rows.features)
        return (
            VideoRecord(
                video_id=video_id,
                source_path=source_path,
                size_bytes=stat.st_size,
                mtime_ns=mtime_ns_of(stat),
                content_hash=content_hash,
                duration_seconds=math.nan,
                frame_rate=video.frame_rate,
                width_px=0,
                height_px=0,
                rotation_degrees=0,
                codec="",
                decoder=IMPORTED,
                status="ok",
                error="",
            ),
            rows,
        )

    @cached_property
    def _stored_spelling(self) -> dict[str, str]:
        return {plain_name(video_id): video_id for video_id in self.records}

    def say_counts(self) -> None:
        """Say how many videos were imported, changed and unchanged."""
        parts = [f"{self.counts['new']} videos imported"]
        parts += [f"{self.counts[name]} {name}" for name in ("changed", "unchanged") if self.counts[name]]
        logger.info(f"{', '.join(parts)}; {self.counts['rows']} rows of {self.feature_size} numbers added")

    def _require_new(self, video_id: str, video: FoundVideo) -> None:
        if not video_id:
            raise InputError(f"{video.place}: its video_id is empty - give every video an id")
        if video_id in self.seen:
            raise InputError(f"{video.place}: video_id {video_id!r} appears twice - make every video_id unique")
        self.seen.add(video_id)

    def _times_seconds(self, found: FoundRows, place: str) -> NDArray[np.float64]:
        num_rows = len(_matrix(found.features, place))
        if found.times_seconds is None:
            if self.fps is None and not self.counts["without times"]:
                logger.info(
                    f"{place} has no times: assuming 1 row a second, here and for all videos without times - if "
                    "that is wrong, import into another store with --fps"
                )
            self.counts["without times"] += 1
            return np.arange(num_rows) / (self.fps or 1.0)
        times = found.times_seconds
        if times.shape != (num_rows,):
            raise InputError(f"{place}: times of shape {times.shape} for {num_rows} rows - expected one a row")
        if not np.isfinite(times).all() or (np.diff(times) < 0).any():
            raise InputError(
                f"{place}: its times are not finite, ascending numbers - fix them, or remove them and give --fps"
            )
        if self.fps is not None and not self.counts["with times"]:
            logger.info(f"{place} has times: using them instead of --fps, here and for all videos with times")
        self.counts["with times"] += 1
        return times


def _features(found: FoundRows, place: str) -> NDArray[np.float16]:
    """Return features as `(T, F)` float16.

    Raises:
        InputError: They have another shape, or float16 cannot hold them.
    """
    features = _matrix(found.features, place)
    with np.errstate(over="ignore", invalid="ignore"):
        rows = np.ascontiguousarray(features, np.float16)
    if not np.isfinite(features).all():
        raise InputError(f"{place} holds NaN or infinity - leave the video out, or extract it again")
    if not np.isfinite(rows).all():
        worst = float(np.abs(features.astype(np.float64)).max())
        raise InputError(
            f"{place} holds a value of {worst:g} - float16 holds up to {FLOAT16_MAX:g}: scale all features"
        )
    if features.any() and not rows.any():
        raise InputError(f"{place} holds only values that float16 rounds to 0 - scale all features")
    return rows


def _matrix(features: NDArray[Any], place: str) -> NDArray[Any]:
    if features.dtype.kind not in "fiu":
        raise InputError(f"{place} holds {features.dtype} - expected numbers")
    rows = features[0] if features.ndim == 3 and len(features) == 1 else features
    rows = rows[None] if rows.ndim == 1 else rows
    if rows.ndim != 2 or 0 in rows.shape:
        raise InputError(
            f"{place} has shape {features.shape} - expected (T, F), (1, T, F) or (F,), none of them 0: average or "
            "flatten what is more"
        )
    return rows


def _hash_rows(rows: VideoRows) -> str:
    digest = hashlib.sha256(np.ascontiguousarray(rows.features).data)
    digest.update(np.ascontiguousarray(rows.times_seconds).data)
    return digest.hexdigest()
