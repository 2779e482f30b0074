"""What ffmpeg says of its input, read off its log: there is no ffprobe."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from svb.extract.decode.decoder import (
    DecodeErrors,
    require_duration,
    require_size,
    require_streams,
    right_angle,
    square_pixels_width,
    tagged_seconds,
)
from svb.extract.decode.ffmpeg_process import Lines
from svb.extract.decode.options import Limits


class FfmpegLog:
    """Reads what ffmpeg says of the input, and counts its complaints.

    Attributes:
        container_format: The demuxer's names, such as `matroska,webm`; empty where none opened the file.
        unit_seconds: What a timestamp counts in, exact; NaN before the first frame.
        num_streams: Of any kind.
        errors: Damage that ffmpeg met while decoding.
        last_words: The last error of any kind.
    """

    # Indentation tells ffmpeg's own lines from tags of the file that look like them.
    _DURATION = re.compile(r"\[info\]   Duration: ([\d:.]+)")
    _STREAM = re.compile(r"\[info\]   Stream #0:(\d+)[^ ]*: (\w+): (\w+)")
    _SIZE = re.compile(r", (\d+)x(\d+)[ ,\[]")
    _ASPECT = re.compile(r"\bSAR (\d+):(\d+)")
    _RATE = re.compile(r", ([\d.]+)(k?) fps\b")
    _TAG = re.compile(r"\[info\]       DURATION +: ([\d:.]+)", re.IGNORECASE)
    _TURN = re.compile(r"\[info\]       Display ?Matrix: rotation of (-?[\d.]+) degrees", re.IGNORECASE)
    _GRAPH = re.compile(
        r"\[graph .* input from stream .*\] \[verbose\] w:(\d+) h:(\d+) .* tb:(\d+)/(\d+) .*sar:(\d+)/(\d+)"
    )
    _TOO_LARGE = re.compile(r"Picture size (\d+)x(\d+) exceeds specified max pixel count")
    _ERROR = re.compile(r"(?:\[[^\]]* @ 0x[0-9a-f]+\] )*\[(?:error|fatal|panic)\] (.*)")
    _DAMAGE = re.compile(
        r"\[(?:error|warning|fatal)\] "
        r"(Error submitting packet to decoder.*|corrupt decoded frame.*|Error during demuxing.*"
        r"|Decoding error.*|Error while decoding.*)|\[info\] (concealing .*)",
        re.IGNORECASE,
    )

    def __init__(self) -> None:
        self.container_format = ""
        self.unit_seconds = math.nan
        self.num_streams = 0
        self.errors = DecodeErrors()
        self.last_words = ""
        self.has_picture = False
        self._container_seconds = math.nan
        self._refused_px = (0, 0)
        self._streams: dict[int, _Stream] = {}
        self._current: _Stream | None = None
        self._in_banner = False
        self._has_turning_filter = False
        self._lies = False
        self._first_frame: _Shape | None = None
        self._lines = Lines()

    def feed(self, data: bytes) -> None:
        for line in self._lines.feed(data):
            if line.startswith("[info] Input #0, "):
                self.container_format = line.removeprefix("[info] Input #0, ").split(", from")[0]
                self._in_banner = True
            elif not line.startswith("[info]  "):
                self._in_banner = False
            if self._in_banner:
                self._read_banner(line)
            else:
                self._read_event(line)

    def _read_banner(self, line: str) -> None:
        if match := self._DURATION.match(line):
            self._container_seconds = tagged_seconds(match[1])
        elif match := self._STREAM.match(line):
            self._current = None
            self.num_streams = max(self.num_streams, int(match[1]) + 1)
            if match[2] == "Video" and "(attached pic)" in line:
                self.has_picture = True
            elif match[2] == "Video":
                self._current = self._streams.setdefault(int(match[1]), _Stream(match[3]))
                self._read_stream(line, self._current)
        elif self._current is not None and (match := self._TAG.match(line)):
            self._current.duration_seconds = tagged_seconds(match[1])
        elif self._current is not None and (match := self._TURN.match(line)):
            self._current.turn_degrees = float(match[1])

    def _read_stream(self, line: str, stream: _Stream) -> None:
        if rate := self._RATE.search(line):
            stream.frame_rate = float(rate[1]) * (1000 if rate[2] else 1) or math.nan
        if size := self._SIZE.search(line):
            # The codec's, then the container's where it differs: the container's counts.
            aspects = self._ASPECT.findall(line) or [("1", "1")]
            stream.shape = _Shape(int(size[1]), int(size[2]), _ratio(*aspects[-1]))

    def _read_event(self, line: str) -> None:
        if line.startswith(("[transpose @", "[rotate @")):
            self._has_turning_filter = True
            self._lies = self._lies or line.startswith("[transpose @")
        if match := self._GRAPH.match(line):
            self.unit_seconds = int(match[3]) / int(match[4])
            # Where the size changes there is another such line; the first frame's size is every frame's.
            self._first_frame = self._first_frame or _Shape(
                int(match[1]), int(match[2]), _ratio(match[5], match[6])
            )
        if math.isnan(self.unit_seconds) and (match := self._TOO_LARGE.search(line)):
            self._refused_px = int(match[1]), int(match[2])
        if match := self._ERROR.match(line):
            self.last_words = match[1][:500]
        if match := self._DAMAGE.search(line):
            self.errors.add((match[1] or match[2])[:500])

    def require_within(self, path: Path, limits: Limits) -> None:
        """Refuse a video as soon as the log tells that it is over its limits.

        Raises:
            DecodeError: `over_limit`.
        """
        require_streams(path, limits, self.num_streams)
        if not self.has_video:
            return
        for width, height in (self._refused_px, *self._sizes_px()):
            require_size(path, limits, width, height)
        for seconds in (self.duration_seconds, self._container_seconds):
            require_duration(path, limits, seconds)

    def _sizes_px(self) -> Iterator[tuple[int, int]]:
        """Yield the width and height of frames, as coded and as displayed, so far as they are known."""
        lies = right_angle(self._first.turn_degrees) in (90, 270) if self._first.is_turned else self._lies
        for shape in (self._first.shape, self._first_frame):
            if shape is not None:
                yield shape.width_px, shape.height_px
                yield shape.displayed_px(lies)

    @property
    def displayed_px(self) -> tuple[int, int]:
        """Width and height of upright frames with square pixels, before they are resized; only after a frame."""
        assert self._first_frame is not None
        return self._first_frame.displayed_px(self._lies)

    @property
    def has_video(self) -> bool:
        return bool(self._streams)

    @property
    def is_turned(self) -> bool:
        """Say whether ffmpeg turns the picture, by its container's word or, seldom, its codec's."""
        return self._has_turning_filter or (self.has_video and self._first.is_turned)

    @property
    def _first(self) -> _Stream:
        return self._streams[min(self._streams)]

    @property
    def codec(self) -> str:
        return self._first.codec

    @property
    def frame_rate(self) -> float:
        return self._first.frame_rate if self.has_video else math.nan

    @property
    def rotation_degrees(self) -> int:
        return right_angle(self._first.turn_degrees) if self._first.is_turned else 0

    @property
    def duration_seconds(self) -> float:
        tag = self._first.duration_seconds
        return tag if tag > 0 else self._container_seconds


def _ratio(across: str, down: str) -> float:
    """Return a sample aspect ratio; 0:1 is none, and taken for square."""
    return int(across) / int(down) if int(across) and int(down) else 1.0


@dataclass(frozen=True)
class _Shape:
    """Frames as they are coded."""

    width_px: int
    height_px: int
    sample_aspect_ratio: float

    def displayed_px(self, lies: bool) -> tuple[int, int]:
        """Return width and height with square pixels, of frames to be stood upright where they lie."""
        if lies:
            return square_pixels_width(self.height_px, 1 / self.sample_aspect_ratio), self.width_px
        return square_pixels_width(self.width_px, self.sample_aspect_ratio), self.height_px


class _Stream:
    """A video stream as the log describes it; NaN is unknown, of a turn: none."""

    def __init__(self, codec: str) -> None:
        self.codec = codec
        self.frame_rate = math.nan
        self.duration_seconds = math.nan
        self.turn_degrees = math.nan
        self.shape: _Shape | None = None

    @property
    def is_turned(self) -> bool:
        return not math.isnan(self.turn_degrees)
