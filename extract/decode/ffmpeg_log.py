"""Reads what the ffmpeg program says: its description of the input and its complaints, and its lists of packets.

The description comes from its log, because there is no ffprobe.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from svb.extract.decode.choice import PacketTimes
from svb.extract.decode.containers import is_fragmented
from svb.extract.decode.decoder import (
    Candidate,
    DecodeError,
    DecodeErrors,
    VideoProperties,
    no_video,
    require_duration,
    require_size,
    require_streams,
    right_angle,
    square_pixels_width,
    tagged_seconds,
    unreadable,
    zero_frames,
)
from svb.extract.decode.ffmpeg_process import Lines
from svb.extract.decode.options import Limits

# libavutil's AV_NOPTS_VALUE, which framecrc prints as a number.
NO_TIMESTAMP = -(1 << 63)


class FfmpegLog:
    """Reads ffmpeg's description of the input from its log, and counts its complaints.

    Attributes:
        container_format: The demuxer's names, such as `matroska,webm`; empty if none opened the file.
        unit_seconds: The exact unit of timestamps; NaN before the first frame.
        num_streams: Number of streams of any kind.
        stream: The number of the video stream that is used; None means the first that is no cover art.
        refuses_colours: Whether swscale refuses frames because of their colour numbers.
        errors: Damage that ffmpeg found while decoding.
        hardware_words: The first complaint about a hardware decoder.
        last_words: The last error of any kind.
    """

    # The indentation separates ffmpeg's own lines from tags of the file that look like them.
    _DURATION = re.compile(r"\[info\]   Duration: ([\d:.]+)(?:, start: ([\d.]+))?")
    _STREAM = re.compile(r"\[info\]   Stream #0:(\d+)[^ ]*: (\w+): (\w+)")
    _SIZE = re.compile(r", (\d+)x(\d+)[ ,\[]")
    _ASPECT = re.compile(r"\bSAR (\d+):(\d+)")
    _RATE = re.compile(r", ([\d.]+)(k?) fps\b")
    _TAG = re.compile(r"\[info\]       DURATION +: ([\d:.]+)", re.IGNORECASE)
    _TURN = re.compile(r"\[info\]       Display ?Matrix: rotation of (-?[\d.]+) degrees", re.IGNORECASE)
    _GRAPH = re.compile(
        r"\[graph .* input from stream .*\] \[verbose\] w:(\d+) h:(\d+) .* tb:(\d+)/(\d+) .*sar:(\d+)/(\d+)"
    )
    _TRANSFER = re.compile(r"/(smpte2084|arib-std-b67)[,)]")
    _CROP = re.compile(r"\[crop @ [^\]]*\] \[verbose\] w:\d+ h:\d+ .*-> w:(\d+) h:(\d+) ")
    _COLOURS = re.compile(r"\] Unsupported input \(|^\[error\]   Color spaces:|\[error\] Invalid color space")
    _TOO_LARGE = re.compile(r"Picture size (\d+)x(\d+) exceeds specified max pixel count")
    _HARDWARE = re.compile(
        r"\[(?:error|fatal)\] (Could not dynamically load CUDA|Device creation failed.*|No device available.*"
        r"|Hardware device setup failed.*|.*CUDA_ERROR_\w+.*|No decoder surfaces left.*)"
    )
    _ERROR = re.compile(r"(?:\[[^\]]* @ 0x[0-9a-f]+\] )*\[(?:error|fatal|panic)\] (.*)")
    _DAMAGE = re.compile(
        r"\[(?:error|warning|fatal)\] "
        r"(Error submitting packet to decoder.*|corrupt decoded frame.*|Error during demuxing.*"
        r"|Decoding error.*|Error while decoding.*)|\[info\] (concealing .*)",
        re.IGNORECASE,
    )

    def __init__(self, stream: int | None = None) -> None:
        self.container_format = ""
        self.unit_seconds = math.nan
        self.num_streams = 0
        self.errors = DecodeErrors()
        self.hardware_words = ""
        self.last_words = ""
        self.has_picture = False
        self._container_seconds = math.nan
        self._start_seconds = 0.0
        self._refused_px = (0, 0)
        self._streams: dict[int, _Stream] = {}
        self._current: _Stream | None = None
        self._in_banner = False
        self._counts_start = False
        self._is_cropped = False
        self.stream = stream
        self.refuses_colours = False
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
            self._start_seconds = float(match[2] or 0)
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
        stream.is_default = "(default)" in line
        if transfer := self._TRANSFER.search(line):
            stream.hdr_transfer = transfer[1]
        if rate := self._RATE.search(line):
            stream.frame_rate = float(rate[1]) * (1000 if rate[2] else 1) or math.nan
        if size := self._SIZE.search(line):
            # The codec's ratio comes first, then the container's if it differs: the container's is used.
            aspects = self._ASPECT.findall(line) or [("1", "1")]
            stream.shape = _Shape(int(size[1]), int(size[2]), _ratio(*aspects[-1]))

    def _read_event(self, line: str) -> None:
        if line.startswith(("[transpose @", "[rotate @")):
            self._has_turning_filter = True
            self._lies = self._lies or line.startswith("[transpose @")
        if match := self._GRAPH.match(line):
            self.unit_seconds = int(match[3]) / int(match[4])
            # Another such line follows if the size changes; all frames get the first one's size.
            self._first_frame = self._first_frame or _Shape(
                int(match[1]), int(match[2]), _ratio(match[5], match[6])
            )
        if self._first_frame and not self._is_cropped and (match := self._CROP.match(line)):
            # ffmpeg itself cuts off what the container says not to show.
            self._is_cropped = True
            self._first_frame = replace(self._first_frame, width_px=int(match[1]), height_px=int(match[2]))
        if math.isnan(self.unit_seconds) and (match := self._TOO_LARGE.search(line)):
            self._refused_px = int(match[1]), int(match[2])
        if self._COLOURS.search(line):
            self.refuses_colours = True
        if not self.hardware_words and (match := self._HARDWARE.search(line)):
            self.hardware_words = match[1][:200]
        if match := self._ERROR.match(line):
            self.last_words = match[1][:500]
        if match := self._DAMAGE.search(line):
            self.errors.add((match[1] or match[2])[:500])

    def require_within(self, path: Path, limits: Limits) -> None:
        """Refuse a video as soon as the log shows that it exceeds the limits.

        Raises:
            DecodeError: `over_limit`.
        """
        require_streams(path, limits, self.num_streams)
        if not self.has_video or self._in_banner:
            return
        for width, height in (self._refused_px, *self._sizes_px()):
            require_size(path, limits, width, height)
        self._counts_start = "mp4" in self.container_format and self._start_seconds > 0 and is_fragmented(path)
        for seconds in (self.duration_seconds, self._promised_by_container):
            require_duration(path, limits, seconds)

    def _sizes_px(self) -> Iterator[tuple[int, int]]:
        """Yield the known widths and heights of frames, as coded and as displayed."""
        lies = right_angle(self._used.turn_degrees) in (90, 270) if self._used.is_turned else self._lies
        for shape in (self._used.shape, self._first_frame):
            if shape is not None:
                yield shape.width_px, shape.height_px
                yield shape.displayed_px(lies)

    def failure(self, path: Path) -> DecodeError:
        """Return the error for a file that gave no frame."""
        if not self.container_format:
            return unreadable(path, self.last_words)
        if not self.has_video:
            return no_video(path, has_picture=self.has_picture)
        return zero_frames(path, self.last_words)

    def properties(self) -> VideoProperties:
        """Return what the log says of the video, with the size of frames before resizing; needs a decoded frame."""
        width, height = self.displayed_px
        return VideoProperties(
            self.duration_seconds, self.frame_rate, width, height, self.rotation_degrees, self.codec
        )

    @property
    def displayed_px(self) -> tuple[int, int]:
        """Width and height of upright frames with square pixels, before resizing; needs a decoded frame."""
        assert self._first_frame is not None
        return self._first_frame.displayed_px(self._lies)

    @property
    def has_video(self) -> bool:
        return self._used_number in self._streams

    @property
    def is_turned(self) -> bool:
        """Whether ffmpeg turns the picture; the container says so or, seldom, the codec."""
        return self._has_turning_filter or (self.has_video and self._used.is_turned)

    @property
    def is_described(self) -> bool:
        """Whether all of the input's description has been read."""
        return bool(self.container_format) and not self._in_banner

    def candidates(self, stills: Collection[int] = ()) -> list[Candidate]:
        """Return the video streams that are no cover art; `stills` are the numbers of those of one frame."""
        return [
            Candidate(number, stream.num_pixels, stream.is_default, number in stills)
            for number, stream in sorted(self._streams.items())
        ]

    @property
    def place_among_videos(self) -> tuple[int, int]:
        """How many video streams the file has, cover art left out, and which one is used, from 1."""
        numbers = sorted(self._streams)
        return len(numbers), numbers.index(self._used_number) + 1

    @property
    def _used_number(self) -> int:
        return min(self._streams, default=-1) if self.stream is None else self.stream

    @property
    def _used(self) -> _Stream:
        return self._streams[self._used_number]

    @property
    def hdr_transfer(self) -> str:
        """The name of the transfer function if that is one for HDR, else an empty string."""
        return self._used.hdr_transfer if self.has_video else ""

    @property
    def codec(self) -> str:
        return self._used.codec

    @property
    def frame_rate(self) -> float:
        return self._used.frame_rate if self.has_video else math.nan

    @property
    def rotation_degrees(self) -> int:
        return right_angle(self._used.turn_degrees) if self._used.is_turned else 0

    @property
    def duration_seconds(self) -> float:
        tag = self._used.duration_seconds
        return tag if tag > 0 else self._promised_by_container

    @property
    def _promised_by_container(self) -> float:
        return self._container_seconds - (self._start_seconds if self._counts_start else 0.0)


def _ratio(across: str, down: str) -> float:
    """Return a sample aspect ratio; 0:1 means none, and is taken for square."""
    return int(across) / int(down) if int(across) and int(down) else 1.0


@dataclass(frozen=True)
class _Shape:
    """The size of frames as they are coded."""

    width_px: int
    height_px: int
    sample_aspect_ratio: float

    def displayed_px(self, lies: bool) -> tuple[int, int]:
        """Return width and height with square pixels, swapped if the frames lie on their side."""
        if lies:
            return square_pixels_width(self.height_px, 1 / self.sample_aspect_ratio), self.width_px
        return square_pixels_width(self.width_px, self.sample_aspect_ratio), self.height_px


class _Stream:
    """A video stream as the log describes it; NaN means unknown, and for a turn none."""

    def __init__(self, codec: str) -> None:
        self.codec = codec
        self.frame_rate = math.nan
        self.duration_seconds = math.nan
        self.turn_degrees = math.nan
        self.shape: _Shape | None = None
        self.is_default = False
        self.hdr_transfer = ""

    @property
    def num_pixels(self) -> int:
        return self.shape.width_px * self.shape.height_px if self.shape else 0

    @property
    def is_turned(self) -> bool:
        return not math.isnan(self.turn_degrees)


def note_packet(line: str, units: dict[str, float], times: PacketTimes) -> None:
    """Read a line of framecrc: `#tb 0: 1/25`, or `stream, dts, pts, duration, size, checksum[, F=flags]`."""
    unit = re.match(r"#tb (\d+): (\d+)/(\d+)", line)
    if unit:
        units[unit[1]] = int(unit[2]) / int(unit[3])
    if line.startswith("#") or line.count(",") < 5:
        return
    stream, dts, pts, duration, *_ = (field.strip() for field in line.split(","))
    flags = re.search(r"F=0x([0-9a-fA-F]+)", line)
    is_discarded = flags is not None and int(flags[1], 16) & 4
    if not is_discarded:
        timestamp = int(dts) if int(pts) == NO_TIMESTAMP else int(pts)
        seconds = None if timestamp == NO_TIMESTAMP else timestamp * units[stream]
        times.add(seconds, int(duration) * units[stream])
