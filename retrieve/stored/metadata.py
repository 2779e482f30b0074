"""A user's table about videos, as columns of an index: shown beside results, and used to filter.

They lie in `metadata/<key>/` of an index, for the R videos that the table names, sorted by video_id:

video_id                   column of R strings, see `svb.retrieve.stored.segment.StringColumn`
column<i>.npy              (R,) float64 i-th column, if it holds numbers; NaN for a missing one
column<i>                  i-th column, if it holds text: R strings, empty for a missing one
"""

from __future__ import annotations

import datetime
import logging
import math
import operator
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svb.data.text import plain_name
from svb.errors import InputError, StoreError
from svb.retrieve.stored.manifest import part_folder, publish_part
from svb.retrieve.stored.segment import StringColumn, open_array, require_sizes

logger = logging.getLogger(__name__)

Value = float | str | None

# float64 takes different integers for one from here on: such a column holds names, not numbers.
_EXACT = 2.0**53
# The column that makes a table one of captions.
CAPTION = "caption"
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
# The longer ones first, or `<=` would be `<` and a value.
_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "!=": operator.ne,
    "<=": operator.le,
    ">=": operator.ge,
    "=": operator.eq,
    "<": operator.lt,
    ">": operator.gt,
}
OPERATORS = (*_COMPARE, "~")


class Metadata:
    """The metadata of an index's videos. Threads may share it.

    Attributes:
        columns: `number` or `text` by name, for what each holds.
    """

    def __init__(self, columns: Mapping[str, str], video_ids: StringColumn, values: Sequence[Any]) -> None:
        self.columns = dict(columns)
        self._video_ids = video_ids
        self._values = dict(zip(columns, values, strict=True))
        self._last: tuple[Sequence[str], NDArray[np.int64]] | None = None

    @classmethod
    def open(cls, folder: Path, manifest: Mapping[str, Any]) -> Metadata:
        """Map an index's metadata; without columns where it has none.

        Raises:
            StoreError: A file is missing, or is not what was written as far as its size and header tell.
        """
        if not manifest["metadata"]:
            return cls({}, StringColumn.of([]), [])
        entry = manifest["metadata"][0]
        path = part_folder(folder, "metadata", entry)
        try:
            require_sizes(path, entry["sizes"])
            video_ids = StringColumn.open(path, "video_id")
            values = [
                StringColumn.open(path, f"column{number}")
                if kind == "text"
                else open_array(path / f"column{number}.npy")
                for number, kind in enumerate(entry["columns"].values())
            ]
            if {len(column) for column in values} != {len(video_ids)}:
                raise ValueError(
                    f"columns of {sorted({len(column) for column in values})} rows, not {len(video_ids)}"
                )
        except (OSError, ValueError, EOFError) as error:
            raise StoreError(
                f"{path} is damaged ({error}) - restore it, or give the table again with "
                "`svb index --metadata FILE`"
            ) from error
        return cls(entry["columns"], video_ids, values)

    def of(self, video_id: str) -> dict[str, float | int | str]:
        """Return a video's values by column; columns without one are left out."""
        row = self._row_of.get(plain_name(video_id))
        if row is None:
            return {}
        found = {name: shown(column[row]) for name, column in self._values.items()}
        return {name: value for name, value in found.items() if value is not None}

    def matches(self, where: Sequence[str], video_ids: Sequence[str]) -> NDArray[np.bool_]:
        """Return `(V,)`, whether each video fits all conditions.

        A condition is `column OP value` with one of `OPERATORS`: numbers compare as numbers, texts letter by
        letter, and `~` finds a part of a text, in any case. What is missing fits nothing but `!=`.

        Args:
            where: Conditions.
            video_ids: V of them.

        Raises:
            InputError: A condition names no column or no operator, or compares a column of numbers with a text.
        """
        conditions = [self._parse(condition) for condition in where]
        rows = self._rows_of(video_ids)
        fits = np.ones(len(rows), np.bool_)
        for name, symbol, value in conditions:
            # The last row stands for videos that the table does not name.
            of_rows = np.append(self._fits(name, symbol, value), symbol == "!=")
            fits &= of_rows[rows]
        return fits

    @cached_property
    def _row_of(self) -> dict[str, int]:
        return {plain_name(video_id): row for row, video_id in enumerate(self._video_ids)}

    def _rows_of(self, video_ids: Sequence[str]) -> NDArray[np.int64]:
        """Return each video's row, -1 where there is none; looked up once for the same list."""
        last = self._last
        if last is None or last[0] is not video_ids:
            rows = np.fromiter((self._row_of.get(plain_name(video_id), -1) for video_id in video_ids), np.int64)
            last = self._last = (video_ids, rows)
        return last[1]

    def _parse(self, condition: str) -> tuple[str, str, str | float]:
        name, symbol, value = self._split(condition)
        if self.columns[name] == "text":
            return name, symbol, value
        if symbol == "~":
            raise InputError(f"{condition!r}: {name} holds numbers, and ~ searches text - use = != < <= > or >=")
        if not NUMBER.fullmatch(value):
            raise InputError(f"{condition!r}: {name} holds numbers - expected one, as in {name}>=10, got {value!r}")
        return name, symbol, float(value)

    def _split(self, condition: str) -> tuple[str, str, str]:
        """Return column, operator and value; a column's own name may hold an operator."""
        condition = condition.strip()
        for name in sorted(self.columns, key=len, reverse=True):
            if condition.startswith(name):
                rest = condition[len(name) :].lstrip()
                symbol = next((symbol for symbol in OPERATORS if rest.startswith(symbol)), None)
                if symbol is not None:
                    return name, symbol, rest[len(symbol) :].strip()
        named = re.split(r"[!<>=~]", condition)[0].strip()
        if not self.columns:
            raise InputError(
                f"{condition!r}: the index has no metadata - give it a table with `svb index --metadata FILE`"
            )
        if named in self.columns:
            raise InputError(f"{condition!r} has no operator - expected one of {' '.join(OPERATORS)} after {named}")
        raise InputError(f"{condition!r}: no column {named!r} - expected one of {', '.join(self.columns)}")

    def _fits(self, name: str, symbol: str, value: str | float) -> NDArray[np.bool_]:
        """Return `(R,)`, whether each row of the table fits a condition."""
        column = self._values[name]
        if not isinstance(column, StringColumn):
            with np.errstate(invalid="ignore"):
                fits: NDArray[np.bool_] = _COMPARE[symbol](
                    column, value
                )  # NaN differs from all, and is else no match
            return fits
        texts = column.tolist()
        if symbol == "~":
            part = str(value).casefold()
            return np.fromiter((part in text.casefold() and text != "" for text in texts), np.bool_, len(texts))
        compare = _COMPARE[symbol]
        missing = symbol == "!="
        return np.fromiter((compare(text, value) if text else missing for text in texts), np.bool_, len(texts))


def shown(value: Any) -> float | int | str | None:
    """Return a stored value as it is shown: 3 rather than 3.0, and None where it is missing."""
    if isinstance(value, str):
        return value or None
    if math.isnan(value):
        return None
    return int(value) if float(value).is_integer() else float(value)


def publish_metadata(out: Path, table: Path, video_ids: Collection[str]) -> dict[str, Any]:
    """Write a table's values into an index and return its entry for the manifest, under `metadata`.

    A column of which every value is a number holds numbers; any other holds text.

    Args:
        out: The index's folder.
        table: CSV, JSON lines or Parquet with `video_id` and any columns. In a table of captions, which has a
            column `caption` and a row for each, values that all rows of a video share belong to the video.
        video_ids: The video_ids of the index.

    Raises:
        InputError: The table cannot be read, has no other column or no row, or contradicts itself about a video.
    """
    rows = _read(table)
    unknown = sorted({*rows} - {*video_ids})
    if unknown:
        logger.info(
            f"{table}: {len(unknown)} of {len(rows)} videos are not in the index, first {unknown[0]!r}; their "
            "values are kept until they are"
        )
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    if not names:
        raise InputError(f"{table} has no column besides video_id - expected columns to show and to filter by")
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
    from svb.data.tables import TableKind, read_table  # no search reads a table

    kind = TableKind("metadata table", ("video_id",), "video_id and columns of your own")
    rows: dict[str, dict[str, Value]] = {}
    differing: dict[str, str] = {}
    for place, row in read_table(table, kind):
        values = {name: _value(f"{place}, {name}", value) for name, value in row.items()}
        video_id = _as_text(values.pop("video_id"))
        if not video_id:
            raise InputError(f"{place}: video_id is empty - give every row the id of its video")
        first = rows.setdefault(video_id, values)
        for name in (name for name in {**first, **values} if first.get(name) != values.get(name)):
            if CAPTION not in values:
                raise InputError(
                    f"{place}: {video_id!r} appears twice with different values - remove one of the rows"
                )
            differing.setdefault(name, video_id)
    if not rows:
        raise InputError(f"{table} holds no rows - expected rows with video_id and columns of your own")
    for name, video_id in differing.items():
        logger.info(
            f"{table}: {name} differs between the rows of a video, first {video_id!r}; the column is left out"
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
        raise InputError(f"{place} holds {type(value).__name__} - expected a number or text")
    from svb.data.text import is_storable

    if not is_storable(value):
        raise InputError(f"{place} holds a NUL or half a character - remove it")
    return value.strip() or None


def _as_column(values: Sequence[Value]) -> StringColumn | NDArray[np.float64]:
    if all(value is None or _is_number(value) for value in values):
        return np.array([math.nan if value is None else float(value) for value in values])
    return StringColumn.of(_as_text(value) for value in values)


def _is_number(value: float | str) -> bool:
    if isinstance(value, str):
        # Digits after a leading 0 are a name: 007 differs from 7.
        return bool(NUMBER.fullmatch(value) and not re.match(r"[+-]?0\d", value)) and abs(float(value)) < _EXACT
    return math.isfinite(value)


def _as_text(value: Value) -> str:
    return "" if value is None else str(shown(value))
