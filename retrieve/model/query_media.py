"""A picture or a video file as a query: decoded and computed as the rows of the index were. Imports no torch."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from svb.data.fusion import parts_of
from svb.errors import InputError
from svb.extract.decode.decoder import FrameChunk, on_white
from svb.extract.decode.options import resized
from svb.extract.decode.sampling import TIME_TOLERANCE_SECONDS

if TYPE_CHECKING:
    from PIL import Image

    from svb.data.rows import FrameFeatures
    from svb.extract.one_file import OneFile
    from svb.retrieve.model.media_model import MediaModel

# What PIL reads by itself: it hands some formats, such as EPS, to other programs.
PICTURE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
MAX_PICTURE_BYTES = 256 * 2**20
# Backbones look at a few hundred thousand: a picture that is far larger is scaled down before it is copied.
MAX_PICTURE_PIXELS = 12_000_000


def embed_image(file: Path, media: MediaModel) -> NDArray[np.float32]:
    """Return the `(D,)` embedding of a picture, as that of a video of one frame.

    Args:
        file: JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF.
        media: The index's backbones and video head.

    Raises:
        InputError: The file is not a picture, or too large; or the index holds features of moving clips, or ones
            that cannot be computed here.
        MismatchError: A backbone's weights here are not those of the index.
    """
    video = media.model["video"]
    _require_computable(video, file)
    moving = [name for name, held in parts_of(video).items() if held["clip_frames"] > 1]
    if moving:
        raise InputError(
            f"{moving[0]} looks at {parts_of(video)[moving[0]]['clip_frames']} frames at a time and cannot tell "
            f"what {file} shows - search with a text or a video, or index a backbone of single frames"
        )
    frame = read_picture(file)
    chunk = FrameChunk(_scaled(frame, video["decoder"])[None], np.zeros(1))
    return media.embed(_rows(media, [chunk], file))


def embed_video(file: Path, span_seconds: tuple[float, float] | None, media: MediaModel) -> NDArray[np.float32]:
    """Return the `(D,)` embedding of a video file, or of a part of it.

    Args:
        file: The video.
        span_seconds: `[begin, end)` on the file's own clock, as moments are; None for all of it. Where no sampled
            frame lies in it, the nearest one stands for it.
        media: The index's backbones and video head.

    Raises:
        InputError: The file gives no frame, or ends before the span; or the index holds features that cannot be
            computed here.
        MismatchError: A backbone's weights here are not those of the index.
    """
    from svb.extract.decode.options import stored_decode_options
    from svb.extract.one_file import OneFile

    video = media.model["video"]
    _require_computable(video, file)
    opened = OneFile(file, stored_decode_options(video))
    chunks: Iterable[FrameChunk] = opened.chunks()
    single = all(held["clip_frames"] == 1 for held in parts_of(video).values())
    if span_seconds is not None and single:
        # Frames outside it do not go through the backbones, which take most of the time.
        chunks = _within(chunks, span_seconds)
    rows = _rows(media, chunks, file)
    if span_seconds is not None:
        _require_reaches(opened, file, span_seconds[0])
        rows = rows if single else _cut(rows, span_seconds)
    return media.embed(rows)


def read_picture(file: Path) -> NDArray[np.uint8]:
    """Return a picture `(H, W, 3)` uint8 RGB, upright, transparent parts on white; scaled down where it is huge.

    Raises:
        InputError: The file is not a picture, or too large.
    """
    from PIL import Image, ImageOps

    try:
        size = file.stat().st_size
        if size > MAX_PICTURE_BYTES:
            raise InputError(f"{file} has {size} bytes - expected a picture of at most {MAX_PICTURE_BYTES}")
        with warnings.catch_warnings():
            # PIL warns of a picture that is too large, and refuses one of twice the size: here both are refused.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=PICTURE_FORMATS) as picture:
                return on_white(np.array(_rgba(ImageOps.exif_transpose(picture))))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"{file} is too large a picture ({error}) - make it smaller") from error
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{file} does not exist - expected a picture; check the path") from error
    except Exception as error:  # the errors of PIL's many readers have no common root
        raise InputError(
            f"{file} cannot be used as a picture ({error}) - expected one of {', '.join(PICTURE_FORMATS)}"
        ) from error


def _rgba(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):
        picture = _of_8_bits(picture)
    times = math.ceil(math.sqrt(picture.width * picture.height / MAX_PICTURE_PIXELS))
    if times > 1:
        # The numbers of a palette have no mean.
        picture = (picture.convert("RGBA") if picture.mode in {"1", "P", "PA"} else picture).reduce(times)
    return picture.convert("RGBA")


def _of_8_bits(picture: Image.Image) -> Image.Image:
    """Return a grey picture of 16 or 32 bits a pixel in 8: the high ones, which PIL cuts off, of those in use."""
    from PIL import Image

    values = np.asarray(picture)
    highest = int(values.max(initial=0))
    bits = 16 if picture.mode != "I" or 255 < highest < 2**16 else max(8, highest.bit_length())
    return Image.fromarray((values.clip(0) >> (bits - 8)).astype(np.uint8))


def _scaled(frame: NDArray[np.uint8], decoder: dict[str, Any]) -> NDArray[np.uint8]:
    """Return a frame as an index's decoder would have made it, whose scaling differs from PIL's by tenths."""
    from PIL import Image

    from svb.extract.decode.options import stored_resize_px

    resize_px = stored_resize_px(decoder)
    if resize_px is None:
        return frame
    size = resized(frame.shape[1], frame.shape[0], resize_px)
    interpolation = Image.Resampling[decoder.get("interpolation", "bicubic").upper()]
    return np.array(Image.fromarray(frame).resize(size, interpolation))


def _require_computable(video: dict[str, Any], file: Path) -> None:
    if any(settings.get("imported", False) for settings in parts_of(video).values()):
        raise InputError(
            f"the features of {video['backbone']} were imported and cannot be computed of {file} here - search "
            "with a text, or train on features that `svb extract` made"
        )


def _rows(media: MediaModel, chunks: Iterable[FrameChunk], file: Path) -> FrameFeatures:
    """Return the features of frames as one video, with those of several backbones side by side."""
    from svb.data.fusion import fuse
    from svb.data.rows import FrameFeatures

    return fuse(
        [
            FrameFeatures([str(file)], features.astype(np.float16), times, np.array([0, len(features)]))
            for features, times in media.rows(chunks)
        ]
    )


def _require_reaches(opened: OneFile, file: Path, seconds: float) -> None:
    """Refuse a time at or after the end of a file that was read; the last frame's time is within.

    Raises:
        InputError: The file ends before that time.
    """
    if seconds >= opened.end_seconds and seconds > opened.last_seconds:
        raise InputError(
            f"the part begins at {seconds:g} s, and {file} lasts until {opened.end_seconds:.1f} s - expected a "
            "part that begins before the end"
        )


def _within(chunks: Iterable[FrameChunk], span_seconds: tuple[float, float]) -> Iterator[FrameChunk]:
    """Yield the frames of a span; if it has none, the frame shown then, or else the first frame."""
    shown: FrameChunk | None = None
    has_any = False
    for chunk in chunks:
        away = _seconds_away(chunk.frame_times_seconds, span_seconds)
        inside = away == 0
        if inside.any():
            has_any = True
            yield FrameChunk(chunk.frames[inside], chunk.frame_times_seconds[inside])
            continue
        num_before = int((chunk.frame_times_seconds < span_seconds[0]).sum())
        if num_before or shown is None:
            row = slice(max(0, num_before - 1), max(1, num_before))
            # A copy: the chunk's memory is written to again.
            shown = FrameChunk(chunk.frames[row].copy(), chunk.frame_times_seconds[row])
    if not has_any and shown is not None:
        yield shown


def _cut(rows: FrameFeatures, span_seconds: tuple[float, float]) -> FrameFeatures:
    """Return the rows of a span, or the one that is nearest to it."""
    away = _seconds_away(rows.times_seconds, span_seconds)
    kept = np.flatnonzero(away == away.min())
    kept = kept if away[kept[0]] == 0 else kept[:1]
    return replace(
        rows, features=rows.features[kept], times_seconds=rows.times_seconds[kept], offsets=np.array([0, len(kept)])
    )


def _seconds_away(times_seconds: NDArray[np.float64], span_seconds: tuple[float, float]) -> NDArray[np.float64]:
    """Return how far each time is from a half-open span, 0 within it."""
    begin, end = span_seconds
    # A container that counts in milliseconds may put a frame a little before the second it belongs to.
    begin, end = begin - TIME_TOLERANCE_SECONDS, end - TIME_TOLERANCE_SECONDS
    away: NDArray[np.float64] = np.maximum(begin - times_seconds, times_seconds - np.nextafter(end, begin)).clip(0)
    return away
