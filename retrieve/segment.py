"""A segment of an index: the embeddings of some videos and their moments, as plain immutable arrays.

videos.json              video_id, source_path and duration_seconds, a video a row
video_embeddings.npy     (V, D) float16, L2-normalised before rounding
moment_embeddings.npy    (M, D) float16, moments of one video next to each other
moment_offsets.npy       (V + 1,) int64, video v owns moments offsets[v]:offsets[v + 1]
moment_seconds.npy       (M, 2) float64, each moment's half-open interval [begin, end)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from svb.data.feature_store import FeatureStore, FrameFeatures
from svb.retrieve.embedder import Embedder
from svb.train.training_data import FrameTable

# A moment of a single frame whose video tells no duration; an interval must not be empty.
SHORTEST_SECONDS = 0.04
ARRAYS = ("video_embeddings", "moment_embeddings", "moment_offsets", "moment_seconds")


@dataclass(frozen=True)
class Segment:
    """A segment in memory; see the layout above."""

    videos: list[dict[str, Any]]
    video_embeddings: NDArray[np.float16]
    moment_embeddings: NDArray[np.float16]
    moment_offsets: NDArray[np.int64]
    moment_seconds: NDArray[np.float64]


@dataclass(frozen=True)
class MomentWindows:
    """A sliding window over a video's time.

    Attributes:
        seconds: Length of a moment.
        stride_seconds: From the begin of one moment to the next.
    """

    seconds: float
    stride_seconds: float


def embed_segment(store: FeatureStore, embedder: Embedder, windows: MomentWindows, device: torch.device) -> Segment:
    """Embed every usable video of a store and its moments: the video head on a sliding window."""
    loaded = store.load(embedder.backbone)
    frames = FrameTable.of(loaded, embedder.max_frames, device)
    durations_seconds = [store.records[video_id].duration_seconds for video_id in loaded.video_ids]
    rows, moment_offsets, moment_seconds = _moments(loaded, durations_seconds, windows)
    moment_frames = FrameTable(
        [],
        frames.features,
        torch.from_numpy(rows[:, 0]).to(device),
        torch.from_numpy(rows[:, 1]).to(device),
        embedder.max_frames,
    )
    videos = [
        {
            "video_id": record.video_id,
            "source_path": record.source_path,
            "duration_seconds": record.duration_seconds if record.duration_seconds > 0 else None,
        }
        for record in (store.records[video_id] for video_id in loaded.video_ids)
    ]
    return Segment(
        videos,
        embedder.embed_videos(frames).astype(np.float16),
        embedder.embed_videos(moment_frames).astype(np.float16),
        moment_offsets,
        moment_seconds,
    )


def _moments(
    loaded: FrameFeatures, durations_seconds: Sequence[float], windows: MomentWindows
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Return the `(M, 2)` first row and number of rows of every moment, `(V + 1,)` offsets, `(M, 2)` seconds."""
    rows: list[tuple[int, int]] = []
    seconds: list[tuple[float, float]] = []
    offsets = [0]
    for first, last, duration in zip(loaded.offsets[:-1], loaded.offsets[1:], durations_seconds, strict=True):
        times = loaded.times_seconds[first:last]
        end = _end_seconds(times, duration)
        num_windows = max(1, int(np.ceil((end - times[0] - windows.seconds) / windows.stride_seconds)) + 1)
        for window in range(num_windows):
            begin = times[0] + window * windows.stride_seconds
            low, high = np.searchsorted(times, [begin - 1e-6, begin + windows.seconds - 1e-6])
            if high > low:
                rows.append((int(first + low), int(high - low)))
                seconds.append((float(begin), float(min(begin + windows.seconds, end))))
        offsets.append(len(rows))
    return np.array(rows, np.int64), np.array(offsets, np.int64), np.array(seconds, np.float64)


def _end_seconds(times_seconds: NDArray[np.float64], duration_seconds: float) -> float:
    """Return when a video ends: its last frame is shown about as long as frames lie apart, and not for ever."""
    first, last = float(times_seconds[0]), float(times_seconds[-1])
    ends = [last + (last - first) / (len(times_seconds) - 1)] if len(times_seconds) > 1 else []
    if first + duration_seconds > last + 1e-3:  # False where the container promised nothing, or too little
        ends.append(first + duration_seconds)
    return min(ends, default=last + SHORTEST_SECONDS)


def write_segment(folder: Path, segment: Segment) -> None:
    """Write a segment's files into a folder."""
    (folder / "videos.json").write_text(json.dumps(segment.videos, ensure_ascii=False), "utf-8")
    for name in ARRAYS:
        np.save(folder / f"{name}.npy", getattr(segment, name))


def read_segment(folder: Path) -> Segment:
    """Read a segment; moment embeddings are mapped, not read.

    Raises:
        OSError: A file is missing.
        ValueError, EOFError: A file is damaged, or they do not belong together.
    """
    videos = json.loads((folder / "videos.json").read_text("utf-8"))
    arrays = {
        name: np.load(folder / f"{name}.npy", mmap_mode="r" if name == "moment_embeddings" else None)
        for name in ARRAYS
    }
    segment = Segment(videos, **arrays)
    counts = {len(videos), len(segment.video_embeddings), len(segment.moment_offsets) - 1}
    moments = {len(segment.moment_embeddings), len(segment.moment_seconds), int(segment.moment_offsets[-1])}
    if len(counts) > 1 or len(moments) > 1:
        raise ValueError(f"arrays of {sorted(counts)} videos and {sorted(moments)} moments")
    return segment
