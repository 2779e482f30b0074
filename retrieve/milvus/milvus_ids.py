"""What a collection in Milvus calls an index's videos and moments, and what it must have been made with.

Rows shift as segments are merged, so a collection knows videos by keys: a hash of the video_id, its content and how
many moments it has. A video that changes gets another key.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svb.config import canonical_json
from svb.retrieve.stored.segment import Segment


def video_keys(segments: Sequence[Segment]) -> NDArray[np.int64]:
    """Return `(V,)`, what a collection calls each video: it says which content the video has."""
    keys = [
        _key(f"{video_id}\0{content_hash or (size, mtime)}\0{count}")
        for segment in segments
        for video_id, content_hash, size, mtime, count in zip(
            segment.video_ids,
            segment.content_hashes,
            segment.size_bytes.tolist(),
            segment.mtime_ns.tolist(),
            np.diff(segment.moment_offsets).tolist(),
            strict=True,
        )
    ]
    return np.array(keys, np.int64)


def moment_ids(keys: NDArray[np.int64], numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return what a collection calls moments, from their videos' keys and their numbers in them.

    Of 63 bits (splitmix64): among 100 million moments two share an id once in 2,000 indexes.
    """
    mixed = keys.astype(np.uint64) + (numbers.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    ids: NDArray[np.int64] = ((mixed ^ (mixed >> np.uint64(31))) >> np.uint64(1)).astype(np.int64)
    return ids


def made_with(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Return what a collection must have been made with to be of an index."""
    return {"model": manifest["model_fingerprint"], "moments": canonical_json(manifest["moments"])}


def _key(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
