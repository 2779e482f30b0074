"""The row types: what is known of one video, and its features."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

USABLE = ("ok", "partial")
# A record of this status takes earlier ones of its video out of the store.
REMOVED = "removed"
# Why a video has no features; what each means is in docs/extraction.md.
FAILURES = (
    *("missing", "empty", "unreadable", "no_video_stream", "attached_picture", "zero_frames", "truncated"),
    *("encrypted", "no_permission"),
    *("concealed_errors", "over_limit", "timeout", "decoder_crash", "out_of_memory", "nonfinite_features"),
)


@dataclass(frozen=True)
class VideoRecord:
    """What is known of one video. A failed video has empty or NaN properties.

    `source_path` is where the file lay, `content_hash` the SHA-256 of its bytes, and `status` is `ok`,
    `partial` (decoded less than the container promises) or a failure code, explained in `error`. It was
    decoded in `elapsed_seconds`, without waiting, in the `tries`th try of the same file. `removed` says
    that earlier records of this video no longer count.
    """

    video_id: str
    source_path: str
    size_bytes: int
    mtime_ns: int
    content_hash: str
    duration_seconds: float
    frame_rate: float
    width_px: int
    height_px: int
    rotation_degrees: int
    codec: str
    decoder: str
    status: str
    error: str
    elapsed_seconds: float = 0.0
    tries: int = 1

    @property
    def usable(self) -> bool:
        return self.status in USABLE


@dataclass(frozen=True)
class VideoRows:
    """One video's rows of one backbone: `features (T, F)` float16 and `times_seconds (T,)` float64."""

    features: NDArray[np.float16]
    times_seconds: NDArray[np.float64]


@dataclass(frozen=True)
class FrameFeatures:
    """Rows of many videos, one video after the other.

    Attributes:
        video_ids: V ids, the order of the rows.
        features: `(N, F)` float16, finite.
        times_seconds: `(N,)` float64.
        offsets: `(V + 1,)` int64; video v owns rows `offsets[v]:offsets[v + 1]`, at least one.
    """

    video_ids: list[str]
    features: NDArray[np.float16]
    times_seconds: NDArray[np.float64]
    offsets: NDArray[np.int64]
