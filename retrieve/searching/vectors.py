"""What a search asks of an index's vectors, and the answer of its segments: an exact scan of every row."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from svb.retrieve.searching.gpu_scan import GpuScan
from svb.retrieve.searching.scan import Piece, cut_into_pieces, scan
from svb.retrieve.segment import Segment

# Rows that show how scores of a query are spread: enough for its tail, and read in a few milliseconds.
BACKGROUND_ROWS = 8192

Nearest = tuple[NDArray[np.float32], NDArray[np.int64]]


class FileState(NamedTuple):
    """A video's file when it was extracted; where its state is not known, as of some imports, 0 and empty."""

    size_bytes: int
    mtime_ns: int
    content_hash: str


class Vectors(Protocol):
    """An index's videos and moments; both are numbered through, videos that were deleted included.

    Attributes:
        num_videos: V, with deleted ones.
        num_moments: M, likewise.
        embedding_size: D.
        exact: Whether `nearest` compares every row.
        recall: Where it does not, the measured share of the ten nearest that it finds.
        alive: `(V,)`, False on videos that were deleted: `nearest` never finds them.
        moment_counts: `(V,)`, how many moments each video has.
        durations: `(V,)` seconds, NaN where not known.
        mtime_ns: `(V,)`, when each video's file had changed last.
        video_ids: V of them.
        source_paths: Where each video's file lay.
    """

    @property
    def num_videos(self) -> int: ...
    @property
    def num_moments(self) -> int: ...
    @property
    def embedding_size(self) -> int: ...
    @property
    def exact(self) -> bool: ...
    @property
    def recall(self) -> float | None: ...
    @property
    def alive(self) -> NDArray[np.bool_]: ...
    @property
    def moment_counts(self) -> NDArray[np.int64]: ...
    @property
    def durations(self) -> NDArray[np.float64]: ...
    @property
    def mtime_ns(self) -> NDArray[np.int64]: ...
    @property
    def video_ids(self) -> Sequence[str]: ...
    @property
    def source_paths(self) -> Sequence[str]: ...

    def nearest(
        self, embedding: NDArray[np.float32], k: int, *, by: str, allowed: NDArray[np.bool_] | None
    ) -> Nearest:
        """Return the scores and rows of the k nearest, best first; fewer where fewer are there.

        Args:
            embedding: `(D,)`.
            k: How many.
            by: `moment` or `video`: what the rows are.
            allowed: `(V,)`, the videos that count; None for all.
        """
        ...

    def videos_of(self, moment_rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the video that each moment is of."""
        ...

    def moment_range(self, video_row: int) -> tuple[int, int]:
        """Return the half-open interval of a video's moments."""
        ...

    def embeddings(self, rows: NDArray[np.int64], *, by: str) -> NDArray[np.float32]:
        """Return `(n, D)` float32."""
        ...

    def moment_seconds(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return `(n, 2)`, each moment's half-open interval."""
        ...

    def background(self, by: str) -> NDArray[np.float32]:
        """Return `(n, D)` of live rows, always the same: all, or 8,192 by chance where there are more."""
        ...

    def video_id(self, row: int) -> str: ...
    def source_path(self, row: int) -> str: ...
    def duration_seconds(self, row: int) -> float | None: ...
    def file_state(self, row: int) -> FileState: ...

    def row_of(self, video_id: str) -> int | None:
        """Return a live video's row; None where there is none."""
        ...


class SegmentVectors:
    """`Vectors` of segments that lie here; nothing is read until it is asked for. Threads may share it.

    Args:
        segments: In the order of the manifest.
    """

    exact = True
    recall: float | None = None

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._segments = list(segments)
        self.embedding_size = self._segments[0].embedding_size if self._segments else 0
        self._video_begins = _begins([segment.num_videos for segment in segments])
        self._moment_begins = _begins([segment.num_moments for segment in segments])
        self.num_videos, self.num_moments = int(self._video_begins[-1]), int(self._moment_begins[-1])
        self._any_deleted = any(len(segment.deleted) for segment in segments)
        self._lock = threading.Lock()
        self._backgrounds: dict[str, NDArray[np.float32]] = {}
        self._gpu_scans = {
            "moment": GpuScan([segment.moment_embeddings for segment in segments]),
            "video": GpuScan([segment.video_embeddings for segment in segments]),
        }

    def nearest(
        self, embedding: NDArray[np.float32], k: int, *, by: str, allowed: NDArray[np.bool_] | None
    ) -> Nearest:
        """As `Vectors.nearest`."""
        if allowed is None and (found := self._nearest_by_gpu(embedding, k, by)) is not None:
            return found
        if self._any_deleted:
            allowed = self.alive if allowed is None else self.alive & allowed
        if by == "moment":
            selected = None if allowed is None else np.repeat(allowed, self.moment_counts)
            return scan(self._moment_pieces, embedding, k, selected)
        return scan(self._video_pieces, embedding, k, allowed)

    def _nearest_by_gpu(self, embedding: NDArray[np.float32], k: int, by: str) -> Nearest | None:
        """Return what a GPU finds, which knows nothing of what was deleted: so many rows more are asked for."""
        if not self._any_deleted or not self._gpu_scans[by].is_usable:
            return self._gpu_scans[by].nearest(embedding, k)
        of_moments = by == "moment"
        num_gone = int(self.moment_counts[~self.alive].sum() if of_moments else (~self.alive).sum())
        found = self._gpu_scans[by].nearest(embedding, k + num_gone)
        if found is None:
            return None
        scores, rows = found
        kept = self.alive[self.videos_of(rows) if of_moments else rows]
        return scores[kept][:k], rows[kept][:k]

    def videos_of(self, moment_rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """As `Vectors.videos_of`."""
        return np.searchsorted(self._moment_offsets, moment_rows, side="right").astype(np.int64) - 1

    def moment_range(self, video_row: int) -> tuple[int, int]:
        """As `Vectors.moment_range`."""
        begin, end = self._moment_offsets[video_row : video_row + 2].tolist()
        return begin, end

    def embeddings(self, rows: NDArray[np.int64], *, by: str) -> NDArray[np.float32]:
        """As `Vectors.embeddings`."""
        begins = self._moment_begins if by == "moment" else self._video_begins
        found = np.empty((len(rows), self.embedding_size), np.float32)
        for segment, mine, local in self._in_segments(rows, begins):
            found[mine] = getattr(segment, f"{by}_embeddings")[local]
        return found

    def moment_seconds(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """As `Vectors.moment_seconds`."""
        found = np.empty((len(rows), 2), np.float64)
        for segment, mine, local in self._in_segments(rows, self._moment_begins):
            found[mine] = segment.moment_seconds[local]
        return found

    def background(self, by: str) -> NDArray[np.float32]:
        """As `Vectors.background`."""
        with self._lock:
            if by not in self._backgrounds:
                self._backgrounds[by] = self.embeddings(self.background_rows(by), by=by)
            return self._backgrounds[by]

    def background_rows(self, by: str) -> NDArray[np.int64]:
        """Return which rows `background` is of."""
        live = np.arange(self.num_moments if by == "moment" else self.num_videos)
        if self._any_deleted:
            live = np.flatnonzero(np.repeat(self.alive, self.moment_counts) if by == "moment" else self.alive)
        if len(live) > BACKGROUND_ROWS:  # in the order of the file, for its pages
            live = np.sort(live[np.random.default_rng(0).choice(len(live), BACKGROUND_ROWS, replace=False)])
        return live

    def video_id(self, row: int) -> str:
        """As `Vectors.video_id`."""
        segment, local = self._place(row)
        return segment.video_ids[local]

    def source_path(self, row: int) -> str:
        """As `Vectors.source_path`."""
        segment, local = self._place(row)
        return segment.source_paths[local]

    def duration_seconds(self, row: int) -> float | None:
        """As `Vectors.duration_seconds`."""
        segment, local = self._place(row)
        duration = float(segment.duration_seconds[local])
        return None if np.isnan(duration) else duration

    def file_state(self, row: int) -> FileState:
        """As `Vectors.file_state`."""
        segment, local = self._place(row)
        return FileState(
            int(segment.size_bytes[local]), int(segment.mtime_ns[local]), segment.content_hashes[local]
        )

    def row_of(self, video_id: str) -> int | None:
        """As `Vectors.row_of`."""
        return self._rows.get(video_id)

    @cached_property
    def alive(self) -> NDArray[np.bool_]:
        alive = np.ones(self.num_videos, np.bool_)
        for segment, begin in zip(self._segments, self._video_begins[:-1], strict=True):
            alive[begin + segment.deleted] = False
        return alive

    @cached_property
    def moment_counts(self) -> NDArray[np.int64]:
        return np.diff(self._moment_offsets)

    @cached_property
    def durations(self) -> NDArray[np.float64]:
        return np.concatenate([np.empty(0), *(segment.duration_seconds for segment in self._segments)])

    @cached_property
    def mtime_ns(self) -> NDArray[np.int64]:
        return np.concatenate([np.empty(0, np.int64), *(segment.mtime_ns for segment in self._segments)])

    @cached_property
    def video_ids(self) -> Sequence[str]:
        return [video_id for segment in self._segments for video_id in segment.video_ids.tolist()]

    @cached_property
    def source_paths(self) -> Sequence[str]:
        return [path for segment in self._segments for path in segment.source_paths.tolist()]

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {self.video_ids[row]: row for row in np.flatnonzero(self.alive).tolist()}

    @cached_property
    def _moment_offsets(self) -> NDArray[np.int64]:
        begins = self._moment_begins[:-1]
        ends = [s.moment_offsets[1:] + b for s, b in zip(self._segments, begins, strict=True)]
        return np.concatenate([np.zeros(1, np.int64), *ends])

    @cached_property
    def _moment_pieces(self) -> list[Piece]:
        return _pieces([segment.moment_embeddings for segment in self._segments], self._moment_begins)

    @cached_property
    def _video_pieces(self) -> list[Piece]:
        return _pieces([segment.video_embeddings for segment in self._segments], self._video_begins)

    def _place(self, row: int) -> tuple[Segment, int]:
        number = int(np.searchsorted(self._video_begins, row, side="right")) - 1
        return self._segments[number], row - int(self._video_begins[number])

    def _in_segments(
        self, rows: NDArray[np.int64], begins: NDArray[np.int64]
    ) -> list[tuple[Segment, NDArray[np.int64] | slice, NDArray[np.int64]]]:
        """Return the segments that rows lie in: for each, where in `rows` its own are, and their numbers in it."""
        if len(self._segments) == 1:
            return [(self._segments[0], slice(None), rows)]
        numbers = np.searchsorted(begins, rows, side="right") - 1
        return [
            (self._segments[number], mine := np.flatnonzero(numbers == number), rows[mine] - begins[number])
            for number in np.unique(numbers).tolist()
        ]


def _begins(counts: Sequence[int]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def _pieces(arrays: Sequence[NDArray[np.float16]], begins: NDArray[np.int64]) -> list[Piece]:
    return [
        piece
        for array, begin in zip(arrays, begins[:-1].tolist(), strict=True)
        for piece in cut_into_pieces(array, begin)
    ]
