"""Which videos browsers play as they are; the others get a preview."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from svb.errors import InputError

# Only what Chromium, Firefox and Safari of the last years all play. HEVC they do on some machines only.
MP4_VIDEO = ("h264", "av1", "vp9")
MP4_AUDIO = (None, "aac", "mp3", "opus", "flac")
WEBM_VIDEO = ("vp8", "vp9", "av1")
WEBM_AUDIO = (None, "opus", "vorbis")
PIXELS = ("yuv420p", "yuvj420p")

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


def streams_of(path: Path) -> dict[str, str | None]:
    """Return `container`, `video`, `pixels` and `audio` of a file, in ffmpeg's names; decodes nothing.

    Raises:
        InputError: It is no video.
    """
    from svb.extract.decode import DecodeError, check_file
    from svb.extract.decode_options import Limits
    from svb.extract.decode_pyav import opened

    try:
        check_file(path)
        with opened(path, Limits()) as (container, stream):
            audio = container.streams.audio
            return {
                "container": container.format.name,
                "video": stream.codec_context.name if stream.codec_context else None,
                "pixels": stream.codec_context.pix_fmt if stream.codec_context else None,
                "audio": _codec_name(audio[0]) if audio else None,
            }
    except (DecodeError, OSError) as error:
        raise InputError(str(error)) from error


def is_playable(streams: Mapping[str, str | None], path: Path) -> bool:
    """Tell whether browsers play a file as it is."""
    container, video, audio = streams["container"] or "", _plain(streams["video"]), _plain(streams["audio"])
    if streams["pixels"] not in PIXELS:
        return False
    if "mp4" in container.split(","):
        return video in MP4_VIDEO and audio in MP4_AUDIO
    # Matroska with the same streams plays in some browsers; ffmpeg does not tell the two apart, the name does.
    is_webm = "webm" in container.split(",") and path.suffix.lower() == ".webm"
    return is_webm and video in WEBM_VIDEO and audio in WEBM_AUDIO


def can_copy_video(streams: Mapping[str, str | None]) -> bool:
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
