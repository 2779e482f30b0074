"""Decodes with an ffmpeg program of its own: slower than PyAV, but it knows more formats.

ffmpeg-python builds the arguments; the process is owned here, because its `run()` has no time limit
and holds a whole video. Pictures come as PAM, which names its own size. The container's promise is
read off ffmpeg's log (there is no ffprobe), and frame times come over a pipe of their own: the filter
graph prints each frame's timestamp before and after the choice.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Collection, Generator, Iterator
from pathlib import Path
from typing import Any

import ffmpeg
import numpy as np
from numpy.typing import NDArray

from svb.extract.decode import (
    MAX_ASPECT_RATIO,
    MIN_ASPECT_RATIO,
    SCALE_FLAGS,
    ChunkBuilder,
    DecodeEnd,
    FrameChooser,
    FrameChunk,
    PacketTimes,
    VideoProperties,
    check_file,
    judge_end,
    no_video,
    on_white,
    origin_seconds,
    unreadable,
    zero_frames,
)
from svb.extract.decode_options import DecodeOptions
from svb.extract.ffmpeg_log import FfmpegLog
from svb.extract.ffmpeg_process import FfmpegProcess, Lines, Pictures
from svb.extract.sampling import TIME_TOLERANCE_SECONDS, Sampling

# Linux takes no argument longer than 128 KiB. Past this many positions every frame is converted and
# the unwanted ones are dropped here.
MAX_SELECTED_POSITIONS = 5000

# libavutil's AV_NOPTS_VALUE, which framecrc prints as it is.
NO_TIMESTAMP = -(1 << 63)

# Printed with the time of every decoded frame, and of every chosen one.
DECODED, CHOSEN = "decoded", "chosen"


def decode(path: Path, options: DecodeOptions) -> Iterator[VideoProperties | FrameChunk | DecodeEnd]:
    """Decode one file; see `svb.extract.decode.Decoder`."""
    check_file(path)
    sampling = options.sampling
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


def _failure(path: Path, log: FfmpegLog) -> Exception:
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
        self.log = FfmpegLog()
        self.chooser = FrameChooser(self._sampling, self.positions)
        self._pictures = Pictures()
        self._times = Lines()
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

        with FfmpegProcess(arguments, self._video_fd) as process:
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
                yield on_white(picture), time_seconds

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
        .filter("format", "rgba")
        .output("pipe:1", f="image2pipe", fps_mode="passthrough", threads=1, **{"c:v": "pam"})
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
    log, lines = FfmpegLog(), Lines()
    listed: PacketTimes | None = None
    units: dict[str, float] = {}
    with FfmpegProcess(lambda _: list(ffmpeg.get_args(graph)), video_fd) as process:
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
