"""What a decoder gives: a video's properties, then its sampled frames in chunks of bounded size.

Both decoders (`pyav_decoder`, `ffmpeg_decoder`) turn the same file into the same
frames with the same times. This module and they import neither torch nor h5py: decode workers are
processes that must start fast and stay small.
"""

from __future__ import annotations

import bisect
import math
import re
import sys
from array import array
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from svb.errors import SvbError
from svb.extract.decode.options import DecodeOptions, Limits
from svb.extract.decode.sampling import TIME_TOLERANCE_SECONDS, Sampling

# A chunk crosses from a decode worker to the backbones in one piece; this bounds a worker's memory
# whatever the length of the video.
CHUNK_BYTES = 16 * 2**20
# Small frames are enlarged for the backbone: 512 squares of 224 pixels are 77 MB there.
CHUNK_FRAMES = 512

# Earlier than any frame.
BEFORE_ALL_SECONDS = -1e12

# Without these flags swscale rounds and places chroma faster but worse, and PyAV's and ffmpeg's pixels part.
SCALE_FLAGS = "bicubic+accurate_rnd+full_chroma_int+full_chroma_inp"

# Anamorphic video lies between 1:2 and 64:33; a damaged header can ask for frames of gigabytes.
MIN_ASPECT_RATIO, MAX_ASPECT_RATIO = 1 / 8, 8.0


@dataclass(frozen=True)
class VideoProperties:
    """A video as displayed: rotation and sample aspect ratio applied to the size.

    Attributes:
        duration_seconds: What the container promises for the video stream; NaN where it promises nothing.
        frame_rate: Average frames a second; NaN where unknown.
        width_px: Displayed width.
        height_px: Displayed height.
        rotation_degrees: Counter-clockwise turn that was applied: 0, 90, 180 or 270.
        codec: The decoder's name for the codec, such as `h264`.
    """

    duration_seconds: float
    frame_rate: float
    width_px: int
    height_px: int
    rotation_degrees: int
    codec: str


@dataclass(frozen=True)
class FrameChunk:
    """Consecutive sampled frames of one video.

    Attributes:
        frames: `(T, H, W, 3)` uint8 RGB, upright, square pixels.
        frame_times_seconds: `(T,)` float64 presentation times as the file has them, ascending.
    """

    frames: NDArray[np.uint8]
    frame_times_seconds: NDArray[np.float64]

    def after(self, seconds: float) -> Iterator[FrameChunk]:
        """Yield the frames later than a time, if any."""
        later = self.frame_times_seconds > seconds
        if later.any():
            yield FrameChunk(self.frames[later], self.frame_times_seconds[later])


@dataclass(frozen=True)
class DecodeEnd:
    """How a decode ended.

    Attributes:
        status: `ok` or `partial`.
        error: The decoder's last words, or empty.
        cause: Of `partial`, the failure it is where partial videos are none to keep.
    """

    status: str
    error: str = ""
    cause: str = ""


class DecodeError(SvbError):
    """A video gave no frame at all.

    Attributes:
        status: The failure code that goes into the video's record.
    """

    def __init__(self, status: str, message: str) -> None:
        super().__init__(message)
        self.status = status


class Decoder(Protocol):
    """Decodes one file: yields its properties once, then chunks, then the end.

    Raises:
        DecodeError: With the status `missing`, `empty`, `unreadable`, `truncated` (no index to read by),
            `no_video_stream`, `attached_picture`, `zero_frames`, or `over_limit` (more than
            `DecodeOptions.limits` allow: before the first frame, or amid the chunks of a video that runs
            on for longer than it promised).
    """

    def __call__(
        self, path: Path, options: DecodeOptions
    ) -> Iterator[VideoProperties | FrameChunk | DecodeEnd]: ...


def promised_but_missing(promised_seconds: float, decoded_seconds: float, frame_rate: float) -> float:
    """Return by how many seconds a decode fell short of the container's promise, 0.0 within tolerance.

    Containers round durations and some count the audio's: up to 0.5 s, three frames or 5 % are no loss.
    """
    if not promised_seconds > 0:
        return 0.0
    frame_seconds = 1.0 / frame_rate if frame_rate > 0 else 0.0
    tolerance = max(0.5, 3 * frame_seconds, 0.05 * promised_seconds)
    short = promised_seconds - decoded_seconds
    return short if short > tolerance else 0.0


def check_file(path: Path) -> None:
    """Raise what needs no decoder to see.

    Raises:
        DecodeError: `missing`, `empty` or, for a folder, `unreadable`.
    """
    if not path.exists():
        raise DecodeError("missing", f"{path} does not exist - expected a video file; check the path")
    if not path.is_file():
        raise DecodeError("unreadable", f"{path} is not a regular file - expected a video file")
    if path.stat().st_size == 0:
        raise DecodeError("empty", f"{path} has 0 bytes - copy or download it again")


def unreadable(path: Path, words: str) -> DecodeError:
    """Return the error for a file that no demuxer opens: `truncated` where its index was lost."""
    if _lacks_index(path):
        return DecodeError(
            "truncated",
            f"{path} ends before its index (moov atom not found) - copy or download it again; {words}",
        )
    return DecodeError("unreadable", f"{path} is not a video that can be read - {words}")


def no_video(path: Path, has_picture: bool) -> DecodeError:
    """Return the error for a file without a real video stream; cover art is a picture, not a video."""
    if has_picture:
        return DecodeError(
            "attached_picture", f"{path} has cover art but no video stream - expected a video, not music"
        )
    return DecodeError("no_video_stream", f"{path} has no video stream - expected a video")


def zero_frames(path: Path, words: str) -> DecodeError:
    """Return the error for a video stream of which nothing decodes."""
    return DecodeError("zero_frames", f"{path} gave no frame - {words or 'its video stream is empty'}")


def over_limit(path: Path, words: str, option: str) -> DecodeError:
    """Return the error for a video that asks for more than its limits allow."""
    return DecodeError("over_limit", f"{path} {words}; if you trust it raise {option}")


def require_size(path: Path, limits: Limits, width_px: int, height_px: int) -> None:
    """Refuse too large frames.

    Raises:
        DecodeError: `over_limit`.
    """
    for name, size, limit in (
        ("width", width_px, limits.max_width_px),
        ("height", height_px, limits.max_height_px),
    ):
        if size > limit:
            words = f"has frames of {width_px}x{height_px} px - expected a {name} of at most {limit}"
            raise over_limit(path, words, f"--max-{name}")


def require_duration(path: Path, limits: Limits, duration_seconds: float, verb: str = "promises") -> None:
    """Refuse a too long video; NaN is no promise.

    Raises:
        DecodeError: `over_limit`.
    """
    if duration_seconds > limits.max_duration_seconds:
        words = (
            f"{verb} {duration_seconds / 3600:.2f} hours of video - "
            f"expected at most {limits.max_duration_seconds / 3600:g}"
        )
        raise over_limit(path, words, "--max-hours")


def require_streams(path: Path, limits: Limits, num_streams: int) -> None:
    """Refuse a file of too many streams, of any kind.

    Raises:
        DecodeError: `over_limit`.
    """
    if num_streams > limits.max_streams:
        words = f"has {num_streams} streams - expected at most {limits.max_streams}"
        raise over_limit(path, words, "--max-streams")


def max_pixels(limits: Limits) -> int:
    """Return what libavcodec is to refuse, too: it counts whole blocks, of up to 128 pixels."""
    width, height = (-(-size // 128) * 128 for size in (limits.max_width_px, limits.max_height_px))
    return width * height


def _lacks_index(path: Path) -> bool:
    """Say whether a file is an MP4 or MOV without its index: PyAV does not pass on what libavformat logs."""
    kinds = {b"ftyp", b"mdat", b"free", b"skip", b"wide", b"moov", b"moof", b"uuid", b"pnot"}
    size = path.stat().st_size
    at = 0
    with path.open("rb") as file:
        while at + 8 <= size:
            file.seek(at)
            header = file.read(16)
            length, kind = int.from_bytes(header[:4], "big"), header[4:8]
            if kind not in kinds:
                # Its first box says what a file is; strange bytes further on are damage.
                return at > 0
            if kind == b"moov":
                return False
            if length == 1:
                length = int.from_bytes(header[8:16], "big")
            if length < 8:
                break
            at += length
    return at > 0


def square_pixels_width(width: int, sample_aspect_ratio: float) -> int:
    """Return the width at which pixels are square; an absurd ratio is taken for damage and left alone."""
    if not MIN_ASPECT_RATIO <= sample_aspect_ratio <= MAX_ASPECT_RATIO:
        return width
    return max(1, math.floor(width * sample_aspect_ratio + 0.5))


def resized(width: int, height: int, resize_px: int | None) -> tuple[int, int]:
    """Return the size whose short side is `resize_px`, with the long one cut off as the device does it.

    A strip longer than `MAX_ASPECT_RATIO` times its short side keeps its size: enlarged it might not fit
    into memory.
    """
    short, long = min(width, height), max(width, height)
    if resize_px is None or long > MAX_ASPECT_RATIO * short:
        return width, height
    long_side = int(resize_px * long / short)
    return (long_side, resize_px) if width > height else (resize_px, long_side)


def right_angle(degrees: float) -> int:
    """Return the nearest of 0, 90, 180 and 270."""
    return round(degrees / 90) * 90 % 360


def on_white(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Lay a picture `(H, W, 4)` onto white and return it as `(H, W, 3)`.

    A viewer does the same. The colours that lie beneath transparent pixels were never meant to be seen: an
    encoder leaves there whatever compresses best.
    """
    colours, alpha = frame[..., :3], frame[..., 3:].astype(np.uint16)
    if alpha.min() == 255:
        return np.ascontiguousarray(colours)
    return ((colours * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def origin_seconds(container_format: str, first_time_seconds: float) -> float:
    """Return the time from which a container counts its duration: Matroska's includes a late start."""
    return min(0.0, first_time_seconds) if "matroska" in container_format else first_time_seconds


def tagged_seconds(text: str) -> float:
    """Return the seconds of an `hh:mm:ss.sss`, NaN where it is none."""
    match = re.fullmatch(r"(\d+):(\d\d):(\d\d(?:\.\d+)?)", text.strip())
    if match is None:
        return math.nan
    return int(match[1]) * 3600 + int(match[2]) * 60 + float(match[3])


def _nobody_listens() -> None: ...


# Called whenever a decoder has got on by a frame or a packet. A decode worker sets it to tell the main
# process that it is alive: with few frames wanted of a long video, nothing else is heard of it for minutes.
got_on: Callable[[], None] = _nobody_listens


class FrameChooser:
    """Says of each decoded frame, in order of presentation, whether it is used; keeps what was seen.

    Args:
        path: The file, for messages.
        options: Which frames, and the limit on how long a video may run.
        positions: Which frames, in order of presentation, where they were listed before.
        targets_seconds: Instead of positions: the first frame at or after each of these ascending times.

    Attributes:
        decoded: Frames seen.
        used: Frames wanted.
        first_time_seconds: The first frame's time.
        last_time_seconds: The latest frame's time.
    """

    def __init__(
        self,
        path: Path,
        options: DecodeOptions,
        positions: Collection[int] | None = None,
        targets_seconds: Sequence[float] | None = None,
    ) -> None:
        self.decoded = 0
        self.used = 0
        self.first_time_seconds = math.nan
        self.last_time_seconds = -math.inf
        self._path = path
        self._limits = options.limits
        self._sampling = options.sampling
        self._positions = None if positions is None else frozenset(positions)
        self._targets = None if targets_seconds is None else earliest(targets_seconds)
        self._last_used_seconds = -math.inf

    def count(self, time_seconds: float) -> None:
        """Count one more decoded frame.

        Raises:
            DecodeError: `over_limit`: the video has run for too long.
        """
        got_on()
        self.decoded += 1
        if self.decoded == 1:
            self.first_time_seconds = time_seconds
        self.last_time_seconds = max(self.last_time_seconds, time_seconds)
        require_duration(
            self._path, self._limits, self.last_time_seconds - self.first_time_seconds, "has run on to"
        )

    def chooses(self, time_seconds: float) -> bool:
        """Say whether the frame that was counted last is used."""
        # A clock that jumps back (joined broadcasts) must not break the ascending order of times.
        wanted = time_seconds > self._last_used_seconds and self._wants(time_seconds)
        if wanted:
            self.use(time_seconds)
        return wanted

    def use(self, time_seconds: float) -> None:
        """Note that a frame is used."""
        self.used += 1
        self._last_used_seconds = time_seconds

    def _wants(self, time_seconds: float) -> bool:
        if self._positions is not None:
            return self.decoded - 1 in self._positions
        if self._targets is not None:
            passed = bisect.bisect_right(self._targets, time_seconds)
            return passed > bisect.bisect_right(self._targets, self._last_used_seconds)
        if self._sampling.fps is not None:
            return self._is_next_on_grid(time_seconds)
        if self._sampling.every_nth is not None:
            return (self.decoded - 1) % self._sampling.every_nth == 0
        # What a key frame or a new scene is, is libav's to say, and every frame asked about is one.
        return True

    def _is_next_on_grid(self, time_seconds: float) -> bool:
        if self.used == 0:
            return True
        first = self.first_time_seconds
        grid_point = self._sampling.grid_point
        return grid_point(time_seconds, first) > grid_point(self._last_used_seconds, first)


def earliest(targets_seconds: Sequence[float]) -> list[float]:
    """Return the time from which on a frame is at each target, given what containers round."""
    return [target - TIME_TOLERANCE_SECONDS for target in targets_seconds]


def scene_expression(threshold: float) -> str:
    """Return where a scene begins, in the language of libavfilter's `select`."""
    return f"if(n,gt(scene,{float(threshold)!r}),1)"


def without_skipping(options: DecodeOptions) -> DecodeOptions | None:
    """Return what to try where nothing decodes of a video whose frames were skipped; None where none were.

    Of a video without key frames the first frame is used: what can be decoded of it says what it shows.
    """
    if options.sampling.keyframes:
        return replace(options, fast=False, sampling=Sampling(every_nth=sys.maxsize))
    return replace(options, fast=False) if options.fast else None


class PacketTimes:
    """The presentation times of a stream's packets, listed without decoding: 8 bytes a frame.

    Attributes:
        start_seconds: The earliest time.
        end_seconds: Where the packet that is shown last ends.
    """

    def __init__(self, frame_seconds: float) -> None:
        self.start_seconds = math.inf
        self.end_seconds = -math.inf
        self._frame_seconds = frame_seconds
        self._times_seconds = array("d")

    def add(self, time_seconds: float | None, duration_seconds: float) -> None:
        """Note one packet; a duration of 0 is unknown and taken to be one frame's.

        A bare stream without a container has no times: its packets follow one another.
        """
        got_on()
        if time_seconds is None:
            time_seconds = self.end_seconds if self._times_seconds else 0.0
        self._times_seconds.append(time_seconds)
        self.start_seconds = min(self.start_seconds, time_seconds)
        end = time_seconds + (duration_seconds if duration_seconds > 0 else self._frame_seconds)
        self.end_seconds = max(self.end_seconds, end)

    def positions(self, sampling: Sampling) -> list[int]:
        """Return which frames, in order of presentation, `frames` or `every_nth` sampling uses."""
        if not self._times_seconds:
            return [0]
        if sampling.every_nth is not None:
            return list(range(0, len(self._times_seconds), sampling.every_nth))
        return sampling.spread(sorted(self._times_seconds), self.end_seconds - self.start_seconds)

    def targets_seconds(self, sampling: Sampling) -> list[float]:
        """Return the times of those frames, by which they are found where not every frame is decoded."""
        times = sorted(self._times_seconds) or [BEFORE_ALL_SECONDS]
        return [times[position] for position in self.positions(sampling)]


class ChunkBuilder:
    """Gathers frames of one size into chunks of at most `CHUNK_BYTES` and `CHUNK_FRAMES`.

    A frame that is larger makes a chunk of its own.
    """

    def __init__(self) -> None:
        self._frames: list[NDArray[np.uint8]] = []
        self._times_seconds: list[float] = []

    def add(self, frame: NDArray[np.uint8], time_seconds: float) -> Iterator[FrameChunk]:
        """Add a frame; yields the chunk that it does not fit into any more."""
        if (len(self._frames) + 1) * frame.nbytes > CHUNK_BYTES or len(self._frames) == CHUNK_FRAMES:
            yield from self.flush()
        self._frames.append(frame)
        self._times_seconds.append(time_seconds)

    def flush(self) -> Iterator[FrameChunk]:
        """Yield what is gathered, if anything."""
        if self._frames:
            chunk = FrameChunk(np.stack(self._frames), np.array(self._times_seconds, dtype=np.float64))
            self._frames, self._times_seconds = [], []
            yield chunk


class DecodeErrors:
    """How often a decoder complained of the video, and its last words."""

    def __init__(self) -> None:
        self.count = 0
        self.last_words = ""

    def add(self, words: str) -> None:
        """Count one complaint."""
        self.count += 1
        self.last_words = words


def judge_end(
    properties: VideoProperties,
    decoded_seconds: float,
    errors: DecodeErrors,
    whole_file_seconds: Callable[[], float],
) -> DecodeEnd:
    """Return `partial` where the decoder complained or the file holds less than it promises, else `ok`.

    Args:
        properties: The promise.
        decoded_seconds: From the first decoded frame to the end of the last.
        errors: The decoder's complaints.
        whole_file_seconds: Lists every packet of the file, sound included. Only asked where frames fall
            short of the promise: a slide shown for long, or sound that outlasts the picture, is no loss.
    """
    promised, rate = properties.duration_seconds, properties.frame_rate
    short = promised_but_missing(promised, decoded_seconds, rate)
    if short and not errors.count:
        short = promised_but_missing(promised, whole_file_seconds(), rate)
    if not errors.count and not short:
        return DecodeEnd("ok")
    of_promised = f" of {promised:.1f} s" if promised > 0 else ""
    words = f"decode errors: {errors.count}, the last: {errors.last_words}" if errors.count else "the file ends"
    cause = "truncated" if short else "concealed_errors"
    return DecodeEnd("partial", f"decoded {decoded_seconds:.1f} s{of_promised}; {words}", cause)
