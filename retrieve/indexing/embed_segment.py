"""Features of videos -> their embeddings and those of their moments: the rows of a segment."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from svb.data.feature_store import FeatureStore
from svb.data.fusion import split_name
from svb.data.rows import FrameFeatures
from svb.retrieve.model.embedder import Embedder
from svb.retrieve.stored.segment import MomentWindows, Segment, segment_of
from svb.train.training_data import FrameTable

# Length of the moment of a single frame, if the video has no duration; an interval must not be empty.
SHORTEST_SECONDS = 0.04
# The most that is embedded and committed at once: about 1 GB in memory for features of 1,024 numbers.
SEGMENT_VIDEOS = 8192
SEGMENT_MOMENTS = 2**18
SEGMENT_BYTES = 2**29


def embed_segment(
    store: FeatureStore,
    embedder: Embedder,
    windows: MomentWindows,
    device: torch.device,
    video_ids: Sequence[str] | None = None,
) -> Segment:
    """Embed videos of a store and their moments: the video head, and the same on a sliding window.

    Args:
        store: The features; only those of the embedded videos are kept in memory.
        embedder: The model.
        windows: Length and stride of moments.
        device: Where to compute.
        video_ids: Which videos; all usable ones by default.
    """
    loaded = store.load(embedder.backbone, video_ids)
    frames = FrameTable.of(loaded, embedder.max_frames, device)
    records = [store.records[video_id] for video_id in loaded.video_ids]
    rows, moment_offsets, moment_seconds = _moments(loaded, [r.duration_seconds for r in records], windows)
    moment_frames = FrameTable(
        [],
        frames.features,
        torch.from_numpy(rows[:, 0]).to(device),
        torch.from_numpy(rows[:, 1]).to(device),
        embedder.max_frames,
    )
    return segment_of(
        records,
        embedder.embed_videos(frames).astype(np.float16),
        embedder.embed_videos(moment_frames).astype(np.float16),
        moment_offsets,
        moment_seconds,
    )


def embedding_batches(
    store: FeatureStore, backbone: str, video_ids: Sequence[str], windows: MomentWindows
) -> Iterator[list[str]]:
    """Yield groups of videos that fit in memory together, to be embedded at once.

    Videos of one shard follow each other, so few groups read the same shard.
    """
    sizes, wanted = _num_rows(store, backbone), set(video_ids)
    row_bytes = 2 * int(store.video_settings(backbone)["backbone_settings"]["feature_size"])
    batch: list[str] = []
    held_bytes, held_moments = 0, 0.0
    for video_id in (video_id for video_id in sizes if video_id in wanted):
        duration = store.records[video_id].duration_seconds
        num_moments = max(sizes[video_id], duration / windows.stride_seconds if duration > 0 else 0)
        num_bytes = sizes[video_id] * row_bytes
        is_full = len(batch) == SEGMENT_VIDEOS or held_moments + num_moments > SEGMENT_MOMENTS
        if batch and (is_full or held_bytes + num_bytes > SEGMENT_BYTES):
            yield batch
            batch, held_bytes, held_moments = [], 0, 0.0
        batch.append(video_id)
        held_bytes, held_moments = held_bytes + num_bytes, held_moments + num_moments
    if batch:
        yield batch


def _num_rows(store: FeatureStore, backbone: str) -> dict[str, int]:
    """Return each usable video's number of rows; shard after shard, and within a shard by video_id."""
    first, *_ = split_name(backbone, store.backbones)  # fused ones are aligned to the rows of the first
    rows: dict[str, int] = {}
    for s, shard in enumerate(store.shards):
        counts = np.diff(shard.offsets(first)).tolist()
        current = [v for v in range(len(shard.records)) if store.is_current(s, v) and counts[v]]
        for v in sorted(current, key=lambda v: shard.records[v].video_id):
            rows[shard.records[v].video_id] = counts[v]
    return rows


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
        # Only windows that hold frames: a time far off would have endless empty ones before it.
        near = np.floor((times - times[0]) / windows.stride_seconds).astype(np.int64)[:, None] + 1
        near = np.unique(near - np.arange(math.ceil(windows.seconds / windows.stride_seconds) + 2))
        for window in near[(near >= 0) & (near < num_windows)].tolist():
            begin = times[0] + window * windows.stride_seconds
            low, high = np.searchsorted(times, [begin - 1e-6, begin + windows.seconds - 1e-6])
            if high > low:
                rows.append((int(first + low), int(high - low)))
                seconds.append((float(begin), float(min(begin + windows.seconds, end))))
        offsets.append(len(rows))
    return np.array(rows, np.int64), np.array(offsets, np.int64), np.array(seconds, np.float64)


def _end_seconds(times_seconds: NDArray[np.float64], duration_seconds: float) -> float:
    """Return when a video ends, given that its last frame is shown about as long as the others."""
    first, last = float(times_seconds[0]), float(times_seconds[-1])
    ends = [last + (last - first) / (len(times_seconds) - 1)] if len(times_seconds) > 1 else []
    if first + duration_seconds > last + 1e-3:  # False if the container gives no duration, or too short a one
        ends.append(first + duration_seconds)
    end = min(ends, default=last)
    return end if end > last else last + SHORTEST_SECONDS  # equal times are a still picture, shown briefly
