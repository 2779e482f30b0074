"""Segments copied together: which ones, and how. No vector is computed again.

Every run adds segments, and a search has a cost for each; what was deleted is still scanned. So, at the end of a
run, among neighbours that are not full,

- a segment is merged with those behind it where it holds no more moments than they do together: there are at most
  as many segments as the logarithm of their moments, and a row is copied as often at most;
- those that make a full one together are merged into it;
- one of which more than a quarter was deleted is copied without that: the scan shrinks by a quarter at least, for
  copying three quarters at most.

A segment of `FULL_MOMENTS` is full: it is not merged any more, so that growth costs no more the larger an index is.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from svb.data.rows import VideoRecord
from svb.retrieve.stored.columns import StringColumn
from svb.retrieve.stored.record_rows import segment_of
from svb.retrieve.stored.segment import COLUMNS, DTYPES, Segment

# A gigabyte of embeddings of 512 numbers.
FULL_MOMENTS = 2**20
MAX_DELETED_SHARE = 0.25
# How many moments are copied at once: what a merge takes in memory.
BLOCK_ROWS = 65536


def live_moments(segment: Segment) -> int:
    """Return how many moments belong to videos that count."""
    lengths = np.diff(segment.moment_offsets)
    return segment.num_moments - int(lengths[segment.deleted].sum())


def choose_merges(segments: Sequence[Segment], full_moments: int = FULL_MOMENTS) -> list[tuple[int, int]]:
    """Return which neighbours are to be merged, as half-open ranges in ascending order; see above.

    A range of one is a segment to be copied without what was deleted.
    """
    live = [live_moments(segment) for segment in segments]
    merges: list[tuple[int, int]] = []
    begin = 0
    for end in range(len(segments) + 1):
        is_full = end < len(segments) and live[end] >= full_moments
        if sum(live[begin:end]) >= full_moments:
            merges.append((begin, end))
            begin = end
        if is_full or end == len(segments):
            merges += _merge_small(live, begin, end)
            begin = end + 1
    covered = {s for first, last in merges for s in range(first, last)}
    merges += [
        (s, s + 1) for s, segment in enumerate(segments) if s not in covered and _is_sparse(segment, live[s])
    ]
    return sorted(merges)


def _merge_small(live: Sequence[int], begin: int, end: int) -> list[tuple[int, int]]:
    for first in range(begin, end - 1):
        if live[first] <= sum(live[first + 1 : end]):
            return [(first, end)]
    return []


def _is_sparse(segment: Segment, live: int) -> bool:
    return segment.num_moments - live > MAX_DELETED_SHARE * segment.num_moments or (
        len(segment.deleted) > MAX_DELETED_SHARE * segment.num_videos
    )


def write_merged(folder: Path, segments: Sequence[Segment]) -> tuple[int, int]:
    """Write one segment of the videos of several that were not deleted, in their order.

    Returns:
        How many videos it has, and how many moments.
    """
    rows = [np.delete(np.arange(segment.num_videos), segment.deleted) for segment in segments]
    moments = [_moment_rows(segment, kept) for segment, kept in zip(segments, rows, strict=True)]
    for name in DTYPES:
        if name != "moment_offsets":
            of_moments = name.startswith("moment_")
            _write_rows(
                folder / f"{name}.npy",
                [getattr(segment, name) for segment in segments],
                moments if of_moments else rows,
            )
    lengths = [np.diff(segment.moment_offsets)[kept] for segment, kept in zip(segments, rows, strict=True)]
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int64)
    np.save(folder / "moment_offsets.npy", offsets)
    for name, attribute in COLUMNS.items():
        columns = [getattr(segment, attribute).tolist() for segment in segments]
        kept_strings = [column[row] for column, kept in zip(columns, rows, strict=True) for row in kept.tolist()]
        StringColumn.of(kept_strings).write(folder, name)
    return len(offsets) - 1, int(offsets[-1])


def copy_videos(
    segments: Sequence[Segment], places: Sequence[tuple[int, int]], records: Sequence[VideoRecord]
) -> Segment:
    """Return a segment of videos whose vectors an index has already, with what the store knows of them now."""
    spans = [slice(*segments[s].moment_offsets[row : row + 2].tolist()) for s, row in places]
    held = [(segments[s], span) for (s, _), span in zip(places, spans, strict=True)]
    return segment_of(
        records,
        np.stack([segments[s].video_embeddings[row] for s, row in places]),
        np.concatenate([segment.moment_embeddings[span] for segment, span in held]),
        np.cumsum([0, *(span.stop - span.start for span in spans)], dtype=np.int64),
        np.concatenate([segment.moment_seconds[span] for segment, span in held]),
    )


def _moment_rows(segment: Segment, videos: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the moments of some videos, ascending."""
    lengths = np.diff(segment.moment_offsets)
    keep = np.zeros(segment.num_videos, bool)
    keep[videos] = True
    return np.flatnonzero(np.repeat(keep, lengths))


def _write_rows(path: Path, arrays: Sequence[NDArray[np.generic]], rows: Sequence[NDArray[np.int64]]) -> None:
    """Write the rows of several arrays one after the other, a block at a time."""
    shape = (sum(map(len, rows)), *arrays[0].shape[1:])
    target = open_memmap(path, mode="w+", dtype=arrays[0].dtype, shape=shape)
    written = 0
    for array, kept in zip(arrays, rows, strict=True):
        for begin, end in pairwise([*range(0, len(kept), BLOCK_ROWS), len(kept)]):
            target[written : written + end - begin] = array[kept[begin:end]]
            written += end - begin
    target.flush()
