"""Segments of an index without a run or a store: embeddings in clusters, as those of videos are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svb.retrieve.stored.columns import StringColumn
from svb.retrieve.stored.manifest import publish_part
from svb.retrieve.stored.segment import Segment, write_segment


def units(rows: NDArray[np.floating]) -> NDArray[np.float32]:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def clustered(
    number: int, size: int, seed: int, *, clusters: int = 40, spread: float = 0.15
) -> NDArray[np.float32]:
    """Return unit rows around centres that are the same whatever the seed."""
    centres = np.random.default_rng(99).normal(size=(clusters, size))
    random = np.random.default_rng(seed)
    rows = centres[random.integers(0, clusters, number)] + spread * np.sqrt(size) * random.normal(
        size=(number, size)
    )
    return units(rows)


def make_segment(
    moments_of: Sequence[NDArray[np.floating]],
    *,
    first: int = 0,
    deleted: Sequence[int] = (),
    key: str = "",
    videos: NDArray[np.floating] | None = None,
) -> Segment:
    """Return a segment of videos `v<first>`, ... with the given moments, `(M, D)` each, and their means."""
    V, counts = len(moments_of), [len(moments) for moments in moments_of]
    videos = units(np.stack([moments.mean(axis=0) for moments in moments_of])) if videos is None else videos
    begins = np.concatenate([np.arange(count) for count in counts]) * 2.0
    ids = [f"v{first + row}" for row in range(V)]
    return Segment(
        key=key or f"segment{first}",
        video_embeddings=videos.astype(np.float16),
        moment_embeddings=np.concatenate(moments_of).astype(np.float16),
        moment_offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        moment_seconds=np.stack([begins, begins + 4.0], axis=1),
        duration_seconds=np.array([2.0 * count + 2.0 for count in counts]),
        size_bytes=np.ones(V, np.int64),
        mtime_ns=np.ones(V, np.int64),
        video_ids=StringColumn.of(ids),
        source_paths=StringColumn.of([f"/videos/{video_id}.mp4" for video_id in ids]),
        content_hashes=StringColumn.of([f"hash of {video_id}" for video_id in ids]),
        deleted=np.array(sorted(deleted), np.int64),
    )


def random_segment(
    num_videos: int, *, size: int = 32, seed: int = 0, most: int = 9, first: int = 0, deleted: Sequence[int] = ()
) -> Segment:
    """Return a segment of videos of 1 to `most` moments each."""
    counts = np.random.default_rng(seed).integers(1, most + 1, num_videos)
    rows = clustered(int(counts.sum()), size, seed)
    return make_segment(np.split(rows, np.cumsum(counts)[:-1]), first=first, deleted=deleted)


def publish_segment(out: Path, segment: Segment) -> tuple[Segment, dict[str, Any]]:
    """Write a segment into an index's folder; returns it with its key, and its entry for the manifest."""
    entry = publish_part(out, "segments", lambda folder: write_segment(folder, segment))
    entry |= {"videos": segment.num_videos, "moments": segment.num_moments, "deleted": None}
    return replace(segment, key=entry["key"]), entry
