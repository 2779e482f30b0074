"""Everything that an index knows about its videos and moments besides their vectors, and filters that use it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from svb.data.text import plain_name, spelled_as
from svb.errors import UsageError
from svb.retrieve.answer import SearchRequest
from svb.retrieve.stored.metadata import Metadata
from svb.retrieve.stored.segment import Segment

# Rows that show how a query's scores are distributed: enough for the tail, and read in a few milliseconds.
SAMPLE_ROWS = 8192


class FileState(NamedTuple):
    """The file of a video when it was extracted; 0 and empty if unknown, as after some imports."""

    size_bytes: int
    mtime_ns: int
    content_hash: str


class Catalog:
    """The videos and moments of segments, both numbered across all of them, including deleted videos.

    Nothing is read before it is needed. Threads may share it.

    Args:
        segments: The segments in the order of the manifest; their embeddings are not read.

    Attributes:
        segments: The same.
        num_videos: V, including deleted ones.
        num_moments: M, including those of deleted videos.
        embedding_size: D.
        any_deleted: Whether any video was deleted.
        video_begins: `(S + 1,)`, the first video of each of S segments, and V.
        moment_begins: `(S + 1,)`, the first moment of each, and M.
    """

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.segments = list(segments)
        self.embedding_size = self.segments[0].embedding_size if self.segments else 0
        self.video_begins = _begins([segment.num_videos for segment in segments])
        self.moment_begins = _begins([segment.num_moments for segment in segments])
        self.num_videos, self.num_moments = int(self.video_begins[-1]), int(self.moment_begins[-1])
        self.any_deleted = any(len(segment.deleted) for segment in segments)

    def videos_of(self, moment_rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the video that each moment is of."""
        return np.searchsorted(self._moment_offsets, moment_rows, side="right").astype(np.int64) - 1

    def moment_range(self, video_row: int) -> tuple[int, int]:
        """Return the half-open interval of a video's moments."""
        begin, end = self._moment_offsets[video_row : video_row + 2].tolist()
        return begin, end

    def moment_seconds(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return `(n, 2)`, each moment's half-open interval."""
        found = np.empty((len(rows), 2), np.float64)
        for segment, mine, local in self.in_segments(rows, by="moment"):
            found[mine] = segment.moment_seconds[local]
        return found

    def sample_rows(self, by: str) -> NDArray[np.int64]:
        """Return all live rows, or the same 8,192 random ones each time if there are more."""
        live = np.arange(self.num_moments if by == "moment" else self.num_videos)
        if self.any_deleted:
            live = np.flatnonzero(np.repeat(self.alive, self.moment_counts) if by == "moment" else self.alive)
        if len(live) > SAMPLE_ROWS:  # in the order of the file, for its pages
            live = np.sort(live[np.random.default_rng(0).choice(len(live), SAMPLE_ROWS, replace=False)])
        return live

    def video_id(self, row: int) -> str:
        """Return a video's id."""
        segment, local = self._place(row)
        return segment.video_ids[local]

    def source_path(self, row: int) -> str:
        """Return the path of a video's file when it was extracted."""
        segment, local = self._place(row)
        return segment.source_paths[local]

    def duration_seconds(self, row: int) -> float | None:
        """Return a video's length; None if not known."""
        segment, local = self._place(row)
        duration = float(segment.duration_seconds[local])
        return None if np.isnan(duration) else duration

    def file_state(self, row: int) -> FileState:
        """Return size, time and hash of a video's file."""
        segment, local = self._place(row)
        return FileState(
            int(segment.size_bytes[local]), int(segment.mtime_ns[local]), segment.content_hashes[local]
        )

    def counted(self, allowed: NDArray[np.bool_] | None) -> NDArray[np.bool_]:
        """Return `(V,)`, the live videos that pass a filter; None passes all."""
        return self.alive if allowed is None else self.alive & allowed

    def row_of(self, video_id: str) -> int | None:
        """Return a live video's row, whatever the encoding of its accents; None if there is none."""
        row = self.live_rows.get(video_id)
        if row is None and not video_id.isascii():
            row = self.live_rows.get(spelled_as([video_id], self.live_rows).get(video_id, ""))
        return row

    @cached_property
    def alive(self) -> NDArray[np.bool_]:
        """`(V,)`, False on videos that were deleted: no search finds them."""
        alive = np.ones(self.num_videos, np.bool_)
        for segment, begin in zip(self.segments, self.video_begins[:-1], strict=True):
            alive[begin + segment.deleted] = False
        return alive

    @cached_property
    def moment_counts(self) -> NDArray[np.int64]:
        """`(V,)`, how many moments each video has."""
        return np.diff(self._moment_offsets)

    @cached_property
    def durations(self) -> NDArray[np.float64]:
        """`(V,)` seconds, NaN if not known."""
        return np.concatenate([np.empty(0), *(segment.duration_seconds for segment in self.segments)])

    @cached_property
    def mtime_ns(self) -> NDArray[np.int64]:
        """`(V,)`, when each video's file was last changed."""
        return np.concatenate([np.empty(0, np.int64), *(segment.mtime_ns for segment in self.segments)])

    @cached_property
    def video_ids(self) -> Sequence[str]:
        """V video_ids."""
        return [video_id for segment in self.segments for video_id in segment.video_ids.tolist()]

    @cached_property
    def source_paths(self) -> Sequence[str]:
        """V paths of the videos' files."""
        return [path for segment in self.segments for path in segment.source_paths.tolist()]

    def in_segments(
        self, rows: NDArray[np.int64], *, by: str
    ) -> list[tuple[Segment, NDArray[np.int64] | slice, NDArray[np.int64]]]:
        """Return the segments that hold some rows, with positions in `rows` and local row numbers."""
        if len(self.segments) == 1:
            return [(self.segments[0], slice(None), rows)]
        begins = self.moment_begins if by == "moment" else self.video_begins
        numbers = np.searchsorted(begins, rows, side="right") - 1
        return [
            (self.segments[number], mine := np.flatnonzero(numbers == number), rows[mine] - begins[number])
            for number in np.unique(numbers).tolist()
        ]

    @cached_property
    def live_rows(self) -> dict[str, int]:
        """The row of each live video by its video_id, ascending."""
        return {self.video_ids[row]: row for row in np.flatnonzero(self.alive).tolist()}

    @cached_property
    def _moment_offsets(self) -> NDArray[np.int64]:
        begins = self.moment_begins[:-1]
        ends = [s.moment_offsets[1:] + b for s, b in zip(self.segments, begins, strict=True)]
        return np.concatenate([np.zeros(1, np.int64), *ends])

    def _place(self, row: int) -> tuple[Segment, int]:
        number = int(np.searchsorted(self.video_begins, row, side="right")) - 1
        return self.segments[number], row - int(self.video_begins[number])


def _begins(counts: Sequence[int]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


# --- filters


def allowed_videos(
    catalog: Catalog, request: SearchRequest, metadata: Metadata
) -> tuple[NDArray[np.bool_] | None, str | None]:
    """Return which videos pass a request's filters, and which filter left none.

    Returns:
        `(V,)`, without deleted videos, or None if there is no filter; and a sentence for the user if the filters
        leave no video.

    Raises:
        UsageError: The value of a filter is not valid.
        InputError: A condition names a column that the index does not have.
    """
    allowed = None
    for name, passing in _filters(catalog, request, metadata):
        before = catalog.alive if allowed is None else allowed
        allowed = before & passing
        if before.any() and not allowed.any():
            rest = "videos" if before is catalog.alive else "videos that the others leave"
            return allowed, f"{name} leaves nothing: none of the {np.count_nonzero(before):,} {rest} passes"
    return allowed, None


def _filters(
    catalog: Catalog, request: SearchRequest, metadata: Metadata
) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """Yield each filter of a request, in the user's words, and which videos pass it."""
    if request.folders:
        yield f"the folder {' or '.join(map(repr, request.folders))}", _below(catalog, request.folders)
    if (least := request.min_duration_seconds) is not None:
        yield f"the duration of at least {least:g} s", catalog.durations >= least  # False if unknown
    if (most := request.max_duration_seconds) is not None:
        yield f"the duration of at most {most:g} s", catalog.durations <= most
    if request.after is not None:
        yield f"the date after {request.after}", catalog.mtime_ns >= _nanoseconds("after", request.after)
    if request.before is not None:
        yield f"the date before {request.before}", catalog.mtime_ns < _nanoseconds("before", request.before)
    for condition in request.where:
        yield f"the condition {condition!r}", metadata.matches([condition], catalog.video_ids)


def _below(catalog: Catalog, folders: Sequence[str]) -> NDArray[np.bool_]:
    """Return which videos are in a folder, or are the file it names; `a/bc` is not in `a/b`."""
    for folder in folders:
        if not folder.strip():
            raise UsageError("a folder is empty - name one, or leave the filter out")
    below = tuple(plain_name(_as_prefix(folder)) for folder in folders)
    pairs = zip(catalog.video_ids, catalog.source_paths, strict=True)
    return np.fromiter(
        (
            plain_name(f"{video_id}/").startswith(below) or plain_name(f"{path}/").startswith(below)
            for video_id, path in pairs
        ),
        np.bool_,
        catalog.num_videos,
    )


def _as_prefix(folder: str) -> str:
    parts = [part for part in folder.split("/") if part not in ("", ".")]
    root = "/" if folder.startswith("/") else ""
    return root + "".join(f"{part}/" for part in parts)


def _nanoseconds(name: str, date: str) -> int:
    """Return an ISO date as nanoseconds since 1970; a date without a time zone is local."""
    try:
        return int(datetime.fromisoformat(date).timestamp() * 1e9)
    except (ValueError, OverflowError, OSError) as error:
        raise UsageError(f"{name} is {date!r} - expected a date such as 2026-11-25 or 2026-11-25T18:30") from error
