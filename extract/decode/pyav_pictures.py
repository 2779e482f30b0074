"""Makes pictures from PyAV's frames, and finds scenes, with the filters that the ffmpeg program uses."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
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
from svb.extract.decode.containers import Crop
from svb.extract.decode.decoder import (
    NEUTRAL_COLOURS,
    SCALE_FLAGS,
    SDR_COLOURS,
    on_white,
    square_pixels_width,
)
from svb.extract.decode.options import resized

# libavutil's number for unknown primaries, transfer function and matrix.
UNKNOWN_COLOUR = 2
HDR_TRANSFERS = {16: "smpte2084", 18: "arib-std-b67"}


class Converter:
    """Turns decoded frames into upright RGB with square pixels.

    Every frame gets the first one's size: if a stream changes its resolution, later frames are scaled,
    as ffmpeg does.
    """

    def __init__(
        self,
        stream: VideoStream,
        resize_px: int | tuple[int, int] | None,
        crop: Crop,
        interpolation: str = "bicubic",
    ) -> None:
        self._scale_flags = f"{interpolation}+{SCALE_FLAGS}"
        self._crop = crop
        self._stream = stream
        self._resize_px = resize_px
        self._size: tuple[int, int] | None = None
        self._filters = _Filters(stream, self._chain)

    def size(self, frame: VideoFrame) -> tuple[int, int]:
        """Return the displayed `(width, height)` of all frames: that of the first one."""
        if self._size is None:
            turned = clockwise_degrees(display_matrix(frame)) in (90, 270)
            (width, height), aspect = self._shown(frame), float(_aspect_ratio(self._stream))
            if turned:
                width, height, aspect = height, width, 1 / aspect
            self._size = square_pixels_width(width, aspect), height
        return self._size

    def rgb(self, frame: VideoFrame) -> NDArray[np.uint8]:
        """Return `(H, W, 3)`."""
        filtered = self._filters.apply(frame)
        assert filtered is not None
        picture = cast("NDArray[np.uint8]", filtered.to_ndarray())
        return on_white(picture) if picture.shape[-1] == 4 else picture

    def _shown(self, frame: VideoFrame) -> tuple[int, int]:
        """Return the width and height that the container shows, all of the frame if its crop makes no sense."""
        width = frame.width - self._crop.left - self._crop.right
        height = frame.height - self._crop.top - self._crop.bottom
        return (width, height) if width > 0 and height > 0 else (frame.width, frame.height)

    def _chain(self, frame: VideoFrame) -> list[tuple[str, str | None]]:
        width, height = resized(*self.size(frame), self._resize_px)
        to_sdr = f":{SDR_COLOURS}" if hdr_transfer(frame) else ""
        shown = self._shown(frame)
        crop = [("crop", f"w={shown[0]}:h={shown[1]}:x={self._crop.left}:y={self._crop.top}:exact=1")]
        return [
            *(crop if shown != (frame.width, frame.height) else []),
            *_upright(display_matrix(frame)),
            ("scale", f"w={width}:h={height}:flags={self._scale_flags}{to_sdr}"),
            ("format", f"pix_fmts={'rgba' if _is_transparent(frame) else 'rgb24'}"),
        ]


class SceneDetector:
    """Finds where scenes begin, by the score of libavfilter's `select`, as the ffmpeg program does."""

    def __init__(self, stream: VideoStream, threshold: float) -> None:
        chain: list[tuple[str, str | None]] = [("select", scene_expression(threshold))]
        self._filters = _Filters(stream, lambda _: chain)

    def begins(self, frame: VideoFrame) -> bool:
        """Return whether a scene begins with this frame; call it with every frame, in order.

        Frames of different size or format are not compared: the first one of a new kind begins a scene.
        """
        return self._filters.apply(frame) is not None


class _Filters:
    """Applies filters to frames; builds the graph anew for a frame of another kind.

    If swscale refuses a frame because of its colour numbers, they are set to unknown, for this frame and all
    that follow.
    """

    def __init__(self, stream: VideoStream, chain: Callable[[VideoFrame], list[tuple[str, str | None]]]) -> None:
        self._stream = stream
        self._chain = chain
        self._graph: av.filter.Graph | None = None
        self._graph_is_for: tuple[object, ...] = ()
        self._neutral = 0

    def apply(self, frame: VideoFrame) -> VideoFrame | None:
        """Return what comes out for this frame; None if a filter drops it."""
        while True:
            try:
                return self._apply(frame)
            except av.error.FFmpegError:
                self._neutral += 1
                self._graph = None
                if self._neutral == len(NEUTRAL_COLOURS):
                    raise

    def _apply(self, frame: VideoFrame) -> VideoFrame | None:
        for colour in NEUTRAL_COLOURS[self._neutral]:
            setattr(frame, colour, UNKNOWN_COLOUR)
        look = *_look(frame), display_matrix(frame)
        if self._graph is None or look != self._graph_is_for:
            self._graph, self._graph_is_for = _graph(self._stream, frame, *self._chain(frame)), look
        self._graph.push(frame)
        try:
            return self._graph.vpull()
        except av.error.BlockingIOError:
            return None


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
    return frame.width, frame.height, frame.format.name, frame.colorspace, frame.color_range, frame.color_trc


def hdr_transfer(frame: VideoFrame) -> str:
    """Return the name of the frame's transfer function if that is one for HDR, else an empty string."""
    return HDR_TRANSFERS.get(int(frame.color_trc), "")


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
