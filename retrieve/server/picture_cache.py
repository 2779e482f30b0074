"""Posters and strips, made by helpers, each once, and kept on disk."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

from fastapi import HTTPException

from svb.retrieve.server.crew import Crew
from svb.retrieve.server.kept_files import KeptFiles
from svb.retrieve.server.media import VideoFile

# Only these heights are made, the next higher of what is asked, and times of whole tenths of a second:
# a client that asks for everything cannot fill the disk with pictures that nobody can tell apart.
HEIGHTS_PX = (54, 90, 120, 180, 240, 360, 480, 720)
MAX_FRAMES = 24


class PictureCache:
    """Makes posters and strips.

    Args:
        kept: Where they are kept.
        crew: Who makes them.
    """

    def __init__(self, kept: KeptFiles, crew: Crew) -> None:
        self._kept, self._crew = kept, crew
        self._making: dict[str, asyncio.Task[Path]] = {}

    async def poster(self, file: VideoFile, seconds: float, height_px: int, begin_seconds: float) -> Path:
        """Return a JPEG of the frame shown at a time, of at least the height where the video has it.

        Args:
            file: The video.
            seconds: On the file's own clock, as moments are.
            height_px: Of the picture.
            begin_seconds: The time from which the video's duration counts, on the same clock.

        Raises:
            HTTPException: 400, the time or the height means nothing.
            InputError: It cannot be made of the file; further as `Crew.do`.
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
            height_px: Of the picture.
            begin_seconds: The time from which the video's duration counts, on the file's own clock.

        Raises:
            HTTPException: 400 for a number that means nothing; 404 for a video whose duration is not known.
            InputError: It cannot be made of the file; further as `Crew.do`.
        """
        if not 1 <= num_frames <= MAX_FRAMES:
            raise HTTPException(400, f"n is {num_frames} - expected 1 to {MAX_FRAMES} frames")
        duration = file.info.duration_seconds
        if not duration:
            raise HTTPException(404, "how long the video lasts is not known - it has no strip")
        height_px = _allowed_height(height_px)
        times = [begin_seconds + (frame + 0.5) / num_frames * duration for frame in range(num_frames)]
        # Two indexes of one content may know of different durations, of which one was decoded in part.
        name = f"{file.content_key}-n{num_frames}-{round(1000 * duration)}-{height_px}.jpg"
        return await self._get(name, "strip", source=str(file.path), times_seconds=times, height=height_px)

    async def close(self) -> None:
        """Wait for what is being made; its helpers have been ended."""
        await asyncio.gather(*self._making.values(), return_exceptions=True)

    async def _get(self, name: str, task: str, **arguments: Any) -> Path:
        kept = self._kept.find(name)
        if kept is not None:
            return kept
        if name not in self._making:
            self._making[name] = asyncio.create_task(self._make(name, task, arguments))
            self._making[name].add_done_callback(lambda making: self._forget(name, making))
        return await asyncio.shield(self._making[name])

    async def _make(self, name: str, task: str, arguments: dict[str, Any]) -> Path:
        aside = self._kept.new_aside(".jpg")
        try:
            await self._crew.do(task, **arguments, out=str(aside))
            return self._kept.keep(aside, name)
        finally:
            aside.unlink(missing_ok=True)

    def _forget(self, name: str, making: asyncio.Task[Path]) -> None:
        del self._making[name]
        if not making.cancelled():
            making.exception()


def _allowed_height(height_px: int) -> int:
    if not 1 <= height_px <= HEIGHTS_PX[-1]:
        raise HTTPException(400, f"h is {height_px} - expected 1 to {HEIGHTS_PX[-1]} pixels")
    return min(allowed for allowed in HEIGHTS_PX if allowed >= height_px)
