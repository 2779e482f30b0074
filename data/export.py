"""`svb export`: a feature store -> the layouts that other tools read.

h5             one HDF5 file in svb's own layout, which svb takes in the folder's place; all backbones
h5-per-video   one HDF5 file, a dataset (T, F) float16 a video with its attributes `times_seconds` and `video_id`
npz            a folder, a file a video with `features` (T, F) float16, `times_seconds` (T,) and `video_id`
parquet        one file, a row a feature row: `video_id`, `time_seconds`, `features` (F float32 numbers)

All but h5 hold one backbone, and no more than a shard of the store is in memory at a time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path

import h5py
import numpy as np

from svb.data.feature_store import FeatureStore
from svb.data.feature_store_writer import export_store
from svb.data.publish import one_writer, published_file, published_folder
from svb.data.rows import FrameFeatures, VideoRows
from svb.errors import InputError, UsageError

logger = logging.getLogger(__name__)

# Limits of a video_id that becomes a path: file systems take 255 bytes a part, and `.npz` needs four.
MAX_PART_BYTES = 200
MAX_PATH_BYTES = 1000
# Bytes that are turned into float32 and into one row group of Parquet at a time.
ROW_GROUP_BYTES = 64 * 2**20


def export(store: FeatureStore, out: Path, *, layout: str = "h5", backbone: str | None = None) -> Path:
    """Write a store's features in a layout that other tools read; whole or not at all.

    Args:
        store: Videos without features are left out of all layouts but `h5`.
        out: The file to make; for `npz` the folder.
        layout: One of `LAYOUTS`.
        backbone: May be a fused one; needed if the store holds several. Not with `h5`.

    Returns:
        `out`.

    Raises:
        InputError: There is something at `out` already, or the store has no such features.
        StoreError: The store is damaged, or another process is writing `out`.
        UsageError: An option makes no sense.
    """
    if layout not in LAYOUTS:
        raise UsageError(f"unknown layout {layout!r} - expected one of {', '.join(LAYOUTS)}")
    _require_free(out)
    if layout == "h5" and backbone is not None:
        raise UsageError("h5 holds all backbones of a store - leave out --backbone, or choose another --format")
    if layout != "h5" and not store.video_ids:
        raise InputError(f"no video of {store.path} has features - `svb info {store.path} --failures` says why")
    name = "" if layout == "h5" else store.only_backbone(backbone)
    with one_writer(out):
        _require_free(out)  # another process may just have written it
        if layout == "h5":
            return export_store(store, out)
        _WRITERS[layout](store, name, out)
    left_out = len(store.records) - len(store.video_ids)
    if left_out:
        logger.info(
            f"{left_out} videos without features are left out - `svb info {store.path} --failures` lists them"
        )
    return out


def _require_free(out: Path) -> None:
    if os.path.lexists(out):
        raise InputError(f"{out} exists - remove it, or name another with -o")


def _write_h5_per_video(store: FeatureStore, backbone: str, out: Path) -> None:
    names = dataset_names(store.video_ids)
    # HDF5 1.8 is the first with attributes above 64 KiB, which the times of three hours need.
    with published_file(out) as aside, h5py.File(aside, "w", libver=("v108", "latest")) as file:
        file.attrs["backbone"], file.attrs["settings"] = backbone, _settings(store, backbone)
        for video_id, rows in _videos(store, backbone):
            dataset = file.create_dataset(names[video_id], data=rows.features)
            dataset.attrs["video_id"], dataset.attrs["times_seconds"] = video_id, rows.times_seconds
    _say_renamed(names, {video_id: video_id.replace("/", "@") for video_id in names})


def _write_npz(store: FeatureStore, backbone: str, out: Path) -> None:
    names = file_names(store.video_ids)
    with published_folder(out) as filling:
        for video_id, rows in _videos(store, backbone):
            path = filling / f"{names[video_id]}.npz"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.savez(path, features=rows.features, times_seconds=rows.times_seconds, video_id=np.array(video_id))
    _say_renamed(names, {video_id: video_id for video_id in names})


def _write_parquet(store: FeatureStore, backbone: str, out: Path) -> None:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    feature_size = int(store.video_settings(backbone)["backbone_settings"]["feature_size"])
    # float32 holds every float16 exactly, and DuckDB, Polars and Spark can read it.
    schema = pa.schema(
        [
            ("video_id", pa.string()),
            ("time_seconds", pa.float64()),
            ("features", pa.list_(pa.float32(), feature_size)),
        ],
        metadata={"backbone": backbone, "settings": _settings(store, backbone)},
    )
    step = max(1, ROW_GROUP_BYTES // (4 * feature_size))
    with (
        published_file(out) as aside,
        pq.ParquetWriter(aside, schema, compression="zstd", use_dictionary=["video_id"]) as writer,
    ):
        for loaded in _shards(store, backbone):
            row_ids = np.repeat(np.array(loaded.video_ids, object), np.diff(loaded.offsets))
            for begin in range(0, len(row_ids), step):
                rows = slice(begin, begin + step)
                numbers = pa.array(loaded.features[rows].astype(np.float32).ravel())
                columns = [
                    pa.array(row_ids[rows], pa.string()),
                    pa.array(loaded.times_seconds[rows]),
                    pa.FixedSizeListArray.from_arrays(numbers, feature_size),
                ]
                writer.write_table(pa.table(columns, schema=schema))


_WRITERS = {"h5-per-video": _write_h5_per_video, "npz": _write_npz, "parquet": _write_parquet}
LAYOUTS = ("h5", *_WRITERS)


def _shards(store: FeatureStore, backbone: str) -> Iterator[FrameFeatures]:
    """Yield the current rows of each shard; a shard is a store by itself."""
    for s, shard in enumerate(store.shards):
        video_ids = [
            record.video_id for v, record in enumerate(shard.records) if record.usable and store.is_current(s, v)
        ]
        if video_ids:
            yield FeatureStore(shard.path).load(backbone, video_ids)


def _videos(store: FeatureStore, backbone: str) -> Iterator[tuple[str, VideoRows]]:
    for loaded in _shards(store, backbone):
        for video_id, begin, end in zip(loaded.video_ids, loaded.offsets[:-1], loaded.offsets[1:], strict=True):
            yield video_id, VideoRows(loaded.features[begin:end], loaded.times_seconds[begin:end])


def _settings(store: FeatureStore, backbone: str) -> str:
    return json.dumps(store.video_settings(backbone), ensure_ascii=False)


def dataset_names(video_ids: Collection[str]) -> dict[str, str]:
    """Return for each video_id the name of its dataset at the root of an HDF5 file, all different.

    A `/`, which would nest groups, is written `@`. Ids that would share a name get `~` and a hash, as do those
    that are not a name for HDF5.
    """
    plain = {video_id: video_id.replace("/", "@") for video_id in video_ids}
    counts = Counter(plain.values())
    return {
        video_id: _hashed(video_id, name) if counts[name] > 1 or name in ("", ".") or _is_hashed(name) else name
        for video_id, name in plain.items()
    }


def file_names(video_ids: Collection[str]) -> dict[str, str]:
    """Return for each video_id a relative path without suffix that stays in its folder, all different.

    A `/` makes sub-folders. Ids that no path can spell safely, and those that differ only by case or by how
    their accents are encoded, which is one file on some disks, get `~` and a hash.
    """
    folded = {video_id: unicodedata.normalize("NFD", video_id).casefold() for video_id in video_ids}
    counts = Counter(folded.values())
    return {
        video_id: video_id
        if counts[folded[video_id]] == 1 and _is_safe_path(video_id)
        else _hashed(video_id, re.sub(r"[^A-Za-z0-9_.-]+", "_", video_id).lstrip(".")[:80])
        for video_id in video_ids
    }


def _is_safe_path(video_id: str) -> bool:
    parts = video_id.split("/")
    return (
        # Programs that list a folder leave out hidden files, `svb import` among them.
        all(part and not part.startswith(".") and len(part.encode()) <= MAX_PART_BYTES for part in parts)
        and len(video_id.encode()) <= MAX_PATH_BYTES
        and not any(unicodedata.category(letter) == "Cc" for letter in video_id)
        # A folder `a.npz` would be where the file of the video `a` is.
        and not any(part.casefold().endswith(".npz") for part in parts[:-1])
        and not _is_hashed(video_id)
    )


def _hashed(video_id: str, readable: str) -> str:
    return f"{readable}~{hashlib.sha256(video_id.encode()).hexdigest()[:16]}"


def _is_hashed(name: str) -> bool:
    return re.search(r"~[0-9a-f]{16}$", name, re.IGNORECASE) is not None


def _say_renamed(names: dict[str, str], expected: dict[str, str]) -> None:
    renamed = [video_id for video_id, name in names.items() if name != expected[video_id]]
    if renamed:
        logger.info(
            f"{len(renamed)} videos could not be named after their ids, first {renamed[0]!r}, which is named "
            f"{names[renamed[0]]!r}; each holds its id as `video_id`"
        )
