"""What is told of the videos that were found: scores, moments, confidence."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svb.retrieve.answer import CONFIDENCES, SearchRequest, VideoResult, at_least
from svb.retrieve.searching.confidence import Spread, independent_rows
from svb.retrieve.searching.opened import OpenedIndex
from svb.retrieve.searching.peaks import curve_of, find_moments
from svb.retrieve.searching.query import Query, Wish, require_unit_length
from svb.retrieve.searching.rank import Found
from svb.retrieve.searching.vectors import Vectors


@dataclass(frozen=True)
class VideoInfo:
    """What an index knows of a video, whatever is asked.

    Attributes:
        key: See `video_key`.
        video_id: As in the store.
        source_path: Where its file lay when it was extracted.
        duration_seconds: None where it is not known.
        metadata: Its columns of the metadata table.
        size_bytes: Of its file then; 0 where that is not known, as of some imports.
        mtime_ns: When its file had changed last, likewise.
        content_hash: Stands for what its file held; empty where that is not known.
    """

    key: str
    video_id: str
    source_path: str
    duration_seconds: float | None
    metadata: dict[str, Any]
    size_bytes: int
    mtime_ns: int
    content_hash: str


def video_key(video_id: str) -> str:
    """Return a name for a video that says nothing of its path, the same in every index: 16 hex digits."""
    return hashlib.sha256(video_id.encode()).hexdigest()[:16]


def info_of(opened: OpenedIndex, row: int) -> VideoInfo:
    """Return what an index knows of the video in a row."""
    video_id = opened.catalog.video_id(row)
    return VideoInfo(
        video_key(video_id),
        video_id,
        opened.catalog.source_path(row),
        opened.catalog.duration_seconds(row),
        opened.metadata.of(video_id),
        *opened.catalog.file_state(row),
    )


def build_results(
    opened: OpenedIndex,
    request: SearchRequest,
    wish: Wish,
    found: Sequence[Found],
) -> tuple[list[VideoResult], str]:
    """Return the results for videos that were found, and the confidence of the best of them.

    Args:
        opened: The index.
        request: What was asked.
        wish: The same, embedded.
        found: The videos, best first.
    """
    if not found:
        return [], CONFIDENCES[-1]
    vectors = opened.vectors
    moments = wish.query(vectors, "moment")
    ranked = moments if request.ranked_by == "moment" else wish.query(vectors, request.ranked_by)
    # Of the whole index, as the background is, whatever a filter leaves: a video's score means the same with it.
    independent = independent_rows(opened.catalog, request.ranked_by)
    spread = Spread.of(ranked.scores(vectors.background(request.ranked_by)), independent)
    deviation = spread.deviation
    if request.ranked_by != "moment":
        deviation = Spread.of(moments.scores(vectors.background("moment")), independent).deviation
    results = []
    for video in found:
        seconds, scores = _scores_over_time(vectors, video.row, moments)
        info = info_of(opened, video.row)
        score = float(scores.max())
        if request.ranked_by == "video":
            embedding = vectors.embeddings(np.array([video.row]), by="video")
            require_unit_length(embedding)
            score = float(ranked.scores(embedding)[0])
        results.append(
            VideoResult(
                rank=0,
                score=score,
                confidence=spread.confidence(score),
                video_id=info.video_id,
                key=info.key,
                source_path=info.source_path,
                duration_seconds=info.duration_seconds,
                moments=tuple(find_moments(seconds, scores, deviation, request.num_moments)),
                duplicates=tuple(opened.catalog.video_id(row) for row in video.duplicates),
                metadata=info.metadata,
                curve=curve_of(seconds, scores) if request.with_curves else None,
                size_bytes=info.size_bytes,
                mtime_ns=info.mtime_ns,
            )
        )
    return _ranked(results, request), spread.confidence(max(result.score for result in results))


def _scores_over_time(vectors: Vectors, row: int, query: Query) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
    """Return the `(M, 2)` seconds and `(M,)` scores of a video's moments."""
    rows = np.arange(*vectors.catalog.moment_range(row))
    embeddings = vectors.embeddings(rows, by="moment")
    require_unit_length(embeddings)  # a byte may have flipped and made a wrong row the best
    return vectors.catalog.moment_seconds(rows), query.scores(embeddings)


def _ranked(results: list[VideoResult], request: SearchRequest) -> list[VideoResult]:
    """Return those that are sure enough, numbered."""
    # A score may differ in its last digit from the one that the scan went by.
    results = sorted(results, key=lambda result: -result.score)
    wanted = request.min_confidence or CONFIDENCES[-1]
    sure = [result for result in results if at_least(result.confidence, wanted)]
    return [replace(result, rank=rank) for rank, result in enumerate(sure, start=1)]
