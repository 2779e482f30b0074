"""A caption table: CSV, JSON lines or Parquet with `video_id, caption` and optionally `caption_id, split`."""

from __future__ import annotations

import csv
import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svb.errors import InputError

SPLITS = ("train", "val", "test")
_READERS = ".csv, .jsonl, .ndjson or .parquet"


@dataclass(frozen=True)
class CaptionTable:
    """C captions as equally long lists.

    Attributes:
        caption_ids: Unique; `<video_id>#<k>` for a video's k-th caption where the table names none.
        video_ids: The video that each caption is about.
        captions: Sentences, none empty.
        splits: `train`, `val` or `test`; all `train` where the table has no split.
        has_split: Whether the table named splits itself.
    """

    caption_ids: list[str]
    video_ids: list[str]
    captions: list[str]
    splits: list[str]
    has_split: bool

    def __len__(self) -> int:
        return len(self.captions)


def read_caption_table(path: Path, *, drop_empty: bool = False) -> CaptionTable:
    """Read a caption table.

    Args:
        path: The file; its suffix tells the format.
        drop_empty: Leave out rows whose caption is empty rather than refuse the table.

    Raises:
        InputError: The file is missing, not readable in its format or encoding, lacks a column, has no
            rows, or a row has an empty caption, no video_id or an unknown split; names the row.
    """
    if path.is_dir():
        raise InputError(
            f"{path} is a folder - expected a {_READERS} file; for the annotation files of a data set add --dataset"
        )
    if not path.is_file():
        raise InputError(f"no caption table at {path} - expected a {_READERS} file with video_id, caption")
    rows = _rows(path)
    captions: list[tuple[str, str, str, str]] = []
    empty: list[str] = []
    per_video: Counter[str] = Counter()
    has_split = False
    for place, row in rows:
        video_id, caption = _text(row.get("video_id")), _text(row.get("caption")).strip()
        if not video_id:
            raise InputError(f"{place}: video_id is empty - give every caption the id of its video")
        for column, value in row.items():
            if not is_storable(_text(value)):
                raise InputError(f"{place}: {column} holds a NUL or half a character - remove it")
        if not caption:
            empty.append(place)
            continue
        has_split = has_split or bool(_text(row.get("split")))
        split = _text(row.get("split")) or "train"
        if split not in SPLITS:
            raise InputError(f"{place}: split is {split!r} - expected one of {', '.join(SPLITS)}")
        caption_id = _text(row.get("caption_id")) or f"{video_id}#{per_video[video_id]}"
        per_video[video_id] += 1
        captions.append((caption_id, video_id, caption, split))
    if empty and not drop_empty:
        raise InputError(
            f"{empty[0]}: the caption is empty ({len(empty)} such rows) - fill them in, or leave them out "
            "with --drop-empty"
        )
    if not captions:
        raise InputError(f"{path} holds no captions - expected rows with video_id, caption")
    return make_caption_table(captions, has_split=has_split, source=str(path))


def make_caption_table(rows: Sequence[tuple[str, str, str, str]], *, has_split: bool, source: str) -> CaptionTable:
    """Return the table of rows of caption_id, video_id, caption and split.

    Args:
        rows: At least one; no caption empty.
        has_split: Whether the splits were named rather than taken for train.
        source: What the rows were read from, for messages.

    Raises:
        InputError: A caption_id stands twice, a video is in two splits, or a text cannot be stored.
    """
    columns = [list(column) for column in zip(*rows, strict=True)]
    for caption_id, *texts in rows:
        if not all(is_storable(text) for text in (caption_id, *texts)):
            raise InputError(f"{source}: caption {caption_id!r} holds a NUL or half a character - remove it")
    repeated = [caption_id for caption_id, count in Counter(columns[0]).items() if count > 1]
    if repeated:
        raise InputError(f"{source}: caption_id {repeated[0]!r} stands twice - make every caption_id unique")
    _require_one_split_a_video(source, columns[1], columns[3])
    return CaptionTable(columns[0], columns[1], columns[2], columns[3], has_split)


def hash_lines(lines: Iterable[str]) -> str:
    """Return a hash that tells two sets of lines apart, whatever their order.

    It is what `LC_ALL=C sort FILE | sha256sum | cut -c1-16` prints.
    """
    return hashlib.sha256("".join(f"{line}\n" for line in sorted(lines)).encode()).hexdigest()[:16]


def split_contents(table: CaptionTable) -> dict[str, dict[str, Any]]:
    """Return how much each split holds, and `hash_lines` of its video_ids and of `video_id TAB caption`."""
    contents: dict[str, dict[str, Any]] = {}
    for split in SPLITS:
        pairs = [
            (video_id, caption)
            for video_id, caption, held in zip(table.video_ids, table.captions, table.splits, strict=True)
            if held == split
        ]
        if pairs:
            video_ids = {video_id for video_id, _ in pairs}
            contents[split] = {
                "videos": len(video_ids),
                "captions": len(pairs),
                "video_ids_hash": hash_lines(video_ids),
                "captions_hash": hash_lines(f"{video_id}\t{caption}" for video_id, caption in pairs),
            }
    return contents


def _require_one_split_a_video(source: str, video_ids: list[str], splits: list[str]) -> None:
    split_of: dict[str, str] = {}
    for video_id, split in zip(video_ids, splits, strict=True):
        if split_of.setdefault(video_id, split) != split:
            raise InputError(
                f"{source}: video {video_id!r} is in {split_of[video_id]} and in {split} - put all captions of "
                "a video into one split, or training would see what it is tested on"
            )


def _rows(path: Path) -> Iterable[tuple[str, Mapping[str, Any]]]:
    suffix = path.suffix.lower()
    if suffix == ".csv":
        return _csv_rows(path)
    if suffix in {".jsonl", ".ndjson"}:
        return _json_rows(path)
    if suffix == ".parquet":
        return _parquet_rows(path)
    raise InputError(f"{path}: cannot tell the format from {suffix!r} - expected {_READERS}")


def _csv_rows(path: Path) -> Iterable[tuple[str, Mapping[str, Any]]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            _require_columns(path, reader.fieldnames or [])
            for row in reader:
                place = f"{path}, line {reader.line_num}"
                if None in row or None in row.values():
                    raise InputError(
                        f"{place}: {len([v for v in row.values() if v is not None])} fields where the header "
                        f"has {len(reader.fieldnames or [])} - quote captions that hold a comma"
                    )
                yield place, row
    except UnicodeDecodeError as error:
        raise _encoding_error(path) from error
    except csv.Error as error:
        raise InputError(f"{path} is not readable as CSV ({error}) - save it as comma-separated UTF-8") from error


def _json_rows(path: Path) -> Iterable[tuple[str, Mapping[str, Any]]]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                place = f"{path}, line {number}"
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise InputError(f"{place}: not JSON ({error}) - write one object a line") from error
                if not isinstance(row, dict):
                    raise InputError(f"{place}: not a JSON object - write one object a line")
                _require_columns(path, row)
                yield place, row
    except UnicodeDecodeError as error:
        raise _encoding_error(path) from error


def _parquet_rows(path: Path) -> Iterable[tuple[str, Mapping[str, Any]]]:
    import pandas as pd

    try:
        frame = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not readable as Parquet ({error}) - write it again") from error
    _require_columns(path, frame.columns)
    for number, row in enumerate(frame.to_dict("records"), start=1):
        yield f"{path}, row {number}", {str(key): value for key, value in row.items()}


def _require_columns(path: Path, found: Iterable[str]) -> None:
    names = [str(name) for name in found]
    missing = [name for name in ("video_id", "caption") if name not in names]
    if missing:
        raise InputError(
            f"{path}: no column {' and no column '.join(missing)}, only {', '.join(names) or 'nothing'} - "
            "expected the header video_id,caption (and optionally caption_id, split)"
        )


def _encoding_error(path: Path) -> InputError:
    # A file is decoded block by block, and the error it raised counts from its block.
    data = path.read_bytes()
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        return InputError(f"{path}, line {line}: byte {data[error.start]:#04x} is not UTF-8 - save it as UTF-8")
    return InputError(f"{path} changed while it was read - run the same command again")


def is_storable(text: str) -> bool:
    """Tell whether HDF5 can hold a text: JSON can spell NUL and half of a surrogate pair."""
    return "\0" not in text and (text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text))


def _text(value: Any) -> str:
    # pandas writes a missing string as None or NaN.
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else str(value)
