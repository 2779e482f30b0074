"""Pictures of a video at given times: a poster, a strip of frames; upright and with square pixels, as displayed.

Only PyAV and PIL are imported. The file is opened as `pyav_decoder` opens it: the demuxer may read this file and
nothing else, within limits. A damaged container can still hang a decoder inside the library, and no Python code can
stop it: a server that gets strangers' files runs these functions in a process with a time limit.
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import av.error
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from PIL import Image

from svb.errors import InputError
from svb.extract.decode.containers import container_crop
from svb.extract.decode.decoder import DecodeError, check_file, origin_seconds
from svb.extract.decode.options import Limits
from svb.extract.decode.pyav_file import FrameClock, opened, promised_seconds
from svb.extract.decode.pyav_pictures import Converter
from svb.extract.decode.sampling import TIME_TOLERANCE_SECONDS

# The longest that a slow decoder, or one that crosses hours without a key frame, may take.
TIME_LIMIT_SECONDS = 20.0
# If a seek lands late (MPEG-TS has no index), it is tried again this much earlier.
STEPS_BACK_SECONDS = (0.0, 3.0, 15.0, math.inf)
# Up to this distance, decoding further costs less than seeking to a key frame, which may be behind.
READ_ON_SECONDS = 2.0
MAX_HEIGHT_PX = 2160
MAX_STRIP_WIDTH_PX = 65_000  # JPEG's own limit is 65,535
JPEG_QUALITY = 82


def frame_at(
    path: Path, seconds: float, height: int, *, time_limit_seconds: float = TIME_LIMIT_SECONDS
) -> Image.Image:
    """Return the frame that is shown at a time.

    Args:
        path: The video.
        seconds: On the file's own clock, as moments are; the first or the last frame stands for a time beyond it.
        height: The height in pixels; a lower video is not enlarged.
        time_limit_seconds: The longest that decoding may take.

    Raises:
        InputError: The file is missing, is not a video, exceeds the decoder's limits, or takes too long.
    """
    return frames_at(path, [seconds], height, time_limit_seconds=time_limit_seconds)[0]


def frames_at(
    path: Path,
    times_seconds: Sequence[float],
    height: int,
    *,
    tolerance_seconds: float = 0.0,
    time_limit_seconds: float = TIME_LIMIT_SECONDS,
) -> list[Image.Image]:
    """Return the frames shown at some times, in the order of the times, all of one size; the file is opened once.

    Args:
        path: The video.
        times_seconds: At least one; see `frame_at`.
        height: The height in pixels; a lower video is not enlarged.
        tolerance_seconds: A frame may be this much earlier than the one shown: key frames cost far less.
        time_limit_seconds: The longest that all of them may take.

    Raises:
        InputError: As `frame_at`.
    """
    if not times_seconds or not all(math.isfinite(seconds) for seconds in times_seconds):
        raise InputError(f"cannot show {path} at {list(times_seconds)} s - expected at least one finite time")
    if not 1 <= height <= MAX_HEIGHT_PX:
        raise InputError(f"cannot make pictures {height} px high - expected 1 to {MAX_HEIGHT_PX}")
    try:
        check_file(path)
        with opened(path, Limits()) as (container, stream):
            reader = FrameReader(path, container, stream, time.monotonic() + time_limit_seconds)
            pictures = {
                seconds: reader.picture(seconds, tolerance_seconds, height) for seconds in sorted({*times_seconds})
            }
    except (DecodeError, OSError) as error:
        raise InputError(f"cannot show a frame: {error}") from error
    except av.error.FFmpegError as error:
        raise InputError(f"cannot show a frame of {path}: {error.strerror}") from error
    return [pictures[seconds] for seconds in times_seconds]


def strip(
    path: Path, times_seconds: Sequence[float], height: int, *, time_limit_seconds: float = TIME_LIMIT_SECONDS
) -> bytes:
    """Return frames side by side as one JPEG, in cells of equal width in the order of the times.

    The frame in a cell is at most half the distance between two cells too early.

    Raises:
        InputError: As `frame_at`, or the strip would be too wide for a JPEG.
    """
    span = max(times_seconds, default=0.0) - min(times_seconds, default=0.0)
    tolerance = span / (2 * max(len(times_seconds) - 1, 1))
    cells = frames_at(
        path, times_seconds, height, tolerance_seconds=tolerance, time_limit_seconds=time_limit_seconds
    )
    width = max(1, round(cells[0].width * height / cells[0].height))
    if width * len(cells) > MAX_STRIP_WIDTH_PX:
        raise InputError(
            f"a strip of {len(cells)} frames of {width}x{height} px is too wide - expected at most "
            f"{MAX_STRIP_WIDTH_PX} px in all; ask for fewer or lower frames"
        )
    sheet = Image.new("RGB", (width * len(cells), height))
    for number, cell in enumerate(cells):
        sheet.paste(cell if cell.size == (width, height) else cell.resize((width, height)), (width * number, 0))
    return as_jpeg(sheet)


def as_jpeg(picture: Image.Image) -> bytes:
    """Return a picture as a JPEG file's bytes."""
    held = io.BytesIO()
    picture.save(held, "JPEG", quality=JPEG_QUALITY)
    return held.getvalue()


def duration_seconds(path: Path) -> float | None:
    """Return the duration in a video's header, None if it has none.

    Raises:
        InputError: As `frame_at`.
    """
    try:
        check_file(path)
        with opened(path, Limits()) as (container, stream):
            promised = promised_seconds(container, stream, path)
    except (DecodeError, OSError) as error:
        raise InputError(f"cannot tell its duration: {error}") from error
    return promised if promised > 0 else None


def begins_at(container: InputContainer, stream: VideoStream) -> float:
    """Return the time from which a video's duration counts, on the file's own clock: that of its first frame.

    Matroska's duration counts from 0, a late start included.
    """
    if stream.start_time is None or stream.time_base is None:
        return 0.0
    return origin_seconds(container.format.name, float(stream.start_time * stream.time_base))


def begin_seconds(path: Path) -> float:
    """Return `begins_at` of a file; errors as `duration_seconds`."""
    try:
        check_file(path)
        with opened(path, Limits()) as (container, stream):
            return begins_at(container, stream)
    except (DecodeError, OSError) as error:
        raise InputError(f"cannot tell when it begins: {error}") from error


class FrameReader:
    """Finds the frames at ascending times in one open file.

    Args:
        path: The file, for messages.
        container: The container that `svb.extract.decode.pyav_file.opened` gives.
        stream: The stream to read.
        until: The value of `time.monotonic` after which it gives up.
    """

    def __init__(self, path: Path, container: InputContainer, stream: VideoStream, until: float) -> None:
        self._path = path
        self._container = container
        self._stream = stream
        self._until = until
        self._frames = self._decoded()
        # The frame that is shown and the one after it, each with its time.
        self._held: tuple[VideoFrame, float] | None = None
        self._next: tuple[VideoFrame, float] | None = None
        self._crop = container_crop(path, container.format.name, stream.index)
        self._sizes = Converter(stream, None, self._crop)
        self._converter: Converter | None = None

    def picture(self, seconds: float, tolerance_seconds: float, height: int) -> Image.Image:
        """Return the frame shown at a time, which is not before the last one asked for."""
        return self._picture(self.shown(seconds, tolerance_seconds)[0], height)

    def shown(self, seconds: float, tolerance_seconds: float = 0.0) -> tuple[VideoFrame, float]:
        """Return the frame shown at a time and its own time; the time is not before the last one asked for.

        Raises:
            InputError: The file has no frame that can be decoded, or takes too long.
        """
        is_far = self._held is None or seconds - self._held[1] > READ_ON_SECONDS
        if is_far and not self._is_shown(seconds, tolerance_seconds):
            self._seek(seconds)
        while not self._is_shown(seconds, tolerance_seconds):
            if not self._advance():
                raise InputError(f"{self._path} has no frame that can be decoded - expected a video that plays")
        assert self._held is not None
        return self._held

    def _is_shown(self, seconds: float, tolerance_seconds: float) -> bool:
        """Tell whether the held frame is the one shown, or near enough."""
        if self._held is None:
            return False
        if self._next is None or self._next[1] > seconds + TIME_TOLERANCE_SECONDS:
            return True
        return seconds - tolerance_seconds <= self._held[1] <= seconds

    def _seek(self, seconds: float) -> None:
        """Go to a key frame before a time, from which reading on reaches that time."""
        unit = self._stream.time_base
        if unit is None or self._stream.start_time is None:
            return  # a bare stream has no times to seek to
        start = self._stream.start_time * float(unit)
        for back in STEPS_BACK_SECONDS:
            target = max(seconds - back, start)
            try:
                self._container.seek(round(target / unit), stream=self._stream, backward=True)
            except (av.error.FFmpegError, OverflowError):
                return  # a file that cannot seek is read on from its current place
            self._stream.codec_context.flush_buffers()
            self._frames, self._held, self._next = self._decoded(), None, None
            is_early = self._advance() and self._held is not None and self._held[1] <= seconds
            if is_early or target == start:
                return

    def _advance(self) -> bool:
        """Decode one more frame; return False if none is left."""
        if self._held is None:
            self._next = next(self._frames, None)
        if self._next is None:
            return False
        self._held, self._next = self._next, next(self._frames, None)
        return True

    def _decoded(self) -> Iterator[tuple[VideoFrame, float]]:
        """Yield frames with their times; skip damage, as players do."""
        clock, last_seconds = FrameClock(self._stream), -math.inf
        for frame in self._raw():
            if time.monotonic() > self._until:
                raise InputError(f"{self._path} takes too long to decode - try a smaller or shorter video")
            last_seconds = max(clock.time_seconds(frame), last_seconds)
            yield frame, last_seconds

    def _raw(self) -> Iterator[VideoFrame]:
        try:
            for packet in self._container.demux(self._stream):
                try:
                    yield from self._stream.codec_context.decode(packet if packet.size else None)
                except av.error.EOFError:
                    return
                except av.error.FFmpegError:
                    continue
        except av.error.FFmpegError:
            return  # the file was cut short

    def _picture(self, frame: VideoFrame, height: int) -> Image.Image:
        width_px, height_px = self._sizes.size(frame)
        height = min(height, height_px)
        width = max(1, int(width_px * height / height_px))
        if self._converter is None:
            # The decoder's own filters scale: a small picture of a large frame costs little.
            self._converter = Converter(self._stream, min(width, height), self._crop)
        picture = Image.fromarray(self._converter.rgb(frame))
        return picture if picture.size == (width, height) else picture.resize((width, height))
