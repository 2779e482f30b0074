"""Decodes in this process with PyAV on one thread: the fast decoder.

PyAV leaves out some things that the ffmpeg program does. They are done here: turning rotated video,
mending frame times, going on after a damaged packet, and reporting a file that ends early as `partial`.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import av.error
import av.logging
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from svb.extract.decode import decoder as decode_module
from svb.extract.decode.choice import (
    FrameChooser,
    Item,
    PacketTimes,
    PassedOn,
    RunningClock,
    SkipPlan,
    StretchList,
    decoded_at_right_positions,
    without_skipping,
)
from svb.extract.decode.containers import OggPart, container_crop, ogg_parts, what_is_missing
from svb.extract.decode.decoder import (
    ChunkBuilder,
    DecodeError,
    DecodeErrors,
    VideoProperties,
    check_file,
    judge_end,
    note_of,
    origin_seconds,
    require_size,
    right_angle,
    zero_frames,
)
from svb.extract.decode.options import DecodeOptions
from svb.extract.decode.pyav_file import (
    FrameClock,
    add_packet,
    error_words,
    opened,
    place_among_videos,
    promised_seconds,
    read_packets,
    whole_file_seconds,
)
from svb.extract.decode.pyav_pictures import (
    Converter,
    SceneDetector,
    clockwise_degrees,
    display_matrix,
    hdr_transfer,
)
from svb.extract.decode.sampling import Sampling, shown_at

# If this many frames a second are wanted, nearly every stretch holds one: listing packets is not worth it.
FPS_THAT_NEEDS_ALL = 1.0

# How libavcodec's messages about concealed damage begin.
HIDDEN_DAMAGE = ("concealing", "error while decoding")

# PyAV holds a repeated message back until another one comes: it would be counted for the next file.
av.logging.set_skip_repeated(False)


class _NotAsListedError(Exception):
    """Stretches of a video did not decode to the frames that its packets listed."""


def decode(path: Path, options: DecodeOptions) -> Iterator[Item]:
    """Decode one file; see `svb.extract.decode.decoder.Decoder`.

    If frames are wanted seldom, only the stretches around them are decoded, provided that the packets
    show that the frames come out the same. At the first sign of damage the whole video is decoded.
    """
    check_file(path)
    if options.fast and len(ogg_parts(path, decode_module.heartbeat)) > 1:
        options = replace(options, fast=False)  # the frames to take are found by decoding all parts
    try:
        yield from _decode_what_is_needed(path, options)
        return
    except DecodeError as error:
        unskipped = without_skipping(options)
        if error.status != "zero_frames" or unskipped is None:
            raise
    yield from _decode(path, unskipped, FrameChooser(path, unskipped))


def _decode_what_is_needed(path: Path, options: DecodeOptions) -> Iterator[Item]:
    listed, chooser, plan = _listed(path, options)
    passed_on = PassedOn()
    if plan is not None:
        with contextlib.suppress(_NotAsListedError):
            yield from passed_on.rest_of(_decode(path, options, FrameChooser(path, options), plan))
            return

    def decode_at(positions: list[int], seen_seconds: array[float]) -> Iterator[Item]:
        return _decode(path, options, FrameChooser(path, options, positions, seen_seconds=seen_seconds))

    if listed is not None and options.sampling.frames is not None and not options.fast:
        yield from passed_on.rest_of(decoded_at_right_positions(decode_at, listed, options.sampling))
    else:
        yield from passed_on.rest_of(_decode(path, options, chooser))


def _decode(
    path: Path, options: DecodeOptions, chooser: FrameChooser, plan: SkipPlan | None = None
) -> Iterator[Item]:
    errors = DecodeErrors()
    chunks = ChunkBuilder()
    with opened(path, options.limits) as (container, stream):
        stream.codec_context.skip_frame = _skipped(options)
        crop = container_crop(path, container.format.name, stream.index)
        converter = Converter(stream, options.resize_px, crop, options.interpolation)
        running = RunningClock()
        parts = ogg_parts(path, decode_module.heartbeat)
        decoded = itertools.chain(
            _decoded_frames(container, stream, errors, running, plan),
            _frames_of_other_parts(path, parts[1:], options, errors, running),
        )
        first = next(decoded, None)
        if first is None:
            raise zero_frames(path, errors.last_words) if plan is None else _NotAsListedError
        properties = _properties(path, container, stream, converter, first[0])
        require_size(path, options.limits, properties.width_px, properties.height_px)
        yield properties
        hdr = hdr_transfer(first[0])
        frames = _Counted(itertools.chain([first], decoded), chooser)
        chosen = (
            _chosen(frames, options.sampling, chooser, stream, running)
            if plan is None
            else _planned(frames, plan, chooser, errors)
        )
        for frame, time_seconds in chosen:
            yield from chunks.add(converter.rgb(frame), time_seconds)
        for _ in frames:
            # Damage after the last wanted frame makes a video partial, too.
            pass
        if not chooser.used:
            # All the wanted frames lie in the part that does not decode: use the last one that does.
            frame, time_seconds = frames.last
            yield from chunks.add(converter.rgb(frame), time_seconds)
        yield from chunks.flush()
        if plan is not None:
            chooser.first_time_seconds, chooser.last_time_seconds = plan.first_time_seconds, plan.last_time_seconds
        decoded_seconds = _decoded_seconds(container, chooser, properties)
        note = note_of(*place_among_videos(container, stream), hdr)
        missing = what_is_missing(path, parts, decode_module.heartbeat)
    whole_seconds = functools.partial(whole_file_seconds, path, options.limits)
    yield judge_end(properties, decoded_seconds, errors, whole_seconds, note, missing)


def _skipped(options: DecodeOptions) -> Literal["NONKEY", "NONREF", "DEFAULT"]:
    """Return which frames libavcodec is to leave out."""
    return "NONKEY" if options.sampling.keyframes else "NONREF" if options.fast else "DEFAULT"


def _listed(path: Path, options: DecodeOptions) -> tuple[PacketTimes | None, FrameChooser, SkipPlan | None]:
    """Return the packets' times if they are needed, what chooses the frames, and which stretches to decode."""
    sampling = options.sampling
    by_position = sampling.frames is not None or (sampling.every_nth is not None and options.fast)
    if not by_position and (options.fast or not _is_sparse(sampling)):
        return None, FrameChooser(path, options), None
    errors = DecodeErrors()
    with opened(path, options.limits) as (container, stream):
        rate = stream.average_rate
        times = PacketTimes(float(1 / rate) if rate else 0.0)
        stretches = StretchList(stream)
        for packet in read_packets(container, (stream,), errors):
            add_packet(packet, times)
            stretches.add(packet)
    if options.fast:
        return times, FrameChooser(path, options, targets_seconds=times.targets_seconds(sampling)), None
    chooser = FrameChooser(path, options, times.positions(sampling) if by_position else None)
    shown = [] if errors.count else stretches.sorted_times_seconds()
    plan = stretches.plan(_wanted(shown, path, options, times)) if shown else None
    return times, chooser, plan


def _is_sparse(sampling: Sampling) -> bool:
    is_slow = sampling.fps is not None and sampling.fps < FPS_THAT_NEEDS_ALL
    return is_slow or sampling.times_seconds is not None or sampling.every_nth is not None


def _wanted(shown_seconds: list[float], path: Path, options: DecodeOptions, times: PacketTimes) -> list[float]:
    """Return the times of the frames that are used if the whole video decodes."""
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
    """Passes decoded frames on and counts them.

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
    frames: _Counted, sampling: Sampling, chooser: FrameChooser, stream: VideoStream, running: RunningClock
) -> Iterator[tuple[VideoFrame, float]]:
    """Yield the frames that are used, with their times."""
    if sampling.times_seconds is not None:
        for frame, time_seconds in shown_at(sampling.times_seconds, frames):
            chooser.use(time_seconds)
            yield frame, time_seconds
        return
    scenes: SceneDetector | None = None
    part = -1
    for frame, time_seconds in frames:
        if sampling.scenes is not None and part != running.parts:  # a part begins with a scene
            scenes, part = SceneDetector(stream, sampling.scenes), running.parts
        # Some codecs cannot skip: their other frames arrive here.
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
        _NotAsListedError: A frame is missing, or something is damaged.
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


def _decoded_frames(
    container: InputContainer,
    stream: VideoStream,
    errors: DecodeErrors,
    running: RunningClock,
    plan: SkipPlan | None = None,
) -> Iterator[tuple[VideoFrame, float]]:
    """Yield frames and their times in order of presentation; continue after damage, as ffmpeg does."""
    clock = FrameClock(stream)
    packets = (packet for packet in read_packets(container, (stream,), errors) if packet.size)
    for packet in packets if plan is None else _needed_packets(packets, plan):
        for frame in _decode_packet(stream, packet, errors):
            yield frame, running.running(clock.time_seconds(frame))
        if packet is None:
            stream.codec_context.flush_buffers()
    for frame in _decode_packet(stream, None, errors):
        yield frame, running.running(clock.time_seconds(frame))


def _frames_of_other_parts(
    path: Path, parts: Sequence[OggPart], options: DecodeOptions, errors: DecodeErrors, running: RunningClock
) -> Iterator[tuple[VideoFrame, float]]:
    """Yield the frames of these parts of a joined Ogg file; one that gives none is damage."""
    for number, part in enumerate(parts, 2):
        running.begin_part()
        num_frames = 0
        with contextlib.ExitStack() as stack:
            try:
                container, stream = stack.enter_context(opened(path, options.limits, part))
            except DecodeError as error:
                errors.add(str(error))
                continue
            stream.codec_context.skip_frame = _skipped(options)
            for frame in _decoded_frames(container, stream, errors, running):
                num_frames += 1
                yield frame
        if not num_frames:
            errors.add(f"part {number} gave no frame")


def _needed_packets(packets: Iterator[Packet[VideoStream]], plan: SkipPlan) -> Iterator[Packet[VideoStream] | None]:
    """Yield the packets of needed stretches, and None where packets are left out: the decoder must be emptied."""
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
    # libavcodec neither raises concealed damage nor marks the frame: it only logs it.
    av.logging.set_level(av.logging.INFO)
    frames: list[VideoFrame] = []
    try:
        with av.logging.Capture() as log:
            frames = stream.codec_context.decode(packet)
    except av.error.FFmpegError as error:
        errors.add(error_words(error))
    finally:
        av.logging.set_level(level)
    concealed = [message.strip() for _, _, message in log if message.startswith(HIDDEN_DAMAGE)]
    if concealed:
        errors.add(concealed[-1])
    elif any(frame.is_corrupt for frame in frames):
        errors.add("corrupt decoded frame")
    return frames


def _properties(
    path: Path, container: InputContainer, stream: VideoStream, converter: Converter, frame: VideoFrame
) -> VideoProperties:
    width, height = converter.size(frame)
    return VideoProperties(
        duration_seconds=promised_seconds(container, stream, path),
        frame_rate=float(stream.average_rate) if stream.average_rate else math.nan,
        width_px=width,
        height_px=height,
        rotation_degrees=right_angle(-clockwise_degrees(display_matrix(frame))),
        codec=stream.codec_context.codec.canonical_name,
    )


def _decoded_seconds(container: InputContainer, chooser: FrameChooser, properties: VideoProperties) -> float:
    frame_seconds = 1 / properties.frame_rate if properties.frame_rate > 0 else 0.0
    end = chooser.last_time_seconds + frame_seconds
    return end - origin_seconds(container.format.name, chooser.first_time_seconds)
