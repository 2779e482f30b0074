"""A caption table in a format of `svb.data.tables`: `video_id, caption`, optionally `caption_id, split, group`."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from svb.data.tables import TABLE_SUFFIXES, TableKind, read_table, text_of
from svb.data.text import is_storable
from svb.errors import InputError

SPLITS = ("train", "val", "test")
_OTHER_NAMES = {"validation": "val"}
_KIND = TableKind(
    "caption table",
    ("video_id", "caption"),
    "video_id,caption (and optionally caption_id, split, group)",
    "quote captions that hold a comma",
)


@dataclass(frozen=True)
class CaptionTable:
    """C captions as equally long lists.

    Attributes:
        caption_ids: Unique; `<video_id>#<k>` for a video's k-th caption if the table has none.
        video_ids: The video that each caption is about.
        captions: Sentences, none empty.
        splits: `train`, `val` or `test`; all `train` if the table has no split.
        has_split: Whether the table named splits itself.
        groups: The group of each caption's video, empty texts where the table gives none; videos of one group mean
            the same. An empty list if the table has no such column.
    """

    caption_ids: list[str]
    video_ids: list[str]
    captions: list[str]
    splits: list[str]
    has_split: bool
    groups: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.captions)


def read_caption_table(path: Path, *, drop_empty: bool = False) -> CaptionTable:
    """Read a caption table; a list of captions in one row is several captions of its video.

    Args:
        path: A table of any format of `svb.data.tables`.
        drop_empty: Leave out rows with an empty caption rather than refuse the table.

    Raises:
        InputError: The file is missing, not readable in its format or encoding, lacks a column, has no
            rows, or a row has an empty caption, no video_id or an unknown split; names the row.
    """
    if path.is_dir():
        raise InputError(
            f"{path} is a folder - expected a {TABLE_SUFFIXES} file; for the annotation files of a data set add "
            "--dataset"
        )
    rows: list[tuple[str, str, str, str]] = []
    groups: list[str] = []
    empty: list[str] = []
    per_video: Counter[str] = Counter()
    has_split = False
    for place, row in read_table(path, _KIND):
        video_id = text_of(place, "video_id", row.get("video_id"))
        if not video_id:
            raise InputError(f"{place}: video_id is empty - give every caption the id of its video")
        split = _split_of(place, row.get("split"))
        has_split = has_split or bool(split)
        group = text_of(place, "group", row.get("group"))
        given_id = text_of(place, "caption_id", row.get("caption_id"))
        held = row.get("caption")
        for number, sentence in enumerate(held if isinstance(held, list) else [held]):
            caption = text_of(place, "caption", sentence)
            if not caption:
                empty.append(place)
                continue
            caption_id = f"{given_id}#{number}" if given_id and isinstance(held, list) else given_id
            rows.append((caption_id or f"{video_id}#{per_video[video_id]}", video_id, caption, split or "train"))
            groups.append(group)
            per_video[video_id] += 1
    if empty and not drop_empty:
        raise InputError(
            f"{empty[0]}: the caption is empty ({len(empty)} such rows) - fill them in, or leave them out "
            "with --drop-empty"
        )
    if not rows:
        raise InputError(f"{path} holds no captions - expected rows with video_id, caption")
    table = make_caption_table(rows, has_split=has_split, source=str(path))
    if not any(groups):
        return table
    return replace(table, groups=groups)


def _split_of(place: str, value: object) -> str:
    split = text_of(place, "split", value)
    if split not in ("", *SPLITS, *_OTHER_NAMES):
        raise InputError(f"{place}: split is {split!r} - expected one of {', '.join(SPLITS)}")
    return _OTHER_NAMES.get(split, split)


def make_caption_table(rows: Sequence[tuple[str, str, str, str]], *, has_split: bool, source: str) -> CaptionTable:
    """Return the table of rows of caption_id, video_id, caption and split.

    Args:
        rows: At least one; no caption empty.
        has_split: Whether the source named the splits.
        source: Where the rows come from, for messages.

    Raises:
        InputError: A caption_id appears twice, a video is in two splits, or a text cannot be stored.
    """
    columns = [list(column) for column in zip(*rows, strict=True)]
    for caption_id, *texts in rows:
        if not all(is_storable(text) for text in (caption_id, *texts)):
            raise InputError(f"{source}: caption {caption_id!r} holds a NUL or half a character - remove it")
    repeated = [caption_id for caption_id, count in Counter(columns[0]).items() if count > 1]
    if repeated:
        raise InputError(f"{source}: caption_id {repeated[0]!r} appears twice - make every caption_id unique")
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
