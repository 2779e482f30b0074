"""What an agent can do with an index: tools that return plain values and pictures, whatever the protocol.

An agent names videos by their ids, never by paths. It reads only what the index names and, if the user named one,
the folder of queries; it writes only clips, into the folder that the user named.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import math
import re
import tempfile
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from svb.errors import InputError, UsageError
from svb.retrieve.answer import SearchRequest, request_schema
from svb.retrieve.searching.results import video_key
from svb.retrieve.server.child_processes import WorkerPool
from svb.retrieve.server.options import McpOptions
from svb.retrieve.server.search_routes import COUNTS, FILE_FIELDS, describe_index, limited, search_upload
from svb.retrieve.server.state import ServerState
from svb.retrieve.server.uploads import PREFIX, Upload
from svb.retrieve.server.video_files import MAX_FRAMES, VideoFile, find_file
from svb.retrieve.stored.cues import KINDS, open_speech

if TYPE_CHECKING:
    from svb.retrieve.searching.searcher import Searcher

# An answer must fit into what a model reads at once.
MAX_RESULTS = 100
MAX_LINES = 500
# A clip is cut while the agent waits.
MAX_CLIP_SECONDS = 600.0
CUT_SECONDS = 3600.0
# The file arrives as text inside a message. A larger one goes into the folder of queries.
MAX_CONTENT_BYTES = 20_000_000
POSTER_HEIGHT_PX, STRIP_HEIGHT_PX = 480, 180


@dataclass(frozen=True)
class Shown:
    """What a tool returns: a value that JSON can hold, and pictures as JPEG."""

    value: dict[str, Any]
    pictures: tuple[bytes, ...] = ()


@dataclass(frozen=True)
class Tool:
    """A tool of an agent.

    Attributes:
        does: Tells the agent what it does.
        parameters: The JSON schema of its arguments.
        call: Runs it.
        reads_only: Whether it changes nothing.
    """

    does: str
    parameters: dict[str, Any]
    call: Callable[[Mapping[str, Any]], Awaitable[Shown]]
    reads_only: bool = True


class AgentTools:
    """The tools over an index.

    Args:
        state: Keeps the index open.
        options: The folders that the user allows.

    Raises:
        InputError: A folder that the user named cannot be used.
    """

    def __init__(self, state: ServerState, options: McpOptions) -> None:
        self._state, self._clips, self._queries = state, options.clips, options.queries
        if self._queries is not None and not self._queries.is_dir():
            raise InputError(
                f"{self._queries} is not a folder - expected one with images and videos to search with"
            )
        if self._clips is not None:
            try:
                self._clips.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(
                    f"the folder {self._clips} cannot be made ({error.strerror}) - name another one"
                ) from error
        self._cutters = WorkerPool(1, 4, CUT_SECONDS)
        self.tools = {
            "search": Tool(_SEARCH, _search_parameters(), self._search),
            "search_file": Tool(_SEARCH_FILE, _object(_FILE_PARAMETERS), self._search_file),
            "describe_index": Tool(_DESCRIBE, _object({}), self._describe),
            "list_videos": Tool(_LIST, _object(_LIST_PARAMETERS), self._list),
            "look": Tool(_LOOK, _object(_LOOK_PARAMETERS, "video_id", "begin_seconds"), self._look),
            "read_said": Tool(_SAID, _object(_SAID_PARAMETERS, "video_id", "seconds"), self._read_said),
        }
        if self._clips is not None:
            needed = ("video_id", "begin_seconds", "end_seconds")
            self.tools["cut_clip"] = Tool(_CUT, _object(_CUT_PARAMETERS, *needed), self._cut, reads_only=False)

    async def close(self) -> None:
        """End the cutting of clips."""
        await self._cutters.close()

    async def call(self, name: str, arguments: Mapping[str, Any]) -> Shown:
        """Use a tool.

        Raises:
            UsageError: There is no such tool, or an argument is missing, unknown or not of its type.
            SvbError, HTTPException: The tool failed.
        """
        tool = self.tools.get(name)
        if tool is None:
            raise UsageError(f"there is no tool {name!r} - expected one of {', '.join(self.tools)}")
        given = {argument: value for argument, value in arguments.items() if value is not None}
        _require_arguments(given, tool.parameters)
        return await tool.call(given)

    async def _search(self, arguments: Mapping[str, Any]) -> Shown:
        request = _limited(SearchRequest.from_json(arguments))
        answer = await self._state.search(lambda index: index.search(request))
        return Shown(answer.as_json())

    async def _search_file(self, arguments: Mapping[str, Any]) -> Shown:
        rest = {name: value for name, value in arguments.items() if name not in ("kind", "name", "content_base64")}
        kind, name, content = arguments.get("kind", "image"), arguments.get("name"), arguments.get("content_base64")
        if (name is None) == (content is None):
            raise UsageError("expected either name or content_base64 - give exactly one of them")
        request = _limited(SearchRequest.from_json({**rest, kind: name or f"the {kind} sent"}))
        with tempfile.TemporaryDirectory(prefix=PREFIX) as folder:
            if content is None:
                path = self._query_file(str(name))
            else:
                path = Path(folder) / "upload"
                await asyncio.to_thread(path.write_bytes, _decoded(content))
            upload = Upload(path, str(name or f"the {kind} sent"), kind, "")
            held: dict[str, Any] = json.loads(await search_upload(self._state, upload, request))
        return Shown(held)

    async def _describe(self, arguments: Mapping[str, Any]) -> Shown:
        held = await self._state.search(describe_index)
        return Shown({**held, "query_files": await asyncio.to_thread(self._query_names)})

    async def _list(self, arguments: Mapping[str, Any]) -> Shown:
        folder, contains = arguments.get("folder", "").strip("/"), arguments.get("contains", "").casefold()
        begin, count = arguments.get("begin", 0), arguments.get("count", MAX_RESULTS)

        def listed(searcher: Searcher) -> dict[str, Any]:
            catalog, found = searcher.catalog, list[int]()
            for row in np.flatnonzero(catalog.alive).tolist():
                video_id = catalog.video_id(row)
                if (not folder or video_id.startswith(f"{folder}/")) and contains in video_id.casefold():
                    found.append(row)
            infos = [searcher.video(video_key(catalog.video_id(row))) for row in found[begin : begin + count]]
            videos = [
                {"video_id": info.video_id, "duration_seconds": info.duration_seconds, "metadata": info.metadata}
                for info in infos
                if info is not None
            ]
            more = begin + count if begin + count < len(found) else None
            return {"num_videos": len(found), "videos": videos, "next_begin": more}

        return Shown(await self._state.search(listed))

    async def _look(self, arguments: Mapping[str, Any]) -> Shown:
        file = await self._file_of(arguments["video_id"])
        begin = float(arguments["begin_seconds"])
        end, frames = float(arguments.get("end_seconds", begin)), int(arguments.get("frames", 8))
        _require_interval(begin, end, may_be_empty=True)
        times = [begin + (frame + 0.5) / frames * (end - begin) for frame in range(frames)] if end > begin else []
        with tempfile.TemporaryDirectory(prefix="svb-look-") as folder:
            out, source = Path(folder) / "picture.jpg", str(file.path)
            await self._state.decoders.do(
                "poster", source=source, seconds=begin, height=POSTER_HEIGHT_PX, out=str(out)
            )
            pictures = [out.read_bytes()]
            if times:
                await self._state.decoders.do(
                    "strip", source=source, times_seconds=times, height=STRIP_HEIGHT_PX, out=str(out)
                )
                pictures.append(out.read_bytes())
        shown = {"video_id": file.info.video_id, "picture_seconds": begin, "strip_seconds": times}
        return Shown(shown, tuple(pictures))

    async def _read_said(self, arguments: Mapping[str, Any]) -> Shown:
        seconds, around = float(arguments["seconds"]), float(arguments.get("around_seconds", 30.0))
        begin, end = max(seconds - around, 0.0), seconds + around
        _require_interval(begin, end)

        def read(searcher: Searcher) -> dict[str, Any]:
            video_id = _video_id(searcher, arguments["video_id"])
            lines = said_between(searcher, video_id, begin, end)
            told = {"video_id": video_id, "begin_seconds": begin, "end_seconds": end, "lines": lines[:MAX_LINES]}
            return {**told, "lines_left_out": max(len(lines) - MAX_LINES, 0)}

        return Shown(await self._state.search(read))

    async def _cut(self, arguments: Mapping[str, Any]) -> Shown:
        assert self._clips is not None
        begin, end = float(arguments["begin_seconds"]), float(arguments["end_seconds"])
        _require_interval(begin, end)
        if end - begin > MAX_CLIP_SECONDS:
            raise UsageError(f"the clip lasts {end - begin:g} s - expected at most {MAX_CLIP_SECONDS:g} s")
        file = await self._file_of(arguments["video_id"])
        named = re.sub(r"[^\w.-]+", "_", file.info.video_id, flags=re.ASCII).strip("._-")[-48:]
        clip = self._clips / f"{named or 'clip'}-{file.info.key[:6]}-{begin:.3f}-{end:.3f}.mp4"
        if not clip.exists():
            await self._cutters.do(
                "cut", source=str(file.path), begin_seconds=begin, end_seconds=end, out=str(clip)
            )
        return Shown({"clip": clip.name, "folder": str(self._clips.absolute()), "size_bytes": clip.stat().st_size})

    async def _file_of(self, video_id: str) -> VideoFile:
        searcher = await self._state.snapshots.newest()
        return await asyncio.to_thread(lambda: find_file(searcher, video_key(_video_id(searcher, video_id))))

    def _query_names(self) -> list[str]:
        if self._queries is None:
            return []
        files = (path for path in self._queries.iterdir() if path.is_file() and not path.is_symlink())
        return sorted(path.name for path in files if path.name.isprintable())[:MAX_RESULTS]

    def _query_file(self, name: str) -> Path:
        """Return a file in the folder of queries; refuse a name that could lead out of the folder."""
        if self._queries is None:
            raise UsageError("there is no folder of queries - send content_base64, or start svb mcp with --queries")
        path = self._queries / name
        is_name = re.fullmatch(r"[^/\\\0]+", name) is not None and name not in (".", "..")
        if not is_name or path.is_symlink() or not path.is_file():
            raise InputError(f"{name!r} is not a file in the folder of queries - describe_index lists them")
        return path


def said_between(
    searcher: Searcher, video_id: str, begin_seconds: float, end_seconds: float
) -> list[dict[str, Any]]:
    """Return all lines of subtitles and transcripts in an interval of a video, in any language, in order of time.

    Raises:
        StoreError: The speech of the index is damaged.
    """
    lines = []
    for entry in searcher.manifest.get("speech", []):  # older indexes have none
        speech = open_speech(searcher.path, entry)
        for track in range(speech.num_tracks):
            if speech.video_ids[track] != video_id:
                continue
            first, last = speech.track_offsets[track : track + 2].tolist()
            seconds = speech.cue_seconds[first:last]
            shown = (seconds[:, 0] < end_seconds) & (seconds[:, 1] > begin_seconds)
            of_track = {"language": speech.languages[track], "source": KINDS[speech.track_kind[track]]}
            for cue in (first + np.flatnonzero(shown)).tolist():
                begin, end = speech.cue_seconds[cue].tolist()
                lines.append({"text": speech.cues[cue], "begin_seconds": begin, "end_seconds": end, **of_track})
    return sorted(lines, key=lambda line: (line["begin_seconds"], line["end_seconds"]))


def _video_id(searcher: Searcher, named: str) -> str:
    """Return the video_id of a video, which may be named by its key instead.

    Raises:
        InputError: The index has no such video.
    """
    info = searcher.video(video_key(named)) or searcher.video(named)
    if info is None:
        raise InputError(
            f"the index has no video {named!r} - expected a video_id as search or list_videos gives it"
        )
    return info.video_id


def _decoded(content: str) -> bytes:
    if len(content) > MAX_CONTENT_BYTES * 4 // 3 + 4:
        raise InputError(
            f"the file has more than {MAX_CONTENT_BYTES / 1e6:g} MB - put it into the folder of queries"
        )
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"content_base64 is not base64 ({error}) - expected a file's bytes") from None


def _limited(request: SearchRequest) -> SearchRequest:
    return limited(request, max_listed=MAX_RESULTS, max_returned=MAX_RESULTS)


def _require_interval(begin: float, end: float, *, may_be_empty: bool = False) -> None:
    if not (math.isfinite(begin) and math.isfinite(end) and begin >= 0 and (begin < end or may_be_empty)):
        raise UsageError(f"the times are {begin:g} to {end:g} s - expected 0 <= begin < end")


# --- what the agent is told


_TYPES: dict[str, type | tuple[type, ...]] = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "array": list,
    "boolean": bool,
}


def _require_arguments(arguments: Mapping[str, Any], parameters: Mapping[str, Any]) -> None:
    """Refuse arguments that a schema does not allow; `SearchRequest` checks those of a search."""
    known = parameters["properties"]
    for name in parameters["required"]:
        if name not in arguments:
            raise UsageError(f"{name} is missing - expected {', '.join(parameters['required'])}")
    for name, value in arguments.items():
        if name not in known:
            raise UsageError(f"unknown argument {name} - expected some of {', '.join(known) or 'none'}")
        said = known[name]
        kind = said.get("type")
        if isinstance(kind, str):
            fits = isinstance(value, _TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool))
            if not fits:
                raise UsageError(f"{name} is {str(value)[:80]!r} - expected a value of type {kind}")
        if "enum" in said and value not in said["enum"]:
            raise UsageError(f"{name} is {value!r} - expected one of {', '.join(map(str, said['enum']))}")
        if kind in ("integer", "number"):
            least, most = said.get("minimum", -math.inf), said.get("maximum", math.inf)
            if not least <= value <= most:
                raise UsageError(f"{name} is {value:g} - expected {least:g} to {most:g}")


def _object(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": [*required], "additionalProperties": False}


def _search_parameters() -> dict[str, Any]:
    """Return the schema of a request, without the fields for files and pages."""
    properties = request_schema()["properties"]
    for name in (*FILE_FIELDS, "with_curves"):
        del properties[name]
    for name in COUNTS:
        properties[name]["maximum"] = MAX_RESULTS
    return _object(properties)


_SEARCH = """Find the moments in the user's videos that match a text, or the videos similar to one (like).

Give exactly one of text and like. Each result has a video_id, a confidence (weak is only the nearest video, likely
not what was asked for), and its best moments with exact begin_seconds and end_seconds on the file's own clock."""
_SEARCH_FILE = """Find the moments that look like an image or a video.

Give the file's bytes in base64, or the name of a file in the folder of queries; describe_index lists these names.
The answer also holds captions that describe the file."""
_DESCRIBE = "Tell what the index holds: how many videos and moments, folders, metadata columns, the model."
_LIST = "List the videos of the index with their length and metadata, some videos at a time."
_LOOK = """Look at a moment of a video. The answer is the frame shown at begin_seconds and, if end_seconds is given,
a strip of frames side by side, in order of time. Both are JPEG."""
_SAID = "Read what is said in a video around a time: subtitles and transcripts, each line with its exact time."
_CUT = "Cut a part out of a video as an MP4 file, into the folder that the user named at the start of svb mcp."

_VIDEO = {"type": "string", "description": "The video_id as search or list_videos gives it; never a path."}
_SECONDS = {"type": "number", "minimum": 0, "maximum": 1e7}
_BEGIN = {**_SECONDS, "description": "Time at which it begins, in seconds of the file's own clock."}
_END = {**_SECONDS, "description": "Time at which it ends."}
_COUNT = {"type": "integer", "minimum": 1, "maximum": MAX_RESULTS}
_FILE_PARAMETERS = {
    "kind": {"type": "string", "enum": ["image", "video"], "description": "What the file is. [default: image]"},
    "name": {"type": "string", "description": "Name of a file in the folder of queries, without folders."},
    "content_base64": {"type": "string", "description": "The bytes of a file, in base64."},
    "span_seconds": {
        **{"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2},
        "description": "Begin and end, in seconds, of the part of a video to search with.",
    },
    "k": {**_COUNT, "description": "Number of videos to return. [default: 10]"},
    "num_captions": {**_COUNT, "minimum": 0, "description": "Number of captions to return. [default: 10]"},
    "folders": {**{"type": "array", "items": {"type": "string"}}, "description": "Search only in these folders."},
}
_LIST_PARAMETERS = {
    "folder": {"type": "string", "description": "List only the videos in this folder."},
    "contains": {
        "type": "string",
        "description": "List only videos whose video_id contains this; case is ignored.",
    },
    "begin": {
        "type": "integer",
        "minimum": 0,
        "description": "Number of videos to skip: next_begin of the last list.",
    },
    "count": {**_COUNT, "description": f"Number of videos to list. [default: {MAX_RESULTS}]"},
}
_LOOK_PARAMETERS = {
    "video_id": _VIDEO,
    "begin_seconds": _BEGIN,
    "end_seconds": {**_END, "description": "Time at which the strip ends; without it there is no strip."},
    "frames": {**_COUNT, "maximum": MAX_FRAMES, "description": "Number of frames in the strip. [default: 8]"},
}
_SAID_PARAMETERS = {
    "video_id": _VIDEO,
    "seconds": {**_SECONDS, "description": "The time, in seconds of the file's own clock."},
    "around_seconds": {**_SECONDS, "description": "Seconds to read before and after it. [default: 30]"},
}
_CUT_PARAMETERS = {"video_id": _VIDEO, "begin_seconds": _BEGIN, "end_seconds": _END}
