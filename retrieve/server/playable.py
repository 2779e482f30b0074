"""Which videos browsers play as they are; the others get a preview."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from svb.errors import InputError

# Only what Chromium, Firefox and Safari of the last years all play. HEVC they do on some machines only.
MP4_VIDEO = ("h264", "av1", "vp9")
MP4_AUDIO = (None, "aac", "mp3", "opus", "flac")
WEBM_VIDEO = ("vp8", "vp9", "av1")
WEBM_AUDIO = (None, "opus", "vorbis")
PIXELS = ("yuv420p", "yuvj420p")
# Of a file that begins later, Chromium takes the length for the end and seeks no further, until it has read on; and
# whether a player's clock begins at 0 or with the file is not alike in all browsers.
LATEST_BEGIN_SECONDS = 0.25

MEDIA_TYPES = {
    ".mp4": "video/mp4",
    ".m4v": "video/mp4",
    ".mov": "video/quicktime",
    ".webm": "video/webm",
    ".mkv": "video/x-matroska",
    ".avi": "video/x-msvideo",
    ".mpg": "video/mpeg",
    ".mpeg": "video/mpeg",
    ".ts": "video/mp2t",
    ".ogv": "video/ogg",
    ".3gp": "video/3gpp",
    ".wmv": "video/x-ms-wmv",
    ".flv": "video/x-flv",
}


def media_type(path: Path) -> str:
    """Return a file's content type: never one that a browser would run."""
    return MEDIA_TYPES.get(path.suffix.lower(), "application/octet-stream")


def streams_of(path: Path) -> dict[str, Any]:
    """Return what a file is made of; decodes nothing.

    Returns:
        `container`, `video`, `pixels` and `audio` in ffmpeg's names. On the file's own clock `begin_seconds`, from
        which its duration counts, and `preview_begin_seconds`, when the first of its streams begins: ffmpeg makes 0
        of that in a preview.

    Raises:
        InputError: It is no video.
    """
    from svb.extract.decode.decoder import DecodeError, check_file
    from svb.extract.decode.options import Limits
    from svb.extract.decode.pyav_decoder import opened
    from svb.retrieve.searching.pictures import begins_at

    try:
        check_file(path)
        with opened(path, Limits()) as (container, stream):
            audio = container.streams.audio
            return {
                "container": container.format.name,
                "video": stream.codec_context.name if stream.codec_context else None,
                "pixels": stream.codec_context.pix_fmt if stream.codec_context else None,
                "audio": _codec_name(audio[0]) if audio else None,
                "begin_seconds": begins_at(container, stream),
                "preview_begin_seconds": (container.start_time or 0) / 1e6,
            }
    except (DecodeError, OSError) as error:
        raise InputError(str(error)) from error


def is_playable(streams: Mapping[str, Any], path: Path) -> bool:
    """Tell whether browsers play a file as it is, and alike."""
    if streams["preview_begin_seconds"] > LATEST_BEGIN_SECONDS:
        return False
    container, video, audio = streams["container"] or "", _plain(streams["video"]), _plain(streams["audio"])
    if streams["pixels"] not in PIXELS:
        return False
    if "mp4" in container.split(","):
        return video in MP4_VIDEO and audio in MP4_AUDIO
    # Matroska with the same streams plays in some browsers; ffmpeg does not tell the two apart, the name does.
    is_webm = "webm" in container.split(",") and path.suffix.lower() == ".webm"
    return is_webm and video in WEBM_VIDEO and audio in WEBM_AUDIO


def can_copy_video(streams: Mapping[str, Any]) -> bool:
    """Tell whether a preview needs another container only, not another picture."""
    return _plain(streams["video"]) == "h264" and streams["pixels"] in PIXELS


def _plain(codec: str | None) -> str | None:
    """Return a codec's name without that of its decoder's library."""
    return {"libdav1d": "av1", "libaom-av1": "av1", "libvpx-vp9": "vp9", "libvpx": "vp8", "mp3float": "mp3"}.get(
        codec or "", codec
    )


def _codec_name(stream: object) -> str:
    context = getattr(stream, "codec_context", None)
    # An unknown codec is not "no sound": nothing would play it.
    return str(context.name) if context is not None else "unknown"
