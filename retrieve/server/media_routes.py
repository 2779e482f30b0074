"""The routes that show videos: the file in ranges, a preview, posters and strips."""

from __future__ import annotations

import asyncio
import os
import re
import stat
from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import APIRouter, HTTPException, Request
from starlette.datastructures import Headers
from starlette.responses import FileResponse, Response
from starlette.types import Message, Receive, Scope, Send

from svb.errors import InputError
from svb.retrieve.server.http import until_hung_up
from svb.retrieve.server.state import ServerState
from svb.retrieve.server.video_files import VideoFile, find_file, media_type

# A file may change, so a browser asks again each time, and learns from the tag that it has not.
CHECK_AGAIN = "private, no-cache"
# The page shows a moment's picture again and again.
FOR_AN_HOUR = "private, max-age=3600"

# A number with more digits than any file's size does not name a range.
_ONE_RANGE = re.compile(r"bytes=\s*(?:(\d{1,18})\s*-\s*(\d{0,18})|-\s*\d{1,18})\s*", re.ASCII | re.IGNORECASE)


def media_routes(state: ServerState) -> APIRouter:
    """Return the routes; each answers HEAD as it answers GET."""
    router = APIRouter(tags=["media"])

    async def file_of(key: str) -> VideoFile:
        return await asyncio.to_thread(find_file, await state.snapshots.newest(), key)

    async def media(key: str) -> Response:
        """Send the video's file, or a byte range of it."""
        path = (await file_of(key)).path
        return OpenFileResponse(path, media_type(path), CHECK_AGAIN)

    async def preview(request: Request, key: str) -> Response:
        """Send the video as H.264 and AAC in MP4, or a byte range of that; the first request makes the file."""
        file = await file_of(key)

        async def make() -> Path:
            copy_video = await state.probes.can_copy_video(file)
            return await state.previews.get(file, copy_video=copy_video)

        return OpenFileResponse(await _made(request, make()), "video/mp4", CHECK_AGAIN)

    async def poster(request: Request, key: str, t: float = 0.0, h: int = 180) -> Response:
        """Send the frame shown at `t` seconds of the file's own clock as a JPEG, about `h` pixels high."""
        file = await file_of(key)

        async def make() -> Path:
            return await state.pictures.poster(file, t, h, await state.probes.begin_seconds(file))

        return OpenFileResponse(await _made(request, make()), "image/jpeg", FOR_AN_HOUR)

    async def strip(request: Request, key: str, n: int = 12, h: int = 54) -> Response:
        """Send a JPEG of `n` frames side by side, at `(i + 0.5) / n` of the duration, about `h` pixels high."""
        file = await file_of(key)

        async def make() -> Path:
            return await state.pictures.strip(file, n, h, await state.probes.begin_seconds(file))

        return OpenFileResponse(await _made(request, make()), "image/jpeg", FOR_AN_HOUR)

    routes: dict[str, Callable[..., Awaitable[Response]]] = {
        "/media/{key}": media,
        "/media/{key}/preview": preview,
        "/poster/{key}": poster,
        "/strip/{key}": strip,
    }
    for path, route in routes.items():
        router.add_api_route(path, route, methods=["GET"], response_class=Response)
        router.add_api_route(path, route, methods=["HEAD"], include_in_schema=False)
    return router


class OpenFileResponse(FileResponse):
    """A file or one range of it, opened once, so that headers and bytes match even if the file is replaced.

    Unlike Starlette's response, it answers If-None-Match. It ignores a Range header that it cannot serve (another
    unit, no range at all, or several ranges), which RFC 9110, section 14.2 allows.

    Args:
        path: A regular file.
        media_type: Its content type.
        cache_control: How long a browser may keep it.

    Raises:
        HTTPException: 404, the file cannot be opened.
    """

    chunk_size = 1 << 18

    def __init__(self, path: Path, media_type: str, cache_control: str) -> None:
        self._name, self._descriptor = path, _open(path)
        known = self._known = os.fstat(self._descriptor)
        # Starlette's own tag knows the time to some hundred nanoseconds only.
        self._etag = f'"{known.st_mtime_ns:x}-{known.st_size:x}"'
        headers = {"etag": self._etag, "cache-control": cache_control}
        super().__init__(f"/dev/fd/{self._descriptor}", headers=headers, media_type=media_type, stat_result=known)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a GET or HEAD."""
        headers = Headers(scope=scope)

        async def send_while_whole(message: Message) -> None:
            if os.fstat(self._descriptor).st_size < self._known.st_size:
                # Closing the connection is the only way left to tell the client.
                raise ConnectionAbortedError(f"{self._name} became shorter while it was sent")
            await send(message)

        try:
            if self._is_held(headers.get("if-none-match", "")):
                del self.headers["content-length"]
                await send({"type": "http.response.start", "status": 304, "headers": self.raw_headers})
                await send({"type": "http.response.body", "body": b""})
            else:
                if not _is_one_range(headers.get("range", "")):
                    scope = {**scope, "headers": [pair for pair in scope["headers"] if pair[0] != b"range"]}
                await super().__call__(scope, receive, send_while_whole)
        finally:
            os.close(self._descriptor)

    def _is_held(self, tags: str) -> bool:
        """Tell whether a client holds the file, by If-None-Match; a proxy that compresses marks tags as weak."""
        return tags.strip() == "*" or self._etag in re.findall(r'(?:W/)?("[^"]*")', tags)


def _is_one_range(header: str) -> bool:
    match = _ONE_RANGE.fullmatch(header)
    return match is not None and not (match[2] and int(match[2]) < int(match[1]))


def _open(path: Path) -> int:
    # Without O_NONBLOCK opening a named pipe would wait for a writer.
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError):
        raise HTTPException(404, "the video's file can no longer be opened") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise HTTPException(404, "the video's file is not a regular file")
    return descriptor


async def _made(request: Request, work: Awaitable[Path]) -> Path:
    try:
        return await until_hung_up(request, work)
    except InputError as error:
        raise HTTPException(415, str(error)) from error
