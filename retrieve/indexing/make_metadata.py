"""`svb index --metadata FILE`: a table of a user's own -> columns of an index, see `stored.metadata`."""

from __future__ import annotations

import datetime
import logging
import math
import re
from collections.abc import Collection, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svb.data.tables import TableKind, read_table
from svb.data.text import is_storable
from svb.errors import InputError
from svb.retrieve.stored.columns import StringColumn
from svb.retrieve.stored.manifest import publish_part
from svb.retrieve.stored.metadata import NUMBER, shown

logger = logging.getLogger(__name__)

Value = float | str | None

_KIND = TableKind("metadata table", ("video_id",), "video_id and columns of your own")
# From it on float64 takes different integers for one: such a column holds names, not numbers.
_EXACT = 2.0**53
# The column that makes a table one of captions.
CAPTION = "caption"


def publish_metadata(out: Path, table: Path, video_ids: Collection[str]) -> dict[str, Any]:
    """Write a table's values into an index and return its entry for the manifest, under `metadata`.

    A column whose every value is a number is one of numbers; any other is text.

    Args:
        out: The index's folder.
        table: CSV, JSON lines or Parquet with `video_id` and any columns. In a table of captions, which has a
            column `caption` and a row for each, what is the same in all of a video's rows is said of the video.
        video_ids: Of the index.

    Raises:
        InputError: The table cannot be read, has no other column or no row, or says two things of one video.
    """
    rows = _read(table)
    unknown = sorted({*rows} - {*video_ids})
    if unknown:
        logger.info(
            f"{table}: {len(unknown)} of {len(rows)} videos are not in the index, first {unknown[0]!r}; what "
            "is said of them is kept for when they are"
        )
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    if not names:
        raise InputError(f"{table} says nothing of its videos - expected columns beside video_id")
    held = [rows[video_id] for video_id in sorted(rows)]
    columns = {name: _as_column([row.get(name) for row in held]) for name in names}
    kinds = {name: "text" if isinstance(column, StringColumn) else "number" for name, column in columns.items()}

    def write(folder: Path) -> None:
        StringColumn.of(sorted(rows)).write(folder, "video_id")
        for number, column in enumerate(columns.values()):
            if isinstance(column, StringColumn):
                column.write(folder, f"column{number}")
            else:
                np.save(folder / f"column{number}.npy", column)

    return {**publish_part(out, "metadata", write), "columns": kinds}


def _read(table: Path) -> dict[str, dict[str, Value]]:
    """Return the values of every video, by video_id."""
    rows: dict[str, dict[str, Value]] = {}
    differing: dict[str, str] = {}
    for place, row in read_table(table, _KIND):
        values = {name: _value(f"{place}, {name}", value) for name, value in row.items()}
        video_id = _as_text(values.pop("video_id"))
        if not video_id:
            raise InputError(f"{place}: video_id is empty - give every row the id of its video")
        first = rows.setdefault(video_id, values)
        for name in (name for name in {**first, **values} if first.get(name) != values.get(name)):
            if CAPTION not in values:
                raise InputError(
                    f"{place}: {video_id!r} stands twice with other values - leave one of the rows out"
                )
            differing.setdefault(name, video_id)
    if not rows:
        raise InputError(f"{table} holds no rows - expected rows with video_id and columns of your own")
    for name, video_id in differing.items():
        logger.info(
            f"{table}: {name} is not the same in all rows of a video, first of {video_id!r}; it is left out"
        )
    return {
        video_id: {name: value for name, value in values.items() if name not in differing}
        for video_id, values in rows.items()
    }


def _value(place: str, value: Any) -> Value:
    """Return a table's value as a number, text, or None where it is missing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float, Decimal)):
        return float(value) if abs(float(value)) < _EXACT else str(value)
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if not isinstance(value, str):
        raise InputError(f"{place} holds {type(value).__name__} - expected numbers and texts")
    if not is_storable(value):
        raise InputError(f"{place} holds a NUL or half a character - remove it")
    return value.strip() or None


def _as_column(values: Sequence[Value]) -> StringColumn | NDArray[np.float64]:
    if all(value is None or _is_number(value) for value in values):
        return np.array([math.nan if value is None else float(value) for value in values])
    return StringColumn.of(_as_text(value) for value in values)


def _is_number(value: float | str) -> bool:
    if isinstance(value, str):
        # What begins with 0 as no number does is a name, of which 007 is another than 7.
        return bool(NUMBER.fullmatch(value) and not re.match(r"[+-]?0\d", value)) and abs(float(value)) < _EXACT
    return math.isfinite(value)


def _as_text(value: Value) -> str:
    return "" if value is None else str(shown(value))
