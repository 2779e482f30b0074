"""The videos' files: found by key, checked to be what was indexed, and whether browsers play them."""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import HTTPException

from svb.errors import InputError
from svb.retrieve.searching.source_file import changes_of
from svb.retrieve.server.child_processes import WorkerPool
from svb.retrieve.server.kept_files import SingleFlight

if TYPE_CHECKING:
    from svb.retrieve.searching.results import VideoInfo
    from svb.retrieve.searching.searcher import Searcher

MAX_PROBED = 10_000

# What recent Chromium, Firefox and Safari all play. HEVC they play on some machines only.
MP4_VIDEO = ("h264", "av1", "vp9")
MP4_AUDIO = (None, "aac", "mp3", "opus", "flac")
WEBM_VIDEO = ("vp8", "vp9", "av1")
WEBM_AUDIO = (None, "opus", "vorbis")
PIXELS = ("yuv420p", "yuvj420p")
# Chromium takes the length of a file that begins later for its end, and seeks no further until it has read on; and
# browsers differ in whether a player's clock begins at 0 or with the file.
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


@dataclass(frozen=True)
class VideoFile:
    """A video's file, unchanged since it was indexed.

    Attributes:
        path: Its place.
        content_key: Names its content, for the files that are made of it: 32 hex digits.
        info: What the index holds about it.
    """

    path: Path
    content_key: str
    info: VideoInfo


def find_file(searcher: Searcher, key: str) -> VideoFile:
    """Return the file of a video that the index holds.

    Only a key finds one: nothing that a client sends becomes part of a path.

    Raises:
        HTTPException: 404, the index has no such video, or its file is gone or out of reach; 409, the file changed.
    """
    info = find_video(searcher, key)
    path = Path(info.source_path)
    try:
        stat = path.stat()
    except PermissionError:
        raise HTTPException(
            404, f"{info.source_path} cannot be reached: the server may not enter its folder - let its user read it"
        ) from None
    except (OSError, ValueError):
        raise HTTPException(
            404,
            f"{info.source_path} is gone: it was moved or removed since it was indexed - bring it back, or extract "
            "and index its folder again",
        ) from None
    changes = changes_of(stat, info.size_bytes, info.mtime_ns)
    if changes:
        raise HTTPException(
            409,
            f"{info.source_path} has changed since it was indexed ({changes}) - extract and index its folder again",
        )
    return VideoFile(path, _content_key(info, stat), info)


def find_video(searcher: Searcher, key: str) -> VideoInfo:
    """Return what the index holds about a video.

    Raises:
        HTTPException: 404, the index has no video of that key.
    """
    info = searcher.video(key)
    if info is None:
        raise HTTPException(404, "the index has no such video - search again: the index may have changed")
    return info


def media_type(path: Path) -> str:
    """Return a file's content type, which is never one that a browser would run."""
    return MEDIA_TYPES.get(path.suffix.lower(), "application/octet-stream")


class Probes:
    """Remembers what the files are made of; a worker opens each file once."""

    def __init__(self, workers: WorkerPool) -> None:
        self._workers = workers
        self._known: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._opening: SingleFlight[dict[str, Any]] = SingleFlight()

    async def describe(self, file: VideoFile) -> dict[str, Any]:
        """Return `playable`, whether browsers play a file as it is, and when it begins on its own clock.

        Its duration counts from `begin_seconds`; its preview begins at `preview_begin_seconds`. A file that cannot
        be read is not playable.
        """
        try:
            streams = await self._streams(file)
        except InputError:
            return {"playable": False, "begin_seconds": 0.0, "preview_begin_seconds": 0.0}
        begins = {name: streams[name] for name in ("begin_seconds", "preview_begin_seconds")}
        return {"playable": _is_playable(streams, file.path), **begins}

    async def begin_seconds(self, file: VideoFile) -> float:
        """Return the time from which a video's duration counts, on the file's own clock.

        Raises as `WorkerPool.do`.
        """
        begin: float = (await self._streams(file))["begin_seconds"]
        return begin

    async def can_copy_video(self, file: VideoFile) -> bool:
        """Tell whether a preview needs only another container: browsers play the video stream as it is."""
        streams = await self._streams(file)
        return _plain(streams["video"]) == "h264" and streams["pixels"] in PIXELS

    async def _streams(self, file: VideoFile) -> dict[str, Any]:
        async def open_file() -> dict[str, Any]:
            streams: dict[str, Any] = await self._workers.do("probe", source=str(file.path))
            self._known[file.content_key] = streams
            while len(self._known) > MAX_PROBED:
                self._known.popitem(last=False)
            return streams

        return self._known.get(file.content_key) or await self._opening.do(file.content_key, open_file)


def _content_key(info: VideoInfo, stat: os.stat_result) -> str:
    """Return a name for a file's content: what was made of a file serves its copies too, wherever they are."""
    content = info.content_hash.partition(".")[0]  # the rest tells decodings of one content apart
    if not (content and info.size_bytes and info.mtime_ns):
        # We cannot tell whether it is the file that was indexed.
        content = f"{info.source_path}\0{stat.st_size}\0{stat.st_mtime_ns}"
    return hashlib.sha256(content.encode("utf-8", "surrogateescape")).hexdigest()[:32]


def _is_playable(streams: Mapping[str, Any], path: Path) -> bool:
    """Tell whether all browsers play a file as it is, and alike."""
    if streams["preview_begin_seconds"] > LATEST_BEGIN_SECONDS:
        return False
    container, video, audio = streams["container"] or "", _plain(streams["video"]), _plain(streams["audio"])
    if streams["pixels"] not in PIXELS:
        return False
    if "mp4" in container.split(","):
        return video in MP4_VIDEO and audio in MP4_AUDIO
    # Matroska with the same streams plays in some browsers only; ffmpeg gives both one name, the suffix differs.
    is_webm = "webm" in container.split(",") and path.suffix.lower() == ".webm"
    return is_webm and video in WEBM_VIDEO and audio in WEBM_AUDIO


def _plain(codec: str | None) -> str | None:
    """Return a codec's name in place of its decoder's."""
    return {"libdav1d": "av1", "libaom-av1": "av1", "libvpx-vp9": "vp9", "libvpx": "vp8", "mp3float": "mp3"}.get(
        codec or "", codec
    )
