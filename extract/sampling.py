"""Which frames of a video are used: one rule for every decoder."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from svb.errors import UsageError

# A container that counts in milliseconds rounds a frame's time by up to half of one.
TIME_TOLERANCE_SECONDS = 1e-3


@dataclass(frozen=True)
class Sampling:
    """`fps` frames a second on a grid that starts at the first frame, or `frames` of them spread evenly.

    Exactly one of the two is set. With `fps`, the first frame at or after each grid point is used, and
    no frame twice: a video slower than `fps` gives every frame once. With `frames`, the video is cut
    into that many equal parts and the frame shown in the middle of each is used. A video that decodes
    at all gives at least one frame.

    Raises:
        UsageError: None or both are set, or one is not positive.
    """

    fps: float | None = None
    frames: int | None = None

    def __post_init__(self) -> None:
        if (self.fps is None) == (self.frames is None):
            raise UsageError(f"got fps={self.fps} and frames={self.frames} - give exactly one of the two")
        value = self.fps if self.fps is not None else self.frames
        if value is None or not math.isfinite(value) or value <= 0:
            raise UsageError(f"cannot sample {value} frames - give a positive number")

    def grid_point(self, time_seconds: float, first_time_seconds: float) -> int:
        """Return the number of the last grid point at or before a time; only with `fps`."""
        assert self.fps is not None
        return math.floor((time_seconds - first_time_seconds + TIME_TOLERANCE_SECONDS) * self.fps)

    def spread(self, frame_times_seconds: Sequence[float], duration_seconds: float) -> list[int]:
        """Return the positions of the frames shown in the middle of `frames` equal parts; only with `frames`.

        Args:
            frame_times_seconds: Ascending presentation times of all frames, at least one.
            duration_seconds: From the first frame's start to the last one's end.

        Returns:
            Ascending positions without repeats: fewer than `frames` where the video has fewer.
        """
        assert self.frames is not None
        first = frame_times_seconds[0]
        middles = (first + (part + 0.5) * duration_seconds / self.frames for part in range(self.frames))
        shown = {
            max(0, bisect.bisect_right(frame_times_seconds, middle + TIME_TOLERANCE_SECONDS) - 1)
            for middle in middles
        }
        return sorted(shown)

    def settings(self) -> dict[str, Any]:
        """Return the settings as they are stored and fingerprinted."""
        return {"fps": float(self.fps)} if self.fps is not None else {"frames": self.frames}
