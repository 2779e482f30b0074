"""Parquet tables of features: a row a feature row, or a row a video."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from numpy.typing import NDArray

from svb.data.importing.source import FEATURES, TIMES, FoundRows, FoundVideo, Source, choose_array, reading
from svb.errors import InputError

# Rows that are decoded at a time, where one is of a feature row and where it is a video.
BATCH_ROWS, BATCH_VIDEOS = 4096, 16


def find_parquet(path: Path, array: str | None) -> Source:
    """Find the videos of a table with `video_id` and a column of lists, and perhaps their times.

    A list of numbers is a feature row, and those of one video must stand next to each other; a list of lists is
    a video.
    """
    with reading(str(path)):
        schema = pq.read_schema(path)
    if "video_id" not in schema.names:
        raise InputError(f"{path}: no column video_id, only {', '.join(schema.names) or 'nothing'} - add it")
    lists = [field.name for field in schema if _is_list(field.type) and field.name not in TIMES]
    if not lists:
        raise InputError(f"{path}: no column of lists of numbers - expected one called {FEATURES}")
    column = choose_array(lists, array, str(path))
    times_column = next((name for name in TIMES if name in schema.names), None)
    if _is_list(schema.field(column).type.value_type):
        return Source(pq.read_metadata(path).num_rows, _videos_of_rows(path, column, times_column))
    return Source(None, _videos_of_feature_rows(path, column, times_column))


def _videos_of_rows(path: Path, column: str, times_column: str | None) -> Iterator[FoundVideo]:
    for number, row in _rows(path, column, times_column, BATCH_VIDEOS):
        place = f"{path}, row {number}"
        with reading(place):
            features = _matrix(row.column(column).flatten())
            times = row.column(times_column).flatten() if times_column else None
            rows = FoundRows(features, _seconds(times, times_column))
        yield _video(path, _video_id(row, place), rows)


def _videos_of_feature_rows(path: Path, column: str, times_column: str | None) -> Iterator[FoundVideo]:
    current, parts = "", list[FoundRows]()
    done: set[str] = set()
    for number, run in _runs(path, column, times_column):
        place = f"{path}, row {number}"
        video_id = _video_id(run, place)
        if parts and video_id != current:
            yield _video(path, current, _joined(parts, f"{path}, video {current!r}"))
            done.add(current)
            parts = []
        if video_id in done:
            raise InputError(
                f"{place}: the rows of video {video_id!r} are not next to each other - sort the table by video_id"
            )
        current = video_id
        with reading(place):
            times = run.column(times_column) if times_column else None
            parts.append(FoundRows(_matrix(run.column(column)), _seconds(times, times_column)))
    if parts:
        yield _video(path, current, _joined(parts, f"{path}, video {current!r}"))


def _rows(path: Path, *columns: Any) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Yield each row with its number, from 1."""
    number = 1
    for batch in _batches(path, *columns):
        for row in range(len(batch)):
            yield number + row, batch.slice(row, 1)
        number += len(batch)


def _runs(path: Path, column: str, times_column: str | None) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Yield neighbouring rows of one video, as far as a batch reaches, with the number of the first."""
    number = 1
    for batch in _batches(path, column, times_column, BATCH_ROWS):
        ids = batch.column("video_id").to_pylist()
        begins = [row for row in range(len(ids)) if row == 0 or ids[row] != ids[row - 1]]
        for begin, end in zip(begins, [*begins[1:], len(ids)], strict=True):
            yield number + begin, batch.slice(begin, end - begin)
        number += len(batch)


def _batches(path: Path, column: str, times_column: str | None, batch_size: int) -> Iterator[pa.RecordBatch]:
    columns = ["video_id", column, *([times_column] if times_column else [])]
    # Neither a whole row group is held, which may be the whole table, nor its pages.
    with reading(str(path)):
        file = pq.ParquetFile(path, pre_buffer=False, buffer_size=2**20)
    with file:
        batches = file.iter_batches(batch_size=batch_size, columns=columns)
        while True:
            with reading(str(path)):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch


def _matrix(lists: pa.Array) -> NDArray[Any]:
    """Return equally long lists as the rows of an array."""
    lengths = pc.unique(pc.list_value_length(lists)).to_pylist()
    if None in lengths:
        raise ValueError("a row has no features")
    if len(lengths) > 1:
        raise ValueError(f"rows of {lengths[0]} and of {lengths[1]} numbers")
    numbers: NDArray[Any] = lists.flatten().to_numpy(zero_copy_only=False)
    return numbers.reshape(len(lists), *lengths) if lengths else np.empty((0, 0), np.float32)


def _seconds(times: pa.Array | None, name: str | None) -> NDArray[np.float64] | None:
    if times is None or name is None:
        return None
    return np.asarray(times.to_numpy(zero_copy_only=False), np.float64) * TIMES[name]


def _joined(parts: list[FoundRows], place: str) -> FoundRows:
    with reading(place):
        times = [part.times_seconds for part in parts if part.times_seconds is not None]
        return FoundRows(
            np.concatenate([part.features for part in parts]), np.concatenate(times) if times else None
        )


def _video_id(rows: pa.RecordBatch, place: str) -> str:
    held = rows.column("video_id")[0].as_py()
    if held is None:
        raise InputError(f"{place}: video_id is missing - give every row the id of its video")
    return str(held)


def _video(path: Path, video_id: str, rows: FoundRows) -> FoundVideo:
    return FoundVideo(video_id, f"{path}, video {video_id!r}", path, False, lambda: rows)


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))
