"""Features of MSR-VTT's shape out of random numbers, as svb keeps them and as many trainers do."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np

from svb.data.caption_features import CaptionFeatures, write_caption_features
from svb.data.caption_table import CaptionTable
from svb.data.feature_store_writer import FeatureStoreWriter
from svb.data.rows import VideoRecord, VideoRows

BACKBONE, TEXT_ENCODER = "made_up:frames", "made_up:captions"
WORDS_A_CAPTION, DIFFERENT_WORDS = 9, 12_000


def make_store(path: Path, *, videos: int, frames: int, feature_size: int, seed: int = 0) -> Path:
    """Write a feature store of videos of `frames` frames each; return `path`."""
    random = np.random.default_rng(seed)
    settings = {
        "backbones": {BACKBONE: {"weights_hash": "none", "feature_size": feature_size, "precision": "float32"}},
        "sampling": {"fps": 1.0},
        "decoder": {"name": "none", "version": "none"},
        "batch_size": 32,
    }
    times_seconds = np.arange(frames, dtype=np.float64)
    with FeatureStoreWriter(path, settings, {}) as writer:
        for video in range(videos):
            features = random.standard_normal((frames, feature_size), np.float32).astype(np.float16)
            writer.add(_record(f"video{video}", frames), {BACKBONE: VideoRows(features, times_seconds)})
    return path


def make_captions(path: Path, *, videos: int, captions_a_video: int, feature_size: int, seed: int = 1) -> Path:
    """Write caption features of every video, all in the train split; return `path`."""
    random = np.random.default_rng(seed)
    total = videos * captions_a_video
    # As in any language a few words are most of the text and most words are rare (Zipf's law).
    often = 1 / np.arange(1, DIFFERENT_WORDS + 1)
    words = random.choice(DIFFERENT_WORDS, size=(total, WORDS_A_CAPTION), p=often / often.sum())
    table = CaptionTable(
        [str(caption) for caption in range(total)],
        [f"video{caption // captions_a_video}" for caption in range(total)],
        [" ".join(f"word{word}" for word in caption) for caption in words.tolist()],
        ["train"] * total,
        has_split=True,
    )
    features = random.standard_normal((total, feature_size), np.float32).astype(np.float16)
    text_encoder = {"name": TEXT_ENCODER, "weights_hash": "another", "feature_size": feature_size, "max_tokens": 64}
    settings = {"text_encoder": text_encoder, "table_hash": "none"}
    return write_caption_features(path, CaptionFeatures(table, features, settings))


def write_dataset_a_video(path: Path, *, videos: int, frames: int, feature_size: int, seed: int = 0) -> Path:
    """Write the features of `make_store` as one HDF5 dataset a video, the layout that many trainers read."""
    random = np.random.default_rng(seed)
    with h5py.File(path, "w") as file:
        for video in range(videos):
            features = random.standard_normal((frames, feature_size), np.float32).astype(np.float16)
            file.create_dataset(f"video{video}", data=features)
    return path


def _record(video_id: str, frames: int) -> VideoRecord:
    return VideoRecord(
        video_id=video_id,
        source_path=f"{video_id}.mp4",
        size_bytes=0,
        mtime_ns=0,
        content_hash="0" * 64,
        duration_seconds=float(frames),
        frame_rate=25.0,
        width_px=320,
        height_px=240,
        rotation_degrees=0,
        codec="none",
        decoder="none",
        status="ok",
        error="",
    )
