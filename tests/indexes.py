"""Indexes for tests: of runs and of made-up segments; what they hold, and what a search should find."""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import synthetic
from numpy.typing import NDArray

from svb.config import fingerprint
from svb.data.feature_store import FeatureStore
from svb.data.feature_store_writer import FeatureStoreWriter
from svb.retrieve.index import index as build
from svb.retrieve.indexing.index_config import IndexConfig
from svb.retrieve.indexing.index_plan import live_videos
from svb.retrieve.indexing.verify_index import verify_index
from svb.retrieve.model.query_embedder import QueryEmbedder
from svb.retrieve.stored.manifest import commit, publish_part, read_manifest, read_whole
from svb.retrieve.stored.segment import Segment, StringColumn, open_segments, write_segment, write_tombstones
from svb.train.config import TrainConfig

CONFIG = TrainConfig(embedding_size=16, variant="none", batch_size=16, epochs=2, learning_rate=2e-3)
MOMENTS: dict[str, Any] = {"moment_seconds": 3, "moment_stride_seconds": 1}
MODEL = {"kind": "run", "text": {"text_encoder": {"name": "synthetic:words", "weights_hash": "of words"}}}


# Of a run and its store


def index(
    source: Path | str,
    out: Path | str,
    *,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    **options: Any,
) -> Path:
    """Make an index or bring it up to date, with `IndexConfig(**options)`."""
    return build(source, out, IndexConfig(**options), on_progress=on_progress)


@dataclasses.dataclass
class Kept:
    """An index of a store that a test may change."""

    run: Path
    store: Path
    out: Path
    said: list[str]

    def update(self, **options: Any) -> str:
        """Bring the index up to date, and return the line that says what there was to do."""
        begin = len(self.said)
        index(self.run, self.out, store=self.store, **options)
        assert verify_index(self.out) == []
        return self.said[begin]


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


# Of made-up segments


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
    """Write a segment and its tombstones into an index's folder; returns it with its key, and its entry."""
    entry = publish_part(out, "segments", lambda folder: write_segment(folder, segment))
    entry |= {"videos": segment.num_videos, "moments": segment.num_moments, "deleted": None}
    if len(segment.deleted):
        tombstones = publish_part(out, "tombstones", lambda folder: write_tombstones(folder, segment.deleted))
        moments = int(np.diff(segment.moment_offsets)[segment.deleted].sum())
        entry["deleted"] = {**tombstones, "videos": len(segment.deleted), "moments": moments}
    return replace(segment, key=entry["key"]), entry


def index_manifest(out: Path, segments: Sequence[Segment], **changes: Any) -> dict[str, Any]:
    """Write segments into an index's folder and return a manifest of them, not committed yet."""
    parts: dict[str, Any] = {part: [] for part in ("captions", "metadata", "heads", "text")}
    return {
        "format": "svb index",
        "generation": 1,
        "model": MODEL,
        "model_fingerprint": "0123456789abcdef",
        "moments": {"seconds": 4.0, "stride_seconds": 2.0},
        "embedding_size": segments[0].embedding_size if segments else 32,
        "videos": sum(segment.num_videos - len(segment.deleted) for segment in segments),
        "moments_total": sum(segment.num_moments for segment in segments),
        "store": "features",
        "segments": [publish_segment(out, segment)[1] for segment in segments],
        "vectors": None,
        **parts,
        **changes,
    }


def write_index(out: Path, segments: Sequence[Segment], **changes: Any) -> tuple[Path, list[Segment]]:
    """Write an index of segments; returns its folder and the segments with their keys."""
    manifest = index_manifest(out, segments, **changes)
    commit(out, manifest)
    keys = [entry["key"] for entry in manifest["segments"]]
    return out, [replace(segment, key=key) for segment, key in zip(segments, keys, strict=True)]


# What a search should find


def text_vector(text: str, size: int = 32) -> NDArray[np.float32]:
    """Return a random direction that a text always has."""
    return units(np.random.default_rng(zlib.crc32(text.encode())).normal(size=(1, size)))[0]


def embed_text(self: QueryEmbedder, text: str, what: str = "the query") -> NDArray[np.float32]:
    """Stand in for `QueryEmbedder.embed_text` where an index has no model."""
    return text_vector(text)


def naive_scores(
    segments: Sequence[Segment],
    by: str,
    positives: Sequence[NDArray[np.float32]],
    negatives: Sequence[NDArray[np.float32]] = (),
) -> dict[str, float]:
    """Return every live video's score, row by row and in double precision."""
    rows: list[tuple[str, NDArray[np.float64]]] = []
    for segment in segments:
        for video in range(segment.num_videos):
            if video in segment.deleted:
                continue
            own = slice(*segment.moment_offsets[video : video + 2].tolist())
            of_video = segment.moment_embeddings[own] if by == "moment" else segment.video_embeddings[video][None]
            rows += [(segment.video_ids[video], row.astype(np.float64)) for row in of_video]
    usual = [float(np.median([row @ negative for _, row in rows])) for negative in negatives]
    best: dict[str, float] = {}
    for video_id, row in rows:
        score = float(np.mean([row @ positive for positive in positives]))
        score -= sum(max(0.0, float(row @ n) - floor) for n, floor in zip(negatives, usual, strict=True))
        best[video_id] = max(score, best.get(video_id, -np.inf))
    return best
