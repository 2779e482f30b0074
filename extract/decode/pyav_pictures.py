"""Makes pictures from PyAV's frames, and finds scenes, with the filters that the ffmpeg program uses."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from fractions import Fraction
from typing import cast

import av.error
import av.filter
import numpy as np
from av.sidedata.sidedata import Type as SideDataType
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from numpy.typing import NDArray

from svb.extract.decode.choice import scene_expression
from svb.extract.decode.decoder import SCALE_FLAGS, on_white, resized, square_pixels_width


class Converter:
    """Turns decoded frames into upright RGB with square pixels.

    Every frame gets the first one's size: if a stream changes its resolution, later frames are scaled,
    as ffmpeg does.
    """

    def __init__(self, stream: VideoStream, resize_px: int | None) -> None:
        self._stream = stream
        self._resize_px = resize_px
        self._size: tuple[int, int] | None = None
        self._graph: av.filter.Graph | None = None
        self._graph_is_for: tuple[object, ...] = ()

    def size(self, frame: VideoFrame) -> tuple[int, int]:
        """Return the displayed `(width, height)` of all frames: that of the first one."""
        if self._size is None:
            turned = clockwise_degrees(display_matrix(frame)) in (90, 270)
            width, height, aspect = frame.width, frame.height, float(_aspect_ratio(self._stream))
            if turned:
                width, height, aspect = height, width, 1 / aspect
            self._size = square_pixels_width(width, aspect), height
        return self._size

    def rgb(self, frame: VideoFrame) -> NDArray[np.uint8]:
        """Return `(H, W, 3)`."""
        matrix = display_matrix(frame)
        look = *_look(frame), matrix
        if self._graph is None or look != self._graph_is_for:
            self._graph, self._graph_is_for = self._build(frame, matrix), look
        self._graph.push(frame)
        picture = cast("NDArray[np.uint8]", self._graph.vpull().to_ndarray())
        return on_white(picture) if picture.shape[-1] == 4 else picture

    def _build(self, frame: VideoFrame, matrix: tuple[int, ...]) -> av.filter.Graph:
        width, height = resized(*self.size(frame), self._resize_px)
        return _graph(
            self._stream,
            frame,
            *_upright(matrix),
            ("scale", f"w={width}:h={height}:flags={SCALE_FLAGS}"),
            ("format", f"pix_fmts={'rgba' if _is_transparent(frame) else 'rgb24'}"),
        )


class SceneDetector:
    """Finds where scenes begin, by the score of libavfilter's `select`, as the ffmpeg program does."""

    def __init__(self, stream: VideoStream, threshold: float) -> None:
        self._stream = stream
        self._threshold = threshold
        self._graph: av.filter.Graph | None = None
        self._graph_is_for: tuple[object, ...] = ()

    def begins(self, frame: VideoFrame) -> bool:
        """Return whether a scene begins with this frame; call it with every frame, in order.

        Frames of different size or format are not compared: the first one of a new kind begins a scene.
        """
        look = *_look(frame), display_matrix(frame)
        if self._graph is None or look != self._graph_is_for:
            self._graph_is_for = look
            self._graph = _graph(self._stream, frame, ("select", scene_expression(self._threshold)))
        self._graph.push(frame)
        try:
            self._graph.vpull()
        except av.error.BlockingIOError:
            return False
        return True


def _graph(stream: VideoStream, frame: VideoFrame, *filters: tuple[str, str | None]) -> av.filter.Graph:
    """Return a filter graph for frames of this one's size, format and colours."""
    source = (
        f"video_size={frame.width}x{frame.height}:pix_fmt={frame.format.name}:time_base={stream.time_base}"
        f":pixel_aspect={_aspect_ratio(stream)}"
        f":colorspace={int(frame.colorspace)}:range={int(frame.color_range)}"
    )
    graph = av.filter.Graph()
    graph.threads = 1
    chain = (("buffer", source), *filters, ("buffersink", None))
    graph.link_nodes(*[graph.add(name, arguments) for name, arguments in chain]).configure()
    return graph


def _look(frame: VideoFrame) -> tuple[object, ...]:
    return frame.width, frame.height, frame.format.name, frame.colorspace, frame.color_range


def _aspect_ratio(stream: VideoStream) -> Fraction:
    """Return the sample aspect ratio: the container's, else the codec's, else 1."""
    return stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio or Fraction(1)


def _is_transparent(frame: VideoFrame) -> bool:
    return frame.format.has_palette or any(component.is_alpha for component in frame.format.components)


def display_matrix(frame: VideoFrame) -> tuple[int, ...]:
    """Return the 9 fixed-point numbers that say how to turn and mirror the frame; empty if it has none."""
    try:
        data = cast("Mapping[object, bytes]", frame.side_data).get(SideDataType.DISPLAYMATRIX)
    except ValueError:
        # PyAV fails on kinds of side data that it does not know; it still knows the angle.
        angle = math.radians(-frame.rotation)
        cos, sin = round(math.cos(angle) * 65536), round(math.sin(angle) * 65536)
        return (cos, sin, 0, -sin, cos, 0, 0, 0, 1 << 30) if frame.rotation else ()
    return struct.unpack("=9i", bytes(data)) if data else ()


def clockwise_degrees(matrix: tuple[int, ...]) -> int:
    """Return the angle by which a display matrix turns the picture, 0 to 359, rounded as ffmpeg does."""
    if not matrix:
        return 0
    across, down = math.hypot(matrix[0], matrix[3]), math.hypot(matrix[1], matrix[4])
    if not across or not down:
        return 0
    return round(math.degrees(math.atan2(matrix[1] / down, matrix[0] / across))) % 360


def _upright(matrix: tuple[int, ...]) -> list[tuple[str, str | None]]:
    """Return the filters that apply a display matrix, mirrored or not: those of ffmpeg's `-autorotate`."""
    degrees = clockwise_degrees(matrix)
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
