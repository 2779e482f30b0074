"""The videos' files: found by key, checked to be what was indexed, and shown to a browser.

A browser plays a file as it is, or its preview: H.264 and AAC in MP4. Posters and strips are JPEGs.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
import os
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import HTTPException

from svb.errors import InputError
from svb.retrieve.searching.source_file import changes_of
from svb.retrieve.server.child_processes import WorkerPool, kill_child, start_child
from svb.retrieve.server.http import TookTooLongError
from svb.retrieve.server.kept_files import KeptFiles, SingleFlight

if TYPE_CHECKING:
    from svb.retrieve.searching.results import VideoInfo
    from svb.retrieve.searching.searcher import Searcher

MAX_PROBED = 10_000

# Recent releases of Chromium, Firefox and Safari all play these. They play HEVC only on some machines.
MP4_VIDEO = ("h264", "av1", "vp9")
MP4_AUDIO = (None, "aac", "mp3", "opus", "flac")
WEBM_VIDEO = ("vp8", "vp9", "av1")
WEBM_AUDIO = (None, "opus", "vorbis")
PIXELS = ("yuv420p", "yuvj420p")
# If a file begins later, Chromium takes its length for its end, and seeks no further until it has read on. Browsers
# also differ in whether a player's clock begins at 0 or with the file.
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

    Clients name a key, and nothing that they send becomes part of a path.

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
    """Remembers the streams of each file; a worker opens a file only once."""

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

        Raises the errors of `WorkerPool.do`.
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
    """Return a name for a file's content: all copies of a file share the pictures and previews made of it."""
    content = info.content_hash.partition(".")[0]  # the rest tells decodings of one content apart
    if not (content and info.size_bytes and info.mtime_ns):
        # We cannot tell whether this is the file that was indexed.
        content = f"{info.source_path}\0{stat.st_size}\0{stat.st_mtime_ns}"
    return hashlib.sha256(content.encode("utf-8", "surrogateescape")).hexdigest()[:32]


def _is_playable(streams: Mapping[str, Any], path: Path) -> bool:
    """Tell whether all browsers play a file as it is, and in the same way."""
    if streams["preview_begin_seconds"] > LATEST_BEGIN_SECONDS:
        return False
    container, video, audio = streams["container"] or "", _plain(streams["video"]), _plain(streams["audio"])
    if streams["pixels"] not in PIXELS:
        return False
    if "mp4" in container.split(","):
        return video in MP4_VIDEO and audio in MP4_AUDIO
    # Only some browsers play Matroska with the same streams; ffmpeg has one name for both, but the suffix differs.
    is_webm = "webm" in container.split(",") and path.suffix.lower() == ".webm"
    return is_webm and video in WEBM_VIDEO and audio in WEBM_AUDIO


def _plain(codec: str | None) -> str | None:
    """Return the name of a codec, given the name of its decoder."""
    return {"libdav1d": "av1", "libaom-av1": "av1", "libvpx-vp9": "vp9", "libvpx": "vp8", "mp3float": "mp3"}.get(
        codec or "", codec
    )


# --- what is made from the files

# Pictures are made only in these heights (the next one above the height asked for) and at whole tenths of a second:
# a client that asks for everything cannot fill the disk with pictures that nobody can tell apart.
HEIGHTS_PX = (54, 90, 120, 180, 240, 360, 480, 720)
MAX_FRAMES = 24

PREVIEW_WIDTH_PX = 1280
LOG_BYTES = 1 << 16


class Pictures:
    """Makes posters and strips.

    Args:
        kept: The folder that keeps them.
        workers: The processes that make them.
    """

    def __init__(self, kept: KeptFiles, workers: WorkerPool) -> None:
        self._kept, self._workers = kept, workers

    async def poster(self, file: VideoFile, seconds: float, height_px: int, begin_seconds: float) -> Path:
        """Return a JPEG of the frame shown at a time, of at least the height where the video has it.

        Args:
            file: The video.
            seconds: On the file's own clock, as moments are.
            height_px: The least height of the picture.
            begin_seconds: The time from which the video's duration counts, on the same clock.

        Raises:
            HTTPException: 400, the time or the height is out of range.
            InputError: The file has no such picture. Also raises what `WorkerPool.do` raises.
        """
        if not (math.isfinite(seconds) and seconds >= 0):
            raise HTTPException(400, f"t is {seconds} - expected seconds of at least 0")
        end = file.info.duration_seconds
        tenths = round(min(seconds, begin_seconds + end if end else 1e7) * 10)
        height_px = _allowed_height(height_px)
        name = f"{file.content_key}-{tenths}-{height_px}.jpg"
        return await self._get(name, "poster", source=str(file.path), seconds=tenths / 10, height=height_px)

    async def strip(self, file: VideoFile, num_frames: int, height_px: int, begin_seconds: float) -> Path:
        """Return a JPEG of evenly spaced frames side by side, at `(i + 0.5) / n` of the duration.

        Args:
            file: The video.
            num_frames: n.
            height_px: The least height of the picture.
            begin_seconds: The time from which the video's duration counts, on the file's own clock.

        Raises:
            HTTPException: 400, a number is out of range; 404, the video's duration is not known.
            InputError: The file gives no such picture. Also raises what `WorkerPool.do` raises.
        """
        if not 1 <= num_frames <= MAX_FRAMES:
            raise HTTPException(400, f"n is {num_frames} - expected 1 to {MAX_FRAMES} frames")
        duration = file.info.duration_seconds
        if not duration:
            raise HTTPException(404, "the video's duration is not known - it has no strip")
        height_px = _allowed_height(height_px)
        times = [begin_seconds + (frame + 0.5) / num_frames * duration for frame in range(num_frames)]
        # Two indexes may know different durations of one content, when one of them decoded only a part of it.
        name = f"{file.content_key}-n{num_frames}-{round(1000 * duration)}-{height_px}.jpg"
        return await self._get(name, "strip", source=str(file.path), times_seconds=times, height=height_px)

    async def _get(self, name: str, task: str, **arguments: Any) -> Path:
        async def make(out: Path) -> None:
            await self._workers.do(task, **arguments, out=str(out))

        return await self._kept.get(name, make)


def _allowed_height(height_px: int) -> int:
    if not 1 <= height_px <= HEIGHTS_PX[-1]:
        raise HTTPException(400, f"h is {height_px} - expected 1 to {HEIGHTS_PX[-1]} pixels")
    return min(allowed for allowed in HEIGHTS_PX if allowed >= height_px)


class Previews:
    """Makes previews of videos whose format browsers cannot play.

    Args:
        kept: The folder that keeps them.
        at_once: How many are made at once.
        time_limit_seconds: The time after which ffmpeg is ended.
    """

    def __init__(self, kept: KeptFiles, at_once: int, time_limit_seconds: float) -> None:
        self._kept = kept
        self._places = asyncio.Semaphore(at_once)
        self._time_limit_seconds = time_limit_seconds

    async def get(self, file: VideoFile, *, copy_video: bool = False) -> Path:
        """Return the preview of a video, made now if it is not kept.

        Args:
            file: The video.
            copy_video: Whether to copy its video stream, H.264 that browsers can play, into the new container.

        Raises:
            BusyError: Too many previews are being made.
            TookTooLongError: The time limit was reached.
            InputError: ffmpeg cannot read the file, or its preview would fill the whole cache.
        """

        async def make(out: Path) -> None:
            async with self._places:
                await self._run_ffmpeg(file.path, out, copy_video)

        return await self._kept.get(f"{file.content_key}.mp4", make)

    async def _run_ffmpeg(self, source: Path, out: Path, copy_video: bool) -> None:
        max_bytes = self._kept.max_bytes
        with source.open("rb") as file:
            command = _ffmpeg_command(file.fileno(), out, copy_video=copy_video, max_bytes=max_bytes)
            process = await start_child(
                *command, stdin=DEVNULL, stdout=DEVNULL, stderr=PIPE, pass_fds=(file.fileno(),)
            )
            try:
                log = await asyncio.wait_for(_read_log(process), self._time_limit_seconds)
            except asyncio.TimeoutError:
                raise TookTooLongError(
                    f"a preview took longer than {self._time_limit_seconds:g} s to make - play the file itself"
                ) from None
            finally:
                await asyncio.shield(kill_child(process))
        if out.stat().st_size >= max_bytes:  # ffmpeg stopped there
            raise InputError(
                f"a preview of this video takes more than {max_bytes:,} bytes, the limit for all previews together "
                "- play the file itself"
            )
        if process.returncode != 0 or not out.stat().st_size:
            lines = log.decode("utf-8", "replace").strip().splitlines() or [f"exit status {process.returncode}"]
            raise InputError(f"ffmpeg cannot make a preview of this video: {lines[-1]}")


def _ffmpeg_command(source_fd: int, out: Path, *, copy_video: bool, max_bytes: int) -> list[str]:
    import imageio_ffmpeg

    shrink = f"min(1,{PREVIEW_WIDTH_PX}/(iw*sar))"
    # Pixels that are not square become square, and both sides become even, as 4:2:0 requires.
    size = f"w='max(2,trunc(iw*sar*{shrink}/2)*2)':h='max(2,trunc(ih*{shrink}/2)*2)'"
    encode = (
        *("-vf", f"scale={size},setsar=1,format=yuv420p"),
        # There is a key frame every few seconds, because a click waits for all frames since the last one.
        *("-c:v", "libx264", "-preset", "veryfast", "-crf", "23", "-g", "60"),
    )
    return [
        imageio_ffmpeg.get_ffmpeg_exe(),
        *("-nostdin", "-hide_banner", "-v", "error", "-y", "-threads", "2", "-filter_threads", "1"),
        # ffmpeg reads the open file and nothing else: a playlist cannot open other files.
        *("-protocol_whitelist", "fd", "-fd", str(source_fd), "-i", "fd:"),
        *("-map", "0:V:0", "-map", "0:a:0?", "-sn", "-dn", "-map_metadata", "-1"),
        *(("-c:v", "copy") if copy_video else encode),
        *("-threads", "2", "-c:a", "aac", "-ac", "2", "-b:a", "96k"),
        *("-fs", str(max_bytes), "-movflags", "+faststart", "-f", "mp4", f"file:{out}"),
    ]


async def _read_log(process: Process) -> bytes:
    """Return the end of what a process writes to stderr, when it has ended; a full pipe would stop it."""
    assert process.stderr is not None
    log = b""
    with contextlib.suppress(ConnectionError):
        while said := await process.stderr.read(LOG_BYTES):
            log = (log + said)[-LOG_BYTES:]
    await process.wait()
    return log
