"""Reads a times table: CSV, TSV, JSON or Parquet with `video_id, time_seconds`, one row for each wanted frame."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from svb.data.caption_table import hash_lines
from svb.data.tables import TableKind, read_table, text_of
from svb.errors import InputError

_KIND = TableKind(
    "times table",
    ("video_id", "time_seconds"),
    "video_id,time_seconds",
    "write decimals with a point",
)


@dataclass(frozen=True)
class TimesTable:
    """The times at which frames are wanted, on each file's own clock.

    Attributes:
        times_seconds: Ascending unique times by video_id.
        content_hash: A hash of the times; neither the order of rows nor the file's format changes it.
    """

    times_seconds: dict[str, tuple[float, ...]]
    content_hash: str


def read_times(path: Path) -> TimesTable:
    """Read a times table.

    The suffix of the file tells its format.

    Raises:
        InputError: The file is missing, not readable in its format or encoding, lacks a column, or has no
            rows; or a row has no video_id or no time of 0 or more. The error names the row.
    """
    times: defaultdict[str, set[float]] = defaultdict(set)
    for place, row in read_table(path, _KIND):
        video_id = text_of(place, "video_id", row["video_id"])
        if not video_id:
            raise InputError(f"{place}: video_id is empty - give every time the id of its video")
        times[video_id].add(_seconds(place, row["time_seconds"]))
    if not times:
        raise InputError(f"{path} holds no times - expected rows with video_id,time_seconds")
    ordered = {video_id: tuple(sorted(times[video_id])) for video_id in sorted(times)}
    lines = (f"{video_id}\t{seconds!r}" for video_id, wanted in ordered.items() for seconds in wanted)
    return TimesTable(ordered, hash_lines(lines))


def _seconds(place: str, value: object) -> float:
    text = text_of(place, "time_seconds", value)
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds >= 0):
        raise InputError(f"{place}: time_seconds is {text!r} - expected a number of seconds, 0 or more")
    return seconds + 0.0  # no negative zero: it would hash as another time
