"""What ffmpeg says of its input, read off its log: there is no ffprobe."""

from __future__ import annotations

import math
import re

from svb.extract.decode import DecodeErrors, right_angle, tagged_seconds
from svb.extract.ffmpeg_process import Lines


class FfmpegLog:
    """Reads what ffmpeg says of the input, and counts its complaints.

    Attributes:
        container_format: The demuxer's names, such as `matroska,webm`; empty where none opened the file.
        unit_seconds: What a timestamp counts in, exact.
        errors: Damage that ffmpeg met while decoding.
        last_words: The last error of any kind.
    """

    # Indentation tells ffmpeg's own lines from tags of the file that look like them.
    _DURATION = re.compile(r"\[info\]   Duration: ([\d:.]+)")
    _STREAM = re.compile(r"\[info\]   Stream #0:(\d+)[^ ]*: (\w+): (\w+)")
    _RATE = re.compile(r", ([\d.]+)(k?) fps\b")
    _TAG = re.compile(r"\[info\]       DURATION +: ([\d:.]+)", re.IGNORECASE)
    _TURN = re.compile(r"\[info\]       Display ?Matrix: rotation of (-?[\d.]+) degrees", re.IGNORECASE)
    _UNIT = re.compile(r"\[graph .* input from stream .*\] \[verbose\] .* tb:(\d+)/(\d+) ")
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
        self.errors = DecodeErrors()
        self.last_words = ""
        self.has_picture = False
        self._container_seconds = math.nan
        self._streams: dict[int, _Stream] = {}
        self._current: _Stream | None = None
        self._in_banner = False
        self._has_turning_filter = False
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
            if match[2] == "Video" and "(attached pic)" in line:
                self.has_picture = True
            elif match[2] == "Video":
                self._current = self._streams.setdefault(int(match[1]), _Stream(match[3]))
                rate = self._RATE.search(line)
                if rate:
                    self._current.frame_rate = float(rate[1]) * (1000 if rate[2] else 1) or math.nan
        elif self._current is not None and (match := self._TAG.match(line)):
            self._current.duration_seconds = tagged_seconds(match[1])
        elif self._current is not None and (match := self._TURN.match(line)):
            self._current.turn_degrees = float(match[1])

    def _read_event(self, line: str) -> None:
        if line.startswith(("[transpose @", "[rotate @")):
            self._has_turning_filter = True
        if match := self._UNIT.match(line):
            self.unit_seconds = int(match[1]) / int(match[2])
        if match := self._ERROR.match(line):
            self.last_words = match[1][:500]
        if match := self._DAMAGE.search(line):
            self.errors.add((match[1] or match[2])[:500])

    @property
    def has_video(self) -> bool:
        return bool(self._streams)

    @property
    def is_turned(self) -> bool:
        """Say whether ffmpeg turns the picture, by its container's word or, seldom, its codec's."""
        return self._has_turning_filter or (self.has_video and not math.isnan(self._first.turn_degrees))

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
        turn = self._first.turn_degrees
        return 0 if math.isnan(turn) else right_angle(turn)

    @property
    def duration_seconds(self) -> float:
        tag = self._first.duration_seconds
        return tag if tag > 0 else self._container_seconds


class _Stream:
    """A video stream as the log describes it; NaN is unknown, of a turn: none."""

    def __init__(self, codec: str) -> None:
        self.codec = codec
        self.frame_rate = math.nan
        self.duration_seconds = math.nan
        self.turn_degrees = math.nan
