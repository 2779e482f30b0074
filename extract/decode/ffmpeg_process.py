"""Runs the ffmpeg program: its process, its output and its log, and the hardware that it can decode with.

The log describes the input, because there is no ffprobe.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import selectors
import subprocess
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

import imageio_ffmpeg
import numpy as np
from numpy.typing import NDArray

from svb.errors import UsageError
from svb.extract.decode.containers import is_fragmented
from svb.extract.decode.decoder import (
    Candidate,
    DecodeErrors,
    require_duration,
    require_size,
    require_streams,
    right_angle,
    square_pixels_width,
    tagged_seconds,
)
from svb.extract.decode.options import Limits

# More than a pipe holds: one read empties it, so that lines are seen in the order of writing.
READ_BYTES = 1 << 20

# Longer lines are cut.
LINE_BYTES = 1 << 16

# `level` marks each line of the log; `verbose` prints the exact time base.
GLOBAL_OPTIONS = (
    *("-nostdin", "-hide_banner", "-nostats"),
    *("-v", "repeat+level+verbose", "-filter_complex_threads", "1"),
)


class FfmpegProcess:
    """An ffmpeg process that ends with the `with` block and never blocks on a pipe that nobody reads."""

    def __init__(self, arguments: Callable[[int], list[str]], video_fd: int) -> None:
        # Earlier processes have moved the file's position, which all of them share.
        os.lseek(video_fd, 0, os.SEEK_SET)
        times_read, times_write = os.pipe()
        try:
            self._process = subprocess.Popen(
                [imageio_ffmpeg.get_ffmpeg_exe(), *GLOBAL_OPTIONS, *arguments(times_write)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=(video_fd, times_write),
            )
        except BaseException:
            os.close(times_read)
            raise
        finally:
            os.close(times_write)
        self._times = os.fdopen(times_read, "rb", buffering=0)

    def __enter__(self) -> FfmpegProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdout, self._process.stderr, self._times):
            if pipe is not None:
                pipe.close()

    def output(self) -> Iterator[tuple[str, bytes]]:
        """Yield `("log" | "times" | "pictures", bytes)` until ffmpeg has closed all three.

        While the caller is busy nothing is read, so ffmpeg waits and memory stays bounded. ffmpeg writes
        the log and the time of a picture before the picture, so they are read in that order.
        """
        assert self._process.stdout is not None and self._process.stderr is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stderr, selectors.EVENT_READ, (0, "log"))
            selector.register(self._times, selectors.EVENT_READ, (1, "times"))
            selector.register(self._process.stdout, selectors.EVENT_READ, (2, "pictures"))
            while selector.get_map():
                for key, _ in sorted(selector.select(), key=lambda ready: ready[0].data):
                    data = os.read(key.fd, READ_BYTES)
                    if data:
                        yield key.data[1], data
                    else:
                        selector.unregister(key.fileobj)
        # A process that closed its pipes is done; if it lingers it is killed on exit.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5)


class Lines:
    """Cuts bytes into lines; keeps at most one unfinished line."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[str]:
        *lines, self._rest = (self._rest + data).split(b"\n")
        self._rest = self._rest[-LINE_BYTES:]
        return [line.decode("utf-8", "replace").rstrip("\r") for line in lines]


class PamPictures:
    """Cuts bytes into PAM pictures.

    Attributes:
        ready: Whole pictures that wait to be taken: `(H, W, 4)` uint8, RGB and alpha.
    """

    _HEADER = re.compile(rb"P7\nWIDTH (\d+)\nHEIGHT (\d+)\nDEPTH 4\nMAXVAL 255\nTUPLTYPE RGB_ALPHA\nENDHDR\n")

    def __init__(self) -> None:
        self.ready: deque[NDArray[np.uint8]] = deque()
        self._bytes = bytearray()

    def feed(self, data: bytes) -> None:
        self._bytes += data
        while True:
            header = self._HEADER.match(self._bytes)
            if header is None:
                return
            width, height, start = int(header[1]), int(header[2]), header.end()
            # A match holds the buffer, which then cannot be cut.
            del header
            end = start + width * height * 4
            if len(self._bytes) < end:
                return
            picture = np.frombuffer(bytes(self._bytes[start:end]), dtype=np.uint8)
            self.ready.append(picture.reshape(height, width, 4))
            del self._bytes[:end]


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

    def __init__(self) -> None:
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
        self.stream: int | None = None
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


# A driver that hangs must not hang the command line.
HWACCEL_TIMEOUT_SECONDS = 30.0


_HWACCEL_ADVICE = "leave out --hwaccel, or set IMAGEIO_FFMPEG_EXE to an ffmpeg built with it"


def require_hwaccel(name: str) -> None:
    """Check that ffmpeg knows a hardware decoder and that its device opens.

    ffmpeg would fall back to software silently. It still does so for codecs that the device cannot decode.

    Args:
        name: As `ffmpeg -hwaccels` prints it, such as `cuda`.

    Raises:
        UsageError: ffmpeg does not know it, or cannot open the device; quotes ffmpeg.
    """
    listed, _ = _ask("-hwaccels")
    known = listed.partition(":\n")[2].split()
    if name not in known:
        raise UsageError(
            f"ffmpeg knows no hardware decoder {name!r} - expected one of {', '.join(known) or 'none at all'}; "
            f"{_HWACCEL_ADVICE}"
        )
    arguments = (
        "-init_hw_device",
        name,
        "-f",
        "lavfi",
        "-i",
        "color=size=16x16",
        "-frames:v",
        "1",
        "-f",
        "null",
        "-",
    )
    said, exit_code = _ask(*arguments)
    if exit_code != 0:
        words = "; ".join(line.strip() for line in said.splitlines()[:2]) or f"exit code {exit_code}"
        raise UsageError(
            f"ffmpeg cannot open the hardware decoder {name!r} on this machine: {words} - this ffmpeg knows "
            f"{', '.join(known)}, and each needs its device and driver; {_HWACCEL_ADVICE}"
        )


def run_to_end(arguments: Sequence[str], video_fd: int, time_limit_seconds: float) -> tuple[int, list[str]]:
    """Run ffmpeg on an open file; return its exit code and the lines that it wrote to stderr.

    Args:
        arguments: All but the program; its standard input and output are closed.
        video_fd: The file, which ffmpeg reads from the start as `fd:`.
        time_limit_seconds: ffmpeg is killed when it takes longer.

    Raises:
        subprocess.TimeoutExpired: It took longer.
    """
    # Whoever has read the file before has moved its position.
    os.lseek(video_fd, 0, os.SEEK_SET)
    done = subprocess.run(
        [imageio_ffmpeg.get_ffmpeg_exe(), *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        pass_fds=(video_fd,),
        timeout=time_limit_seconds,
        check=False,
    )
    return done.returncode, done.stderr.decode("utf-8", "replace").strip().splitlines()


def _ask(*arguments: str) -> tuple[str, int]:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-hide_banner", "-v", "error", *arguments]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=HWACCEL_TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {HWACCEL_TIMEOUT_SECONDS:.0f} s", 1
    return done.stdout.decode("utf-8", "replace"), done.returncode
