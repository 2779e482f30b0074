"""Decodes with the ffmpeg program: slower than PyAV, but it reads more formats.

ffmpeg-python builds the arguments; the process is run here, because `ffmpeg.run()` has no time limit
and holds a whole video in memory. Pictures come as PAM, which includes their size. The promised
duration comes from ffmpeg's log, and frame times come through a pipe of their own: the filter graph
prints each frame's timestamp before and after the choice.
"""

from __future__ import annotations

import contextlib
from array import array
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ffmpeg
import numpy as np
from numpy.typing import NDArray

from svb.extract.decode import decoder as decode_module
from svb.extract.decode.choice import (
    FrameChooser,
    Item,
    PacketTimes,
    PassedOn,
    RunningClock,
    decoded_at_right_positions,
    without_skipping,
)
from svb.extract.decode.containers import ogg_parts, what_is_missing
from svb.extract.decode.decoder import (
    NEUTRAL_COLOURS,
    ChunkBuilder,
    DecodeError,
    VideoProperties,
    best_stream,
    check_file,
    judge_end,
    note_of,
    on_white,
    origin_seconds,
    require_clear,
    unreadable,
)
from svb.extract.decode.ffmpeg_arguments import (
    CHOSEN,
    DECODED,
    Choice,
    Source,
    decode_arguments,
    input_options,
    print_time,
)
from svb.extract.decode.ffmpeg_log import FfmpegLog, note_packet
from svb.extract.decode.ffmpeg_process import FfmpegProcess, Lines, PamPictures
from svb.extract.decode.options import DecodeOptions, resized
from svb.extract.decode.sampling import shown_at


class _StartAnewError(Exception):
    """ffmpeg's log shows, before the first frame, that the file must be decoded otherwise."""

    def __init__(self, source: Source) -> None:
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
        source = _source(path, file.fileno(), options)
        if options.hwaccel is not None and len(_hardware_failures) == MAX_HARDWARE_FAILURES:
            source = _in_software(source, _hardware_failures[-1])
        passed_on = PassedOn()
        while True:
            try:
                yield from passed_on.rest_of(_decode(source))
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


def _source(path: Path, fd: int, options: DecodeOptions) -> Source:
    parts = tuple(ogg_parts(path, decode_module.heartbeat))
    if len(parts) < 2:
        return Source(path, fd, options, parts)
    # The frames to take are found by decoding all parts, which skips nothing.
    return Source(path, fd, replace(options, fast=False), parts, parts[0])


def _in_software(source: Source, words: str) -> Source:
    options = replace(source.options, hwaccel=None, hwaccel_device=None)
    return replace(source, options=options, hardware_words=words)


def _decode(source: Source) -> Iterator[Item]:
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


def _positions_by_time(source: Source) -> list[int]:
    """Return the positions of the frames that the sampling uses, from the times of all frames."""
    chooser = FrameChooser(source.path, source.options)
    positions = []
    with contextlib.closing(_DecodeRun(source, Choice([])).times()) as times:
        for position, time_seconds in enumerate(times):
            chooser.count(time_seconds)
            if chooser.chooses(time_seconds):
                positions.append(position)
    return positions


def _decode_choice(source: Source, choice: Choice) -> Iterator[Item]:
    run = _DecodeRun(source, choice)
    chunks = ChunkBuilder()
    properties: VideoProperties | None = None
    for frame, time_seconds in _frames_or_last(run):
        if properties is None:
            properties = run.log.properties()
            yield properties
        yield from chunks.add(frame, time_seconds)
    if source.options.hwaccel is not None and (properties is None or run.log.errors.count):
        _require_hardware(run.log, has_frames=properties is not None)
    if properties is None:
        raise run.log.failure(source.path)
    yield from chunks.flush()
    end = judge_end(
        properties,
        run.decoded_seconds(),
        run.log.errors,
        lambda: _whole_file_seconds(source, run.log.container_format),
        note_of(*run.log.place_among_videos, source.hdr_transfer, source.hardware_words),
        what_is_missing(source.path, source.parts, decode_module.heartbeat),
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


def _choice(source: Source) -> Choice:
    """List the wanted frames beforehand, from packets or decoded frames, if the sampling needs it."""
    sampling, is_fast = source.options.sampling, source.options.fast
    if sampling.times_seconds is not None:
        # Only the next frame tells whether a frame is shown at a time, and a filter cannot look ahead.
        with contextlib.closing(_DecodeRun(source, Choice()).times()) as times:
            return Choice([position for position, _ in shown_at(sampling.times_seconds, enumerate(times))] or [0])
    if source.is_joined and (sampling.fps is not None or sampling.every_nth is not None):
        return Choice(_positions_by_time(source))  # ffmpeg itself would begin to count anew with each part
    if not is_fast or (sampling.frames is None and sampling.every_nth is None):
        return Choice()
    return Choice(targets_seconds=_list_packets([source.video()], source).targets_seconds(sampling))


def _frames_or_last(run: _DecodeRun) -> Iterator[tuple[NDArray[np.uint8], float]]:
    yield from run.frames()
    if run.chooser.decoded and not run.chooser.used:
        # All the wanted frames lie in the part that does not decode: use the last one that does.
        run.choice = Choice([run.chooser.decoded - 1])
        yield from run.frames()


class _DecodeRun:
    """Runs ffmpeg over the file, part by part if it was joined, and pairs pictures with their times.

    Attributes:
        choice: The frames to use.
        log: ffmpeg's log; of a joined file that of the first part that gives a frame, and the errors of all.
        chooser: Counts every decoded frame; drops frames that ffmpeg's filter graph lets through by mistake.
    """

    def __init__(self, source: Source, choice: Choice) -> None:
        self.choice = choice
        self._source = source
        self._clear()

    def _clear(self) -> None:
        self.log = self._log_of_part = FfmpegLog(self._source.stream)
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

        def arguments(source: Source, times_fd: int) -> list[str]:
            stream = print_time(source.video(**input_options(source.options)), DECODED, times_fd)
            return list(ffmpeg.get_args(stream.output("pipe:1", f="null", fps_mode="passthrough")))

        with contextlib.closing(self._output(arguments)) as output:
            for kind, data in output:
                if kind == "times":
                    for line in self._times.feed(data):
                        self._note_time(line)
                        if line.startswith(DECODED):
                            yield self._time_seconds

    def frames(self) -> Iterator[tuple[NDArray[np.uint8], float]]:
        """Yield the chosen frames, `(H, W, 3)`, with their times."""
        self._clear()

        def arguments(source: Source, times_fd: int) -> list[str]:
            if self.chooser.decoded:  # all frames get the size of the first
                width, height = resized(*self.log.displayed_px, source.options.resize_px)
                source = replace(source, options=replace(source.options, resize_px=(height, width)))
            return decode_arguments(source, self.choice.after(self.chooser.decoded), times_fd)

        with contextlib.closing(self._output(arguments)) as output:
            for kind, data in output:
                if kind == "log":
                    _require_known_picture(self._log_of_part, self._source)
                elif kind == "times":
                    for line in self._times.feed(data):
                        self._note_time(line)
                else:
                    self._pictures.feed(data)
                yield from self._pairs()

    def _output(self, arguments: Callable[[Source, int], list[str]]) -> Generator[tuple[str, bytes]]:
        """Run ffmpeg on each part of the file and yield what it writes; its log is read already."""
        for number, source in enumerate(self._source.in_parts(), 1):
            num_before, refusal = self.chooser.decoded, ""
            if number > 1:
                self._begin_part()
            with FfmpegProcess(partial(arguments, source), source.fd) as process:
                for kind, data in process.output():
                    if kind == "log":
                        try:
                            _read_log(self._log_of_part, data, source)
                        except DecodeError as error:
                            if number == 1:
                                raise
                            refusal = str(error)
                            break
                    yield kind, data
            if refusal or (number > 1 and self.chooser.decoded == num_before):
                self.log.errors.add(refusal or f"part {number} gave no frame")

    def _begin_part(self) -> None:
        errors, self._log_of_part = self.log.errors, FfmpegLog(self._source.stream)
        self._log_of_part.errors = errors
        if not self.chooser.decoded:
            self.log = self._log_of_part
        self._clock.begin_part()
        self._pictures, self._times = PamPictures(), Lines()
        self._chosen_seconds.clear()

    def _note_time(self, line: str) -> None:
        # Each frame has two lines: `frame:0 pts:0 pts_time:0`, then `decoded=1` or `chosen=1`.
        if line.startswith("frame:"):
            self._timestamp = int(line.split("pts:")[1].split(maxsplit=1)[0])
        elif line.startswith(DECODED):
            # The same double as the filters' `t` and as PyAV's decoder has.
            self._time_seconds = self._clock.running(self._timestamp * self._log_of_part.unit_seconds)
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

    def decoded_seconds(self) -> float:
        """Return how many seconds were decoded, whether or not their frames were used."""
        frame_seconds = 1 / self.log.frame_rate if self.log.frame_rate > 0 else 0.0
        end = self.chooser.last_time_seconds + frame_seconds
        return end - origin_seconds(self.log.container_format, self.chooser.first_time_seconds)


def _read_log(log: FfmpegLog, data: bytes, source: Source) -> None:
    """Feed a log.

    Raises:
        DecodeError: `over_limit` or `encrypted`.
        _StartAnewError: Another video stream than the first must be used.
    """
    had_description = log.is_described
    log.feed(data)
    may_choose = source.stream is None and source.is_first_part
    if log.is_described and may_choose and len(candidates := log.candidates()) > 1:
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


def _require_known_picture(log: FfmpegLog, source: Source) -> None:
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


def _whole_file_seconds(source: Source, container_format: str) -> float:
    """Return the duration of all the file's packets, sound included."""
    # ffmpeg names only the duration of the longest of several video streams.
    others = ["a?"] if source.stream is None else ["a?", "V?"]
    times = _list_packets([source.video(), *(source.input()[other] for other in others)], source)
    return times.end_seconds - origin_seconds(container_format, times.start_seconds)


def _list_packets(streams: list[Any], source: Source) -> PacketTimes:
    """List the times of packets without decoding them."""
    graph = ffmpeg.output(*streams, "pipe:1", f="framecrc", c="copy", copyinkf=None)
    log, lines = FfmpegLog(source.stream), Lines()
    listed: PacketTimes | None = None
    units: dict[str, float] = {}
    with FfmpegProcess(lambda _: list(ffmpeg.get_args(graph)), source.fd) as process:
        for kind, data in process.output():
            if kind == "log":
                _read_log(log, data, source)
                continue
            listed = listed or PacketTimes(1 / log.frame_rate if log.frame_rate > 0 else 0.0)
            for line in lines.feed(data):
                note_packet(line, units, listed)
    return listed or PacketTimes(0.0)
