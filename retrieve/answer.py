"""What is asked of an index and what it answers, as plain values: for the library, `--json` and the server alike.

This module imports nothing heavy: a client of a running server needs no more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from svb.errors import UsageError

# From the surest to the least sure; what each means is in `svb.retrieve.searching.confidence`.
CONFIDENCES = ("strong", "fair", "weak")
RANKED_BY = ("moment", "video")


@dataclass(frozen=True)
class SearchRequest:
    """A question to an index: exactly one of `text`, `image`, `video` and `like`, and what narrows it.

    Attributes:
        text: What to look for.
        image: The path of a picture to look for.
        video: The path of a video to look for.
        span_seconds: Of the video, the half-open interval that counts; None for all of it.
        like: The video_id of a video of the index, to find what resembles it.
        plus: Further texts that a video must fit as well.
        without: Texts that a video must not fit.
        k: K, how many videos to answer with.
        by: What a video's score is: that of its best `moment`, or of the whole `video`; see `ranked_by`.
        folders: Only videos below one of these, as in `video_id` or `source_path`.
        min_duration_seconds: Only videos that last at least so long; likewise the maximum.
        after: Only files changed on this ISO date or later; `before`: before it.
        where: Only videos whose metadata fit: `column=value`, or with `!=`, `<`, `<=`, `>`, `>=`, `~` (contains).
        min_confidence: Only answers at least as sure.
        fold: Put near-duplicates of an answer under it instead of beside it.
        exact: Compare with every row even where an approximate index is at hand.
        num_moments: How many moments to name a video.
        num_captions: How many captions answer an image or a video.
        with_curves: Answer with the score over each video's time.
    """

    text: str | None = None
    image: str | None = None
    video: str | None = None
    span_seconds: tuple[float, float] | None = None
    like: str | None = None
    plus: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    k: int = 10
    by: str | None = None
    folders: tuple[str, ...] = ()
    min_duration_seconds: float | None = None
    max_duration_seconds: float | None = None
    after: str | None = None
    before: str | None = None
    where: tuple[str, ...] = ()
    min_confidence: str | None = None
    fold: bool = True
    exact: bool = False
    num_moments: int = 3
    num_captions: int = 10
    with_curves: bool = False

    def __post_init__(self) -> None:
        asked = [name for name in ("text", "image", "video", "like") if getattr(self, name) is not None]
        if len(asked) != 1:
            raise UsageError(
                f"the query is {' and '.join(asked) or 'nothing'} - expected exactly one of a text, an image, a "
                "video and a video_id to find the like of"
            )
        if self.span_seconds is not None:
            if self.video is None:
                raise UsageError("a span of seconds goes with a video - leave it out")
            begin, end = self.span_seconds
            if not 0 <= begin < end:
                raise UsageError(f"the span is {begin:g} to {end:g} s - expected 0 <= start < end")
        _require_at_least_1(k=self.k, num_moments=self.num_moments)
        if self.num_captions < 0:
            raise UsageError(f"num_captions is {self.num_captions} - expected at least 0")
        if self.by is not None:
            _require_one_of("by", self.by, RANKED_BY)
        if self.min_confidence is not None:
            _require_one_of("min_confidence", self.min_confidence, CONFIDENCES)

    @property
    def ranked_by(self) -> str:
        """Return `by`; where it was not said `video` for a whole video, whose like is one, and else `moment`."""
        if self.by is not None:
            return self.by
        return "video" if self.like is not None or (self.video and self.span_seconds is None) else "moment"

    def as_json(self) -> dict[str, Any]:
        """Return what differs from the defaults; `from_json` takes it."""
        held = asdict(self)
        return {f.name: held[f.name] for f in fields(self) if held[f.name] != f.default}

    @classmethod
    def from_json(cls, held: Mapping[str, Any]) -> SearchRequest:
        """Return the request that a program has sent.

        Raises:
            UsageError: A field is unknown or has a value that means nothing.
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
    """A stretch `[begin_seconds, end_seconds)` of a video that fits the query.

    Attributes:
        begin_seconds: Where it begins.
        end_seconds: Where it ends.
        best_seconds: Where the score is highest: what to show as its picture.
        score: Cosine similarity at its best, -1 to 1.
    """

    begin_seconds: float
    end_seconds: float
    best_seconds: float
    score: float


@dataclass(frozen=True)
class Curve:
    """The score over a video's time: `scores[i]` is that of the moment whose middle is at `times_seconds[i]`."""

    times_seconds: tuple[float, ...]
    scores: tuple[float, ...]


@dataclass(frozen=True)
class VideoResult:
    """A video found.

    Attributes:
        rank: From 1.
        score: Cosine similarity of the query with its best moment, or with the whole video where those are ranked.
        confidence: One of `CONFIDENCES`.
        video_id: As in the store.
        key: A name for it that says nothing of its path, the same in every index: 16 hex digits.
        source_path: Where its file lay when it was extracted.
        duration_seconds: None where it is not known.
        moments: Its best moments, the best first; at least one.
        duplicates: The video_ids of near-duplicates that were folded under it.
        metadata: Its columns of the metadata table.
        curve: Where it was asked for.
        size_bytes: Of its file when it was extracted; 0 where that is not known, as of some imports.
        mtime_ns: When its file had changed last, likewise.
    """

    rank: int
    score: float
    confidence: str
    video_id: str
    key: str
    source_path: str
    duration_seconds: float | None
    moments: tuple[Moment, ...]
    duplicates: tuple[str, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)
    curve: Curve | None = None
    size_bytes: int = 0
    mtime_ns: int = 0


@dataclass(frozen=True)
class CaptionResult:
    """A caption found.

    Attributes:
        rank: From 1.
        score: Cosine similarity with the query.
        caption: Its words.
        pool: The name of the pool it comes from.
        video_id: Whose caption it is; empty where that is not known.
        begin_seconds: What it is said of, for a subtitle; `end_seconds` likewise.
    """

    rank: int
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
        request: What was asked.
        results: Videos, best first.
        captions: What fits an image or a video best; empty for a text.
        confidence: Of the best result before any was left out for being less sure; `weak` where there is none.
        num_videos: How many videos were compared, after filters.
        num_moments: How many moments.
        exact: Whether every row was compared.
        recall: Of the approximate index, measured at k = 10 against exact search; None where exact.
        generation: Of the index; grows with every change of it.
        elapsed_seconds: How long the parts took: `embed`, `scan`, `total`.
        notes: What the user should know of it.
    """

    request: SearchRequest
    results: tuple[VideoResult, ...]
    captions: tuple[CaptionResult, ...]
    confidence: str
    num_videos: int
    num_moments: int
    exact: bool
    recall: float | None
    generation: int
    elapsed_seconds: dict[str, float]
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return it as `--json` and the server send it; the schema is `docs/answer.schema.json`."""
        held = asdict(self)
        return {**held, "request": self.request.as_json()}

    @classmethod
    def from_json(cls, held: Mapping[str, Any]) -> Answer:
        """Return the answer that a server has sent."""
        results = [
            {
                **result,
                "moments": tuple(Moment(**moment) for moment in result["moments"]),
                "duplicates": tuple(result["duplicates"]),
                "curve": None
                if result["curve"] is None
                else Curve(tuple(result["curve"]["times_seconds"]), tuple(result["curve"]["scores"])),
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
    """Tell whether a confidence is as sure as another, or surer."""
    return CONFIDENCES.index(confidence) <= CONFIDENCES.index(wanted)


def _require_at_least_1(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise UsageError(f"{name} is {number} - expected at least 1")


def _require_one_of(name: str, value: str, expected: tuple[str, ...]) -> None:
    if value not in expected:
        raise UsageError(f"{name} is {value!r} - expected {', '.join(expected[:-1])} or {expected[-1]}")


def _fits(value: Any, annotation: str) -> bool:
    """Tell whether a value from JSON is of a field's type, for the types that `SearchRequest` has."""
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
