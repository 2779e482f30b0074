"""How the videos of an extraction are decoded: the options that a decode worker is given."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

from svb.errors import UsageError
from svb.extract.decode.sampling import Sampling


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
