"""Opens a video with PyAV and reads its packets; mends frame times as the ffmpeg program does."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import av
import av.error
from av.container import InputContainer
from av.container.core import Flags
from av.packet import Packet
from av.stream import Discard, Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from svb.extract.decode import decoder as decode_module
from svb.extract.decode.choice import PacketTimes
from svb.extract.decode.containers import OggPart, is_fragmented, ogg_parts, part_url
from svb.extract.decode.decoder import (
    Candidate,
    DecodeErrors,
    best_stream,
    no_video,
    origin_seconds,
    require_clear,
    require_duration,
    require_size,
    require_streams,
    tagged_seconds,
    unreadable,
    zero_frames,
)
from svb.extract.decode.options import Limits


@contextlib.contextmanager
def opened(path: Path, limits: Limits, part: OggPart | None = None) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open a file and its best video stream that is no cover art; refuse what exceeds the limits.

    The demuxer gets one open file and access to nothing else: a playlist that is named .mp4 cannot
    open other files, and no file name is ever taken for an option or a pattern.

    Args:
        path: The file.
        limits: Which files are refused.
        part: The part of a joined Ogg file; by default the first.
    """
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(path.open("rb"))
            parts = [] if part is not None else ogg_parts(path, decode_module.heartbeat)
            url, protocols = part_url(parts[0] if len(parts) > 1 else part)
            options = {"fd": str(file.fileno()), "protocol_whitelist": protocols}
            container = stack.enter_context(av.open(url, options=options))
        except (OSError, ValueError, av.error.FFmpegError) as error:
            raise unreadable(path, error_words(error)) from error
        require_streams(path, limits, len(container.streams))
        # PyAV asks for invented times, which are out of order for packed AVI; ffmpeg does not.
        container.flags &= ~cast("int", Flags.gen_pts.value)
        pictures = [bool(s.disposition & Disposition.attached_pic) for s in container.streams.video]
        if all(pictures):
            raise no_video(path, has_picture=any(pictures))
        stream = _best_stream(
            [s for s, is_picture in zip(container.streams.video, pictures, strict=True) if not is_picture]
        )
        if stream.codec_context is None:
            raise zero_frames(path, "its codec is unknown")
        require_size(path, limits, stream.codec_context.width, stream.codec_context.height)
        require_clear(path, container.format.name)
        require_duration(path, limits, promised_seconds(container, stream, path))
        require_duration(path, limits, (container.duration or 0) / 1e6 - _counted_start(container, path))
        stream.codec_context.options = {"max_pixels": str(limits.max_pixels)}
        # Automatic threading can hang where many decoders run at once.
        stream.codec_context.thread_count = 1
        stream.codec_context.thread_type = "NONE"
        yield container, stream


def whole_file_seconds(path: Path, limits: Limits) -> float:
    """Return the duration of all the file's packets, sound included."""
    with opened(path, limits) as (container, stream):
        times = PacketTimes(0.0)
        streams = (stream, *container.streams.audio)
        for packet in read_packets(container, streams, DecodeErrors()):
            add_packet(packet, times, with_empty=True)
        return times.end_seconds - origin_seconds(container.format.name, times.start_seconds)


def add_packet(packet: Packet[VideoStream], times: PacketTimes, with_empty: bool = False) -> None:
    """Add a packet to a list of times; an empty one says that the picture before it stays."""
    is_empty = not packet.size and (not with_empty or packet.pts is None)
    if not is_empty and not packet.is_discard:
        timestamp = packet.pts if packet.pts is not None else packet.dts
        unit = packet.time_base
        seconds = None if timestamp is None else timestamp * (unit.numerator / unit.denominator)
        times.add(seconds, float((packet.duration or 0) * unit))


def read_packets(
    container: InputContainer, streams: tuple[object, ...], errors: DecodeErrors
) -> Iterator[Packet[VideoStream]]:
    """Yield packets up to the end or to the first that cannot be read."""
    for other in container.streams:
        # A stream that is not read must not end the file where its own part of it is missing.
        other.discard = Discard.default if other in streams else Discard.all
    try:
        for packet in cast("Iterator[Packet[VideoStream]]", container.demux(*streams)):
            # Many packets in a row may give no frame: skipped or damaged ones.
            decode_module.heartbeat()
            yield packet
    except av.error.FFmpegError as error:
        errors.add(error_words(error))


class FrameClock:
    """Mends frame times as libavcodec's best-effort timestamps and the ffmpeg program do.

    PyAV gives only the two raw times: the presentation time, which is missing or wrong in some AVI files,
    and the packet's decoding time. The one that has run backwards less often is used.
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


def _best_stream(streams: list[VideoStream]) -> VideoStream:
    candidates = [
        Candidate(
            stream.index,
            stream.codec_context.width * stream.codec_context.height if stream.codec_context else 0,
            is_default=bool(stream.disposition & Disposition.default),
            is_still=stream.frames == 1,
        )
        for stream in streams
    ]
    number = best_stream(candidates)
    return next(stream for stream in streams if stream.index == number)


def place_among_videos(container: InputContainer, stream: VideoStream) -> tuple[int, int]:
    """Return how many video streams a file has, cover art left out, and which one this is, from 1."""
    numbers = [s.index for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    return len(numbers), numbers.index(stream.index) + 1


def _counted_start(container: InputContainer, path: Path) -> float:
    """Return the start time if the container's durations include it, else 0.0."""
    start = (container.start_time or 0) / 1e6
    return start if start > 0 and "mp4" in container.format.name and is_fragmented(path) else 0.0


def promised_seconds(container: InputContainer, stream: VideoStream, path: Path) -> float:
    """Return the stream's duration, else that of Matroska's tag, else the container's."""
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base) - _counted_start(container, path)
    tag = tagged_seconds(stream.metadata.get("DURATION", ""))
    if tag > 0:
        return tag
    return (
        container.duration / 1e6 - _counted_start(container, path) if container.duration is not None else math.nan
    )


def error_words(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
