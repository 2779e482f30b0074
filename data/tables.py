"""Tables that users give, read row by row with the place of each row for messages.

CSV, TSV and Parquet go through pandas. JSON does not: pandas cannot tell which line is damaged, and makes `7.0` of
the video_id 7 where another row has none.
"""

from __future__ import annotations

import contextlib
import csv
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

from svb.data.text import is_storable
from svb.errors import InputError

# The place of a row, and its values by column; a missing value is None, NaN or not there.
Row = tuple[str, Mapping[str, Any]]
# What pandas calls an index that has no name.
_UNNAMED_INDEX = re.compile(r"__index_level_\d+__")
_CHUNK_ROWS = 10_000


@dataclass(frozen=True)
class TableKind:
    """What a kind of table must hold, in the words of its messages.

    Attributes:
        name: Such as `caption table`.
        columns: The columns that it must have.
        header: The header that the table should have.
        ragged: What to do about a row that has more or fewer fields than the header.
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
    read = _READERS.get(path.suffix.lower())
    if read is None:
        raise InputError(f"{path}: cannot tell the format from {path.suffix!r} - expected {TABLE_SUFFIXES}")
    return read(path, kind)


def text_of(place: str, column: str, value: Any) -> str:
    """Return a value as text without outer spaces; empty if it is missing, which Parquet says with None or NaN.

    Raises:
        InputError: It is neither a text nor a number, or HDF5 cannot hold it.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool) or not isinstance(value, (str, int, float, Decimal)):
        raise InputError(f"{place}: {column} holds a {type(value).__name__} - expected a text or a number")
    text = str(value)
    if not is_storable(text):
        raise InputError(f"{place}: {column} holds a NUL or half a character - remove it")
    return text.strip()


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


def _delimited_rows(path: Path, kind: TableKind, delimiter: str) -> Iterator[Row]:
    import pandas as pd

    header: list[str] = []
    try:
        for line, fields in _delimited_fields(path, delimiter):
            if not header:
                header = fields
                _require_columns(path, kind, header)
            elif fields:
                place = f"{path}, line {line}"
                _require_fields(place, kind, fields, header)
                yield place, dict(zip(header, fields, strict=True))
    except pd.errors.EmptyDataError:
        _require_columns(path, kind, header)
    except (pd.errors.ParserError, csv.Error) as error:
        raise _refused(path, kind, delimiter, error) from error


def _delimited_fields(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield every row, the header and blank ones too, with the line on which it begins."""
    import pandas as pd

    line = 1
    # The C engine pads short rows, and takes the rest of a file into a quote that is never closed.
    options: dict[str, Any] = {"engine": "python", "header": None, "dtype": object, "keep_default_na": False}
    options |= {"encoding": "utf-8-sig", "skip_blank_lines": False, "chunksize": _CHUNK_ROWS}
    with _reading(path), pd.read_csv(path, sep=delimiter, **options) as chunks:
        for chunk in chunks:
            for padded in chunk.itertuples(index=False, name=None):
                fields = [field for field in padded if isinstance(field, str)]
                yield line, fields
                line += 1 + sum(field.count("\n") for field in fields)


def _refused(path: Path, kind: TableKind, delimiter: str, error: Exception) -> InputError:
    """Return the error for the row that pandas refused; pandas does not tell on which line it begins."""
    line, header = 1, list[str]()
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            for fields in reader:
                header = header or fields
                if not header:
                    return InputError(f"{path}: line 1 is blank - expected the header {kind.header}")
                if fields:
                    _require_fields(f"{path}, line {line}", kind, fields, header)
                line = reader.line_num + 1
        except InputError as ragged:
            return ragged
        except csv.Error as unreadable:
            error = unreadable
    return InputError(
        f"{path}, line {line}: not readable ({error}) - close every quote, write a quote inside a quoted value "
        "twice, and save the table as UTF-8"
    )


def _require_fields(place: str, kind: TableKind, fields: list[str], header: list[str]) -> None:
    if len(fields) != len(header):
        raise InputError(f"{place}: {len(fields)} fields where the header has {len(header)} - {kind.ragged}")


def _json_line_rows(path: Path, kind: TableKind) -> Iterator[Row]:
    with _reading(path), path.open(encoding="utf-8-sig") as file:
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


def _json_array_rows(path: Path, kind: TableKind) -> Iterator[Row]:
    with _reading(path):
        text = path.read_text("utf-8-sig")
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error}) - write an array of objects") from error
    if not isinstance(rows, list):
        raise InputError(f"{path}: not an array - write an array of objects, or one object a line as .jsonl")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise InputError(f"{path}, row {number}: not a JSON object - write an array of objects")
        _require_columns(path, kind, row)
        yield f"{path}, row {number}", row


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise encoding_error(path) from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}) - make it readable") from error


def _parquet_rows(path: Path, kind: TableKind) -> Iterator[Row]:
    import pandas as pd

    try:
        # Arrow's own types keep whole numbers whole beside a missing one.
        table = pd.read_parquet(path, dtype_backend="pyarrow")
        table = table.reset_index([name for name in table.index.names if name is not None])
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not readable as Parquet ({error}) - write it again") from error
    names = [name for name in table.columns if not _UNNAMED_INDEX.fullmatch(name)]
    _require_columns(path, kind, names)
    for begin in range(0, len(table), _CHUNK_ROWS):
        columns = [table[name].iloc[begin : begin + _CHUNK_ROWS].tolist() for name in names]
        for number, values in enumerate(zip(*columns, strict=True), start=begin + 1):
            yield (
                f"{path}, row {number}",
                {n: None if v is pd.NA else v for n, v in zip(names, values, strict=True)},
            )


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
        raise InputError(f"{path}: column {repeated[0]!r} appears twice - leave one of them out")


_READERS: dict[str, Callable[[Path, TableKind], Iterator[Row]]] = {
    ".csv": partial(_delimited_rows, delimiter=","),
    ".tsv": partial(_delimited_rows, delimiter="\t"),
    ".jsonl": _json_line_rows,
    ".ndjson": _json_line_rows,
    ".json": _json_array_rows,
    ".parquet": _parquet_rows,
}
TABLE_SUFFIXES = f"{', '.join(list(_READERS)[:-1])} or {list(_READERS)[-1]}"
