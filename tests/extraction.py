"""What tests of extractions share: a run with toy backbones, and a look at what it left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from messages import heard
from numpy.typing import NDArray

from svb.data.feature_store import FeatureStore
from svb.extract.backbones import load_backbone
from svb.extract.backbones.backbone import Backbone
from svb.extract.config import ExtractConfig
from svb.extract.progress import ExtractProgress
from svb.extract.run import extract

FRAMES, WIDE, CLIPS = "toy:frames", "toy:wide", "toy:clips"


def toy(name: str = FRAMES) -> Backbone:
    return load_backbone(name, torch.device("cpu"), torch.float32)


def run(
    videos: Path | list[Path],
    out: Path,
    *backbones: str,
    on_progress: Callable[[ExtractProgress], None] = lambda progress: None,
    **options: object,
) -> list[str]:
    """Extract with toy backbones; returns the messages."""
    messages = heard()
    defaults = {"workers": 1, "batch_size": 4, "precision": "float32", "engine": "torch"}
    settings: dict[str, Any] = {**defaults, **options}
    config = ExtractConfig(backbones or (FRAMES,), **settings)
    extract(videos if isinstance(videos, list) else [videos], out, config, on_progress=on_progress)
    return messages


def num_extracted(videos: Path, out: Path, *backbones: str, **options: Any) -> int:
    """Extract; returns how many videos there were to do."""
    counts = [0]
    run(videos, out, *backbones, on_progress=lambda progress: counts.append(progress.num_videos), **options)
    return counts[-1]


def statuses(out: Path) -> dict[str, str]:
    return {video_id: record.status for video_id, record in FeatureStore(out).records.items()}


def shards(out: Path) -> dict[str, tuple[int, bytes]]:
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in (out / "shards").glob("*.h5")}


def features(out: Path, backbone: str = FRAMES) -> dict[str, NDArray[np.float16]]:
    loaded = FeatureStore(out).load(backbone)
    spans = zip(loaded.offsets[:-1], loaded.offsets[1:], strict=True)
    return {v: loaded.features[begin:end] for v, (begin, end) in zip(loaded.video_ids, spans, strict=True)}


def contents(out: Path) -> dict[str, tuple[object, ...]]:
    """Return of every file of a store how it ended, its hash, and the bytes of its features and times."""
    store, found = FeatureStore(out), {}
    for video_id, record in store.records.items():
        rows = store.rows_of(video_id).values()
        parts = [part.tobytes() for held in rows for part in (held.features, held.times_seconds)]
        found[record.source_path] = record.status, record.error, record.content_hash, parts
    return found


def assert_same_bytes(out: Path, other: Path, *backbones: str) -> None:
    for backbone in backbones or (FRAMES,):
        one, two = (
            {video_id: rows.tobytes() for video_id, rows in features(folder, backbone).items()}
            for folder in (out, other)
        )
        assert one == two


def times(out: Path, video_id: str, backbone: str = FRAMES) -> list[float]:
    return [float(seconds) for seconds in FeatureStore(out).load(backbone, [video_id]).times_seconds]
