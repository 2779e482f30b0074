"""A file in which people say how relevant videos are to captions.

Either a table of any format of `svb.data.tables` with the columns `caption, video_id, relevance`, where `caption`
is the sentence or the caption_id; or the JSON of FIRE (Rodriguez et al., *Fighting FIRe with FIRE*, EACL 2023):

    {"annotations": [{"query": "a man cooks", "video_id": "video9770", "label": "relevant", ...}, ...]}
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svb.config import fingerprint
from svb.data.caption_table import CaptionTable
from svb.data.tables import TABLE_SUFFIXES, TableKind, read_table, text_of
from svb.errors import InputError

logger = logging.getLogger(__name__)

JUDGEMENT_SUFFIXES = tuple(TABLE_SUFFIXES.replace(" or ", ", ").split(", "))
_LABELS = {"relevant": 1.0, "irrelevant": 0.0}
_KIND = TableKind("file of judgements", ("caption", "video_id", "relevance"), "caption,video_id,relevance")


@dataclass(frozen=True)
class Judgements:
    """J judged pairs of the measured captions and videos, each pair once.

    Attributes:
        rows: `(J,)` caption.
        columns: `(J,)` video.
        values: `(J,)` relevance, at least 0.
        description: The file and the number of its pairs.
        fingerprint: Equal for equal judgements.
    """

    rows: NDArray[np.int64]
    columns: NDArray[np.int64]
    values: NDArray[np.float64]
    description: str
    fingerprint: str


def read_judgements(
    path: Path, table: CaptionTable, caption_ids: Sequence[str], video_ids: Sequence[str]
) -> Judgements:
    """Read judgements; those of captions and videos outside the measured split are left out and counted.

    A sentence that several captions share is judged for all of them.

    Args:
        path: The file.
        table: The whole caption table, all splits.
        caption_ids: The measured captions.
        video_ids: The measured videos.

    Raises:
        InputError: The file is missing or damaged, names a caption or video that the table does not hold, gives a
            pair two values, or a value is not a finite number of at least 0; names the row.
    """
    ids_of: dict[str, list[str]] = {}
    for caption_id, caption in zip(table.caption_ids, table.captions, strict=True):
        ids_of.setdefault(caption, []).append(caption_id)
    for caption_id in table.caption_ids:
        ids_of.setdefault(caption_id, [caption_id])
    known_videos = set(table.video_ids)
    row_of = {caption_id: row for row, caption_id in enumerate(caption_ids)}
    column_of = {video_id: column for column, video_id in enumerate(video_ids)}
    given: dict[tuple[str, str], tuple[float, str]] = {}
    values: dict[tuple[int, int], float] = {}
    left_out = 0
    for place, caption, video_id, value in _rows(path):
        if caption not in ids_of:
            raise InputError(
                f"{place}: the caption table has no caption {caption[:80]!r} - expected a sentence or a caption_id "
                "of the table, letter by letter"
            )
        if video_id not in known_videos:
            raise InputError(
                f"{place}: the caption table has no video {video_id!r} - expected one of its video_ids"
            )
        before = given.setdefault((caption, video_id), (value, place))
        if before[0] != value:
            raise InputError(
                f"{place}: caption {caption[:80]!r} and video {video_id!r} have the relevance {value:g}, and "
                f"{before[0]:g} in {before[1]} - keep one of them"
            )
        rows = [row_of[caption_id] for caption_id in ids_of[caption] if caption_id in row_of]
        if not rows or video_id not in column_of:
            left_out += 1
        for row in rows if video_id in column_of else []:
            pair = (row, column_of[video_id])
            if values.setdefault(pair, value) != value:
                raise InputError(
                    f"{place}: caption {caption_ids[row]!r} and video {video_id!r} have the relevance {value:g}, "
                    f"and {values[pair]:g} by another spelling - keep one of them"
                )
    if not values:
        raise InputError(f"{path} judges no pair of the measured split - choose another with --split")
    if left_out:
        logger.warning(f"{path}: {left_out} judgements are of captions or videos outside the measured split")
    pairs = sorted(values)
    held = np.array([values[pair] for pair in pairs])
    rows_columns = np.array(pairs, np.int64)
    named = [[caption_ids[row], video_ids[column], values[row, column]] for row, column in pairs]
    return Judgements(
        rows_columns[:, 0],
        rows_columns[:, 1],
        held,
        f"{len(pairs)} judged pairs of {path.name}; a pair that nobody judged counts 0",
        fingerprint({"judgements": named}),
    )


def _rows(path: Path) -> Iterator[tuple[str, str, str, float]]:
    """Yield the place, caption, video_id and relevance of every judgement."""
    annotations = _annotations(path) if path.suffix.lower() == ".json" and path.is_file() else None
    if annotations is not None:
        for number, annotation in enumerate(annotations, start=1):
            place = f"{path}, annotation {number}"
            if not isinstance(annotation, dict) or {"query", "video_id", "label"} - set(annotation):
                raise InputError(f"{place}: expected an object with query, video_id and label")
            if annotation["label"] not in _LABELS:
                raise InputError(f"{place}: label is {annotation['label']!r} - expected relevant or irrelevant")
            caption, video_id = (text_of(place, name, annotation[name]) for name in ("query", "video_id"))
            yield place, caption, video_id, _LABELS[annotation["label"]]
        return
    for place, row in read_table(path, _KIND):
        caption, video_id = (text_of(place, name, row.get(name)) for name in ("caption", "video_id"))
        yield place, caption, video_id, _number(place, row.get("relevance"))


def _annotations(path: Path) -> list[Any] | None:
    """Return the annotations of a file of FIRE's form; None if it is another JSON file."""
    try:
        held = json.loads(path.read_text("utf-8-sig"))
    except (OSError, ValueError, RecursionError):  # the reader of tables says what is wrong
        return None
    found = held.get("annotations") if isinstance(held, dict) else None
    return found if isinstance(found, list) else None


def _number(place: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and number >= 0) or isinstance(value, bool):
        raise InputError(f"{place}: relevance is {value!r} - expected a finite number of at least 0")
    return number
