"""The videos' files: found by key, checked to be what was indexed, served in ranges, previewed where need be."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import HTTPException

from svb.errors import InputError
from svb.retrieve.searching.source_file import changes_of
from svb.retrieve.server.crew import Crew
from svb.retrieve.server.playable import can_copy_video, is_playable

if TYPE_CHECKING:
    from svb.retrieve.searching.results import VideoInfo
    from svb.retrieve.searching.searcher import Searcher

MAX_PROBED = 10_000


@dataclass(frozen=True)
class VideoFile:
    """A video's file as it is now, which is as it was indexed.

    Attributes:
        path: Where it lies.
        content_key: Names its content, for what is made from it: hex digits.
        info: What the index holds of it.
    """

    path: Path
    content_key: str
    info: VideoInfo


def find_file(searcher: Searcher, key: str) -> VideoFile:
    """Return the file of a video that the index holds.

    Only a key finds one: nothing that a client sends becomes part of a path.

    Raises:
        HTTPException: 404 where the index holds no such video, or its file is gone or out of reach; 409 where the
            file changed.
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
    """Return what the index holds of a video.

    Raises:
        HTTPException: 404 where it holds none of that key.
    """
    info = searcher.video(key)
    if info is None:
        raise HTTPException(404, "the index holds no such video - search again: it may have changed")
    return info


def _content_key(info: VideoInfo, stat: os.stat_result) -> str:
    """Return a name for a file's content: what was made from a file is right for its copies, wherever they lie."""
    content = info.content_hash.partition(".")[0]  # what follows tells decodings of one content apart
    if not (content and info.size_bytes and info.mtime_ns):
        # Whether it is the file that was indexed cannot be told.
        content = f"{info.source_path}\0{stat.st_size}\0{stat.st_mtime_ns}"
    return hashlib.sha256(content.encode("utf-8", "surrogateescape")).hexdigest()[:32]


class Probes:
    """Remembers what the files are made of; each is opened once, by a helper."""

    def __init__(self, crew: Crew) -> None:
        self._crew = crew
        self._known: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._opening: dict[str, asyncio.Task[dict[str, Any]]] = {}

    async def describe(self, file: VideoFile) -> dict[str, Any]:
        """Return `playable`, whether browsers play a file as it is, and on its own clock when it begins.

        From `begin_seconds` its duration counts; its preview begins at `preview_begin_seconds`. One that cannot be
        read is not played.
        """
        try:
            streams = await self._streams(file)
        except InputError:
            return {"playable": False, "begin_seconds": 0.0, "preview_begin_seconds": 0.0}
        begins = {name: streams[name] for name in ("begin_seconds", "preview_begin_seconds")}
        return {"playable": is_playable(streams, file.path), **begins}

    async def begin_seconds(self, file: VideoFile) -> float:
        """Return the time from which a video's duration counts, on the file's own clock; errors as `Crew.do`."""
        begin: float = (await self._streams(file))["begin_seconds"]
        return begin

    async def can_copy_video(self, file: VideoFile) -> bool:
        """Tell whether a preview needs another container only."""
        return can_copy_video(await self._streams(file))

    async def _streams(self, file: VideoFile) -> dict[str, Any]:
        key = file.content_key
        if key in self._known:
            return self._known[key]
        if key not in self._opening:
            opening = self._opening[key] = asyncio.create_task(self._crew.do("probe", source=str(file.path)))
            opening.add_done_callback(lambda done: self._remember(key, done))
        return await asyncio.shield(self._opening[key])

    def _remember(self, key: str, opened: asyncio.Task[dict[str, Any]]) -> None:
        del self._opening[key]
        if opened.cancelled() or opened.exception() is not None:
            return
        self._known[key] = opened.result()
        while len(self._known) > MAX_PROBED:
            self._known.popitem(last=False)
