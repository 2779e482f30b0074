"""The routes that search, and the route that makes a timeline for an editor from what was found."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import re
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, HTTPException, Request
from pydantic import TypeAdapter, ValidationError
from starlette.responses import Response

from svb import __version__
from svb.errors import InputError, StoreError, UsageError
from svb.retrieve.answer import Answer, Moment, SearchRequest, VideoResult, request_schema
from svb.retrieve.searching.catalog import FileState
from svb.retrieve.server.http import json_response, parse_object, read_json, until_hung_up
from svb.retrieve.server.state import ServerState
from svb.retrieve.server.uploads import Upload
from svb.retrieve.server.video_files import find_file, find_video
from svb.retrieve.stored.calibration import meanings_of

if TYPE_CHECKING:
    from svb.retrieve.searching.searcher import Searcher

# The page proposes only the folders of the first videos: collecting those of millions of videos would take seconds.
MAX_FOLDERS, VIDEOS_LOOKED_AT = 200, 200_000

# A client sends the file itself, never the name of a file on the server.
FILE_FIELDS = ("image", "video", "span_seconds")

# A running search cannot be ended, and must not keep its thread for minutes. Each text that it embeds takes some
# 15 ms, and each video in the answer a fraction of that.
MAX_LISTED, MAX_RETURNED = 32, 1000
# The fields of a request that say how much to return.
COUNTS = ("k", "num_moments", "num_captions")


def search_routes(state: ServerState) -> APIRouter:
    """Return the routes."""
    router = APIRouter(tags=["search"])
    described: dict[int, dict[str, Any]] = {}

    @router.post("/api/search", responses=_ANSWERS, openapi_extra=_json_body(), summary="Search with a text")
    async def search(request: Request) -> Response:
        """Search with `text`, or with `like`, a video_id of the index."""
        asked = await read_json(request)
        named = [name for name in FILE_FIELDS if asked.get(name) is not None]
        if named:
            raise HTTPException(400, f"{', '.join(named)} cannot be sent here - send a file to /api/search/file")
        wanted = limited(SearchRequest.from_json(asked))
        body = await until_hung_up(request, state.search(lambda index: _as_json(index.search(wanted))))
        return Response(body, media_type="application/json")

    @router.post(
        "/api/search/file",
        responses=_ANSWERS,
        openapi_extra=_form_body(),
        summary="Search with an image or a video",
    )
    async def search_file(request: Request) -> Response:
        """Search with a file: `kind` is image or video, `request` the JSON of the other fields."""
        async with state.uploads.receive(request) as upload:
            wanted = _request_of(upload)
            body = await until_hung_up(request, search_upload(state, upload, wanted))
        return Response(body, media_type="application/json")

    @router.get("/api/index", summary="What the index holds")
    async def index() -> Response:
        searcher = await state.snapshots.newest()
        if searcher.generation not in described:
            described.clear()
            described[searcher.generation] = {
                "index": str(state.index.absolute()),
                **await asyncio.to_thread(describe_index, searcher),
            }
        return json_response(described[searcher.generation])

    @router.get("/api/videos/{key}", summary="A video and its file")
    async def video(key: str) -> Response:
        """Tell whether a video's file is there, unchanged, and whether browsers play it as it is.

        Moments are on the file's own clock. On this clock, the video begins at `begin_seconds`, from which its
        duration counts, and a preview of it begins at `preview_begin_seconds`.
        """
        searcher = await state.snapshots.newest()
        info = await asyncio.to_thread(find_video, searcher, key)
        try:
            file = await asyncio.to_thread(find_file, searcher, key)
            found: dict[str, Any] = {"available": True, **await state.probes.describe(file)}
        except HTTPException as error:
            found = {"available": False, "playable": False, "problem": error.detail}
        held = {name: value for name, value in dataclasses.asdict(info).items() if name not in FileState._fields}
        return json_response({**held, **found})

    return router


async def search_upload(state: ServerState, upload: Upload, request: SearchRequest) -> str:
    """Return the answer to a request that searches with a file, as JSON."""
    options = state.options
    sent = {**request.as_json(), upload.kind: str(upload.path)}
    try:
        held = await state.embedders.do(
            "embed",
            index=str(state.index),
            request=sent,
            device=options.device,
            max_seconds=options.max_upload_seconds,
        )
    except InputError as error:  # the client has another name for its file
        raise InputError(str(error).replace(str(upload.path), upload.name)) from error

    def search(index: Searcher) -> str:
        import numpy as np

        if index.manifest["model_fingerprint"] != held["model_fingerprint"]:
            raise StoreError("the index changed to another model while the file was embedded - send the file again")
        answer = index.search_embedding(np.asarray(held["embedding"], np.float32), request)
        took = Counter(answer.elapsed_seconds)
        took.update({**held["elapsed_seconds"], "total": held["elapsed_seconds"]["embed"]})
        return _as_json(dataclasses.replace(answer, elapsed_seconds=dict(took)))

    return await state.search(search)


def _request_of(upload: Upload) -> SearchRequest:
    """Return an upload's request, with the client's name for the file as its image or video."""
    asked = parse_object(upload.request)
    named = [name for name in ("text", "like", "image", "video") if asked.get(name) is not None]
    if named:
        raise HTTPException(400, f"{', '.join(named)} cannot go with a file - send the request without it")
    return limited(SearchRequest.from_json({**asked, upload.kind: upload.name}))


def limited(
    request: SearchRequest, *, max_listed: int = MAX_LISTED, max_returned: int = MAX_RETURNED
) -> SearchRequest:
    """Return the request, if it lists and asks for no more than a server allows.

    Raises:
        UsageError: It lists or asks for more.
    """
    for name in ("plus", "without", "folders", "where"):
        if (number := len(getattr(request, name))) > max_listed:
            raise UsageError(f"{name} has {number} entries - expected at most {max_listed}")
    for name in COUNTS:
        if (number := getattr(request, name)) > max_returned:
            raise UsageError(f"{name} is {number} - expected at most {max_returned}; narrow the search instead")
    return request


def _as_json(answer: Answer) -> str:
    return json.dumps(answer.as_json(), allow_nan=False)


def describe_index(searcher: Searcher) -> dict[str, Any]:
    """Return a summary of what an index holds."""
    manifest = searcher.manifest
    return {
        "generation": searcher.generation,
        "num_videos": manifest["videos"],
        "num_moments": manifest["moments_total"],
        "model": manifest["model"],
        "folders": _folders(searcher),
        "columns": {name: kind for entry in manifest["metadata"] for name, kind in entry["columns"].items()},
        "has_captions": bool(manifest["captions"]),
        "languages": [language for entry in manifest.get("speech", []) for language in entry["languages"]],
        "has_speech": any(entry["windows"] for entry in manifest.get("speech", [])),
        "confidence": meanings_of(manifest),
        "version": __version__,
    }


def _folders(searcher: Searcher) -> list[str]:
    """Return the folders in the video_ids; if there are too many, return those with the most videos."""
    catalog = searcher.catalog
    rows = range(min(catalog.num_videos, VIDEOS_LOOKED_AT))
    counts: Counter[str] = Counter()
    # Splitting each folder once, not once per video, saves seconds in which searches would wait.
    for folder, number in Counter(catalog.video_id(row).rpartition("/")[0] for row in rows).items():
        for path in (Path(folder), *Path(folder).parents):
            if path.name:
                counts[str(path)] += number
    return sorted(folder for folder, _ in counts.most_common(MAX_FOLDERS))


_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"model": Answer, "description": "The answer; docs/answer.schema.json describes it."},
    400: {"description": 'The request or the file cannot be used: `{"error": ...}`.'},
    413: {"description": "The request is too large."},
    429: {"description": "Too many uploads at once."},
    503: {"description": "Too many searches run or wait, or a time limit was reached; try again."},
}


def _json_body() -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": _request_schema()}}}}


def _form_body() -> dict[str, Any]:
    fields = {
        "kind": {"type": "string", "enum": ["image", "video"]},
        "request": {"type": "string", "description": "JSON of the other fields; for a video also `span_seconds`."},
        "file": {"type": "string", "format": "binary"},
    }
    schema = {"type": "object", "required": ["kind", "file"], "properties": fields}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


def _request_schema() -> dict[str, Any]:
    schema = request_schema()
    for name in FILE_FIELDS:
        del schema["properties"][name]
    return {**schema, "oneOf": [{"required": ["text"]}, {"required": ["like"]}]}


# --- timelines

FORMATS = ("otio", "edl", "fcpxml")
# The timeline decodes a frame for each.
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
    """The body of `POST /api/timeline`."""

    query: str
    format: str
    videos: tuple[TimelineVideo, ...]
    handles_seconds: float = 0.0


_REQUEST = TypeAdapter(TimelineRequest)


def timeline_routes(state: ServerState) -> APIRouter:
    """Return the route."""
    router = APIRouter(tags=["search"])

    @router.post("/api/timeline", openapi_extra=_timeline_body(), summary="A timeline for an editor")
    async def timeline(request: Request) -> Response:
        """Make a timeline of an answer's moments: `{name, content, notes}`.

        The content is the text of the file. The notes say what was left out and why.
        """
        asked = _timeline_request(await read_json(request))
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


def _timeline_request(held: dict[str, Any]) -> TimelineRequest:
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
        raise HTTPException(400, "a time or a score is not a finite number - expected finite numbers")
    return asked


def _videos_of(searcher: Searcher, asked: TimelineRequest) -> list[dict[str, Any]]:
    """Return the videos as results, with their files as the index names them: a client names keys, never files."""
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


def _timeline_body() -> dict[str, Any]:
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
