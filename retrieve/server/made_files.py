"""What is made of the videos for a browser: posters and strips as JPEG, previews as H.264 and AAC in MP4."""

from __future__ import annotations

import asyncio
import contextlib
import math
from asyncio.subprocess import DEVNULL, PIPE, Process
from pathlib import Path
from typing import Any

from fastapi import HTTPException

from svb.errors import InputError
from svb.retrieve.server.child_processes import WorkerPool, kill_child, start_child
from svb.retrieve.server.http import TookTooLongError
from svb.retrieve.server.kept_files import KeptFiles
from svb.retrieve.server.video_files import VideoFile

# Pictures are made in these heights only, the next higher of what is asked for, and at whole tenths of a second:
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
            InputError: The file gives no such picture; others as `WorkerPool.do`.
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
            InputError: The file gives no such picture; others as `WorkerPool.do`.
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
    # Pixels that are not square become square; both sides are even, as 4:2:0 needs it.
    size = f"w='max(2,trunc(iw*sar*{shrink}/2)*2)':h='max(2,trunc(ih*{shrink}/2)*2)'"
    encode = (
        *("-vf", f"scale={size},setsar=1,format=yuv420p"),
        # A key frame every few seconds: a click waits for all frames since the last one.
        *("-c:v", "libx264", "-preset", "veryfast", "-crf", "23", "-g", "60"),
    )
    return [
        imageio_ffmpeg.get_ffmpeg_exe(),
        *("-nostdin", "-hide_banner", "-v", "error", "-y", "-threads", "2", "-filter_threads", "1"),
        # The open file and nothing else: a playlist cannot open other files.
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
