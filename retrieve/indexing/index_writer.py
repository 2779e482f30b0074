"""The one writer of an index: segments, tombstones and other parts, a commit at a time.

Every run adds segments, each of which costs time in a search, and deleted videos are still scanned. So, at the end
of a run, among neighbours that are not full,

- a segment that holds no more moments than all behind it together is merged with them: there are at most as many
  segments as the logarithm of their moments, and a row is copied at most as often;
- segments that make a full one together are merged into it;
- a segment of which more than a quarter was deleted is copied without that: the scan shrinks by at least a quarter,
  for copying at most three quarters.

A segment of `FULL_MOMENTS` is full and is not merged again, so growth costs the same however large an index is.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from svb.config import differing_fields
from svb.data.publish import FolderLock
from svb.data.rows import VideoRecord
from svb.errors import MismatchError, StoreError
from svb.retrieve.indexing.index_plan import Place
from svb.retrieve.stored.manifest import OLD_PARTS, PARTS, commit, publish_part, read_manifest, remove_unnamed
from svb.retrieve.stored.segment import (
    COLUMNS,
    DTYPES,
    Segment,
    StringColumn,
    open_segment,
    segment_of,
    write_segment,
    write_tombstones,
)

logger = logging.getLogger(__name__)

# A gigabyte of embeddings of 512 numbers.
FULL_MOMENTS = 2**20
MAX_DELETED_SHARE = 0.25
# How many moments are copied at once, which bounds the memory of a merge.
BLOCK_ROWS = 65536


@contextlib.contextmanager
def writing(out: Path) -> Iterator[None]:
    """Be the only writer of an index.

    Raises:
        StoreError: Another process is writing to it.
    """
    out.mkdir(parents=True, exist_ok=True)
    lock = FolderLock(out)
    try:
        lock.take()
        yield
    finally:
        lock.close()


class IndexWriter:
    """An index that grows; every commit leaves it whole. Call it inside `writing`.

    Args:
        out: The index's folder.
        rebuild: Begin with nothing, and leave the old index alone until the first commit.

    Attributes:
        before: The manifest so far, whose settings continue; empty if none can be read.
        draft: The next manifest without `videos`, `moments_total` and `generation`; parts may be put into it.
        segments: The draft's, mapped; a `Place` counts through them, and holds until `merge`.

    Raises:
        StoreError: The manifest is damaged.
    """

    def __init__(self, out: Path, *, rebuild: bool = False) -> None:
        self._out = out
        self.before: dict[str, Any] = {}
        if (out / "manifest.json").exists():
            try:
                self.before = read_manifest(out)
            except StoreError as error:
                if not rebuild:
                    raise
                logger.info(
                    f"{error}; how it was made is unknown, so options that are not given take their defaults"
                )
        self._generation = int(self.before.get("generation", 0))
        self._committed = self.before if self.before and not rebuild else None
        self.draft: dict[str, Any] = _empty() if self._committed is None else copy.deepcopy(self._committed)
        for field in (*OLD_PARTS, "normalise"):
            self.draft.pop(field, None)
        self.draft.setdefault("speech", [])  # older versions had none
        self.segments: list[Segment] = []
        if self._committed is not None:
            self._open_segments()
            remove_unnamed(out, self._committed)  # left by a killed run

    @property
    def is_new(self) -> bool:
        """Tell whether this is a new index."""
        return self._committed is None

    def require_model(self, model: Mapping[str, Any], moments: Mapping[str, Any]) -> None:
        """Refuse to put vectors of two models into one index.

        Raises:
            MismatchError: Model or moments differ from the index's; the error names what differs and two remedies.
        """
        held = {"model": self.draft["model"], "moments": self.draft["moments"]}
        wanted: dict[str, Any] = {"model": model, "moments": moments}
        if held["model"]["kind"] != model["kind"]:  # the other fields are not comparable
            held, wanted = ({"model": {"kind": part["model"]["kind"]}} for part in (held, wanted))
        lines = differing_fields(held, wanted)
        if lines:
            raise MismatchError(
                f"{self._out} was made with another model or other moments ({'; '.join(lines)}), whose vectors "
                "cannot be compared - write to another folder with -o, or make the index again with --rebuild"
            )

    def add(self, segment: Segment) -> None:
        """Publish a segment's files and put it into the draft."""
        entry = publish_part(self._out, "segments", lambda folder: write_segment(folder, segment))
        entry |= {"videos": segment.num_videos, "moments": segment.num_moments, "deleted": None}
        self.draft["embedding_size"] = segment.embedding_size
        self.draft["segments"].append(entry)
        self.segments.append(self._open(entry))

    def delete(self, places: Iterable[Place]) -> None:
        """Publish tombstones of videos and put them into the draft."""
        rows_of: dict[int, list[int]] = {}
        for s, row in places:
            rows_of.setdefault(s, []).append(row)
        for s, rows in rows_of.items():
            segment, entry = self.segments[s], self.draft["segments"][s]
            deleted = np.union1d(segment.deleted, np.array(rows, np.int64))
            part = publish_part(self._out, "tombstones", functools.partial(write_tombstones, rows=deleted))
            moments = int(np.diff(segment.moment_offsets)[deleted].sum())
            entry["deleted"] = {**part, "videos": len(deleted), "moments": moments}
            self.segments[s] = self._open(entry)

    def merge(self) -> None:
        """Merge small segments in the draft and leave out deleted videos, if that pays."""
        for begin, end in reversed(choose_merges(self.segments)):
            entries = self._merged(self.segments[begin:end])
            self.draft["segments"][begin:end] = entries
            self.segments[begin:end] = [self._open(entry) for entry in entries]

    def commit(self) -> bool:
        """Make the draft the index; return whether there was anything to write."""
        entries = self.draft["segments"]
        deleted = [entry["deleted"] or {"videos": 0, "moments": 0} for entry in entries]
        self.draft["videos"] = sum(e["videos"] - d["videos"] for e, d in zip(entries, deleted, strict=True))
        self.draft["moments_total"] = sum(
            e["moments"] - d["moments"] for e, d in zip(entries, deleted, strict=True)
        )
        self.draft["generation"] = self._generation
        if self.draft == self._committed:
            return False
        self._generation += 1
        self.draft["generation"] = self._generation
        commit(self._out, self.draft)
        self._committed = copy.deepcopy(self.draft)
        return True

    def _open_segments(self) -> None:
        for entry in list(self.draft["segments"]):
            try:
                self.segments.append(self._open(entry))
            except StoreError as error:
                if isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, FileNotFoundError):
                    raise  # it may be whole, only not readable now
                logger.info(
                    f"segments/{entry['key']} is damaged ({error.__cause__ or error}): its {entry['videos']:,} "
                    "videos are embedded again, if the store still has them"
                )
                self.draft["segments"].remove(entry)

    def _merged(self, segments: list[Segment]) -> list[dict[str, Any]]:
        """Return the entry of segments copied into one; none if all their videos were deleted."""
        counts = [0, 0]

        def write(folder: Path) -> None:
            counts[:] = write_merged(folder, segments)

        if not sum(map(live_moments, segments)):
            return []
        entry = publish_part(self._out, "segments", write)
        return [{**entry, "videos": counts[0], "moments": counts[1], "deleted": None}]

    def _open(self, entry: Mapping[str, Any]) -> Segment:
        return open_segment(self._out, entry, int(self.draft["embedding_size"]))


def _empty() -> dict[str, Any]:
    parts: dict[str, Any] = {part: [] for part in PARTS if part != "tombstones"}
    return {"format": "svb index", "embedding_size": 0, **parts, "vectors": None}


def live_moments(segment: Segment) -> int:
    """Return how many moments belong to videos that were not deleted."""
    lengths = np.diff(segment.moment_offsets)
    return segment.num_moments - int(lengths[segment.deleted].sum())


def choose_merges(segments: Sequence[Segment], full_moments: int = FULL_MOMENTS) -> list[tuple[int, int]]:
    """Return the neighbours to merge, as ascending half-open ranges; the module's docstring has the rules.

    A range of one segment means to copy it without its deleted videos.
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
    """Return a segment of videos whose vectors an index already has, with their newest records."""
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
