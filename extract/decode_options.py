"""How every video of an extraction is decoded: what a decode worker is told."""

from __future__ import annotations

from dataclasses import dataclass, field

from svb.extract.sampling import Sampling


@dataclass(frozen=True)
class Limits:
    """What a video may ask for before it is refused as `over_limit`: files come from strangers.

    Attributes:
        max_width_px: Of a coded or displayed frame.
        max_height_px: Of a coded or displayed frame.
        max_duration_seconds: Of what the container promises, and of what is decoded.
        max_streams: Of any kind, in one file.
    """

    max_width_px: int = 16384
    max_height_px: int = 16384
    max_duration_seconds: float = 48 * 3600.0
    max_streams: int = 64


@dataclass(frozen=True)
class DecodeOptions:
    """What both decoders need to know beside the file.

    Attributes:
        sampling: Which frames.
        decoder: `pyav`, which hands over to ffmpeg what it cannot read, or `ffmpeg`.
        fast: Skip frames that no other frame refers to; picked frames may move by a few.
        hwaccel: ffmpeg's name of a hardware decoder, such as `cuda`; only with the decoder `ffmpeg`.
        resize_px: Scale the short side to this in the decoder; None leaves the size to the device.
        limits: What is refused.
    """

    sampling: Sampling
    decoder: str = "pyav"
    fast: bool = False
    hwaccel: str | None = None
    resize_px: int | None = None
    limits: Limits = field(default_factory=Limits)
