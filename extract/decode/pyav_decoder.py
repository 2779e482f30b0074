"""Decodes in this process with PyAV, one thread: the fast way.

What the ffmpeg program does on its own and PyAV does not is done here: turning rotated video, mending
frame times, going on after a damaged packet, and calling a half-read file `partial`.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import av
import av.error
import av.logging
from av.container import InputContainer
from av.container.core import Flags
from av.packet import Packet
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from svb.extract.decode import decoder as decode_module
from svb.extract.decode.decoder import (
    ChunkBuilder,
    DecodeEnd,
    DecodeError,
    DecodeErrors,
    FrameChooser,
    FrameChunk,
    PacketTimes,
    VideoProperties,
    check_file,
    judge_end,
    max_pixels,
    no_video,
    origin_seconds,
    require_duration,
    require_size,
    require_streams,
    right_angle,
    tagged_seconds,
    unreadable,
    without_skipping,
    zero_frames,
)
from svb.extract.decode.options import DecodeOptions, Limits
from svb.extract.decode.pyav_pictures import Converter, SceneDetector, clockwise_degrees, display_matrix
from svb.extract.decode.sampling import Sampling, shown_at
from svb.extract.decode.skip_plan import SkipPlan, StretchList

# Whole stretches of a video are seldom without a frame that is used at this many a second: not worth a look.
FPS_THAT_NEEDS_ALL = 1.0

# How libavcodec begins to tell of damage that it hides.
HIDDEN_DAMAGE = ("concealing", "error while decoding")

# PyAV keeps a message that is repeated until another one comes: it would be held against the next file.
av.logging.set_skip_repeated(False)


class _NotAsListedError(Exception):
    """Stretches of a video did not decode to what its packets let expect."""


def decode(path: Path, options: DecodeOptions) -> Iterator[VideoProperties | FrameChunk | DecodeEnd]:
    """Decode one file; see `svb.extract.decode.decoder.Decoder`.

    Of a video that is sampled sparsely only the stretches around wanted frames are decoded, where its
    packets tell that the frames come out the same. At the first sign of damage all of it is.
    """
    check_file(path)
    try:
        yield from _decode_what_is_needed(path, options)
        return
    except DecodeError as error:
        unskipped = without_skipping(options)
        if error.status != "zero_frames" or unskipped is None:
            raise
    yield from _decode(path, unskipped, FrameChooser(path, unskipped))


def _decode_what_is_needed(
    path: Path, options: DecodeOptions
) -> Iterator[VideoProperties | FrameChunk | DecodeEnd]:
    chooser, plan = _listed(path, options)
    had_properties = False
    last_seconds = -math.inf
    if plan is not None:
        with contextlib.suppress(_NotAsListedError):
            for item in _decode(path, options, FrameChooser(path, options), plan):
                had_properties = True
                if isinstance(item, FrameChunk):
                    last_seconds = float(item.frame_times_seconds[-1])
                yield item
            return
    for item in _decode(path, options, chooser):
        if isinstance(item, FrameChunk):
            yield from item.after(last_seconds)
        elif not (had_properties and isinstance(item, VideoProperties)):
            yield item


def _decode(
    path: Path, options: DecodeOptions, chooser: FrameChooser, plan: SkipPlan | None = None
) -> Iterator[VideoProperties | FrameChunk | DecodeEnd]:
    errors = DecodeErrors()
    chunks = ChunkBuilder()
    with opened(path, options.limits) as (container, stream):
        stream.codec_context.skip_frame = (
            "NONKEY" if options.sampling.keyframes else "NONREF" if options.fast else "DEFAULT"
        )
        converter = Converter(stream, options.resize_px)
        decoded = _decoded_frames(container, stream, errors, plan)
        first = next(decoded, None)
        if first is None:
            raise zero_frames(path, errors.last_words) if plan is None else _NotAsListedError
        properties = _properties(container, stream, converter, first[0])
        require_size(path, options.limits, properties.width_px, properties.height_px)
        yield properties
        frames = _Counted(itertools.chain([first], decoded), chooser)
        chosen = (
            _chosen(frames, options.sampling, chooser, stream)
            if plan is None
            else _planned(frames, plan, chooser, errors)
        )
        for frame, time_seconds in chosen:
            yield from chunks.add(converter.rgb(frame), time_seconds)
        for _ in frames:
            # Past the last wanted time, too, damage makes a video partial.
            pass
        if not chooser.used:
            # Every position asked for lies in the part that does not decode.
            frame, time_seconds = frames.last
            yield from chunks.add(converter.rgb(frame), time_seconds)
        yield from chunks.flush()
        if plan is not None:
            chooser.first_time_seconds, chooser.last_time_seconds = plan.first_time_seconds, plan.last_time_seconds
        decoded_seconds = _decoded_seconds(container, chooser, properties)
    yield judge_end(properties, decoded_seconds, errors, lambda: _whole_file_seconds(path, options.limits))


def _listed(path: Path, options: DecodeOptions) -> tuple[FrameChooser, SkipPlan | None]:
    """Return what chooses frames, and what need not be decoded; for that the packets may be read first."""
    sampling = options.sampling
    by_position = sampling.frames is not None or (sampling.every_nth is not None and options.fast)
    if not by_position and (options.fast or not _is_sparse(sampling)):
        return FrameChooser(path, options), None
    errors = DecodeErrors()
    with opened(path, options.limits) as (container, stream):
        rate = stream.average_rate
        times = PacketTimes(float(1 / rate) if rate else 0.0)
        stretches = StretchList(stream)
        for packet in _packets(container, (stream,), errors):
            _note_packet(packet, times)
            stretches.add(packet)
    if options.fast:
        return FrameChooser(path, options, targets_seconds=times.targets_seconds(sampling)), None
    chooser = FrameChooser(path, options, times.positions(sampling) if by_position else None)
    shown = [] if errors.count else stretches.sorted_times_seconds()
    return chooser, stretches.plan(_wanted(shown, path, options, times)) if shown else None


def _is_sparse(sampling: Sampling) -> bool:
    is_slow = sampling.fps is not None and sampling.fps < FPS_THAT_NEEDS_ALL
    return is_slow or sampling.times_seconds is not None or sampling.every_nth is not None


def _wanted(shown_seconds: list[float], path: Path, options: DecodeOptions, times: PacketTimes) -> list[float]:
    """Return the times of the frames that are used, of a video that decodes whole."""
    sampling = options.sampling
    if sampling.times_seconds is not None:
        return [
            seconds
            for _, seconds in shown_at(sampling.times_seconds, zip(shown_seconds, shown_seconds, strict=True))
        ]
    chooser = FrameChooser(path, options, None if sampling.frames is None else times.positions(sampling))
    wanted = []
    for seconds in shown_seconds:
        chooser.count(seconds)
        if chooser.chooses(seconds):
            wanted.append(seconds)
    return wanted


class _Counted:
    """Counts decoded frames on their way.

    Attributes:
        last: The latest frame and its time.
    """

    def __init__(self, frames: Iterator[tuple[VideoFrame, float]], chooser: FrameChooser) -> None:
        self.last: tuple[VideoFrame, float]
        self._frames = frames
        self._chooser = chooser

    def __iter__(self) -> _Counted:
        return self

    def __next__(self) -> tuple[VideoFrame, float]:
        self.last = next(self._frames)
        self._chooser.count(self.last[1])
        return self.last


def _chosen(
    frames: _Counted, sampling: Sampling, chooser: FrameChooser, stream: VideoStream
) -> Iterator[tuple[VideoFrame, float]]:
    """Yield the frames that are used, with their times."""
    if sampling.times_seconds is not None:
        for frame, time_seconds in shown_at(sampling.times_seconds, frames):
            chooser.use(time_seconds)
            yield frame, time_seconds
        return
    scenes = None if sampling.scenes is None else SceneDetector(stream, sampling.scenes)
    for frame, time_seconds in frames:
        # Not every decoder knows how to skip.
        if sampling.keyframes and not frame.key_frame:
            continue
        if scenes is not None and not scenes.begins(frame):
            continue
        if chooser.chooses(time_seconds):
            yield frame, time_seconds


def _planned(
    frames: _Counted, plan: SkipPlan, chooser: FrameChooser, errors: DecodeErrors
) -> Iterator[tuple[VideoFrame, float]]:
    """Yield the planned frames, with their times.

    Raises:
        _NotAsListedError: One is missing, or something is damaged.
    """
    wanted = iter(plan.times_seconds)
    next_seconds = next(wanted, math.inf)
    for frame, time_seconds in frames:
        if errors.count or time_seconds > next_seconds:
            raise _NotAsListedError
        if time_seconds == next_seconds:
            chooser.use(time_seconds)
            yield frame, time_seconds
            next_seconds = next(wanted, math.inf)
    if errors.count or next_seconds < math.inf:
        raise _NotAsListedError


@contextlib.contextmanager
def opened(path: Path, limits: Limits) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open a file and its first real video stream; refuse one over the limits.

    The demuxer gets an open file and the right to nothing else: a playlist that calls itself .mp4
    cannot open other files, and no name, however odd, is taken for an option or a pattern.
    """
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(path.open("rb"))
            options = {"fd": str(file.fileno()), "protocol_whitelist": "fd"}
            container = stack.enter_context(av.open("fd:", options=options))
        except (OSError, ValueError, av.error.FFmpegError) as error:
            raise unreadable(path, _words(error)) from error
        require_streams(path, limits, len(container.streams))
        # PyAV asks for invented times, which are out of order for packed AVI; ffmpeg does not.
        container.flags &= ~cast("int", Flags.gen_pts.value)
        pictures = [bool(s.disposition & Disposition.attached_pic) for s in container.streams.video]
        if all(pictures):
            raise no_video(path, has_picture=any(pictures))
        stream = container.streams.video[pictures.index(False)]
        if stream.codec_context is None:
            raise zero_frames(path, "its codec is unknown")
        require_size(path, limits, stream.codec_context.width, stream.codec_context.height)
        require_duration(path, limits, promised_seconds(container, stream))
        require_duration(path, limits, (container.duration or 0) / 1e6)
        stream.codec_context.options = {"max_pixels": str(max_pixels(limits))}
        # Automatic threading can hang where many decoders run at once.
        stream.codec_context.thread_count = 1
        stream.codec_context.thread_type = "NONE"
        yield container, stream


def _whole_file_seconds(path: Path, limits: Limits) -> float:
    """Return how long the file's packets last, sound included."""
    with opened(path, limits) as (container, stream):
        times = PacketTimes(0.0)
        streams = (stream, *container.streams.audio)
        for packet in _packets(container, streams, DecodeErrors()):
            _note_packet(packet, times)
        return times.end_seconds - _origin_seconds(container, times.start_seconds)


def _note_packet(packet: Packet[VideoStream], times: PacketTimes) -> None:
    if packet.size and not packet.is_discard:
        timestamp = packet.pts if packet.pts is not None else packet.dts
        unit = packet.time_base
        seconds = None if timestamp is None else timestamp * (unit.numerator / unit.denominator)
        times.add(seconds, float((packet.duration or 0) * unit))


def _packets(
    container: InputContainer, streams: tuple[object, ...], errors: DecodeErrors
) -> Iterator[Packet[VideoStream]]:
    """Yield packets up to the end or to what cannot be read any more."""
    try:
        for packet in cast("Iterator[Packet[VideoStream]]", container.demux(*streams)):
            # Of many packets in a row no frame may come: skipped ones, damaged ones.
            decode_module.got_on()
            yield packet
    except av.error.FFmpegError as error:
        errors.add(_words(error))


def _decoded_frames(
    container: InputContainer, stream: VideoStream, errors: DecodeErrors, plan: SkipPlan | None
) -> Iterator[tuple[VideoFrame, float]]:
    """Yield frames and their times in order of presentation; goes on after damage as ffmpeg does."""
    clock = FrameClock(stream)
    packets = (packet for packet in _packets(container, (stream,), errors) if packet.size)
    for packet in packets if plan is None else _needed_packets(packets, plan):
        for frame in _decode_packet(stream, packet, errors):
            yield frame, clock.time_seconds(frame)
        if packet is None:
            stream.codec_context.flush_buffers()
    for frame in _decode_packet(stream, None, errors):
        yield frame, clock.time_seconds(frame)


def _needed_packets(packets: Iterator[Packet[VideoStream]], plan: SkipPlan) -> Iterator[Packet[VideoStream] | None]:
    """Yield the packets of needed stretches; None where what follows is left out, and the decoder to be emptied."""
    was_needed = False
    for number, packet in enumerate(packets):
        if number == len(plan.stretches):
            raise _NotAsListedError
        is_needed = plan.stretches[number] in plan.needed
        if is_needed or was_needed:
            yield packet if is_needed else None
        was_needed = is_needed


def _decode_packet(
    stream: VideoStream, packet: Packet[VideoStream] | None, errors: DecodeErrors
) -> list[VideoFrame]:
    """Return the frames that a packet completes; None empties the decoder."""
    level = av.logging.get_level()
    # Hidden damage is neither raised nor marked on the frame: the decoder only mentions it in its log.
    av.logging.set_level(av.logging.INFO)
    frames: list[VideoFrame] = []
    try:
        with av.logging.Capture() as log:
            frames = stream.codec_context.decode(packet)
    except av.error.FFmpegError as error:
        errors.add(_words(error))
    finally:
        av.logging.set_level(level)
    concealed = [message.strip() for _, _, message in log if message.startswith(HIDDEN_DAMAGE)]
    if concealed:
        errors.add(concealed[-1])
    elif any(frame.is_corrupt for frame in frames):
        errors.add("corrupt decoded frame")
    return frames


class FrameClock:
    """Mends frame times as libavcodec's best-effort timestamps and the ffmpeg program do.

    PyAV has only the raw two: the presentation time, which some AVI files lack or get wrong, and the
    decoding time of the packet. Whichever has run backwards less often is believed.
    """

    def __init__(self, stream: VideoStream) -> None:
        unit = stream.time_base
        assert unit is not None
        # The same double that ffmpeg's filters multiply by, so that both decoders' times agree to the bit.
        self._unit_seconds = unit.numerator / unit.denominator
        rate = stream.guessed_rate
        self._frame_units = max(1, round(1 / (rate * unit))) if rate else 1
        self._last_pts = self._last_dts = -math.inf
        self._faulty_pts = self._faulty_dts = 0
        self._last_timestamp: int | None = None

    def time_seconds(self, frame: VideoFrame) -> float:
        timestamp = self._best_effort(frame.pts, frame.dts)
        if timestamp is None:
            last = self._last_timestamp
            timestamp = 0 if last is None else last + (frame.duration or self._frame_units)
        self._last_timestamp = timestamp
        return timestamp * self._unit_seconds

    def _best_effort(self, pts: int | None, dts: int | None) -> int | None:
        if dts is not None:
            self._faulty_dts += dts <= self._last_dts
            self._last_dts = dts
        elif pts is not None:
            self._last_dts = pts
        if pts is not None:
            self._faulty_pts += pts <= self._last_pts
            self._last_pts = pts
        elif dts is not None:
            self._last_pts = dts
        if pts is not None and (self._faulty_pts <= self._faulty_dts or dts is None):
            return pts
        return dts


def _properties(
    container: InputContainer, stream: VideoStream, converter: Converter, frame: VideoFrame
) -> VideoProperties:
    width, height = converter.size(frame)
    return VideoProperties(
        duration_seconds=promised_seconds(container, stream),
        frame_rate=float(stream.average_rate) if stream.average_rate else math.nan,
        width_px=width,
        height_px=height,
        rotation_degrees=right_angle(-clockwise_degrees(display_matrix(frame))),
        codec=stream.codec_context.codec.canonical_name,
    )


def promised_seconds(container: InputContainer, stream: VideoStream) -> float:
    """Return the stream's duration, from Matroska's tag where it is nowhere else, before the container's."""
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    tag = tagged_seconds(stream.metadata.get("DURATION", ""))
    if tag > 0:
        return tag
    return container.duration / 1e6 if container.duration is not None else math.nan


def _decoded_seconds(container: InputContainer, chooser: FrameChooser, properties: VideoProperties) -> float:
    frame_seconds = 1 / properties.frame_rate if properties.frame_rate > 0 else 0.0
    end = chooser.last_time_seconds + frame_seconds
    return end - _origin_seconds(container, chooser.first_time_seconds)


def _origin_seconds(container: InputContainer, first_time_seconds: float) -> float:
    return origin_seconds(container.format.name, first_time_seconds)


def _words(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
