"""Builds the results for the videos that were found: their scores, moments and confidence.

Confidence says how sure an answer is. For a text, ranked by moments, it comes from the index's calibration:
`svb.retrieve.stored.calibration`. For all else it depends on how a query's scores are spread over the whole index.
The best of N rows that have nothing to do with a query stands out by a little less than sqrt(2 ln N) standard
deviations. So an answer is

    strong    from sqrt(2 ln N) on: hardly by chance
    fair      from 0.9 of it on: about where chance ends
    weak      below: likely the best of what does not match

By this rule nothing stands out if most of an index matches a query, and every answer is weak.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svb.retrieve.answer import CONFIDENCES, SearchRequest, VideoResult, at_least
from svb.retrieve.searching.catalog import Catalog
from svb.retrieve.searching.moments import curve_of, find_moments
from svb.retrieve.searching.rank import EmbeddedRequest, Found, Query, require_unit_length
from svb.retrieve.searching.vectors import Vectors
from svb.retrieve.stored.calibration import Calibration
from svb.retrieve.stored.metadata import Metadata

FAIR = 0.9
# Among fewer rows than this, chance leaves little room: a single row would always be strong.
FEWEST_ROWS = 5
# Neighbouring windows of a video show much the same: about this many are one piece of evidence.
WINDOWS_A_SCENE = 8


@dataclass(frozen=True)
class VideoInfo:
    """What an index knows about a video, whatever the query.

    Attributes:
        key: See `video_key`.
        video_id: The video_id in the store.
        source_path: Path of its file when it was extracted.
        duration_seconds: None if unknown.
        metadata: The video's columns of the metadata table.
        size_bytes: Size of its file when it was extracted; 0 if unknown, as for some imports.
        mtime_ns: Last change of its file when it was extracted; 0 if unknown.
        content_hash: Hash of its file's content; empty if unknown.
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
    """Return a name for a video that does not reveal its path, the same in every index: 16 hex digits."""
    return hashlib.sha256(video_id.encode()).hexdigest()[:16]


def info_of(catalog: Catalog, metadata: Metadata, row: int) -> VideoInfo:
    """Return what an index knows about the video in a row."""
    video_id = catalog.video_id(row)
    return VideoInfo(
        video_key(video_id),
        video_id,
        catalog.source_path(row),
        catalog.duration_seconds(row),
        metadata.of(video_id),
        *catalog.file_state(row),
    )


def build_results(
    vectors: Vectors,
    metadata: Metadata,
    request: SearchRequest,
    embedded: EmbeddedRequest,
    found: Sequence[Found],
    calibration: Calibration | None,
) -> tuple[list[VideoResult], str]:
    """Return the results for the videos that were found, best first, and the confidence of the best of them."""
    if not found:
        return [], CONFIDENCES[-1]
    results = describe_results(vectors, metadata, request, embedded, found, calibration)
    # A score may differ in its last digit from the one that the scan went by.
    results.sort(key=lambda result: -result.score)
    return numbered(results, request), results[0].confidence


def describe_results(
    vectors: Vectors,
    metadata: Metadata,
    request: SearchRequest,
    embedded: EmbeddedRequest,
    found: Sequence[Found],
    calibration: Calibration | None,
) -> list[VideoResult]:
    """Return the results for the videos that were found, in their order, not numbered yet."""
    catalog = vectors.catalog
    windows = embedded.query(vectors, "moment")
    ranked = windows if request.ranked_by == "moment" else embedded.query(vectors, request.ranked_by)
    # The spread is that of the whole index, whatever a filter leaves: a video's score means the same with a filter.
    independent = independent_rows(catalog, request.ranked_by)
    background = ranked.scores(vectors.background(request.ranked_by))
    spread = Spread.of(background, independent)
    deviation = spread.deviation
    confidence_of: Callable[[float], str] = spread.confidence
    if calibration is not None and request.text is not None and request.ranked_by == "moment":
        known = calibration.query((request.text, *request.plus), (embedded.main, *embedded.plus))
        confidence_of = partial(calibration.confidence, query=known, best_score=float(background.max()))
    if request.ranked_by != "moment":
        deviation = Spread.of(windows.scores(vectors.background("moment")), independent).deviation
    results = []
    for video in found:
        seconds, scores = _scores_over_time(vectors, video.row, windows)
        info = info_of(catalog, metadata, video.row)
        score = float(scores.max())
        if request.ranked_by == "video":
            embedding = vectors.embeddings(np.array([video.row]), by="video")
            require_unit_length(embedding)
            score = float(ranked.scores(embedding)[0])
        results.append(
            VideoResult(
                rank=0,
                score=score,
                confidence=confidence_of(score),
                video_id=info.video_id,
                key=info.key,
                source_path=info.source_path,
                duration_seconds=info.duration_seconds,
                moments=tuple(find_moments(seconds, scores, deviation, request.num_moments)),
                duplicates=tuple(catalog.video_id(row) for row in video.duplicates),
                metadata=info.metadata,
                curve=curve_of(seconds, scores) if request.with_curves else None,
                size_bytes=info.size_bytes,
                mtime_ns=info.mtime_ns,
            )
        )
    return results


def _scores_over_time(vectors: Vectors, row: int, query: Query) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
    """Return the `(M, 2)` seconds and `(M,)` scores of a video's windows."""
    rows = np.arange(*vectors.catalog.moment_range(row))
    embeddings = vectors.embeddings(rows, by="moment")
    require_unit_length(embeddings)  # a byte may have flipped and made a wrong row the best
    return vectors.catalog.moment_seconds(rows), query.scores(embeddings)


def numbered(results: Sequence[VideoResult], request: SearchRequest) -> list[VideoResult]:
    """Return the results that are sure enough, numbered."""
    wanted = request.min_confidence or CONFIDENCES[-1]
    sure = [result for result in results if at_least(result.confidence, wanted)]
    return [replace(result, rank=rank) for rank, result in enumerate(sure, start=1)]


# --- confidence


@dataclass(frozen=True)
class Spread:
    """How a query's scores are spread over an index.

    Attributes:
        mean: The mean score.
        deviation: The standard deviation of the scores.
        chance: How many deviations above the mean the best of unrelated rows may be.
    """

    mean: float
    deviation: float
    chance: float

    @classmethod
    def of(cls, scores: NDArray[np.floating], num_rows: float) -> Spread:
        """Return the spread of `(n,)` scores, those of a sample of rows.

        Args:
            scores: At least one.
            num_rows: How many independent rows are compared with the query.
        """
        wide = scores.astype(np.float64)
        return cls(float(wide.mean()), float(wide.std()), float(np.sqrt(2 * np.log(max(num_rows, FEWEST_ROWS)))))

    def share_of_chance(self, scores: NDArray[np.floating]) -> NDArray[np.float64]:
        """Return how far `(n,)` scores stand out, 1 being as far as the best of unrelated rows; at least 0."""
        if self.deviation == 0:
            return np.zeros(len(scores))
        shares: NDArray[np.float64] = np.maximum((scores - self.mean) / (self.chance * self.deviation), 0.0)
        return shares

    def confidence(self, score: float) -> str:
        """Return the confidence of a result with this score, one of `svb.retrieve.answer.CONFIDENCES`."""
        above = score - self.mean
        if self.deviation == 0 or above < FAIR * self.chance * self.deviation:
            return "weak"
        return "strong" if above >= self.chance * self.deviation else "fair"


def independent_rows(catalog: Catalog, by: str) -> float:
    """Return how many rows of an index count as independent of each other."""
    num_videos, num_windows = int(catalog.alive.sum()), int(catalog.moment_counts[catalog.alive].sum())
    return num_videos if by == "video" else max(num_videos, num_windows / WINDOWS_A_SCENE)
