"""One shard of a feature store: the records and rows of some videos in one immutable HDF5 file.

Layout, for V videos and, per backbone, N rows of F numbers (plain HDF5, contiguous, uncompressed):

    videos/video_id, source_path, content_hash, codec, decoder, status, error     (V,) UTF-8
    videos/size_bytes, mtime_ns, width_px, height_px, rotation_degrees            (V,) int64
    videos/tries                                                                  (V,) int64
    videos/duration_seconds, frame_rate, elapsed_seconds                          (V,) float64
    <backbone>/features        (N, F) float16
    <backbone>/times_seconds   (N,) float64
    <backbone>/offsets         (V + 1,) int64, video v owns rows offsets[v]:offsets[v + 1]

Every `/` of the backbone's name is written `@` in the group's name.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from svb.data.description import FORMAT_VERSION
from svb.data.publish import published_file
from svb.data.rows import VideoRecord, VideoRows
from svb.data.text import storable_text
from svb.errors import StoreError

# A shard up to this size is put together in memory before it is written.
IN_MEMORY_BYTES = 1 << 30

# What h5py raises on damaged files, depending on where the damage is.
_DAMAGE = (OSError, KeyError, ValueError, TypeError, AttributeError, RuntimeError)
_DTYPES = {"str": h5py.string_dtype("utf-8"), "int": np.dtype("int64"), "float": np.dtype("float64")}


def group_name(backbone: str) -> str:
    """Return the HDF5 group of a backbone: a `/` would nest groups, so it is written `@`."""
    return backbone.replace("/", "@")


def write_shard(
    path: Path,
    store: Mapping[str, Any],
    records: Sequence[VideoRecord],
    rows: Sequence[Mapping[str, VideoRows]],
    feature_sizes: Mapping[str, int],
    replaces: Sequence[str] = (),
) -> None:
    """Write a shard, whole or not at all.

    Args:
        path: The file to make.
        store: The content of the store's store.json, repeated in the file so that it stands alone.
        records: V records.
        rows: The rows of each record by backbone; empty for a failed video.
        feature_sizes: F of every backbone.
        replaces: Names of the shards that this one takes the place of.
    """
    size_bytes = sum(video.features.nbytes for by_backbone in rows for video in by_backbone.values())
    with _disk_errors_named(path), published_file(path) as aside:
        if size_bytes > IN_MEMORY_BYTES:
            _fill(aside, store, records, rows, feature_sizes, replaces)
            return
        # HDF5 cannot close a file that the disk has no room for, and reports it until the process ends.
        content = io.BytesIO()
        _fill(content, store, records, rows, feature_sizes, replaces)
        aside.write_bytes(content.getbuffer())


def _fill(
    target: Path | io.BytesIO,
    store: Mapping[str, Any],
    records: Sequence[VideoRecord],
    rows: Sequence[Mapping[str, VideoRows]],
    feature_sizes: Mapping[str, int],
    replaces: Sequence[str],
) -> None:
    with h5py.File(target, "w") as file:
        file.attrs["format_version"] = FORMAT_VERSION
        file.attrs["store"] = json.dumps(store, ensure_ascii=False)
        file.attrs["replaces"] = json.dumps(list(replaces))
        for field in fields(VideoRecord):
            column = [getattr(record, field.name) for record in records]
            if field.type == "str":
                column = [storable_text(text) for text in column]
            file.create_dataset(f"videos/{field.name}", data=column, dtype=_DTYPES[str(field.type)])
        for backbone, feature_size in feature_sizes.items():
            _write_rows(file.create_group(group_name(backbone)), backbone, rows, feature_size)


@contextlib.contextmanager
def _disk_errors_named(path: Path) -> Iterator[None]:
    """Turn the errors of a full disk, from the system or from HDF5, into a StoreError."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())[:200]
        raise StoreError(
            f"cannot write {path} ({reason}) - what was published before is whole: make room, "
            "and run the same command again to go on"
        ) from error


def _write_rows(
    group: h5py.Group, backbone: str, rows: Sequence[Mapping[str, VideoRows]], feature_size: int
) -> None:
    counts = [len(video[backbone].times_seconds) if video else 0 for video in rows]
    offsets = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)
    features_hash, times_hash = hashlib.sha256(), hashlib.sha256()
    features = group.create_dataset("features", shape=(offsets[-1], feature_size), dtype=np.float16)
    times_seconds = group.create_dataset("times_seconds", shape=(offsets[-1],), dtype=np.float64)
    for video, begin, end in zip(rows, offsets[:-1], offsets[1:], strict=True):
        if end > begin:
            features[begin:end] = video[backbone].features
            times_seconds[begin:end] = video[backbone].times_seconds
            features_hash.update(np.ascontiguousarray(video[backbone].features, np.float16).data)
            times_hash.update(np.ascontiguousarray(video[backbone].times_seconds, np.float64).data)
    features.attrs["sha256"], times_seconds.attrs["sha256"] = features_hash.hexdigest(), times_hash.hexdigest()
    group.create_dataset("offsets", data=offsets).attrs["sha256"] = hash_array(offsets)


def hash_array(array: NDArray[Any]) -> str:
    """Return the SHA-256 of an array's bytes, in hex: the attribute `sha256` of the datasets that svb writes."""
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()


class Shard:
    """A shard for reading; every call opens the file and closes it again.

    Raises:
        StoreError: The file is not a shard, is damaged, or has a newer format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with h5py.File(path, "r", locking=False) as file:
                version = int(file.attrs["format_version"])
                if version > FORMAT_VERSION:
                    raise StoreError(
                        f"{path} has format {version} - this svb reads up to {FORMAT_VERSION}; upgrade svb"
                    )
                self.store: dict[str, Any] = json.loads(file.attrs["store"])
                self.replaces: list[str] = json.loads(file.attrs["replaces"])
                columns = [_read_column(file, field) for field in fields(VideoRecord)]
                self.records = [VideoRecord(*values) for values in zip(*columns, strict=True)]
        except _DAMAGE as error:
            raise StoreError(
                f"{path} is not a whole shard of a feature store ({error}) - move it away and run "
                "`svb extract` again: only its videos are extracted again"
            ) from error

    def offsets(self, backbone: str) -> NDArray[np.int64]:
        """Return the `(V + 1,)` offsets of a backbone's rows."""
        return self._read(backbone, "offsets")

    def features(self, backbone: str) -> NDArray[np.float16]:
        """Return all `(N, F)` float16 rows of a backbone."""
        return self._read(backbone, "features")

    def times_seconds(self, backbone: str) -> NDArray[np.float64]:
        """Return the `(N,)` times of all rows of a backbone."""
        return self._read(backbone, "times_seconds")

    def checksum(self, backbone: str, dataset: str) -> str:
        """Return the SHA-256 that a dataset was written with; empty if it has none."""
        with h5py.File(self.path, "r", locking=False) as file:
            return str(file[f"{group_name(backbone)}/{dataset}"].attrs.get("sha256", ""))

    def video_rows(self, backbones: Sequence[str]) -> list[dict[str, VideoRows]]:
        """Return for each record its rows by backbone; an empty dict for a failed video."""
        rows: list[dict[str, VideoRows]] = [{} for _ in self.records]
        for backbone in backbones:
            offsets = self.offsets(backbone)
            features, times_seconds = self.features(backbone), self.times_seconds(backbone)
            for v, record in enumerate(self.records):
                if record.usable:
                    span = slice(offsets[v], offsets[v + 1])
                    rows[v][backbone] = VideoRows(features[span], times_seconds[span])
        return rows

    def rows_of(self, video: int, backbones: Sequence[str]) -> dict[str, VideoRows]:
        """Return one record's rows by backbone and read no others; an empty dict for a failed video."""
        if not self.records[video].usable:
            return {}
        rows: dict[str, VideoRows] = {}
        for backbone in backbones:
            begin, end = self.offsets(backbone)[video : video + 2]
            with h5py.File(self.path, "r", locking=False) as file:
                group = file[group_name(backbone)]
                rows[backbone] = VideoRows(group["features"][begin:end], group["times_seconds"][begin:end])
        return rows

    def _read(self, backbone: str, dataset: str) -> NDArray[Any]:
        try:
            with h5py.File(self.path, "r", locking=False) as file:
                group = file[group_name(backbone)]
                array: NDArray[Any] = group[dataset][...]
                self._require_fitting(dataset, array, len(group["features"]))
        except _DAMAGE as error:
            raise StoreError(
                f"{self.path} cannot give {backbone}/{dataset} ({error}) - `svb verify` says what is damaged"
            ) from error
        return array

    def _require_fitting(self, dataset: str, array: NDArray[Any], num_rows: int) -> None:
        if dataset == "offsets":
            num_videos = len(self.records)
            fits = array.shape == (num_videos + 1,) and array[0] == 0 and array[-1] == num_rows
            if not fits or (np.diff(array) < 0).any():
                raise ValueError(f"they do not divide {num_rows} rows among {num_videos} videos")
        elif len(array) != num_rows:
            raise ValueError(f"there are {len(array)} for {num_rows} rows")


def _read_column(file: h5py.File, field: Field[Any]) -> list[Any]:
    if field.name not in file["videos"] and field.default is not MISSING:
        return [field.default] * len(file["videos/video_id"])  # the shard is older than the column
    dataset = file[f"videos/{field.name}"]
    if h5py.check_string_dtype(dataset.dtype) is not None:
        return list(dataset.asstr()[...])
    values: list[Any] = dataset[...].tolist()
    return values
