"""What both decoders share: they yield a video's properties, then its sampled frames in bounded chunks.

Both (`pyav_decoder`, `ffmpeg_decoder`) turn the same file into the same frames with the same times.
None of these modules imports torch or h5py: decode workers must start fast and stay small.
"""

from __future__ import annotations

import math
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from svb.errors import SvbError
from svb.extract.decode.containers import is_encrypted, lacks_index
from svb.extract.decode.options import MAX_ASPECT_RATIO, MIN_ASPECT_RATIO, DecodeOptions, Limits

# A chunk goes from a decode worker to the backbones in one piece; this bounds a worker's memory
# however long the video is.
CHUNK_BYTES = 16 * 2**20
# Small frames are enlarged for the backbone: 512 squares of 224 pixels are 77 MB there.
CHUNK_FRAMES = 512

# Without these flags swscale rounds and places chroma less exactly, and PyAV's and ffmpeg's pixels differ.
SCALE_FLAGS = "accurate_rnd+full_chroma_int+full_chroma_inp"

# swscale maps HDR to SDR when it is told the colours that are wanted.
SDR_COLOURS = "out_primaries=bt709:out_transfer=bt709"

# Reserved or unknown colour numbers make swscale refuse a frame: they are set to unknown. Primaries and
# transfer go first, because a frame of SDR needs only its matrix.
NEUTRAL_COLOURS = ((), ("color_primaries", "color_trc"), ("color_primaries", "color_trc", "colorspace"))

# What the ffmpeg program adds to a stream's pixels for its default flag.
DEFAULT_FLAG_PIXELS = 5_000_000


@dataclass(frozen=True)
class VideoProperties:
    """A video as displayed, with rotation and sample aspect ratio applied to its size.

    Attributes:
        duration_seconds: The duration that the container promises for the video stream; NaN if it has none.
        frame_rate: Average frames a second; NaN if unknown.
        rotation_degrees: The counter-clockwise turn that was applied: 0, 90, 180 or 270.
        codec: libavcodec's name for the codec, such as `h264`.
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
        """Yield the frames later than a time, if any; where all are, without a copy."""
        later = self.frame_times_seconds > seconds
        if later.all():
            yield self
        elif later.any():
            yield FrameChunk(self.frames[later], self.frame_times_seconds[later])


@dataclass(frozen=True)
class DecodeEnd:
    """How a decode ended.

    Attributes:
        status: `ok` or `partial`.
        error: The decoder's last complaint, or empty.
        cause: The failure code that replaces `partial` if partial videos are not kept.
        duration_seconds: What was decoded, where that is more than the container promises; else None.
        in_software: Whether the hardware decoder that was asked for failed.
    """

    status: str
    error: str = ""
    cause: str = ""
    duration_seconds: float | None = None
    in_software: bool = False


class DecodeError(SvbError):
    """A video could not be decoded.

    Attributes:
        status: The failure code for the video's record.
    """

    def __init__(self, status: str, message: str) -> None:
        super().__init__(message)
        self.status = status


class Decoder(Protocol):
    """Decodes one file: yields its properties once, then chunks, then the end.

    Raises:
        DecodeError: With the status `missing`, `empty`, `no_permission`, `unreadable`, `encrypted`, `truncated`
            (the index is missing), `no_video_stream`, `attached_picture`, `zero_frames`, or `over_limit`
            (the video exceeds `DecodeOptions.limits`: raised before the first frame, or later if it runs on
            for longer than it promised).
    """

    def __call__(
        self, path: Path, options: DecodeOptions
    ) -> Iterator[VideoProperties | FrameChunk | DecodeEnd]: ...


def promised_but_missing(promised_seconds: float, decoded_seconds: float, frame_rate: float) -> float:
    """Return how many seconds are missing from what the container promises; 0.0 within tolerance.

    Containers round durations, and some count the sound's: up to 0.5 s, three frames or 5 % may be missing.
    """
    if not promised_seconds > 0:
        return 0.0
    frame_seconds = 1.0 / frame_rate if frame_rate > 0 else 0.0
    tolerance = max(0.5, 3 * frame_seconds, 0.05 * promised_seconds)
    short = promised_seconds - decoded_seconds
    return short if short > tolerance else 0.0


def check_file(path: Path) -> None:
    """Refuse what is no file to decode.

    Raises:
        DecodeError: `missing`, `empty`, `no_permission`, or `unreadable` if it is a folder or a device.
    """
    try:
        found = path.stat()
        if stat.S_ISREG(found.st_mode):
            path.open("rb").close()
    except PermissionError as error:
        words = f"{path} cannot be read ({error.strerror}) - give yourself permission to read it, and run again"
        raise DecodeError("no_permission", words) from error
    except (OSError, ValueError) as error:
        reason = "" if isinstance(error, FileNotFoundError) else f" ({getattr(error, 'strerror', error)})"
        words = f"{path} does not exist{reason} - expected a video file; check the path"
        raise DecodeError("missing", words) from error
    if not stat.S_ISREG(found.st_mode):
        raise DecodeError("unreadable", f"{path} is not a regular file - expected a video file")
    if found.st_size == 0:
        raise DecodeError("empty", f"{path} has 0 bytes - copy or download it again")


def unreadable(path: Path, words: str) -> DecodeError:
    """Return the error for a file that no demuxer opens: `truncated` if its index is missing."""
    if lacks_index(path):
        return DecodeError(
            "truncated", f"{path} ends before its index (moov atom not found) - copy or download it again; {words}"
        )
    return DecodeError("unreadable", f"{path} is not a video that can be read - {words}")


def no_video(path: Path, has_picture: bool) -> DecodeError:
    """Return the error for a file without a video stream; cover art is a picture, not a video."""
    if has_picture:
        return DecodeError(
            "attached_picture", f"{path} has cover art but no video stream - expected a video, not music"
        )
    return DecodeError("no_video_stream", f"{path} has no video stream - expected a video")


@dataclass(frozen=True)
class Candidate:
    """A video stream that may be used; `number` counts all the file's streams, `is_still` says it is one frame."""

    number: int
    num_pixels: int
    is_default: bool
    is_still: bool


def best_stream(candidates: Sequence[Candidate]) -> int:
    """Return the number of the stream to use: the one that the ffmpeg program picks, but no still before a clip.

    ffmpeg takes the stream of the most pixels, and counts the default flag as `DEFAULT_FLAG_PIXELS`.
    """

    def rank(candidate: Candidate) -> tuple[bool, int]:
        return not candidate.is_still, candidate.num_pixels + DEFAULT_FLAG_PIXELS * candidate.is_default

    return max(candidates, key=rank).number


def note_of(num_streams: int, place: int, transfer: str, hardware_words: str = "") -> str:
    """Return what the record says of a video that is used otherwise than as it is; empty if nothing is special.

    Args:
        num_streams: Number of the file's video streams, cover art left out.
        place: Which of them is used, from 1.
        transfer: The name of a transfer function for HDR that was mapped to SDR, or empty.
        hardware_words: Why it was decoded in software although hardware was asked for, or empty.
    """
    notes = {
        f"used video stream {place} of {num_streams}": num_streams > 1,
        f"HDR ({transfer}) was mapped to SDR": transfer,
        f"decoded in software, because the hardware decoder failed ({hardware_words})": hardware_words,
    }
    return "; ".join(note for note, holds in notes.items() if holds)


def zero_frames(path: Path, words: str) -> DecodeError:
    """Return the error for a video stream that gives no frame."""
    return DecodeError("zero_frames", f"{path} gave no frame - {words or 'its video stream is empty'}")


def over_limit(path: Path, words: str, option: str) -> DecodeError:
    """Return the error for a video that exceeds a limit."""
    return DecodeError("over_limit", f"{path} {words}; if you trust it raise {option}")


def require_size(path: Path, limits: Limits, width_px: int, height_px: int) -> None:
    """Refuse frames that are too large.

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
    """Refuse a video that is too long; NaN means unknown.

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
    """Refuse a file with too many streams of any kind.

    Raises:
        DecodeError: `over_limit`.
    """
    if num_streams > limits.max_streams:
        words = f"has {num_streams} streams - expected at most {limits.max_streams}"
        raise over_limit(path, words, "--max-streams")


def require_clear(path: Path, container_format: str) -> None:
    """Refuse an encrypted file: it would decode to noise.

    Raises:
        DecodeError: `encrypted`.
    """
    if is_encrypted(path, container_format):
        raise DecodeError("encrypted", f"{path} is encrypted - decrypt it, or leave it out")


def square_pixels_width(width: int, sample_aspect_ratio: float) -> int:
    """Return the width at which pixels are square; an absurd ratio is ignored as damage."""
    if not MIN_ASPECT_RATIO <= sample_aspect_ratio <= MAX_ASPECT_RATIO:
        return width
    return max(1, math.floor(width * sample_aspect_ratio + 0.5))


def right_angle(degrees: float) -> int:
    """Return the nearest of 0, 90, 180 and 270."""
    return round(degrees / 90) * 90 % 360


def on_white(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Lay a picture `(H, W, 4)` onto white, as a viewer does, and return it as `(H, W, 3)`.

    The colours of transparent pixels were never meant to be seen: encoders store whatever compresses best.
    """
    colours, alpha = frame[..., :3], frame[..., 3:].astype(np.uint16)
    if alpha.min() == 255:
        return np.ascontiguousarray(colours)
    return ((colours * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def origin_seconds(container_format: str, first_time_seconds: float) -> float:
    """Return the time from which a container counts its duration: Matroska's duration includes a late start."""
    return min(0.0, first_time_seconds) if "matroska" in container_format else first_time_seconds


def tagged_seconds(text: str) -> float:
    """Return the seconds of an `hh:mm:ss.sss`; NaN if the text has another form."""
    match = re.fullmatch(r"(\d+):(\d\d):(\d\d(?:\.\d+)?)", text.strip())
    if match is None:
        return math.nan
    return int(match[1]) * 3600 + int(match[2]) * 60 + float(match[3])


def _no_listener() -> None: ...


# Called at every packet and frame. A decode worker sets it to tell the main process that it is alive:
# while it looks for a few frames of a long video, it sends nothing else for minutes.
heartbeat: Callable[[], None] = _no_listener


class ChunkBuilder:
    """Gathers frames of one size into chunks of at most `CHUNK_BYTES` and `CHUNK_FRAMES`.

    A larger frame makes a chunk of its own.
    """

    def __init__(self) -> None:
        self._frames: list[NDArray[np.uint8]] = []
        self._times_seconds: list[float] = []

    def add(self, frame: NDArray[np.uint8], time_seconds: float) -> Iterator[FrameChunk]:
        """Add a frame; yields the chunk before it if that is full."""
        if (len(self._frames) + 1) * frame.nbytes > CHUNK_BYTES or len(self._frames) == CHUNK_FRAMES:
            yield from self.flush()
        self._frames.append(frame)
        self._times_seconds.append(time_seconds)

    def flush(self) -> Iterator[FrameChunk]:
        """Yield the frames gathered so far, if any."""
        if self._frames:
            chunk = FrameChunk(np.stack(self._frames), np.array(self._times_seconds, dtype=np.float64))
            self._frames, self._times_seconds = [], []
            yield chunk


class DecodeErrors:
    """How often a decoder complained about the video, and its last complaint."""

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
    note: str = "",
    missing: str = "",
) -> DecodeEnd:
    """Return `partial` if the decoder complained or something is missing of the file, else `ok`.

    Args:
        properties: Hold the promised duration.
        decoded_seconds: Time from the first decoded frame to the end of the last one.
        errors: The decoder's complaints.
        whole_file_seconds: Lists every packet of the file, sound included. Called only if frames end
            before the promise: a slide shown for long, or sound that outlasts the picture, is no loss.
        note: Added to the words; see `note_of`.
        missing: What else is known to be missing; see `containers.what_is_missing`.
    """
    promised, rate = properties.duration_seconds, properties.frame_rate
    short = promised_but_missing(promised, decoded_seconds, rate)
    # Joined recordings promise the length of one of them.
    duration = decoded_seconds if promised_but_missing(decoded_seconds, promised, rate) else None
    if short and not errors.count:
        short = promised_but_missing(promised, whole_file_seconds(), rate)
    if not errors.count and not short and not missing:
        return DecodeEnd("ok", note, duration_seconds=duration)
    # A cut Ogg promises what is left of it.
    of_promised = f" of {promised:.1f} s" if promised > 0 and not missing else ""
    words = [f"decoded {decoded_seconds:.1f} s{of_promised}"]
    if errors.count:
        words.append(f"decode errors: {errors.count}, the last: {errors.last_words}")
    if missing or not errors.count:
        words.append(missing or "the file ends")
    cause = "truncated" if short or missing else "concealed_errors"
    return DecodeEnd("partial", "; ".join([*words, *([note] if note else [])]), cause, duration)
