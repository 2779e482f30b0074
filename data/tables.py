"""Tables that users give: CSV, JSON lines or Parquet, read row by row with the place of each row for messages."""

from __future__ import annotations

import csv
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svb.errors import InputError

TABLE_SUFFIXES = ".csv, .jsonl, .ndjson or .parquet"
# Where a row stands, and its values by column; what is missing in JSON and Parquet is None or not there.
Row = tuple[str, Mapping[str, Any]]
# What pandas calls an index that has no name.
_UNNAMED_INDEX = re.compile(r"__index_level_\d+__")


@dataclass(frozen=True)
class TableKind:
    """What a table is for, in the words of its messages.

    Attributes:
        name: Such as `caption table`.
        columns: The columns that it must have.
        header: What its header should be.
        ragged: What to do where a row has more or fewer fields than the header.
    """

    name: str
    columns: tuple[str, ...]
    header: str
    ragged: str = "quote values that hold a comma"


def read_table(path: Path, kind: TableKind) -> Iterator[Row]:
    """Read a table; its suffix tells the format.

    Raises:
        InputError: The file is missing, not readable in its format or encoding, lacks a column or has one
            twice, or a row has another number of fields than the header; names the row.
    """
    if not path.is_file():
        raise InputError(
            f"no {kind.name} at {path} - expected a {TABLE_SUFFIXES} file with {', '.join(kind.columns)}"
        )
    suffix = path.suffix.lower()
    if suffix == ".csv":
        return _csv_rows(path, kind)
    if suffix in {".jsonl", ".ndjson"}:
        return _json_rows(path, kind)
    if suffix == ".parquet":
        return _parquet_rows(path, kind)
    raise InputError(f"{path}: cannot tell the format from {suffix!r} - expected {TABLE_SUFFIXES}")


def text_of(value: Any) -> str:
    """Return a value of a row as text; empty where it is missing, for which Parquet knows None and NaN."""
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else str(value)


def is_storable(text: str) -> bool:
    """Tell whether HDF5 can hold a text: JSON can spell NUL and half of a surrogate pair."""
    return "\0" not in text and (text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text))


def encoding_error(path: Path) -> InputError:
    """Return the error that says where a file stops being UTF-8."""
    # A file is decoded block by block, and the error it raised counts from its block.
    data = path.read_bytes()
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        return InputError(f"{path}, line {line}: byte {data[error.start]:#04x} is not UTF-8 - save it as UTF-8")
    return InputError(f"{path} changed while it was read - run the same command again")


def _csv_rows(path: Path, kind: TableKind) -> Iterator[Row]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            header = reader.fieldnames or []
            _require_columns(path, kind, header)
            for row in reader:
                place = f"{path}, line {reader.line_num}"
                if None in row or None in row.values():
                    found = sum(value is not None for value in row.values()) + len(row.get(None) or [None]) - 1
                    raise InputError(f"{place}: {found} fields where the header has {len(header)} - {kind.ragged}")
                yield place, row
    except UnicodeDecodeError as error:
        raise encoding_error(path) from error
    except (OSError, csv.Error) as error:
        raise InputError(f"{path} is not readable as CSV ({error}) - save it as comma-separated UTF-8") from error


def _json_rows(path: Path, kind: TableKind) -> Iterator[Row]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                place = f"{path}, line {number}"
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise InputError(f"{place}: not JSON ({error}) - write one object a line") from error
                if not isinstance(row, dict):
                    raise InputError(f"{place}: not a JSON object - write one object a line")
                _require_columns(path, kind, row)
                yield place, row
    except UnicodeDecodeError as error:
        raise encoding_error(path) from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error}) - make it readable") from error


def _parquet_rows(path: Path, kind: TableKind) -> Iterator[Row]:
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            names = [name for name in file.schema_arrow.names if not _UNNAMED_INDEX.fullmatch(name)]
            _require_columns(path, kind, names)
            for batch in file.iter_batches(columns=names):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not readable as Parquet ({error}) - write it again") from error


def _require_columns(path: Path, kind: TableKind, found: Iterable[str]) -> None:
    names = list(found)
    missing = [name for name in kind.columns if name not in names]
    if missing:
        raise InputError(
            f"{path}: no column {' and no column '.join(missing)}, only {', '.join(names) or 'nothing'} - "
            f"expected the header {kind.header}"
        )
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise InputError(f"{path}: column {repeated[0]!r} stands twice - leave one of them out")
