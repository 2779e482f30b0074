"""Similarities of another system as a .npy file, with the captions and videos that they belong to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from svb.data.caption_features import read_caption_features
from svb.data.caption_table import CaptionTable, read_caption_table
from svb.data.shard import hash_array
from svb.errors import InputError
from svb.train.retrieval_metrics import require_finite_similarities

ALL = "all"


@dataclass(frozen=True)
class GivenSimilarities:
    """A matrix with the meaning of its rows and columns, in the order of svb's own evaluations.

    Attributes:
        similarity: `(C, V)`, finite.
        content_hash: A hash of the matrix.
        split: The measured split; `all` if the table names none.
        table: The whole caption table.
        captions: C sentences.
        caption_ids: C ids.
        video_ids: V ids.
        caption_video: `(C,)` column of each caption's own video.
    """

    similarity: NDArray[np.floating]
    content_hash: str
    split: str
    table: CaptionTable
    captions: list[str]
    caption_ids: list[str]
    video_ids: list[str]
    caption_video: NDArray[np.int64]


def read_similarities(path: Path, captions: Path, split: str, videos: Path | None) -> GivenSimilarities:
    """Read a matrix and its captions; see `svb.retrieve.evaluate.evaluate_similarities`.

    Raises:
        InputError: The matrix has another shape or a value that is not finite, the split is empty, or the columns
            are not the split's videos.
    """
    table = _read_captions(captions)
    rows = [row for row, of in enumerate(table.splits) if of == split or not table.has_split]
    if not rows:
        raise InputError(
            f"{captions} has no {split} split - expected one of {', '.join(sorted(set(table.splits)))}: choose it "
            "with --split"
        )
    of_captions = [table.video_ids[row] for row in rows]
    video_ids = list(dict.fromkeys(of_captions))
    if videos is not None:
        video_ids = _read_columns(videos, video_ids)
    similarity, content_hash = _read_matrix(path, len(rows), len(video_ids))
    require_finite_similarities(similarity, [table.caption_ids[row] for row in rows], video_ids)
    # This is the order of svb's own evaluations, so that `svb compare` can pair the two.
    columns = sorted(range(len(video_ids)), key=lambda column: video_ids[column])
    order = sorted(range(len(rows)), key=lambda place: of_captions[place])
    rows, video_ids = [rows[place] for place in order], [video_ids[column] for column in columns]
    column_of = {video_id: column for column, video_id in enumerate(video_ids)}
    return GivenSimilarities(
        similarity[np.ix_(order, columns)],
        content_hash,
        split if table.has_split else ALL,
        table,
        [table.captions[row] for row in rows],
        [table.caption_ids[row] for row in rows],
        video_ids,
        np.array([column_of[table.video_ids[row]] for row in rows]),
    )


def _read_captions(path: Path) -> CaptionTable:
    return (
        read_caption_features(path).table if path.suffix.lower() in (".h5", ".hdf5") else read_caption_table(path)
    )


def _read_columns(path: Path, of_split: Sequence[str]) -> list[str]:
    if not path.is_file():
        raise InputError(f"no file of video_ids at {path} - expected one video_id a line, in the columns' order")
    try:
        named = path.read_text("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}) - expected one video_id a line, as UTF-8") from error
    video_ids = [line.strip() for line in named if line.strip()]
    repeated = next((video_id for video_id, count in Counter(video_ids).items() if count > 1), None)
    if repeated is not None:
        raise InputError(f"{path}: video_id {repeated!r} appears twice - expected each video once")
    differing = set(video_ids) ^ set(of_split)
    if differing:
        first = min(differing)
        what = "is not a video of the measured captions" if first in video_ids else "is missing"
        raise InputError(f"{path}: video {first!r} {what} - expected the {len(of_split)} videos of the captions")
    return video_ids


def _read_matrix(path: Path, num_captions: int, num_videos: int) -> tuple[NDArray[np.floating], str]:
    """Return `(C, V)` similarities and a hash of the file."""
    expected = f"expected a .npy file of ({num_captions} captions, {num_videos} videos)"
    if not path.is_file():
        raise InputError(f"no similarities at {path} - {expected}")
    try:
        similarity = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise InputError(f"{path} is not readable as .npy ({error}) - {expected}") from error
    if not isinstance(similarity, np.ndarray) or similarity.dtype.kind not in "fiu":
        raise InputError(f"{path} holds no single array of real numbers - {expected}")
    if similarity.shape != (num_captions, num_videos):
        hint = "; it is transposed: save its .T" if similarity.shape == (num_videos, num_captions) else ""
        raise InputError(
            f"{path} has the shape {similarity.shape} - {expected}, rows and columns in the order of the captions"
            f"{hint}"
        )
    if similarity.dtype.kind != "f":
        similarity = similarity.astype(np.float64)
    return similarity, hash_array(similarity)[:16]
