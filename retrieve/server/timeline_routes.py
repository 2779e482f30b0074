"""The route that makes a timeline for an editor of the moments that a page shows."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, HTTPException, Request
from pydantic import TypeAdapter, ValidationError
from starlette.responses import Response

from svb.retrieve.answer import Moment, VideoResult
from svb.retrieve.server.http import json_response, read_json, until_hung_up
from svb.retrieve.server.state import ServerState
from svb.retrieve.server.video_files import find_video

if TYPE_CHECKING:
    from svb.retrieve.searching.searcher import Searcher

FORMATS = ("otio", "edl", "fcpxml")
# A frame is decoded for each.
MAX_MOMENTS = 1000


@dataclass(frozen=True)
class TimelineVideo:
    """A video of an answer, by its key, with the moments to show."""

    key: str
    rank: int
    score: float
    confidence: str
    moments: tuple[Moment, ...]


@dataclass(frozen=True)
class TimelineRequest:
    """What a timeline is asked for: see `POST /api/timeline`."""

    query: str
    format: str
    videos: tuple[TimelineVideo, ...]
    handles_seconds: float = 0.0


_REQUEST = TypeAdapter(TimelineRequest)


def timeline_routes(state: ServerState) -> APIRouter:
    """Return the route."""
    router = APIRouter(tags=["search"])

    @router.post("/api/timeline", openapi_extra=_body(), summary="A timeline for an editor")
    async def timeline(request: Request) -> Response:
        """Make a timeline of an answer's moments: `{name, content, notes}`, the text of the file.

        Notes say what was left out and why.
        """
        asked = _asked(await read_json(request))
        searcher = await state.snapshots.newest()
        videos = await asyncio.to_thread(_videos_of, searcher, asked)
        name = f"{re.sub(r'[^A-Za-z0-9]+', '-', asked.query)[:48].strip('-') or 'found'}.{asked.format}"
        with tempfile.TemporaryDirectory(prefix="svb-timeline-") as folder:
            out = Path(folder) / name
            made = state.decoders.do(
                "timeline", query=asked.query, videos=videos, handles_seconds=asked.handles_seconds, out=str(out)
            )
            notes = await until_hung_up(request, made)
            content = await asyncio.to_thread(out.read_text, "utf-8")
        return json_response({"name": name, "content": content, "notes": notes})

    return router


def _asked(held: dict[str, Any]) -> TimelineRequest:
    try:
        asked = _REQUEST.validate_python(held)
    except ValidationError as error:
        first = error.errors()[0]
        raise HTTPException(400, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    if asked.format not in FORMATS:
        raise HTTPException(
            400, f"format is {asked.format!r} - expected {', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
        )
    moments = [moment for video in asked.videos for moment in video.moments]
    if len(moments) > MAX_MOMENTS:
        raise HTTPException(400, f"there are {len(moments)} moments - this server accepts up to {MAX_MOMENTS}")
    numbers = [
        number
        for moment in moments
        for number in (moment.begin_seconds, moment.end_seconds, moment.best_seconds, moment.score)
    ]
    if not all(math.isfinite(number) for number in (*numbers, asked.handles_seconds)):
        raise HTTPException(400, "a time or a score is not a finite number")
    return asked


def _videos_of(searcher: Searcher, asked: TimelineRequest) -> list[dict[str, Any]]:
    """Return the videos as results, with what the index holds of them: a client names keys, never files."""
    videos = []
    for video in asked.videos:
        info = find_video(searcher, video.key)
        result = VideoResult(
            *(video.rank, video.score, video.confidence, info.video_id, info.key, info.source_path),
            *(info.duration_seconds, video.moments),
            size_bytes=info.size_bytes,
            mtime_ns=info.mtime_ns,
        )
        videos.append(dataclasses.asdict(result))
    return videos


def _body() -> dict[str, Any]:
    number = {"type": "number"}
    moment = dict.fromkeys(("begin_seconds", "end_seconds", "best_seconds", "score"), number)
    moments = {"type": "array", "items": {"type": "object", "properties": moment}}
    video: dict[str, Any] = {"key": {"type": "string"}, "rank": {"type": "integer"}, "score": number}
    video |= {"confidence": {"type": "string"}, "moments": moments}
    fields: dict[str, Any] = {"query": {"type": "string"}, "format": {"type": "string", "enum": list(FORMATS)}}
    fields |= {
        "handles_seconds": number,
        "videos": {"type": "array", "items": {"type": "object", "properties": video}},
    }
    schema = {"type": "object", "required": ["query", "format", "videos"], "properties": fields}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
