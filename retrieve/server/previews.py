"""Previews: H.264 and AAC in MP4, made when a browser asks for a video in a format that it cannot play."""

from __future__ import annotations

import asyncio
import contextlib
from asyncio.subprocess import DEVNULL, PIPE
from pathlib import Path

from svb.errors import InputError
from svb.retrieve.server.kept_files import KeptFiles
from svb.retrieve.server.refusals import BusyError, TookTooLongError
from svb.retrieve.server.tied import kill_group, start_tied

MAX_WIDTH_PX = 1280
MAX_WAITING = 8
LOG_BYTES = 1 << 16
# How often the size of one that is being made is looked at.
LOOK_SECONDS = 0.5


class Previews:
    """Makes each preview once, however many wait for it, and ends it when nobody does any more.

    Args:
        kept: Where they are kept.
        at_once: How many are made at once.
        time_limit_seconds: Of each.
    """

    def __init__(self, kept: KeptFiles, at_once: int, time_limit_seconds: float) -> None:
        self._kept = kept
        self._places = asyncio.Semaphore(at_once)
        self._max_jobs = at_once + MAX_WAITING
        self._time_limit_seconds = time_limit_seconds
        self._jobs: dict[str, asyncio.Task[Path]] = {}
        self._running: set[asyncio.Task[Path]] = set()  # those that end because nobody waits as well
        self._waiting: dict[str, int] = {}

    async def get(self, source: Path, content_key: str, *, copy_video: bool = False) -> Path:
        """Return the preview of a video, made now if it is not kept.

        Args:
            source: The video's file.
            content_key: Names its content; letters and digits.
            copy_video: Its picture is H.264 that browsers can play: only the container is made anew.

        Raises:
            BusyError: Too many are being made.
            TookTooLongError: The time limit.
            InputError: ffmpeg cannot read the file, or its preview is larger than all that are kept may be.
        """
        name = f"{content_key}.mp4"
        kept = self._kept.find(name)
        if kept is not None:
            return kept
        if name not in self._jobs:
            if len(self._running) >= self._max_jobs:
                raise BusyError(f"{len(self._running)} previews are being made - try again in a minute")
            job = self._jobs[name] = asyncio.create_task(self._make(source, name, copy_video))
            self._running.add(job)
            job.add_done_callback(lambda done: self._forget(name, done))
        return await self._wait_for(name)

    async def close(self) -> None:
        """End what is being made."""
        for job in list(self._running):
            job.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    async def _wait_for(self, name: str) -> Path:
        job = self._jobs[name]
        self._waiting[name] = self._waiting.get(name, 0) + 1
        try:
            return await asyncio.shield(job)
        finally:
            self._waiting[name] -= 1
            if not self._waiting[name]:
                del self._waiting[name]
                self._jobs.pop(name, None)  # who asks again while this one ends is given another
                job.cancel()

    def _forget(self, name: str, job: asyncio.Task[Path]) -> None:
        self._running.discard(job)
        if self._jobs.get(name) is job:
            del self._jobs[name]
        if not job.cancelled():
            job.exception()

    async def _make(self, source: Path, name: str, copy_video: bool) -> Path:
        async with self._places:
            aside = self._kept.new_aside(".mp4")
            try:
                await self._run_ffmpeg(source, aside, copy_video)
                return self._kept.keep(aside, name)
            finally:
                aside.unlink(missing_ok=True)

    async def _run_ffmpeg(self, source: Path, out: Path, copy_video: bool) -> None:
        with source.open("rb") as file:
            command = _command(file.fileno(), out, copy_video)
            process = await start_tied(
                *command, stdin=DEVNULL, stdout=DEVNULL, stderr=PIPE, pass_fds=(file.fileno(),)
            )
            reading = asyncio.ensure_future(_read_log(process))
            try:
                await self._wait_until_made(reading, out)
                log = reading.result()
            finally:
                reading.cancel()
                await asyncio.shield(kill_group(process))
        if process.returncode != 0 or not out.stat().st_size:
            words = log.decode("utf-8", "replace").strip().splitlines() or [f"exit status {process.returncode}"]
            raise InputError(f"ffmpeg cannot make a preview of this video: {words[-1]}")

    async def _wait_until_made(self, made: asyncio.Future[bytes], out: Path) -> None:
        until = asyncio.get_running_loop().time() + self._time_limit_seconds
        while not made.done():
            left = until - asyncio.get_running_loop().time()
            if left <= 0:
                raise TookTooLongError(
                    f"a preview took longer than {self._time_limit_seconds:g} s to make - play the file itself"
                )
            if out.stat().st_size > self._kept.max_bytes:
                raise InputError(
                    f"a preview of this video takes more than the {self._kept.max_bytes:,} bytes of all together - "
                    "play the file itself"
                )
            await asyncio.wait({made}, timeout=min(LOOK_SECONDS, left))


def _command(source_fd: int, out: Path, copy_video: bool) -> list[str]:
    import imageio_ffmpeg

    shrink = f"min(1,{MAX_WIDTH_PX}/(iw*sar))"
    # Pixels that are not square become so; both sides are even, as 4:2:0 wants it.
    size = f"w='max(2,trunc(iw*sar*{shrink}/2)*2)':h='max(2,trunc(ih*{shrink}/2)*2)'"
    encode = (
        *("-vf", f"scale={size},setsar=1,format=yuv420p"),
        # A key frame every few seconds, or a click would wait for all of those before it.
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
        *("-movflags", "+faststart", "-f", "mp4", f"file:{out}"),
    ]


async def _read_log(process: asyncio.subprocess.Process) -> bytes:
    """Return the end of what a process says, when it has ended; a pipe that nobody reads would stop it."""
    assert process.stderr is not None
    log = b""
    with contextlib.suppress(ConnectionError):
        while said := await process.stderr.read(LOG_BYTES):
            log = (log + said)[-LOG_BYTES:]
    await process.wait()
    return log
