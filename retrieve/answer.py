"""Requests to an index and its answers, as plain values, for the library, `--json` and the server alike.

`SearchRequest` is the one place that describes the options of a search: the command line, the HTTP API and
docs/answer.schema.json are made from it (`python -m svb.retrieve.answer > docs/answer.schema.json`). This module
imports nothing heavy: a client of a running server needs no more.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from svb.config import json_schema, option
from svb.errors import UsageError

# The confidences from the surest to the least sure; `svb.retrieve.searching.results` says what each means.
CONFIDENCES = ("strong", "fair", "weak")
RANKED_BY = ("moment", "video")
# Why a video was found, and what a request searches for it.
WHY = ("seen", "said", "both")
SEARCH_IN = ("picture", "speech", "both")
# What a request searches with.
QUERIES = ("text", "image", "video", "like")

_CLOCK = re.compile(r"(?:(?:(\d+):)?(\d+):)?(\d+(?:\.\d+)?)")


def seconds_of(text: str) -> float:
    """Return the seconds that `75.5`, `1:15.5` or `0:01:15.5` stands for.

    Raises:
        UsageError: The text is not a time.
    """
    match = _CLOCK.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"{text!r} is not a time - expected seconds, m:ss or h:mm:ss")
    hours, minutes, seconds = match.groups()
    return int(hours or 0) * 3600 + int(minutes or 0) * 60 + float(seconds)


@dataclass(frozen=True)
class SearchRequest:
    """A question to an index: exactly one of `text`, `image`, `video` and `like`, and what narrows it.

    Attributes:
        text: Text to search for.
        image: Path of a picture to search with.
        video: Path of a video to search with.
        span_seconds: Half-open interval of the video to search with; all of it by default.
        like: The video_id of a video in the index, to search for similar ones.
        plus: Text the result must match as well. Repeatable.
        without: Text the result must not match. Repeatable.
        search_in: Search what is seen, what is said, or both. [default: both, if the index has speech]
        language: Search only what is said in this language, e.g. en.
        k: Number of videos to return.
        by: Rank videos by their best moment, or as a whole. [default: moment; video for a whole video]
        folders: Search only videos in this folder. Repeatable.
        min_duration_seconds: Search only videos that last at least this long.
        max_duration_seconds: Search only videos that last at most this long.
        after: Search only files changed on this day or later, e.g. 2026-05-31.
        before: Search only files changed before this day.
        where: Search only videos whose metadata match column=value, or !=, <, <=, >, >=, ~ (contains). Repeatable.
        min_confidence: Return only results with at least this confidence.
        fold: List near-duplicates under the best of them.
        exact: Compare every row, even if there is an approximate index.
        num_moments: Number of moments to return per video.
        num_captions: Number of captions to return for an image or a video.
        with_curves: Return the score over each video's time.
    """

    text: str | None = option(None, hidden=True)
    image: str | None = option(None, hidden=True)
    video: str | None = option(None, hidden=True)
    span_seconds: tuple[float, float] | None = option(None, hidden=True)
    like: str | None = option(None, hidden=True)
    plus: tuple[str, ...] = option((), metavar="TEXT")
    without: tuple[str, ...] = option((), flag="--not", metavar="TEXT")
    search_in: str | None = option(None, flag="--in", choices=SEARCH_IN)
    language: str | None = option(None, metavar="LANG")
    k: int = option(10, flag="-k", at_least=1)
    by: str | None = option(None, choices=RANKED_BY)
    folders: tuple[str, ...] = option((), flag="--folder", metavar="DIR")
    min_duration_seconds: float | None = option(None, flag="--min-duration", metavar="TIME", read=seconds_of)
    max_duration_seconds: float | None = option(None, flag="--max-duration", metavar="TIME", read=seconds_of)
    after: str | None = option(None, metavar="DATE")
    before: str | None = option(None, metavar="DATE")
    where: tuple[str, ...] = option((), metavar="EXPR")
    min_confidence: str | None = option(None, choices=CONFIDENCES)
    fold: bool = True
    exact: bool = False
    num_moments: int = option(3, flag="--moments", at_least=1)
    num_captions: int = option(10, flag="--captions", at_least=0)
    with_curves: bool = option(False, hidden=True)

    def __post_init__(self) -> None:
        asked = [name for name in QUERIES if getattr(self, name) is not None]
        if len(asked) != 1:
            raise UsageError(
                f"the query is {' and '.join(asked) or 'empty'} - expected exactly one of a text, an image, a video"
                " and the video_id of a video in the index"
            )
        if self.span_seconds is not None:
            if self.video is None:
                raise UsageError("span_seconds needs a video - name one, or leave it out")
            begin, end = self.span_seconds
            if not 0 <= begin < end:
                raise UsageError(f"the span is {begin:g} to {end:g} s - expected 0 <= start < end")
        if self.text is None and (self.search_in in ("speech", "both") or self.language is not None):
            raise UsageError("only a text can be searched for in speech - leave out search_in and language")
        if self.search_in == "picture" and self.language is not None:
            raise UsageError(
                f"the language {self.language!r} needs a search in speech - leave it out, or search in speech"
            )
        for each in fields(self):
            _check(each.name, getattr(self, each.name), each.metadata)

    @property
    def ranked_by(self) -> str:
        """Return `by`, or its default: `video` for a whole video and for `like`, else `moment`."""
        if self.by is not None:
            return self.by
        return "video" if self.like is not None or (self.video and self.span_seconds is None) else "moment"

    def as_json(self) -> dict[str, Any]:
        """Return what differs from the defaults; `from_json` takes it."""
        held = asdict(self)
        return {f.name: held[f.name] for f in fields(self) if held[f.name] != f.default}

    @classmethod
    def from_json(cls, held: Mapping[str, Any]) -> SearchRequest:
        """Return the request that a program sent.

        Raises:
            UsageError: A field is unknown, or its value is not of its type or not allowed.
        """
        known = {f.name: f for f in fields(cls)}
        unknown = sorted({*held} - {*known})
        if unknown:
            raise UsageError(f"unknown fields {', '.join(unknown)} - expected some of {', '.join(known)}")
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in held.items()
        }
        for name, value in values.items():
            if not _fits(value, str(known[name].type)):
                raise UsageError(f"{name} is {value!r} - expected {known[name].type}")
        return cls(**values)


@dataclass(frozen=True)
class Moment:
    """A stretch `[begin_seconds, end_seconds)` of a video that matches the query, on the file's own clock.

    Attributes:
        begin_seconds: Time at which it begins.
        end_seconds: Time at which it ends.
        best_seconds: Time of the highest score, and of the picture to show for it; when it begins, if it is said.
        score: Highest cosine similarity in it, -1 to 1; for what is said, the score of the line.
        kind: Whether it is seen or said.
    """

    begin_seconds: float
    end_seconds: float
    best_seconds: float
    score: float
    kind: str = field(default="seen", metadata={"choices": WHY[:2]})


@dataclass(frozen=True)
class Line:
    """A line that is said in a video.

    Attributes:
        text: The words.
        begin_seconds: Time at which it begins; null for notes without times.
        end_seconds: Time at which it ends.
        language: The cue's language, such as en; empty if unknown.
        score: About 1 for an average line that holds every word of the query.
        marks: The parts `[begin, end)` of the text, in letters, that match words of the query.
    """

    text: str
    begin_seconds: float | None
    end_seconds: float | None
    language: str
    score: float
    marks: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Curve:
    """The score over a video's time.

    Attributes:
        times_seconds: The middle of each window of the video.
        scores: The score of each window.
    """

    times_seconds: tuple[float, ...]
    scores: tuple[float, ...]


@dataclass(frozen=True)
class VideoResult:
    """A video that was found.

    Attributes:
        rank: From 1.
        score: Cosine similarity of the query with its best window, or with the whole video if those are ranked;
            where speech is searched too, a score of both, in which 1 is about where chance ends.
        confidence: How sure this result is, from strong to weak.
        video_id: The video_id in the feature store.
        key: A name that does not reveal its path, the same in every index: 16 hex digits.
        source_path: Path of its file when it was extracted.
        duration_seconds: Its duration; null if unknown.
        moments: Its best moments, best first.
        duplicates: The video_ids of near-duplicates listed under it.
        metadata: Its columns of the metadata table.
        curve: The score over its time, if the request asked for it.
        size_bytes: Size of its file when it was extracted; 0 if unknown, as for some imports.
        mtime_ns: Last change of its file when it was extracted, in ns since 1970; 0 if unknown.
        why: Whether what the query asks for is seen, said, or both.
        lines: The lines that are said, best first.
    """

    rank: int = field(metadata={"at_least": 1})
    score: float
    confidence: str = field(metadata={"choices": CONFIDENCES})
    video_id: str
    key: str = field(metadata={"schema": {"pattern": "^[0-9a-f]{16}$"}})
    source_path: str
    duration_seconds: float | None
    moments: tuple[Moment, ...] = field(metadata={"schema": {"minItems": 1}})
    duplicates: tuple[str, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)
    curve: Curve | None = None
    size_bytes: int = field(default=0, metadata={"at_least": 0})
    mtime_ns: int = 0
    why: str = field(default="seen", metadata={"choices": WHY})
    lines: tuple[Line, ...] = ()


@dataclass(frozen=True)
class CaptionResult:
    """A caption that was found.

    Attributes:
        rank: From 1.
        score: Cosine similarity with the query.
        caption: Its text.
        pool: Name of the pool it comes from.
        video_id: The video it belongs to; empty if unknown.
        begin_seconds: Time at which a subtitle begins.
        end_seconds: Time at which a subtitle ends.
    """

    rank: int = field(metadata={"at_least": 1})
    score: float
    caption: str
    pool: str
    video_id: str = ""
    begin_seconds: float | None = None
    end_seconds: float | None = None


@dataclass(frozen=True)
class Answer:
    """What an index answers.

    Attributes:
        request: The question; a field that is missing has its default.
        results: Videos, best first.
        captions: Captions that match an image or a video best; empty for a text.
        confidence: Confidence of the best result, before min_confidence left any out; weak if there is none.
        num_videos: Number of videos compared, after filters.
        num_windows: Number of windows of these videos.
        exact: Whether every row was compared.
        recall: Recall at 10 of the approximate index against exact search; null if exact.
        generation: Generation of the index; it grows with every change.
        elapsed_seconds: Duration of each part: `embed`, of which `load` is loading the model, `scan` and `total`.
        notes: Notes for the user about this answer.
    """

    request: SearchRequest
    results: tuple[VideoResult, ...]
    captions: tuple[CaptionResult, ...]
    confidence: str = field(metadata={"choices": CONFIDENCES})
    num_videos: int = field(metadata={"at_least": 0})
    num_windows: int = field(metadata={"at_least": 0})
    exact: bool
    recall: float | None
    generation: int
    elapsed_seconds: dict[str, float]
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return what `--json` and the server send; its schema is docs/answer.schema.json."""
        return {**asdict(self), "request": self.request.as_json()}

    @classmethod
    def from_json(cls, held: Mapping[str, Any]) -> Answer:
        """Return the answer that a server sent."""
        results = [
            {
                **result,
                "moments": tuple(Moment(**moment) for moment in result["moments"]),
                "duplicates": tuple(result["duplicates"]),
                "lines": tuple(
                    Line(**{**line, "marks": tuple(map(tuple, line["marks"]))}) for line in result.get("lines", ())
                ),
                "curve": result["curve"] and Curve(**{name: tuple(of) for name, of in result["curve"].items()}),
            }
            for result in held["results"]
        ]
        return cls(
            **{
                **held,
                "request": SearchRequest.from_json(held["request"]),
                "results": tuple(VideoResult(**result) for result in results),
                "captions": tuple(CaptionResult(**caption) for caption in held["captions"]),
                "notes": tuple(held["notes"]),
            }
        )


def at_least(confidence: str, wanted: str) -> bool:
    """Tell whether a confidence reaches another."""
    return CONFIDENCES.index(confidence) <= CONFIDENCES.index(wanted)


def _check(name: str, value: Any, said: Mapping[str, Any]) -> None:
    """Refuse a value that the field's `svb.config.option` does not allow."""
    choices, least = said.get("choices"), said.get("at_least")
    if value is None:
        return
    if choices and value not in choices:
        raise UsageError(f"{name} is {value!r} - expected {', '.join(choices[:-1])} or {choices[-1]}")
    if least is not None and value < least:
        raise UsageError(f"{name} is {value} - expected at least {least}")


def _fits(value: Any, annotation: str) -> bool:
    """Tell whether a value from JSON has the type of a field of `SearchRequest`."""
    if value is None:
        return "None" in annotation
    kind = annotation.removesuffix(" | None")
    if kind.startswith("tuple[str"):
        return isinstance(value, tuple) and all(isinstance(text, str) for text in value)
    if kind.startswith("tuple[float"):
        return isinstance(value, tuple) and len(value) == 2 and all(_is_number(number) for number in value)
    if kind == "float":
        return _is_number(value)
    if kind == "int":
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, bool if kind == "bool" else str)


def _is_number(value: Any) -> bool:
    # No infinity and no NaN: neither is JSON, and neither bounds anything.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e18


# --- the schema

# The dataclasses of an answer, by their names in the schema.
_DEFINITIONS: dict[type, str] = {
    **{Answer: "answer", SearchRequest: "request", VideoResult: "result"},
    **{Moment: "moment", Line: "line", Curve: "curve", CaptionResult: "caption"},
}


def answer_schema() -> dict[str, Any]:
    """Return the JSON schema of what `svb search --json` prints: docs/answer.schema.json."""
    answer = {"$ref": "#/$defs/answer"}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "What `svb search --json` prints and POST /api/search answers; with --queries a list of answers",
        "anyOf": [answer, {"type": "array", "items": answer}],
        "$defs": {
            **{name: json_schema(shape, _DEFINITIONS) for shape, name in _DEFINITIONS.items()},
            "request": request_schema(),
        },
    }


def request_schema() -> dict[str, Any]:
    """Return the JSON schema of a request, of which every field may be left out."""
    schema = {**json_schema(SearchRequest, _DEFINITIONS), "oneOf": [{"required": [name]} for name in QUERIES]}
    for each in fields(SearchRequest):
        if each.default not in (None, ()):
            schema["properties"][each.name]["default"] = each.default
    del schema["required"]
    return schema


if __name__ == "__main__":
    import json
    import sys

    sys.stdout.write(json.dumps(answer_schema(), indent=2) + "\n")
