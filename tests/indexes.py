"""What tests of indexes share: how one is made, what it holds, and how its store changes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import synthetic
import torch
from numpy.typing import NDArray

from svb.config import fingerprint
from svb.data.feature_store import FeatureStore
from svb.data.feature_store_writer import FeatureStoreWriter
from svb.retrieve.indexing.index_plan import live_videos
from svb.retrieve.stored.manifest import read_manifest, read_whole
from svb.retrieve.stored.segment import Segment, open_segments
from svb.train.config import TrainConfig

# Tensors this small are slower on two threads than on one.
torch.set_num_threads(1)

CONFIG = TrainConfig(embedding_size=16, variant="none", batch_size=16, epochs=2, learning_rate=2e-3)
MOMENTS: dict[str, Any] = {"moment_seconds": 3, "moment_stride_seconds": 1}


def open_index(folder: Path) -> list[Segment]:
    return read_whole(folder, lambda manifest: open_segments(folder, manifest))


def only_segment(folder: Path) -> Segment:
    (segment,) = open_index(folder)
    return segment


def content(folder: Path) -> dict[str, tuple[object, ...]]:
    """Return of every live video what an index holds of it."""
    segments = open_index(folder)
    held: dict[str, tuple[object, ...]] = {}
    for video_id, (s, row) in live_videos(segments):
        segment = segments[s]
        span = slice(*segment.moment_offsets[row : row + 2].tolist())
        assert video_id not in held
        held[video_id] = (
            segment.video_embeddings[row].tobytes(),
            segment.moment_embeddings[span].tobytes(),
            segment.moment_seconds[span].tobytes(),
            (segment.source_paths[row], segment.content_hashes[row]),
            (int(segment.size_bytes[row]), int(segment.mtime_ns[row]), float(segment.duration_seconds[row])),
        )
    return held


def files_of(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Return the time and content of every file below a folder."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


def edit_manifest(folder: Path, **changes: Any) -> None:
    """Write other values into a manifest, with the checksum that goes with them."""
    manifest = {**read_manifest(folder), **changes}
    (folder / "manifest.json").write_text(json.dumps({**manifest, "checksum": fingerprint(manifest)}))


def frames_of(seed: int, num_frames: int = 4) -> NDArray[np.floating]:
    return np.random.default_rng(seed).normal(size=(num_frames, 24))


def add(store: Path, videos: Mapping[str, NDArray[np.floating]]) -> None:
    synthetic.make_store(store, videos)


def edit_store(store: Path, edit: Callable[[FeatureStore, FeatureStoreWriter], None]) -> None:
    held = FeatureStore(store)
    with FeatureStoreWriter(store, held.settings, {}) as writer:
        edit(held, writer)


def rename(store: Path, names: Mapping[str, str]) -> None:
    """Give videos other ids and paths, as `svb extract` does with files that were moved."""

    def edit(held: FeatureStore, writer: FeatureStoreWriter) -> None:
        moved = [(held.records[old], held.rows_of(old), new) for old, new in names.items()]
        for record, _, _ in moved:
            writer.remove(record)
        writer.publish()
        for record, rows, new in moved:
            writer.add(dataclasses.replace(record, video_id=new, source_path=f"/videos/{new}.mp4"), rows)

    edit_store(store, edit)


def remove(store: Path, *video_ids: str) -> None:
    edit_store(store, lambda held, writer: [writer.remove(held.records[video_id]) for video_id in video_ids])


def touch(store: Path, video: str, **changes: Any) -> None:
    def edit(held: FeatureStore, writer: FeatureStoreWriter) -> None:
        writer.add(dataclasses.replace(held.records[video], **changes), held.rows_of(video))

    edit_store(store, edit)
