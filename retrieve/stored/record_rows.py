"""What a store knows of a video, as an index holds it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from svb.data.rows import VideoRecord
from svb.retrieve.stored.columns import StringColumn
from svb.retrieve.stored.segment import Segment


def content_of(record: VideoRecord) -> str:
    """Return what stands for a video's content in an index.

    What decoded in part may decode further in another try of the same file.
    """
    return f"{record.content_hash}.{record.tries}" if record.status == "partial" else record.content_hash


def is_untouched(segment: Segment, row: int, record: VideoRecord) -> bool:
    """Tell whether a record names the file that a segment does, as large and as old as then."""
    return (segment.source_paths[row], segment.size_bytes[row], segment.mtime_ns[row]) == (
        record.source_path,
        record.size_bytes,
        record.mtime_ns,
    )


def segment_of(
    records: Sequence[VideoRecord],
    video_embeddings: NDArray[np.float16],
    moment_embeddings: NDArray[np.float16],
    moment_offsets: NDArray[np.int64],
    moment_seconds: NDArray[np.float64],
) -> Segment:
    """Return a segment of V embedded videos with what the store knows of them; see `segment`."""
    durations = [r.duration_seconds if r.duration_seconds > 0 else np.nan for r in records]
    return Segment(
        key="",
        video_embeddings=video_embeddings,
        moment_embeddings=moment_embeddings,
        moment_offsets=moment_offsets,
        moment_seconds=moment_seconds,
        duration_seconds=np.array(durations, np.float64),
        size_bytes=np.array([r.size_bytes for r in records], np.int64),
        mtime_ns=np.array([r.mtime_ns for r in records], np.int64),
        video_ids=StringColumn.of(r.video_id for r in records),
        source_paths=StringColumn.of(r.source_path for r in records),
        content_hashes=StringColumn.of(map(content_of, records)),
        deleted=np.empty(0, np.int64),
    )
