"""How every video of an extraction is decoded: what a decode worker is told."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

from svb.errors import UsageError
from svb.extract.decode.sampling import Sampling


@dataclass(frozen=True)
class Limits:
    """What a video may ask for before it is refused as `over_limit`: files come from strangers.

    Attributes:
        max_width_px: Of a coded or displayed frame.
        max_height_px: Of a coded or displayed frame.
        max_duration_seconds: Of what the container promises, and of what is decoded.
        max_streams: Of any kind, in one file.

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
    """What both decoders need to know beside the file.

    Attributes:
        sampling: Which frames.
        decoder: `pyav`, which hands over to ffmpeg what it cannot read, or `ffmpeg`.
        fast: Skip frames that no other frame refers to; picked frames may move by a few.
        hwaccel: ffmpeg's name of a hardware decoder, such as `cuda`; only with the decoder `ffmpeg`. Ask
            `svb.extract.decode.hwaccel.require_hwaccel` first: ffmpeg falls back to software without a word.
        resize_px: Scale the short side to this in the decoder; None leaves the size to the device. A strip
            longer than 8 times its short side keeps its size.
        limits: What is refused.

    Raises:
        UsageError: `hwaccel` without the decoder `ffmpeg`, or a `resize_px` that is not positive.
    """

    sampling: Sampling
    decoder: str = "pyav"
    fast: bool = False
    hwaccel: str | None = None
    resize_px: int | None = None
    limits: Limits = field(default_factory=Limits)

    def at_times(self, times_seconds: tuple[float, ...]) -> DecodeOptions:
        """Return the options for a video that has times of its own, or these where it has none."""
        return replace(self, sampling=Sampling(times_seconds=times_seconds)) if times_seconds else self

    def __post_init__(self) -> None:
        if self.hwaccel is not None and self.decoder != "ffmpeg":
            raise UsageError(
                f"the decoder {self.decoder} cannot use the hardware decoder {self.hwaccel!r} - choose the decoder "
                "ffmpeg, or leave out --hwaccel"
            )
        if self.resize_px is not None and self.resize_px < 1:
            raise UsageError(f"cannot resize frames to {self.resize_px} px - give at least 1")
