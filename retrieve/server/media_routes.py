"""The routes that show videos: the file in ranges, a preview, posters and strips."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import APIRouter, HTTPException, Request
from starlette.responses import Response

from svb.errors import InputError
from svb.retrieve.server.byte_ranges import FileRange
from svb.retrieve.server.http import until_hung_up
from svb.retrieve.server.media import VideoFile, find_file
from svb.retrieve.server.playable import media_type
from svb.retrieve.server.service import Service

# A file may change under its address: a browser asks again, and is told by the tag that nothing did.
CHECK_AGAIN = "private, no-cache"
# A picture of a moment is asked for with every look at its card.
FOR_AN_HOUR = "private, max-age=3600"


def media_routes(service: Service) -> APIRouter:
    """Return the routes; each answers HEAD as it answers GET."""
    router = APIRouter(tags=["media"])

    async def file_of(key: str) -> VideoFile:
        return await asyncio.to_thread(find_file, await service.snapshots.newest(), key)

    async def media(key: str) -> Response:
        """The video's file; byte ranges are served."""
        path = (await file_of(key)).path
        return FileRange(path, media_type(path), CHECK_AGAIN)

    async def preview(request: Request, key: str) -> Response:
        """The video as H.264 and AAC in MP4, made at the first request; byte ranges are served."""
        file = await file_of(key)

        async def make() -> Path:
            copy_video = await service.probes.can_copy_video(file)
            return await service.previews.get(file.path, file.content_key, copy_video=copy_video)

        return FileRange(await _made(request, make()), "video/mp4", CHECK_AGAIN)

    async def poster(request: Request, key: str, t: float = 0.0, h: int = 180) -> Response:
        """The frame shown at `t` seconds of the file's own clock as a JPEG, about `h` pixels high."""
        file = await file_of(key)

        async def make() -> Path:
            return await service.pictures.poster(file, t, h, await service.probes.begin_seconds(file))

        path = await _made(request, make())
        return FileRange(path, "image/jpeg", FOR_AN_HOUR)

    async def strip(request: Request, key: str, n: int = 12, h: int = 54) -> Response:
        """One JPEG of `n` frames side by side, at `(i + 0.5) / n` of the duration, about `h` pixels high."""
        file = await file_of(key)

        async def make() -> Path:
            return await service.pictures.strip(file, n, h, await service.probes.begin_seconds(file))

        path = await _made(request, make())
        return FileRange(path, "image/jpeg", FOR_AN_HOUR)

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


async def _made(request: Request, work: Awaitable[Path]) -> Path:
    try:
        return await until_hung_up(request, work)
    except InputError as error:
        raise HTTPException(415, str(error)) from error
