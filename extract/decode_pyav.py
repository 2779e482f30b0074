"""Decodes in this process with PyAV, one thread: the fast way.

What the ffmpeg program does on its own and PyAV does not is done here: turning rotated video, mending
frame times, going on after a damaged packet, and calling a half-read file `partial`.
"""

from __future__ import annotations

import contextlib
import math
import struct
from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import cast

import av
import av.error
import av.filter
import av.logging
import numpy as np
from av.container import InputContainer
from av.container.core import Flags
from av.packet import Packet
from av.sidedata.sidedata import Type as SideDataType
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from numpy.typing import NDArray

from svb.extract.decode import (
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
    on_white,
    origin_seconds,
    right_angle,
    square_pixels_width,
    tagged_seconds,
    unreadable,
    zero_frames,
)
from svb.extract.decode_options import DecodeOptions
from svb.extract.sampling import Sampling


def decode(path: Path, options: DecodeOptions) -> Iterator[VideoProperties | FrameChunk | DecodeEnd]:
    """Decode one file; see `svb.extract.decode.Decoder`."""
    check_file(path)
    sampling = options.sampling
    chooser = FrameChooser(sampling, None if sampling.frames is None else _positions(path, sampling))
    errors = DecodeErrors()
    chunks = ChunkBuilder()
    with _opened(path) as (container, stream):
        converter = _Converter(stream)
        properties: VideoProperties | None = None
        last: tuple[VideoFrame, float] | None = None
        for frame, time_seconds in _decoded_frames(container, stream, errors):
            if properties is None:
                properties = _properties(container, stream, converter, frame)
                yield properties
            last = frame, time_seconds
            if chooser.wants(time_seconds):
                yield from chunks.add(converter.rgb(frame), time_seconds)
        if properties is None or last is None:
            raise zero_frames(path, errors.last_words)
        if not chooser.used:
            # Every position asked for lies in the part that does not decode.
            yield from chunks.add(converter.rgb(last[0]), last[1])
        yield from chunks.flush()
        decoded_seconds = _decoded_seconds(container, chooser, properties)
    yield judge_end(properties, decoded_seconds, errors, lambda: _whole_file_seconds(path))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open a file and its first real video stream.

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
        # PyAV asks for invented times, which are out of order for packed AVI; ffmpeg does not.
        container.flags &= ~cast("int", Flags.gen_pts.value)
        pictures = [bool(s.disposition & Disposition.attached_pic) for s in container.streams.video]
        if all(pictures):
            raise no_video(path, has_picture=any(pictures))
        stream = container.streams.video[pictures.index(False)]
        if stream.codec_context is None:
            raise zero_frames(path, "its codec is unknown")
        # Automatic threading can hang where many decoders run at once.
        stream.codec_context.thread_count = 1
        stream.codec_context.thread_type = "NONE"
        yield container, stream


def _positions(path: Path, sampling: Sampling) -> list[int]:
    """List the packets' times without decoding, and return which frames `frames` sampling uses."""
    with _opened(path) as (container, stream):
        rate = stream.average_rate
        times = PacketTimes(float(1 / rate) if rate else 0.0)
        for packet in _packets(container, (stream,), DecodeErrors()):
            _note_packet(packet, times)
        return times.positions(sampling)


def _whole_file_seconds(path: Path) -> float:
    """Return how long the file's packets last, sound included."""
    with _opened(path) as (container, stream):
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
        yield from cast("Iterator[Packet[VideoStream]]", container.demux(*streams))
    except av.error.FFmpegError as error:
        errors.add(_words(error))


def _decoded_frames(
    container: InputContainer, stream: VideoStream, errors: DecodeErrors
) -> Iterator[tuple[VideoFrame, float]]:
    """Yield frames and their times in order of presentation; goes on after damage as ffmpeg does."""
    clock = _Clock(stream)
    for packet in _packets(container, (stream,), errors):
        if packet.size:
            for frame in _decode_packet(stream, packet, errors):
                yield frame, clock.time_seconds(frame)
    for frame in _decode_packet(stream, None, errors):
        yield frame, clock.time_seconds(frame)


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
    concealed = [message.strip() for _, _, message in log if message.startswith("concealing")]
    if concealed:
        errors.add(concealed[-1])
    elif any(frame.is_corrupt for frame in frames):
        errors.add("corrupt decoded frame")
    return frames


class _Clock:
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


class _Converter:
    """Turns decoded frames into upright RGB with square pixels, with the filters that ffmpeg would use.

    Every frame has the first one's size: where a stream changes its resolution, later frames are
    scaled, as ffmpeg does it.
    """

    def __init__(self, stream: VideoStream) -> None:
        self._stream = stream
        self._size: tuple[int, int] | None = None
        self._graph: av.filter.Graph | None = None
        self._graph_is_for: tuple[object, ...] = ()

    def size(self, frame: VideoFrame) -> tuple[int, int]:
        """Return `(width, height)` of all frames, which the first one decides."""
        if self._size is None:
            turned = _clockwise_degrees(_display_matrix(frame)) in (90, 270)
            width, height, aspect = frame.width, frame.height, float(self._aspect_ratio())
            if turned:
                width, height, aspect = height, width, 1 / aspect
            self._size = square_pixels_width(width, aspect), height
        return self._size

    def rgb(self, frame: VideoFrame) -> NDArray[np.uint8]:
        """Return `(H, W, 3)`."""
        matrix = _display_matrix(frame)
        look = frame.width, frame.height, frame.format.name, frame.colorspace, frame.color_range, matrix
        if self._graph is None or look != self._graph_is_for:
            self._graph, self._graph_is_for = self._build(frame, matrix), look
        self._graph.push(frame)
        picture = cast("NDArray[np.uint8]", self._graph.vpull().to_ndarray())
        return on_white(picture) if picture.shape[-1] == 4 else picture

    def _build(self, frame: VideoFrame, matrix: tuple[int, ...]) -> av.filter.Graph:
        width, height = self.size(frame)
        unit = self._stream.time_base
        filters = [
            (
                "buffer",
                f"video_size={frame.width}x{frame.height}:pix_fmt={frame.format.name}:time_base={unit}"
                f":pixel_aspect={self._aspect_ratio()}"
                f":colorspace={int(frame.colorspace)}:range={int(frame.color_range)}",
            ),
            *_upright(matrix),
            ("scale", f"w={width}:h={height}:flags={SCALE_FLAGS}"),
            ("format", f"pix_fmts={'rgba' if _is_transparent(frame) else 'rgb24'}"),
            ("buffersink", None),
        ]
        graph = av.filter.Graph()
        graph.threads = 1
        graph.link_nodes(*[graph.add(name, arguments) for name, arguments in filters]).configure()
        return graph

    def _aspect_ratio(self) -> Fraction:
        """Return the sample aspect ratio, the container's before the codec's, 1 where neither has one."""
        return self._stream.sample_aspect_ratio or self._stream.codec_context.sample_aspect_ratio or Fraction(1)


def _is_transparent(frame: VideoFrame) -> bool:
    return frame.format.has_palette or any(component.is_alpha for component in frame.format.components)


def _display_matrix(frame: VideoFrame) -> tuple[int, ...]:
    """Return how the frame is to be turned and mirrored: 9 fixed-point numbers, or none."""
    try:
        data = cast("Mapping[object, bytes]", frame.side_data).get(SideDataType.DISPLAYMATRIX)
    except ValueError:
        # PyAV does not know every kind of side data; it still knows the angle.
        angle = math.radians(-frame.rotation)
        cos, sin = round(math.cos(angle) * 65536), round(math.sin(angle) * 65536)
        return (cos, sin, 0, -sin, cos, 0, 0, 0, 1 << 30) if frame.rotation else ()
    return struct.unpack("=9i", bytes(data)) if data else ()


def _clockwise_degrees(matrix: tuple[int, ...]) -> int:
    """Return by how much a display matrix turns the picture, 0 to 359, as libavutil and ffmpeg round it."""
    if not matrix:
        return 0
    across, down = math.hypot(matrix[0], matrix[3]), math.hypot(matrix[1], matrix[4])
    if not across or not down:
        return 0
    return round(math.degrees(math.atan2(matrix[1] / down, matrix[0] / across))) % 360


def _upright(matrix: tuple[int, ...]) -> list[tuple[str, str | None]]:
    """Return the filters that apply a display matrix: ffmpeg's choice (`-autorotate`), mirrored ones too."""
    degrees = _clockwise_degrees(matrix)
    if not matrix:
        return []
    if degrees == 90:
        return [("transpose", "cclock_flip" if matrix[3] > 0 else "clock")]
    if degrees == 270:
        return [("transpose", "clock_flip" if matrix[3] < 0 else "cclock")]
    if degrees == 180:
        return [(name, None) for name, sign in (("hflip", matrix[0]), ("vflip", matrix[4])) if sign < 0]
    if degrees:
        return [("rotate", f"{degrees}*PI/180")]
    return [("vflip", None)] if matrix[4] < 0 else []


def _properties(
    container: InputContainer, stream: VideoStream, converter: _Converter, frame: VideoFrame
) -> VideoProperties:
    width, height = converter.size(frame)
    return VideoProperties(
        duration_seconds=_promised_seconds(container, stream),
        frame_rate=float(stream.average_rate) if stream.average_rate else math.nan,
        width_px=width,
        height_px=height,
        rotation_degrees=right_angle(-_clockwise_degrees(_display_matrix(frame))),
        codec=stream.codec_context.codec.canonical_name,
    )


def _promised_seconds(container: InputContainer, stream: VideoStream) -> float:
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
