"""Which frames of a video are used: one rule for every decoder, and the table that lists each video's times."""

from __future__ import annotations

import bisect
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from svb.data.caption_table import hash_lines
from svb.data.tables import TableKind, read_table, text_of
from svb.errors import InputError, UsageError

# A container that counts in milliseconds rounds a frame's time by up to half of one.
TIME_TOLERANCE_SECONDS = 1e-3

_TIMES_TABLE = TableKind(
    "times table", ("video_id", "time_seconds"), "video_id,time_seconds", "write decimals with a point"
)

Frame = TypeVar("Frame")


@dataclass(frozen=True)
class Sampling:
    """Which frames are used; exactly one kind is set. A video that decodes gives at least one frame.

    Attributes:
        fps: Use this many frames a second, on a grid that starts at the first frame: the first frame at or
            after each grid point, and no frame twice. A video slower than that gives every frame once.
        frames: Use this many frames, spread evenly: the video is cut into equal parts, and each gives the
            frame shown in its middle.
        every_nth: Use frames 0, n, 2n and so on, in order of presentation.
        keyframes: Use the frames that decode without any other; the others are not decoded.
        scenes: Use one frame a scene: the first frame, and every frame whose libavfilter score against the
            frame before it is above this threshold between 0 and 1.
        times_seconds: Use the frame shown at each of these times on the file's own clock: the last frame at
            or before it, or else the first frame; no frame twice. Stored sorted and unique.

    Raises:
        UsageError: No kind or several are set, or a value is out of its range.
    """

    fps: float | None = None
    frames: int | None = None
    every_nth: int | None = None
    keyframes: bool = False
    scenes: float | None = None
    times_seconds: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        values = {kind.name: getattr(self, kind.name) for kind in fields(self)}
        given = {kind: value for kind, value in values.items() if value is not None and value is not False}
        if len(given) != 1:
            words = " and ".join(f"{kind}={value}" for kind, value in given.items()) or "no kind of sampling"
            raise UsageError(f"got {words} - give exactly one of {', '.join(values)}")
        for value in (self.fps, self.frames, self.every_nth):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UsageError(f"cannot sample {value} frames - give a positive number")
        if self.every_nth is not None and self.every_nth != int(self.every_nth):
            raise UsageError(f"cannot take every {self.every_nth}th frame - give a whole number")
        if self.scenes is not None and not 0 <= self.scenes <= 1:
            raise UsageError(f"cannot tell scenes apart by a score of {self.scenes} - give a number from 0 to 1")
        if self.times_seconds is not None:
            if not self.times_seconds or not all(math.isfinite(time) for time in self.times_seconds):
                raise UsageError(
                    f"cannot sample at the times {list(self.times_seconds)[:3]} - give at least one, all finite"
                )
            object.__setattr__(self, "times_seconds", tuple(sorted({float(time) for time in self.times_seconds})))

    def grid_point(self, time_seconds: float, first_time_seconds: float) -> int:
        """Return the number of the last grid point at or before a time; needs `fps`."""
        assert self.fps is not None
        return math.floor((time_seconds - first_time_seconds + TIME_TOLERANCE_SECONDS) * self.fps)

    def spread(self, frame_times_seconds: Sequence[float], duration_seconds: float) -> list[int]:
        """Return the positions of the frames shown in the middle of `frames` equal parts; needs `frames`.

        Args:
            frame_times_seconds: Ascending presentation times of all frames, at least one.
            duration_seconds: Time from the first frame's start to the last one's end.

        Returns:
            Ascending positions without repeats; fewer than `frames` if the video has fewer.
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
        """Return the settings as they are stored and fingerprinted; `Sampling(**settings)` reads them back."""
        if self.fps is not None:
            return {"fps": float(self.fps)}
        if self.scenes is not None:
            return {"scenes": float(self.scenes)}
        if self.times_seconds is not None:
            return {"times_seconds": list(self.times_seconds)}
        if self.keyframes:
            return {"keyframes": True}
        return {"frames": self.frames} if self.frames is not None else {"every_nth": self.every_nth}


def shown_at(
    times_seconds: Sequence[float], frames: Iterable[tuple[Frame, float]]
) -> Iterator[tuple[Frame, float]]:
    """Yield the frames shown at wanted times, in one pass that holds one frame.

    Args:
        times_seconds: The wanted times, ascending, at least one.
        frames: Frames and their times in order of presentation; read no further than needed. A frame
            whose time jumps back is skipped.
    """
    held: tuple[Frame, float] | None = None
    wanted = 0
    for frame, time_seconds in frames:
        if held is not None:
            if time_seconds <= held[1]:
                continue
            is_shown = times_seconds[wanted] + TIME_TOLERANCE_SECONDS < time_seconds
            while wanted < len(times_seconds) and times_seconds[wanted] + TIME_TOLERANCE_SECONDS < time_seconds:
                wanted += 1
            if is_shown:
                yield held
            if wanted == len(times_seconds):
                return
        held = frame, time_seconds
    if held is not None:
        yield held


@dataclass(frozen=True)
class TimesTable:
    """The times at which frames are wanted, on each file's own clock.

    Attributes:
        times_seconds: Ascending unique times by video_id.
        content_hash: A hash of the times; neither the order of rows nor the file's format changes it.
    """

    times_seconds: dict[str, tuple[float, ...]]
    content_hash: str


def read_times(path: Path) -> TimesTable:
    """Read a table with `video_id, time_seconds`, one row for each wanted frame; its suffix tells its format.

    Raises:
        InputError: The file is missing, not readable in its format or encoding, lacks a column, or has no
            rows; or a row has no video_id or no time of 0 or more. The error names the row.
    """
    times: defaultdict[str, set[float]] = defaultdict(set)
    for place, row in read_table(path, _TIMES_TABLE):
        video_id = text_of(place, "video_id", row["video_id"])
        if not video_id:
            raise InputError(f"{place}: video_id is empty - give every time the id of its video")
        times[video_id].add(_seconds(place, row["time_seconds"]))
    if not times:
        raise InputError(f"{path} holds no times - expected rows with video_id,time_seconds")
    ordered = {video_id: tuple(sorted(times[video_id])) for video_id in sorted(times)}
    lines = (f"{video_id}\t{seconds!r}" for video_id, wanted in ordered.items() for seconds in wanted)
    return TimesTable(ordered, hash_lines(lines))


def _seconds(place: str, value: object) -> float:
    text = text_of(place, "time_seconds", value)
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds >= 0):
        raise InputError(f"{place}: time_seconds is {text!r} - expected a number of seconds, 0 or more")
    return seconds + 0.0  # no negative zero: it would hash as another time
