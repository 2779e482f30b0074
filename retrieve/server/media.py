"""The videos' files: found by key, checked to be what was indexed, served in ranges, previewed where need be."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import HTTPException

from svb.errors import InputError
from svb.retrieve.server.crew import Crew
from svb.retrieve.server.playable import can_copy_video, is_playable

if TYPE_CHECKING:
    from svb.retrieve.search import Searcher
    from svb.retrieve.searching.results import VideoInfo

MAX_PROBED = 10_000


@dataclass(frozen=True)
class VideoFile:
    """A video's file as it is now, which is as it was indexed.

    Attributes:
        path: Where it lies.
        content_key: Names the file's state, for what is made from it: hex digits.
        info: What the index holds of it.
    """

    path: Path
    content_key: str
    info: VideoInfo


def find_file(searcher: Searcher, key: str) -> VideoFile:
    """Return the file of a video that the index holds.

    Only a key finds one: nothing that a client sends becomes part of a path.

    Raises:
        HTTPException: 404 where the index holds no such video or its file is gone; 409 where the file changed.
    """
    info = find_video(searcher, key)
    path = Path(info.source_path)
    try:
        stat = path.stat()
    except (OSError, ValueError):
        raise HTTPException(
            404, f"{info.source_path} is gone - bring it back, or extract and index its folder again"
        ) from None
    known_mtime_ns = _indexed_mtime_ns(searcher, info.video_id)
    if known_mtime_ns and known_mtime_ns != stat.st_mtime_ns:
        raise HTTPException(
            409, f"{info.source_path} has changed since it was indexed - extract and index its folder again"
        )
    state = f"{info.source_path}\0{stat.st_size}\0{stat.st_mtime_ns}".encode("utf-8", "surrogateescape")
    return VideoFile(path, hashlib.sha256(state).hexdigest()[:32], info)


def find_video(searcher: Searcher, key: str) -> VideoInfo:
    """Return what the index holds of a video.

    Raises:
        HTTPException: 404 where it holds none of that key.
    """
    info = searcher.video(key)
    if info is None:
        raise HTTPException(404, "the index holds no such video - search again: it may have changed")
    return info


def _indexed_mtime_ns(searcher: Searcher, video_id: str) -> int:
    """Return when the file had changed last; 0 where that is not known, as of some imports."""
    row = searcher.vectors.row_of(video_id)
    return 0 if row is None else int(searcher.vectors.mtime_ns[row])


class Probes:
    """Remembers what the files are made of; each is opened once, by a helper."""

    def __init__(self, crew: Crew) -> None:
        self._crew = crew
        self._known: OrderedDict[str, dict[str, str | None]] = OrderedDict()

    async def is_playable(self, file: VideoFile) -> bool:
        """Tell whether browsers play a file as it is; one that cannot be read they do not."""
        try:
            return is_playable(await self._streams(file), file.path)
        except InputError:
            return False

    async def can_copy_video(self, file: VideoFile) -> bool:
        """Tell whether a preview needs another container only."""
        return can_copy_video(await self._streams(file))

    async def _streams(self, file: VideoFile) -> dict[str, str | None]:
        if file.content_key not in self._known:
            streams: dict[str, str | None] = await self._crew.do("probe", source=str(file.path))
            self._known[file.content_key] = streams
            while len(self._known) > MAX_PROBED:
                self._known.popitem(last=False)
        return self._known[file.content_key]
