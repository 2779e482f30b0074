"""What an extraction is asked for that shapes its rows: it becomes the settings of the store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svb.config import require_same
from svb.errors import InputError, UsageError
from svb.extract.decode.options import DecodeOptions, Limits
from svb.extract.decode.sampling import Sampling
from svb.extract.names import absolute_name

if TYPE_CHECKING:
    from svb.extract.backbones.backbone import Backbone
    from svb.extract.decode.times_table import TimesTable

DECODERS = ("pyav", "ffmpeg")
RESIZES = ("device", "decoder")


@dataclass(frozen=True)
class Request:
    """What shapes the rows of a store.

    Attributes:
        backbones: Absolute names, without repeats.
        options: How to decode; `resize_px` follows from the backbones.
        resize: Where frames are scaled, one of `RESIZES`.
        batch_size: B. In bfloat16 a row's last bits depend on it.
        times: The table of times, where each video has its own.
    """

    backbones: list[str]
    options: DecodeOptions
    resize: str
    batch_size: int
    times: TimesTable | None

    def settings(self, networks: Sequence[Backbone]) -> dict[str, Any]:
        """Return the settings of the store that is asked for."""
        return {
            **self._settings(self.decode_options(networks).resize_px),
            "backbones": {network.name: network.settings() for network in networks},
        }

    def decode_options(self, networks: Sequence[Backbone]) -> DecodeOptions:
        """Return how to decode for these backbones."""
        if self.resize == "device":
            return self.options
        return replace(self.options, resize_px=max(network.image_size for network in networks))

    def require_fits(self, settings: Mapping[str, Any], precision: str, out: Path) -> None:
        """Compare with a store's settings what needs no network to be known.

        A run with nothing to do takes a second, a mistaken option not much longer.

        Raises:
            MismatchError: The store was made with other settings.
        """
        resize_px = settings["decoder"].get("resize_px", 0) if self.resize == "decoder" else None
        require_same(
            {**settings, "backbones": sorted(settings["backbones"])},
            {**self._settings(resize_px), "backbones": sorted(self.backbones)},
            what=f"the feature store {out}",
            do_next="Give the options (and package versions) it was made with, or write to another folder with -o.",
        )
        if precision != "auto":
            held = settings["backbones"].items()
            stored = {name: {"precision": backbone["precision"]} for name, backbone in held}
            wanted = {name: {"precision": precision} for name in stored}
            require_same(stored, wanted, what=f"the feature store {out}", do_next="Leave out --precision.")

    def _settings(self, resize_px: int | None) -> dict[str, Any]:
        sampling = {"times": self.times.content_hash} if self.times else self.options.sampling.settings()
        decoder = decoder_settings(replace(self.options, resize_px=resize_px or None))
        if resize_px == 0:
            decoder["resize_px"] = "the largest backbone's"
        return {"sampling": sampling, "decoder": decoder, "batch_size": self.batch_size}


def make_request(
    backbones: Sequence[str],
    *,
    sampling: Sampling | None,
    times: Path | str | None,
    decoder: str,
    fast_decode: bool,
    hwaccel: str | None,
    resize: str,
    limits: Limits | None,
    batch_size: int,
) -> Request:
    """Return a request; see `svb.extract.run.extract` for what it is made from.

    Raises:
        InputError: The table of times cannot be used.
        UsageError: An option means nothing.
    """
    for what, value, known in (("decoder", decoder, DECODERS), ("place to resize", resize, RESIZES)):
        if value not in known:
            raise UsageError(f"unknown {what} {value!r} - expected one of {', '.join(known)}")
    if not backbones:
        raise UsageError("nothing to run - give at least one backbone")
    if times is not None and sampling is not None:
        raise UsageError(
            f"got both a sampling ({sampling.settings()}) and times from {times} - give one of the two"
        )
    table = None
    if times is not None:
        from svb.extract.decode.times_table import read_times

        table = read_times(Path(times))
    if hwaccel is not None:
        from svb.extract.decode.ffmpeg_process import require_hwaccel

        require_hwaccel(hwaccel)
    options = DecodeOptions(
        # Where each video has its own times, these stand for none.
        sampling=sampling or (Sampling(fps=1.0) if table is None else Sampling(times_seconds=(0.0,))),
        decoder=decoder,
        fast=fast_decode,
        hwaccel=hwaccel,
        limits=limits or Limits(),
    )
    return Request([absolute_name(name) for name in dict.fromkeys(backbones)], options, resize, batch_size, table)


def decoder_settings(options: DecodeOptions) -> dict[str, Any]:
    """Return a decoder, its version and what it does beyond the ordinary, as stored and fingerprinted."""
    beyond = {"fast": options.fast, "hwaccel": options.hwaccel, "resize_px": options.resize_px}
    return {
        **_name_and_version(options.decoder),
        **{name: value for name, value in beyond.items() if value},
    }


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
        resize_px=decoder.get("resize_px"),
    )


def _name_and_version(decoder: str) -> dict[str, Any]:
    if decoder == "pyav":
        import av

        return {
            "name": "pyav",
            "version": f"{av.__version__}, libavcodec {av.library_versions['libavcodec'][0]}",
        }
    import imageio_ffmpeg

    return {"name": "ffmpeg", "version": imageio_ffmpeg.get_ffmpeg_version()}
