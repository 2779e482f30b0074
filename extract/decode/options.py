"""How the videos of an extraction are decoded: the options of a decode worker, and what a store says of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from svb.errors import InputError, UsageError
from svb.extract.decode.sampling import Sampling

DECODERS = ("pyav", "ffmpeg")
# Recorded in a store. Raised when files are read otherwise than before: other frames, times, colours or streams.
READER = 2

# Anamorphic video has ratios from 1:2 to 64:33; a damaged header can ask for frames of gigabytes.
MIN_ASPECT_RATIO, MAX_ASPECT_RATIO = 1 / 8, 8.0


@dataclass(frozen=True)
class Limits:
    """The limits above which a video is refused as `over_limit`: files come from strangers.

    Attributes:
        max_width_px: Largest width of a coded or displayed frame.
        max_height_px: Largest height of a coded or displayed frame.
        max_duration_seconds: Longest duration, both promised by the container and decoded.
        max_streams: Most streams in one file, of any kind.

    Raises:
        UsageError: A limit is not positive.
    """

    max_width_px: int = 16384
    max_height_px: int = 16384
    max_duration_seconds: float = 48 * 3600.0
    max_streams: int = 64

    def __post_init__(self) -> None:
        for limit in fields(self):
            if not getattr(self, limit.name) > 0:
                raise UsageError(
                    f"a {limit.name} of {getattr(self, limit.name)} lets no video in - give more than 0"
                )

    @property
    def max_pixels(self) -> int:
        """The most pixels that libavcodec may decode: it counts whole blocks, of up to 128 pixels."""
        width, height = (-(-size // 128) * 128 for size in (self.max_width_px, self.max_height_px))
        return width * height


@dataclass(frozen=True)
class DecodeOptions:
    """The options of both decoders.

    Attributes:
        sampling: Which frames are used.
        decoder: `pyav`, which leaves files that it cannot read to ffmpeg, or `ffmpeg`.
        fast: Skip frames that no other frame refers to; the frames used may move by a few.
        hwaccel: ffmpeg's name of a hardware decoder, such as `cuda`; only with the decoder `ffmpeg`. Ask
            `svb.extract.decode.ffmpeg_process.require_hwaccel` first: ffmpeg falls back to software silently.
        hwaccel_device: Which of several such devices, as ffmpeg names it; None is ffmpeg's first.
        resize_px: Scale the short side to this in the decoder, or the whole frame to this `(height, width)`; None
            leaves the size to the device. A strip longer than 8 times its short side keeps its size, unless the
            whole frame is scaled.
        interpolation: swscale's `bicubic` or `bilinear`.
        limits: Which videos are refused.

    Raises:
        UsageError: `hwaccel` without the decoder `ffmpeg`, or a `resize_px` that is not positive.
    """

    sampling: Sampling
    decoder: str = "pyav"
    fast: bool = False
    hwaccel: str | None = None
    hwaccel_device: str | None = None
    resize_px: int | tuple[int, int] | None = None
    interpolation: str = "bicubic"
    limits: Limits = field(default_factory=Limits)

    def at_times(self, times_seconds: tuple[float, ...]) -> DecodeOptions:
        """Return these options with the video's own times as the sampling, if it has any."""
        return replace(self, sampling=Sampling(times_seconds=times_seconds)) if times_seconds else self

    def __post_init__(self) -> None:
        if self.hwaccel is not None and self.decoder != "ffmpeg":
            raise UsageError(
                f"the decoder {self.decoder} cannot use the hardware decoder {self.hwaccel!r} - choose the decoder "
                "ffmpeg, or leave out --hwaccel"
            )
        sizes = self.resize_px if isinstance(self.resize_px, tuple) else (self.resize_px or 0,)
        if self.resize_px is not None and min(sizes) < 1:
            raise UsageError(f"cannot resize frames to {self.resize_px} px - give at least 1")


def resized(width: int, height: int, resize_px: int | tuple[int, int] | None) -> tuple[int, int]:
    """Return the width and height of a scaled frame, as `DecodeOptions.resize_px` tells.

    The short side is `resize_px`, and the long side is rounded down, as on the device.

    A strip longer than `MAX_ASPECT_RATIO` times its short side keeps its size: enlarged, it might not fit
    into memory.
    """
    if isinstance(resize_px, tuple):
        return resize_px[1], resize_px[0]
    short, long = min(width, height), max(width, height)
    if resize_px is None or long > MAX_ASPECT_RATIO * short:
        return width, height
    long_side = int(resize_px * long / short)
    return (long_side, resize_px) if width > height else (resize_px, long_side)


def decoder_settings(options: DecodeOptions) -> dict[str, Any]:
    """Return a decoder, its version and what it does beyond the ordinary, as stored and fingerprinted."""
    size = options.resize_px
    beyond = {
        "fast": options.fast,
        "hwaccel": options.hwaccel,
        "resize_px": list(size) if isinstance(size, tuple) else size,
        "interpolation": options.interpolation if options.interpolation != "bicubic" else None,
    }
    return {**_name_and_version(options.decoder), **{name: value for name, value in beyond.items() if value}}


def stored_decode_options(settings: Mapping[str, Any]) -> DecodeOptions:
    """Return how the videos of a store were decoded, from its settings.

    Raises:
        InputError: The features were not computed from video here, or each video had times of its own.
    """
    decoder, sampling = settings["decoder"], settings["sampling"]
    if "times" in sampling:
        raise InputError(
            "the videos of this store were sampled at times of their own - another file can only be compared with "
            "a store that was extracted with --fps, --frames or their like"
        )
    return DecodeOptions(
        Sampling(**sampling),
        decoder["name"],
        fast=decoder.get("fast", False),
        hwaccel=decoder.get("hwaccel"),
        resize_px=stored_resize_px(decoder),
        interpolation=decoder.get("interpolation", "bicubic"),
    )


def stored_resize_px(decoder: Mapping[str, Any]) -> int | tuple[int, int] | None:
    """Return the size that a store's decoder scaled frames to, as `DecodeOptions` has it."""
    size: int | list[int] | None = decoder.get("resize_px")
    return (size[0], size[1]) if isinstance(size, list) else size


def _name_and_version(decoder: str) -> dict[str, Any]:
    if decoder == "pyav":
        import av

        return {"name": "pyav", "version": f"{av.__version__}, libavcodec {av.library_versions['libavcodec'][0]}"}
    import imageio_ffmpeg

    return {"name": "ffmpeg", "version": imageio_ffmpeg.get_ffmpeg_version()}


def words_of_older_reader(path: Path, description: Mapping[str, Any]) -> str:
    """Return what to say of a store whose first videos were read by an older svb, from its description."""
    is_older: bool = description.get("provenance", {}).get("reader", 1) < READER
    if not is_older or description["settings"]["decoder"]["name"] not in DECODERS:
        return ""
    return (
        f"{path} was begun by an older svb, which read HDR, several video streams, joined recordings and a few "
        "other kinds of files otherwise - extract into another folder to read all alike; docs/extraction.md lists "
        "the kinds"
    )
