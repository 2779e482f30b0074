"""A times table: CSV or Parquet with `video_id, time_seconds`, one row for every frame wanted of a video."""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from svb.data.caption_table import hash_lines
from svb.errors import InputError

_COLUMNS = ("video_id", "time_seconds")


@dataclass(frozen=True)
class TimesTable:
    """The times at which frames are wanted, on each file's own clock.

    Attributes:
        times_seconds: By video_id: ascending, none twice.
        content_hash: The same for the same times, whatever the order of rows or the format of the file.
    """

    times_seconds: dict[str, tuple[float, ...]]
    content_hash: str


def read_times(path: Path) -> TimesTable:
    """Read a times table.

    Args:
        path: A .csv or .parquet file.

    Raises:
        InputError: The file is missing, not readable in its format or encoding, lacks a column, has no
            rows, or a row has no video_id or no time from 0 on; names the row.
    """
    if not path.is_file():
        raise InputError(f"no times table at {path} - expected a .csv or .parquet file with video_id,time_seconds")
    times: defaultdict[str, set[float]] = defaultdict(set)
    for place, row in _rows(path):
        video_id = _text(row["video_id"])
        if not video_id:
            raise InputError(f"{place}: video_id is empty - give every time the id of its video")
        times[video_id].add(_seconds(place, row["time_seconds"]))
    if not times:
        raise InputError(f"{path} holds no times - expected rows with video_id,time_seconds")
    ordered = {video_id: tuple(sorted(times[video_id])) for video_id in sorted(times)}
    lines = (f"{video_id}\t{seconds!r}" for video_id, wanted in ordered.items() for seconds in wanted)
    return TimesTable(ordered, hash_lines(lines))


def _seconds(place: str, value: object) -> float:
    try:
        seconds = float(_text(value))
    except ValueError:
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds >= 0):
        raise InputError(f"{place}: time_seconds is {_text(value)!r} - expected a number of seconds from 0 on")
    return seconds + 0.0  # no negative zero: it would hash as another time


def _rows(path: Path) -> Iterable[tuple[str, Mapping[str, object]]]:
    suffix = path.suffix.lower()
    if suffix == ".csv":
        return _csv_rows(path)
    if suffix == ".parquet":
        return _parquet_rows(path)
    raise InputError(f"{path}: cannot tell the format from {suffix!r} - expected .csv or .parquet")


def _csv_rows(path: Path) -> Iterable[tuple[str, Mapping[str, object]]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            _require_columns(path, reader.fieldnames or [])
            for row in reader:
                place = f"{path}, line {reader.line_num}"
                if None in row:
                    raise InputError(f"{place}: more fields than the header has - write decimals with a point")
                yield place, row
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 - save the table as UTF-8") from error
    except (OSError, csv.Error) as error:
        raise InputError(f"{path} is not readable as CSV ({error}) - save it as comma-separated UTF-8") from error


def _parquet_rows(path: Path) -> Iterable[tuple[str, Mapping[str, object]]]:
    import pandas as pd

    try:
        table = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not readable as Parquet ({error}) - write it again") from error
    _require_columns(path, [str(name) for name in table.columns])
    # pandas has several words for what is missing.
    columns = (table[name].astype(object).where(table[name].notna(), None) for name in _COLUMNS)
    for number, values in enumerate(zip(*columns, strict=True), start=1):
        yield f"{path}, row {number}", dict(zip(_COLUMNS, values, strict=True))


def _require_columns(path: Path, names: Iterable[str]) -> None:
    found = list(names)
    missing = [name for name in _COLUMNS if name not in found]
    if missing:
        raise InputError(
            f"{path}: no column {' and no column '.join(missing)}, only {', '.join(found) or 'nothing'} - "
            "expected the header video_id,time_seconds"
        )


def _text(value: object) -> str:
    return "" if value is None else str(value).strip()
