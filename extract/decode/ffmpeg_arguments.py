"""Builds ffmpeg's arguments: its input, and the filters that choose and scale frames and print their times."""

from __future__ import annotations

from array import array
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ffmpeg

from svb.extract.decode.choice import earliest, scene_expression
from svb.extract.decode.containers import OggPart, part_url
from svb.extract.decode.decoder import (
    NEUTRAL_COLOURS,
    SCALE_FLAGS,
    SDR_COLOURS,
)
from svb.extract.decode.options import MAX_ASPECT_RATIO, MIN_ASPECT_RATIO, DecodeOptions
from svb.extract.decode.sampling import TIME_TOLERANCE_SECONDS, Sampling

# Printed with the time of every decoded frame, and of every chosen one.
DECODED, CHOSEN = "decoded", "chosen"

# Linux takes no argument longer than 128 KiB. Above this many positions every frame is converted, and
# the unwanted ones are dropped here.
MAX_SELECTED_POSITIONS = 5000

# A time takes more characters than a position.
MAX_SELECTED_TARGETS = 2000


@dataclass(frozen=True)
class Source:
    """The file, its open descriptor and how to decode it.

    The last four only show once ffmpeg has described the file; then it is started anew.

    Attributes:
        parts: The parts of an Ogg file.
        part: The part of a joined file to read; None for all of a file that is not joined.
        stream: The number of the video stream to use; None means the first that is no cover art.
        is_turned: Whether ffmpeg turns the picture.
        hdr_transfer: The name of a transfer function for HDR, or empty.
        neutral: How many of `NEUTRAL_COLOURS` were tried.
        hardware_words: Why the hardware decoder that was asked for is not used, or empty.
    """

    path: Path
    fd: int
    options: DecodeOptions
    parts: tuple[OggPart, ...] = ()
    part: OggPart | None = None
    stream: int | None = None
    is_turned: bool = False
    hdr_transfer: str = ""
    neutral: int = 0
    hardware_words: str = ""

    def input(self, **options: Any) -> Any:
        """Return the graph's input: the open file and nothing else, so that a playlist cannot open other files."""
        url, protocols = part_url(self.part)
        return ffmpeg.input(url, fd=self.fd, protocol_whitelist=protocols, copyts=None, **options)

    @property
    def is_joined(self) -> bool:
        """Whether the file was joined of several, each of which ffmpeg must read by itself."""
        return self.part is not None

    @property
    def is_first_part(self) -> bool:
        return not self.is_joined or self.part == self.parts[0]

    def in_parts(self) -> list[Source]:
        """Return the source for each part of a joined file, or just this one."""
        return [replace(self, part=part) for part in self.parts] if self.is_joined else [self]

    def video(self, **options: Any) -> Any:
        """Return the graph's video stream."""
        return self.input(**options)["V:0" if self.stream is None else str(self.stream)]


@dataclass(frozen=True)
class Choice:
    """The wanted frames if they were listed before, as `FrameChooser` takes them."""

    positions: Collection[int] | None = None
    targets_seconds: Sequence[float] | None = None
    seen_seconds: array[float] | None = None

    @property
    def is_listed(self) -> bool:
        return self.positions is not None

    def after(self, num_frames: int) -> Choice:
        """Return the choice of what follows the first frames, with positions counted from there."""
        if not num_frames or self.positions is None:
            return self
        return replace(self, positions=[n - num_frames for n in self.positions if n >= num_frames])


def select_expression(sampling: Sampling, choice: Choice) -> str:
    """Return the choice as an ffmpeg expression with the same operations as `FrameChooser`."""
    if choice.positions is not None:
        return "1" if len(choice.positions) > MAX_SELECTED_POSITIONS else _any_of(sorted(choice.positions))
    if choice.targets_seconds is not None:
        if len(choice.targets_seconds) > MAX_SELECTED_TARGETS:
            return "1"
        return f"if(gt(st(0,{_num_passed(earliest(choice.targets_seconds))}),ld(1)),st(1,ld(0)),0)"
    if sampling.every_nth is not None:
        return f"not(mod(n,{sampling.every_nth}))"
    if sampling.scenes is not None:
        return scene_expression(sampling.scenes)
    if sampling.keyframes:
        return "key"
    assert sampling.fps is not None
    fps = float(sampling.fps)

    def grid_point(time: str) -> str:
        return f"floor(({time}-start_t+{TIME_TOLERANCE_SECONDS!r})*{fps!r})"

    return f"if(isnan(prev_selected_t),1,gt({grid_point('t')},{grid_point('prev_selected_t')}))"


def _any_of(positions: list[int]) -> str:
    """Return an expression for `n` being one of these: a shallow tree, because each frame walks down it."""
    if len(positions) <= 8:
        return "+".join(f"eq(n,{position})" for position in positions) or "0"
    middle = len(positions) // 2
    return f"if(lt(n,{positions[middle]}),{_any_of(positions[:middle])},{_any_of(positions[middle:])})"


def _num_passed(times_seconds: list[float], before: int = 0) -> str:
    """Return an expression for how many of these ascending times have passed, as a shallow tree."""
    if not times_seconds:
        return str(before)
    middle = len(times_seconds) // 2
    earlier = _num_passed(times_seconds[:middle], before)
    later = _num_passed(times_seconds[middle + 1 :], before + middle + 1)
    return f"if(lt(t,{times_seconds[middle]!r}),{earlier},{later})"


def scaled_size(resize_px: int | tuple[int, int] | None) -> tuple[str, str]:
    """Return width and height as ffmpeg expressions, equal to `square_pixels_width` and `resized`."""
    if isinstance(resize_px, tuple):
        return str(resize_px[1]), str(resize_px[0])
    sane = f"between(sar,{MIN_ASPECT_RATIO!r},{MAX_ASPECT_RATIO!r})"
    width = f"if({sane},max(1,floor(iw*sar+0.5)),iw)"
    if resize_px is None:
        return width, "ih"
    # ld(0) is the width with square pixels, ld(1) the short side, ld(2) the long one.
    sides = f"st(0,{width})*0+st(1,min(ld(0),ih))*0+st(2,max(ld(0),ih))*0"
    is_strip = f"gt(ld(2),{MAX_ASPECT_RATIO!r}*ld(1))"
    long_side = f"trunc({resize_px}*ld(2)/ld(1))"
    return (
        f"{sides}+if({is_strip},ld(0),if(gt(ld(0),ih),{long_side},{resize_px}))",
        f"{sides}+if({is_strip},ih,if(gt(ld(0),ih),{resize_px},{long_side}))",
    )


def print_time(stream: Any, key: str, times_fd: int) -> Any:
    # The filter prints only frames that carry its key, so a first filter adds it.
    marked = stream.filter("metadata", mode="add", key=key, value=1)
    return marked.filter("metadata", mode="print", key=key, direct=1, file=f"pipe:{times_fd}")


def input_options(options: DecodeOptions) -> dict[str, Any]:
    arguments: dict[str, Any] = {"threads": 1, "max_pixels": options.limits.max_pixels}
    if options.sampling.keyframes or options.fast:
        arguments["skip_frame"] = "nokey" if options.sampling.keyframes else "noref"
    if options.hwaccel is not None:
        arguments["hwaccel"] = options.hwaccel
        if options.hwaccel_device is not None:
            arguments["hwaccel_device"] = options.hwaccel_device
    return arguments


def decode_arguments(source: Source, choice: Choice, times_fd: int) -> list[str]:
    sampling = source.options.sampling
    options = input_options(source.options)
    if not source.is_turned and sampling.scenes is None:
        # If the resolution changes ffmpeg would build the graph anew, and the choice would start over.
        # Instead the scale filter adapts. The filters that turn a picture cannot, so turned video keeps
        # the default: after a change its frames may be up to a grid step late, or missing. The filter
        # that finds scenes cannot either: it would read past the end of smaller frames.
        options["reinit_filter"] = 0
    width, height = scaled_size(source.options.resize_px)
    if "colorspace" in NEUTRAL_COLOURS[source.neutral]:
        # ffmpeg refuses a reserved matrix even before the first filter.
        options["colorspace"] = "unknown"
    stream = print_time(source.video(**options), DECODED, times_fd)
    if neutral := NEUTRAL_COLOURS[source.neutral]:
        stream = stream.filter("setparams", **dict.fromkeys(neutral, "unknown"))
    to_sdr = dict(pair.split("=") for pair in SDR_COLOURS.split(":")) if source.hdr_transfer else {}
    stream = print_time(stream.filter("select", select_expression(sampling, choice)), CHOSEN, times_fd)
    stream = (
        stream.filter("scale", w=width, h=height, flags=f"{source.options.interpolation}+{SCALE_FLAGS}", **to_sdr)
        .filter("format", "rgba")
        .output("pipe:1", f="image2pipe", fps_mode="passthrough", threads=1, **{"c:v": "pam"})
    )
    return list(ffmpeg.get_args(stream))
