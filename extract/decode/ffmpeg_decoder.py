"""Decodes with the ffmpeg program: slower than PyAV, but it reads more formats.

ffmpeg-python builds the arguments; the process is run here, because `ffmpeg.run()` has no time limit
and holds a whole video in memory. Pictures come as PAM, which includes their size. The promised
duration comes from ffmpeg's log, and frame times come through a pipe of their own: the filter graph
prints each frame's timestamp before and after the choice.
"""

from __future__ import annotations

import contextlib
import math
import re
from array import array
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ffmpeg
import numpy as np
from numpy.typing import NDArray

from svb.extract.decode.choice import (
    FrameChooser,
    Item,
    PacketTimes,
    RunningClock,
    decoded_at_right_positions,
    without_skipping,
)
from svb.extract.decode.decoder import (
    NEUTRAL_COLOURS,
    SCALE_FLAGS,
    SDR_COLOURS,
    ChunkBuilder,
    DecodeError,
    FrameChunk,
    VideoProperties,
    best_stream,
    check_file,
    judge_end,
    max_pixels,
    no_video,
    note_of,
    on_white,
    origin_seconds,
    require_clear,
    unreadable,
    zero_frames,
)
from svb.extract.decode.ffmpeg_filters import Choice, print_time, scaled_size, select_expression
from svb.extract.decode.ffmpeg_process import FfmpegLog, FfmpegProcess, Lines, PamPictures
from svb.extract.decode.options import DecodeOptions
from svb.extract.decode.sampling import shown_at

# libavutil's AV_NOPTS_VALUE, which framecrc prints as a number.
NO_TIMESTAMP = -(1 << 63)

# Printed with the time of every decoded frame, and of every chosen one.
DECODED, CHOSEN = "decoded", "chosen"


@dataclass(frozen=True)
class _Source:
    """The file, its open descriptor and how to decode it.

    The last four only show once ffmpeg has described the file; then it is started anew.

    Attributes:
        stream: The number of the video stream to use; None means the first that is no cover art.
        is_turned: Whether ffmpeg turns the picture.
        hdr_transfer: The name of a transfer function for HDR, or empty.
        neutral: How many of `NEUTRAL_COLOURS` were tried.
        hardware_words: Why the hardware decoder that was asked for is not used, or empty.
    """

    path: Path
    fd: int
    options: DecodeOptions
    stream: int | None = None
    is_turned: bool = False
    hdr_transfer: str = ""
    neutral: int = 0
    hardware_words: str = ""

    def input(self, **options: Any) -> Any:
        """Return the graph's input: the open file and nothing else, so that a playlist cannot open other files."""
        return ffmpeg.input("fd:", fd=self.fd, protocol_whitelist="fd", copyts=None, **options)

    def video(self, **options: Any) -> Any:
        """Return the graph's video stream."""
        return self.input(**options)["V:0" if self.stream is None else str(self.stream)]


class _StartAnewError(Exception):
    """ffmpeg's log shows, before the first frame, that the file must be decoded otherwise."""

    def __init__(self, source: _Source) -> None:
        self.source = source


class _ClockRestartedError(Exception):
    """The file's clock starts again, which ffmpeg's own choice of frames by their times does not allow for."""


class _HardwareError(Exception):
    """The hardware decoder failed, which says nothing about the file."""


# After this many failures in a row the hardware decoder is not tried again by this process.
MAX_HARDWARE_FAILURES = 3

_hardware_failures: list[str] = []


def decode(path: Path, options: DecodeOptions) -> Iterator[Item]:
    """Decode one file; see `svb.extract.decode.decoder.Decoder`.

    Where the hardware decoder fails, the file is decoded in software, from where the hardware stopped.
    """
    check_file(path)
    try:
        file = path.open("rb")
    except OSError as error:
        raise unreadable(path, str(error)) from error
    with file:
        source = _Source(path, file.fileno(), options)
        if options.hwaccel is not None and len(_hardware_failures) == MAX_HARDWARE_FAILURES:
            source = _in_software(source, _hardware_failures[-1])
        done = _Done()
        while True:
            try:
                yield from done.rest_of(_decode(source))
                if source.options.hwaccel is not None:
                    _hardware_failures.clear()
                return
            except _HardwareError as error:
                _hardware_failures.append(str(error))
                source = _in_software(source, str(error))
            except _StartAnewError as anew:
                source = anew.source
            except DecodeError as error:
                unskipped = without_skipping(source.options)
                if error.status != "zero_frames" or unskipped is None:
                    raise
                source = replace(source, options=unskipped)


def _in_software(source: _Source, words: str) -> _Source:
    options = replace(source.options, hwaccel=None, hwaccel_device=None)
    return replace(source, options=options, hardware_words=words)


class _Done:
    """What has been passed on of a file, so that decoding it in another way passes on the rest."""

    def __init__(self) -> None:
        self._had_properties = False
        self._last_seconds = -math.inf

    def rest_of(self, items: Iterator[Item]) -> Iterator[Item]:
        """Pass on what is new: frames later than the last one, and the properties once."""
        for item in items:
            if isinstance(item, FrameChunk):
                yield from item.after(self._last_seconds)
                self._last_seconds = max(self._last_seconds, float(item.frame_times_seconds[-1]))
            elif not (self._had_properties and isinstance(item, VideoProperties)):
                self._had_properties = True
                yield item


def _decode(source: _Source) -> Iterator[Item]:
    sampling, is_fast = source.options.sampling, source.options.fast
    if sampling.frames is not None and not is_fast:
        listed = _list_packets([source.video()], source)

        def decode_at(positions: list[int], seen_seconds: array[float]) -> Iterator[Item]:
            return _decode_choice(source, Choice(positions, seen_seconds=seen_seconds))

        yield from decoded_at_right_positions(decode_at, listed, sampling)
        return
    try:
        yield from _decode_choice(source, _choice(source))
        return
    except _ClockRestartedError:
        positions = _positions_by_time(source)
    yield from _decode_choice(source, Choice(positions))


def _positions_by_time(source: _Source) -> list[int]:
    """Return the positions of the frames that the sampling uses, from the times of all frames."""
    chooser = FrameChooser(source.path, source.options)
    positions = []
    with contextlib.closing(_DecodeRun(source, Choice([])).times()) as times:
        for position, time_seconds in enumerate(times):
            chooser.count(time_seconds)
            if chooser.chooses(time_seconds):
                positions.append(position)
    return positions


def _decode_choice(source: _Source, choice: Choice) -> Iterator[Item]:
    run = _DecodeRun(source, choice)
    chunks = ChunkBuilder()
    properties: VideoProperties | None = None
    for frame, time_seconds in _frames_or_last(run):
        if properties is None:
            properties = run.properties()
            yield properties
        yield from chunks.add(frame, time_seconds)
    if source.options.hwaccel is not None and (properties is None or run.log.errors.count):
        _require_hardware(run.log, has_frames=properties is not None)
    if properties is None:
        raise _failure(source.path, run.log)
    yield from chunks.flush()
    end = judge_end(
        properties,
        run.decoded_seconds(),
        run.log.errors,
        lambda: _whole_file_seconds(source, run.log.container_format),
        note_of(*run.log.place_among_videos, source.hdr_transfer, source.hardware_words),
    )
    yield replace(end, in_software=bool(source.hardware_words))


def _require_hardware(log: FfmpegLog, has_frames: bool) -> None:
    """Check that the hardware decoder did not cause a failed decoding.

    Raises:
        _HardwareError: It did, or ffmpeg ended before its first frame without a word.
    """
    words = log.hardware_words or ("" if log.last_words or has_frames else "ffmpeg ended without a word")
    if words:
        raise _HardwareError(words)


def _choice(source: _Source) -> Choice:
    """List the wanted frames beforehand, from packets or decoded frames, if the sampling needs it."""
    sampling, is_fast = source.options.sampling, source.options.fast
    if sampling.times_seconds is not None:
        # Only the next frame tells whether a frame is shown at a time, and a filter cannot look ahead.
        with contextlib.closing(_DecodeRun(source, Choice()).times()) as times:
            return Choice([position for position, _ in shown_at(sampling.times_seconds, enumerate(times))] or [0])
    if not is_fast or (sampling.frames is None and sampling.every_nth is None):
        return Choice()
    return Choice(targets_seconds=_list_packets([source.video()], source).targets_seconds(sampling))


def _frames_or_last(run: _DecodeRun) -> Iterator[tuple[NDArray[np.uint8], float]]:
    yield from run.frames()
    if run.chooser.decoded and not run.chooser.used:
        # All the wanted frames lie in the part that does not decode: use the last one that does.
        run.choice = Choice([run.chooser.decoded - 1])
        yield from run.frames()


def _failure(path: Path, log: FfmpegLog) -> DecodeError:
    if not log.container_format:
        return unreadable(path, log.last_words)
    if not log.has_video:
        return no_video(path, has_picture=log.has_picture)
    return zero_frames(path, log.last_words)


class _DecodeRun:
    """Runs ffmpeg over the file and pairs pictures with their times.

    Attributes:
        choice: The frames to use.
        log: ffmpeg's log.
        chooser: Counts every decoded frame; drops frames that ffmpeg's filter graph lets through by mistake.
    """

    def __init__(self, source: _Source, choice: Choice) -> None:
        self.choice = choice
        self._source = source
        self._clear()

    def _clear(self) -> None:
        self.log = _new_log(self._source)
        choice = self.choice
        self.chooser = FrameChooser(
            self._source.path, self._source.options, choice.positions, choice.targets_seconds, choice.seen_seconds
        )
        self._clock = RunningClock()
        self._pictures = PamPictures()
        self._times = Lines()
        self._chosen_seconds: deque[float | None] = deque()

    def times(self) -> Generator[float]:
        """Yield the time of every decoded frame without making pictures."""

        def arguments(times_fd: int) -> list[str]:
            stream = print_time(self._source.video(**_input_options(self._source.options)), DECODED, times_fd)
            return list(ffmpeg.get_args(stream.output("pipe:1", f="null", fps_mode="passthrough")))

        with FfmpegProcess(arguments, self._source.fd) as process:
            for source, data in process.output():
                if source == "log":
                    _read_log(self.log, data, self._source)
                elif source == "times":
                    for line in self._times.feed(data):
                        self._note_time(line)
                        if line.startswith(DECODED):
                            yield self._time_seconds

    def frames(self) -> Iterator[tuple[NDArray[np.uint8], float]]:
        """Yield the chosen frames, `(H, W, 3)`, with their times."""
        self._clear()

        def arguments(times_fd: int) -> list[str]:
            return _decode_arguments(self._source, self.choice, times_fd)

        with FfmpegProcess(arguments, self._source.fd) as process:
            for source, data in process.output():
                if source == "log":
                    _read_log(self.log, data, self._source)
                    _require_known_picture(self.log, self._source)
                elif source == "times":
                    for line in self._times.feed(data):
                        self._note_time(line)
                else:
                    self._pictures.feed(data)
                yield from self._pairs()

    def _note_time(self, line: str) -> None:
        # Each frame has two lines: `frame:0 pts:0 pts_time:0`, then `decoded=1` or `chosen=1`.
        if line.startswith("frame:"):
            self._timestamp = int(line.split("pts:")[1].split(maxsplit=1)[0])
        elif line.startswith(DECODED):
            # The same double as the filters' `t` and as PyAV's decoder has.
            self._time_seconds = self._clock.running(self._timestamp * self.log.unit_seconds)
            if self._clock.restarts and self._source.options.sampling.fps is not None and not self.choice.is_listed:
                raise _ClockRestartedError
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

    def properties(self) -> VideoProperties:
        """Return the properties that the log gives, with the size of frames before resizing."""
        width, height = self.log.displayed_px
        return VideoProperties(
            duration_seconds=self.log.duration_seconds,
            frame_rate=self.log.frame_rate,
            width_px=width,
            height_px=height,
            rotation_degrees=self.log.rotation_degrees,
            codec=self.log.codec,
        )

    def decoded_seconds(self) -> float:
        """Return how many seconds were decoded, whether or not their frames were used."""
        frame_seconds = 1 / self.log.frame_rate if self.log.frame_rate > 0 else 0.0
        end = self.chooser.last_time_seconds + frame_seconds
        return end - origin_seconds(self.log.container_format, self.chooser.first_time_seconds)


def _new_log(source: _Source) -> FfmpegLog:
    log = FfmpegLog()
    log.stream = source.stream
    return log


def _read_log(log: FfmpegLog, data: bytes, source: _Source) -> None:
    """Feed a log.

    Raises:
        DecodeError: `over_limit` or `encrypted`.
        _StartAnewError: Another video stream than the first must be used.
    """
    had_description = log.is_described
    log.feed(data)
    if log.is_described and source.stream is None and len(candidates := log.candidates()) > 1:
        stills: list[int] = []
        if "mp4" in log.container_format:
            numbers = [candidate.number for candidate in candidates]
            stills = [
                n for n in numbers if _list_packets([source.input()[str(n)]], replace(source, stream=n)).count == 1
            ]
        raise _StartAnewError(replace(source, stream=best_stream(log.candidates(stills))))
    log.require_within(source.path, source.options.limits)
    if log.has_video and log.is_described and not had_description:
        require_clear(source.path, log.container_format)


def _require_known_picture(log: FfmpegLog, source: _Source) -> None:
    """Start anew if the picture needs other filters.

    Raises:
        _StartAnewError: It does.
    """
    known = replace(
        source, is_turned=source.is_turned or log.is_turned, hdr_transfer=source.hdr_transfer or log.hdr_transfer
    )
    if log.refuses_colours and source.neutral + 1 < len(NEUTRAL_COLOURS):
        known = replace(known, neutral=source.neutral + 1)
    if log.is_described and known != source:
        raise _StartAnewError(known)


def _input_options(options: DecodeOptions) -> dict[str, Any]:
    arguments: dict[str, Any] = {"threads": 1, "max_pixels": max_pixels(options.limits)}
    if options.sampling.keyframes or options.fast:
        arguments["skip_frame"] = "nokey" if options.sampling.keyframes else "noref"
    if options.hwaccel is not None:
        arguments["hwaccel"] = options.hwaccel
        if options.hwaccel_device is not None:
            arguments["hwaccel_device"] = options.hwaccel_device
    return arguments


def _decode_arguments(source: _Source, choice: Choice, times_fd: int) -> list[str]:
    sampling = source.options.sampling
    options = _input_options(source.options)
    if not source.is_turned and sampling.scenes is None:
        # If the resolution changes ffmpeg would build the graph anew, and the choice would start over.
        # Instead the scale filter adapts. The filters that turn a picture cannot, so turned video keeps
        # the default: after a change its frames may be up to a grid step late, or missing. The filter
        # that finds scenes cannot either: it would read past the end of smaller frames.
        options["reinit_filter"] = 0
    width, height = scaled_size(source.options.resize_px)
    if "colorspace" in NEUTRAL_COLOURS[source.neutral]:
        # ffmpeg refuses a reserved matrix even before the first filter.
        options["colorspace"] = "unknown"
    stream = print_time(source.video(**options), DECODED, times_fd)
    if neutral := NEUTRAL_COLOURS[source.neutral]:
        stream = stream.filter("setparams", **dict.fromkeys(neutral, "unknown"))
    to_sdr = dict(pair.split("=") for pair in SDR_COLOURS.split(":")) if source.hdr_transfer else {}
    stream = print_time(stream.filter("select", select_expression(sampling, choice)), CHOSEN, times_fd)
    stream = (
        stream.filter("scale", w=width, h=height, flags=f"{source.options.interpolation}+{SCALE_FLAGS}", **to_sdr)
        .filter("format", "rgba")
        .output("pipe:1", f="image2pipe", fps_mode="passthrough", threads=1, **{"c:v": "pam"})
    )
    return list(ffmpeg.get_args(stream))


def _whole_file_seconds(source: _Source, container_format: str) -> float:
    """Return the duration of all the file's packets, sound included."""
    # With several video streams ffmpeg only names the duration of the longest.
    others = ["a?"] if source.stream is None else ["a?", "V?"]
    times = _list_packets([source.video(), *(source.input()[other] for other in others)], source)
    return times.end_seconds - origin_seconds(container_format, times.start_seconds)


def _list_packets(streams: list[Any], source: _Source) -> PacketTimes:
    """List the times of packets without decoding them."""
    graph = ffmpeg.output(*streams, "pipe:1", f="framecrc", c="copy", copyinkf=None)
    log, lines = _new_log(source), Lines()
    listed: PacketTimes | None = None
    units: dict[str, float] = {}
    with FfmpegProcess(lambda _: list(ffmpeg.get_args(graph)), source.fd) as process:
        for kind, data in process.output():
            if kind == "log":
                _read_log(log, data, source)
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
