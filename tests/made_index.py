"""Indexes of made-up segments, and what a search of them should find, computed the slow way."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from segments import publish_segment, units

from svb.retrieve.model.query_embedder import QueryEmbedder
from svb.retrieve.stored.manifest import commit, publish_part
from svb.retrieve.stored.segment import Segment

MODEL = {"kind": "run", "text": {"text_encoder": {"name": "synthetic:words", "weights_hash": "of words"}}}


def write_index(
    out: Path, segments: Sequence[Segment], *, generation: int = 1, **changes: Any
) -> tuple[Path, list[Segment]]:
    """Write an index of segments with their tombstones; returns its folder and the segments with their keys."""
    written, entries = [], []
    for segment in segments:
        held, entry = publish_segment(out, segment)
        if len(segment.deleted):
            gone = segment.deleted
            tombstones = publish_part(
                out, "tombstones", lambda folder, gone=gone: np.save(folder / "videos.npy", gone)
            )
            moments = int(np.diff(segment.moment_offsets)[gone].sum())
            entry["deleted"] = {**tombstones, "videos": len(gone), "moments": moments}
        written.append(replace(held, deleted=segment.deleted))
        entries.append(entry)
    parts: dict[str, Any] = {part: [] for part in ("captions", "metadata", "heads", "text")}
    manifest = {
        "format": "svb index",
        "generation": generation,
        "model": MODEL,
        "model_fingerprint": "0123456789abcdef",
        "moments": {"seconds": 4.0, "stride_seconds": 2.0},
        "embedding_size": segments[0].embedding_size if segments else 32,
        "videos": sum(segment.num_videos - len(segment.deleted) for segment in segments),
        "moments_total": sum(segment.num_moments for segment in segments),
        "store": "features",
        "segments": entries,
        "vectors": None,
        **parts,
        **changes,
    }
    commit(out, manifest)
    return out, written


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
