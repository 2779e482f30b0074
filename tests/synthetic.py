"""Feature stores and caption features without footage: a made-up world in which text and video share a topic."""

from __future__ import annotations

import dataclasses
import hashlib
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from svb.data.caption_features import CaptionFeatures, write_caption_features
from svb.data.caption_table import CaptionTable
from svb.data.feature_store_writer import FeatureStoreWriter
from svb.data.rows import VideoRecord, VideoRows
from svb.extract.text_encoders.text_encoder import TextEncoder

BACKBONE = "synthetic:frames"
TEXT_ENCODER = "synthetic:words"
WORDS = (
    *("dog", "cat", "horse", "boat", "train", "guitar", "kitchen", "beach"),
    *("snow", "road", "child", "ball", "fire", "tree", "bird", "plane"),
)


def make_record(video_id: str, *, duration_seconds: float = 10.0, status: str = "ok") -> VideoRecord:
    return VideoRecord(
        video_id=video_id,
        source_path=f"/videos/{video_id}.mp4",
        size_bytes=1,
        mtime_ns=1,
        content_hash="0" * 64,
        duration_seconds=duration_seconds,
        frame_rate=25.0,
        width_px=64,
        height_px=48,
        rotation_degrees=0,
        codec="h264",
        decoder="synthetic",
        status=status,
        error="" if status == "ok" else "made so",
    )


def make_store(
    path: Path,
    videos: Mapping[str, NDArray[np.floating]],
    *,
    backbone: str = BACKBONE,
    seconds_between_frames: float = 1.0,
    durations_seconds: Mapping[str, float] | None = None,
    beside: Mapping[str, Mapping[str, VideoRows]] | None = None,
) -> Path:
    """Write a store of `(T, F)` frame features by video_id; a video of 0 rows is recorded as failed.

    `beside` has the rows of further backbones, by their name and video_id, at times of their own.
    """
    beside = beside or {}
    sizes = {backbone: next(iter(videos.values())).shape[1]}
    sizes |= {name: next(iter(rows.values())).features.shape[1] for name, rows in beside.items()}
    settings: dict[str, Any] = {
        "backbones": {
            name: {"weights_hash": f"of {name}", "feature_size": size, "precision": "float32"}
            for name, size in sizes.items()
        },
        "sampling": {"fps": 1.0 / seconds_between_frames},
        "decoder": {"name": "pyav", "version": "none"},
        "batch_size": 32,
    }
    with FeatureStoreWriter(path, settings, {}) as writer:
        for video_id, frames in videos.items():
            duration = (durations_seconds or {}).get(video_id, len(frames) * seconds_between_frames)
            rows = {}
            if len(frames):
                rows = {name: held[video_id] for name, held in beside.items()}
                times_seconds = np.arange(len(frames)) * seconds_between_frames
                rows[backbone] = VideoRows(frames.astype(np.float16), times_seconds)
            status = "ok" if len(frames) else "unreadable"
            record = make_record(video_id, duration_seconds=duration, status=status)
            content_hash = hashlib.sha256(np.ascontiguousarray(frames).tobytes()).hexdigest()
            writer.add(dataclasses.replace(record, content_hash=content_hash), rows)
    return path


def make_captions(
    path: Path,
    rows: Sequence[tuple[str, str, str]],
    features: NDArray[np.floating],
    *,
    text_encoder: str = TEXT_ENCODER,
) -> Path:
    """Write caption features of `(video_id, caption, split)` rows; an empty split is none."""
    table = CaptionTable(
        [f"{row}" for row in range(len(rows))],
        [video_id for video_id, _, _ in rows],
        [caption for _, caption, _ in rows],
        [split or "train" for _, _, split in rows],
        has_split=any(split for _, _, split in rows),
    )
    settings = {
        "text_encoder": {
            "name": text_encoder,
            "weights_hash": f"of {text_encoder}",
            "feature_size": features.shape[1],
            "max_tokens": 64,
        },
        "table_hash": "made-up",
    }
    return write_caption_features(path, CaptionFeatures(table, features.astype(np.float16), settings))


def make_task(
    folder: Path,
    *,
    num_train: int = 60,
    num_val: int = 20,
    captions_a_video: int = 2,
    has_split: bool = True,
    feature_size: int = 24,
    text_size: int = 20,
    noise: float = 0.3,
    seed: int = 0,
) -> tuple[Path, Path]:
    """Write a task that can be learned: a video's topic shows, rotated, in its frames and in its captions.

    Returns:
        The store and the caption features.
    """
    random = np.random.default_rng(seed)
    num_videos, topic_size = num_train + num_val, 8
    to_frames = random.normal(size=(topic_size, feature_size))
    to_captions = random.normal(size=(topic_size, text_size))
    topics = random.normal(size=(num_videos, topic_size))
    videos: dict[str, NDArray[np.floating]] = {}
    rows: list[tuple[str, str, str]] = []
    features = []
    for video, topic in enumerate(topics):
        video_id = f"clip{video:03}"
        num_frames = int(random.integers(1, 9))
        videos[video_id] = topic @ to_frames + noise * random.normal(size=(num_frames, feature_size))
        split = ("train" if video < num_train else "val") if has_split else ""
        for _ in range(captions_a_video):
            words = [WORDS[word] for word in np.argsort(-np.abs(topic))[: int(random.integers(2, 5))]]
            rows.append((video_id, " ".join(["a", *words]), split))
            features.append(topic @ to_captions + noise * random.normal(size=text_size))
    return (
        make_store(folder / "features", videos),
        make_captions(folder / "captions.h5", rows, np.stack(features)),
    )


def make_text_encoder(size: int = 20) -> TextEncoder:
    """Return an encoder whose features are sums of a random vector a word; it reads 10 words."""

    def encode_batch(captions: list[str]) -> torch.Tensor:
        features = torch.zeros(len(captions), size)
        for row, caption in enumerate(captions):
            for word in caption.split():
                seed = zlib.crc32(word.encode())
                features[row] += torch.randn(size, generator=torch.Generator().manual_seed(seed))
        return features

    return TextEncoder(
        TEXT_ENCODER,
        torch.nn.Identity(),
        size,
        encode_batch,
        num_tokens=lambda caption: len(caption.split()) + 2,
        max_tokens=12,
        weights_hash=f"of {TEXT_ENCODER}",
    )
