"""Decodes with an ffmpeg program of its own: slower than PyAV, but it knows more formats.

ffmpeg-python builds the arguments; the process is owned here, because its `run()` has no time limit
and holds a whole video. Pictures come as PPM, which names its own size. The container's promise is
read off ffmpeg's log (there is no ffprobe), and frame times come over a pipe of their own: the filter
graph prints each frame's timestamp before and after the choice.
"""

from __future__ import annotations

import math
import os
import re
import selectors
import signal
import subprocess
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import ffmpeg
import imageio_ffmpeg
import numpy as np
from numpy.typing import NDArray

from svb.extract.decode import (
    MAX_ASPECT_RATIO,
    MIN_ASPECT_RATIO,
    SCALE_FLAGS,
    ChunkBuilder,
    DecodeEnd,
    DecodeErrors,
    FrameChooser,
    FrameChunk,
    PacketTimes,
    VideoProperties,
    check_file,
    judge_end,
    no_video,
    origin_seconds,
    right_angle,
    tagged_seconds,
    unreadable,
    zero_frames,
)
from svb.extract.sampling import TIME_TOLERANCE_SECONDS, Sampling

# More than a pipe holds: one read empties it, so that what was written first is also seen first.
READ_BYTES = 1 << 20

# A line of ffmpeg's log or of times longer than this is no longer looked at.
LINE_BYTES = 1 << 16

# Linux takes no argument longer than 128 KiB. Past this many positions every frame is converted and
# the unwanted ones are dropped here.
MAX_SELECTED_POSITIONS = 5000

# libavutil's AV_NOPTS_VALUE, which framecrc prints as it is.
NO_TIMESTAMP = -(1 << 63)

# `level` marks each line of the log; `verbose` tells the exact time base.
GLOBAL_OPTIONS = (
    *("-nostdin", "-hide_banner", "-nostats"),
    *("-v", "repeat+level+verbose", "-filter_complex_threads", "1"),
)

# Printed with the time of every decoded frame, and of every chosen one.
DECODED, CHOSEN = "decoded", "chosen"


def decode(path: Path, sampling: Sampling) -> Iterator[VideoProperties | FrameChunk | DecodeEnd]:
    """Decode one file; see `svb.extract.decode.Decoder`."""
    check_file(path)
    try:
        file = path.open("rb")
    except OSError as error:
        raise unreadable(path, str(error)) from error
    with file:
        positions = None if sampling.frames is None else _positions(file.fileno(), sampling)
        run = _DecodeRun(file.fileno(), sampling, positions)
        chunks = ChunkBuilder()
        properties: VideoProperties | None = None
        for frame, time_seconds in _frames_or_last(run):
            if properties is None:
                properties = run.properties(frame)
                yield properties
            yield from chunks.add(frame, time_seconds)
        if properties is None:
            raise _failure(path, run.log)
        yield from chunks.flush()
        yield judge_end(
            properties,
            run.decoded_seconds(),
            run.log.errors,
            lambda: _whole_file_seconds(file.fileno(), run.log.container_format),
        )


def _frames_or_last(run: _DecodeRun) -> Iterator[tuple[NDArray[np.uint8], float]]:
    yield from run.frames()
    if run.chooser.decoded and not run.chooser.used:
        # Every position asked for lies in the part that does not decode: take the last that does.
        run.positions = [run.chooser.decoded - 1]
        yield from run.frames()


def _failure(path: Path, log: _Log) -> Exception:
    if not log.container_format:
        return unreadable(path, log.last_words)
    if not log.has_video:
        return no_video(path, has_picture=log.has_picture)
    return zero_frames(path, log.last_words)


class _DecodeRun:
    """A run of ffmpeg over the file: pairs pictures with their times.

    Attributes:
        positions: Which frames to take, where `frames` are asked for.
        log: What ffmpeg said.
        chooser: Counts every decoded frame; drops what ffmpeg's filter graph lets through by mistake.
    """

    def __init__(self, video_fd: int, sampling: Sampling, positions: Collection[int] | None) -> None:
        self.positions = positions
        self._video_fd = video_fd
        self._sampling = sampling
        self._is_turned = False
        self._clear()

    def _clear(self) -> None:
        self.log = _Log()
        self.chooser = FrameChooser(self._sampling, self.positions)
        self._pictures = _Pictures()
        self._times = _Lines()
        self._chosen_seconds: deque[float | None] = deque()

    def frames(self) -> Iterator[tuple[NDArray[np.uint8], float]]:
        """Yield the chosen frames, `(H, W, 3)`, with their times."""
        self._clear()
        complete = yield from self._attempt()
        if not complete:
            self._is_turned = True
            self._clear()
            yield from self._attempt()

    def _attempt(self) -> Generator[tuple[NDArray[np.uint8], float], None, bool]:
        """Yield frames; returns False, before the first of them, where ffmpeg needs other options."""

        def arguments(times_fd: int) -> list[str]:
            select = _select_expression(self._sampling, self.positions)
            return _decode_arguments(self._video_fd, times_fd, select, self._is_turned)

        with _Ffmpeg(arguments, self._video_fd) as process:
            for source, data in process.output():
                if source == "log":
                    self.log.feed(data)
                    if self.log.is_turned and not self._is_turned:
                        return False
                elif source == "times":
                    for line in self._times.feed(data):
                        self._note_time(line)
                else:
                    self._pictures.feed(data)
                yield from self._pairs()
        return True

    def _note_time(self, line: str) -> None:
        # Two lines a frame: `frame:0 pts:0 pts_time:0`, then `decoded=1` or `chosen=1`.
        if line.startswith("frame:"):
            self._timestamp = int(line.split("pts:")[1].split(maxsplit=1)[0])
        elif line.startswith(DECODED):
            # The same double as the filters' `t` and as PyAV's decoder has.
            self._time_seconds = self._timestamp * self.log.unit_seconds
            self.chooser.count(self._time_seconds)
        elif line.startswith(CHOSEN):
            wanted = self.chooser.chooses(self._time_seconds)
            self._chosen_seconds.append(self._time_seconds if wanted else None)

    def _pairs(self) -> Iterator[tuple[NDArray[np.uint8], float]]:
        while self._pictures.ready and self._chosen_seconds:
            time_seconds = self._chosen_seconds.popleft()
            picture = self._pictures.ready.popleft()
            if time_seconds is not None:
                yield picture, time_seconds

    def properties(self, frame: NDArray[np.uint8]) -> VideoProperties:
        """Return what the log promised, with the size that frames turned out to have."""
        return VideoProperties(
            duration_seconds=self.log.duration_seconds,
            frame_rate=self.log.frame_rate,
            width_px=frame.shape[1],
            height_px=frame.shape[0],
            rotation_degrees=self.log.rotation_degrees,
            codec=self.log.codec,
        )

    def decoded_seconds(self) -> float:
        """Return how much was decoded, whether or not it was chosen."""
        frame_seconds = 1 / self.log.frame_rate if self.log.frame_rate > 0 else 0.0
        end = self.chooser.last_time_seconds + frame_seconds
        return end - origin_seconds(self.log.container_format, self.chooser.first_time_seconds)


def _input(video_fd: int, **options: Any) -> Any:
    """Return the graph's input: the open file and nothing else, so a playlist cannot open other files."""
    return ffmpeg.input("fd:", fd=video_fd, protocol_whitelist="fd", copyts=None, **options)


def _select_expression(sampling: Sampling, positions: Collection[int] | None) -> str:
    """Return the choice in ffmpeg's language; operation for operation that of `FrameChooser`."""
    if positions is None:
        assert sampling.fps is not None

        def grid_point(time: str) -> str:
            return f"floor(({time}-start_t+{TIME_TOLERANCE_SECONDS!r})*{float(sampling.fps or 0)!r})"

        return f"if(isnan(prev_selected_t),1,gt({grid_point('t')},{grid_point('prev_selected_t')}))"
    if len(positions) > MAX_SELECTED_POSITIONS:
        return "1"
    return _any_of(sorted(positions))


def _any_of(positions: list[int]) -> str:
    """Return an expression for `n` being one of them: a shallow tree, for each frame walks down it."""
    if len(positions) <= 8:
        return "+".join(f"eq(n,{position})" for position in positions)
    middle = len(positions) // 2
    return f"if(lt(n,{positions[middle]}),{_any_of(positions[:middle])},{_any_of(positions[middle:])})"


def _decode_arguments(video_fd: int, times_fd: int, select: str, is_turned: bool) -> list[str]:
    options: dict[str, Any] = {"threads": 1}
    if not is_turned:
        # Where the resolution changes ffmpeg builds the graph anew, and the choice starts over with it.
        # Without that the scale filter adapts. The filters that turn a picture would not, so turned
        # video keeps the default: after a change its frames may be up to a grid step late, or missing.
        options["reinit_filter"] = 0
    sane = f"between(sar,{MIN_ASPECT_RATIO!r},{MAX_ASPECT_RATIO!r})"
    stream = _print_time(_input(video_fd, **options)["V:0"], DECODED, times_fd).filter("select", select)
    stream = (
        _print_time(stream, CHOSEN, times_fd)
        .filter("scale", w=f"if({sane},max(1,floor(iw*sar+0.5)),iw)", h="ih", flags=SCALE_FLAGS)
        .filter("format", "rgb24")
        .output("pipe:1", f="image2pipe", fps_mode="passthrough", threads=1, **{"c:v": "ppm"})
    )
    return list(ffmpeg.get_args(stream))


def _print_time(stream: Any, key: str, times_fd: int) -> Any:
    # The filter prints only frames that carry its key, hence the pair.
    marked = stream.filter("metadata", mode="add", key=key, value=1)
    return marked.filter("metadata", mode="print", key=key, direct=1, file=f"pipe:{times_fd}")


def _positions(video_fd: int, sampling: Sampling) -> list[int]:
    """List the packets' times without decoding, and return which frames `frames` sampling uses."""
    return _list_packets([_input(video_fd)["V:0"]], video_fd).positions(sampling)


def _whole_file_seconds(video_fd: int, container_format: str) -> float:
    """Return how long the file's packets last, sound included."""
    source = _input(video_fd)
    times = _list_packets([source["V:0"], source["a?"]], video_fd)
    return times.end_seconds - origin_seconds(container_format, times.start_seconds)


def _list_packets(streams: list[Any], video_fd: int) -> PacketTimes:
    graph = ffmpeg.output(*streams, "pipe:1", f="framecrc", c="copy", copyinkf=None)
    log, lines = _Log(), _Lines()
    listed: PacketTimes | None = None
    units: dict[str, float] = {}
    with _Ffmpeg(lambda _: list(ffmpeg.get_args(graph)), video_fd) as process:
        for source, data in process.output():
            if source == "log":
                log.feed(data)
                continue
            listed = listed or PacketTimes(1 / log.frame_rate if log.frame_rate > 0 else 0.0)
            for line in lines.feed(data):
                _note_packet(line, units, listed)
    return listed or PacketTimes(0.0)


def _note_packet(line: str, units: dict[str, float], times: PacketTimes) -> None:
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


class _Ffmpeg:
    """An ffmpeg process that cannot outlive the `with`, nor block on a pipe that nobody reads."""

    def __init__(self, arguments: Callable[[int], list[str]], video_fd: int) -> None:
        # The place in the file is shared with the processes that read it before.
        os.lseek(video_fd, 0, os.SEEK_SET)
        times_read, times_write = os.pipe()
        try:
            self._process = subprocess.Popen(
                [imageio_ffmpeg.get_ffmpeg_exe(), *GLOBAL_OPTIONS, *arguments(times_write)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=(video_fd, times_write),
                start_new_session=True,
            )
        except BaseException:
            os.close(times_read)
            raise
        finally:
            os.close(times_write)
        self._times = os.fdopen(times_read, "rb", buffering=0)

    def __enter__(self) -> _Ffmpeg:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdout, self._process.stderr, self._times):
            if pipe is not None:
                pipe.close()

    def output(self) -> Iterator[tuple[str, bytes]]:
        """Yield `("log" | "times" | "pictures", bytes)` until ffmpeg has closed all three.

        One loop instead of threads: while the caller is busy nothing is read, ffmpeg waits and memory
        stays bounded; when the caller is back, whatever ffmpeg is stuck on is read. What explains a
        picture is written before it: so the log is read first, then times, then pictures.
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
        # A process that closed its pipes is done; one that lingers is killed on the way out.
        self._wait_a_little()

    def _wait_a_little(self) -> None:
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return


class _Lines:
    """Cuts bytes into lines; holds no more than one."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[str]:
        *lines, self._rest = (self._rest + data).split(b"\n")
        self._rest = self._rest[-LINE_BYTES:]
        return [line.decode("utf-8", "replace").rstrip("\r") for line in lines]


class _Pictures:
    """Cuts bytes into PPM pictures.

    Attributes:
        ready: Whole pictures, `(H, W, 3)` uint8 RGB, not yet taken.
    """

    _HEADER = re.compile(rb"P6\s(\d+) (\d+)\s255\n")

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
            # A match looks into the buffer, and what is looked into cannot be cut.
            del header
            end = start + width * height * 3
            if len(self._bytes) < end:
                return
            picture = np.frombuffer(bytes(self._bytes[start:end]), dtype=np.uint8)
            self.ready.append(picture.reshape(height, width, 3))
            del self._bytes[:end]


class _Log:
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
        self._lines = _Lines()

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
