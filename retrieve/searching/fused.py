"""Results of what is seen and what is said together: both scores are on one scale, and the better one counts.

A score is divided by what the best of as many unrelated rows reaches by chance, see
`svb.retrieve.searching.results` and `svb.retrieve.searching.said`: 1 is where chance ends. Of the lesser score, a
small part is added. A plain sum lets the noise of one hide a sure find of the other: some picture always seems to
fit, some line too. `benchmarks/speech.py` measures it.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from svb.retrieve.answer import CONFIDENCES, Line, Moment, SearchRequest, VideoResult, at_least
from svb.retrieve.searching.rank import EmbeddedRequest, Found, Query, keep_best, rank_videos
from svb.retrieve.searching.results import Spread, describe_results, independent_rows, numbered
from svb.retrieve.searching.said import Heard, SpeechSearch
from svb.retrieve.searching.vectors import Vectors
from svb.retrieve.stored.calibration import Calibration
from svb.retrieve.stored.metadata import Metadata

LESSER_WEIGHT = 0.1
# Videos that are among the best by what is seen or by what is said; all others are below.
CANDIDATES = 256


def fused_results(
    vectors: Vectors,
    metadata: Metadata,
    speech: SpeechSearch,
    request: SearchRequest,
    embedded: EmbeddedRequest,
    allowed: NDArray[np.bool_] | None,
    calibration: Calibration | None,
) -> tuple[list[VideoResult], str, tuple[str, ...]]:
    """Return the results, best first, the confidence of the best of them, and what the user should know."""
    heard = speech.ask(request, embedded, allowed)
    videos = np.array(list(heard.found), np.int64)
    by, sees = request.ranked_by, request.search_in != "speech"
    query = embedded.query(vectors, by)
    if sees and not heard.is_quoted:
        most = max(CANDIDATES, 4 * request.k)
        nearest = rank_videos(vectors, query, most, by=by, allowed=allowed, folded=False)
        videos = np.union1d(videos[:most], [video.row for video in nearest]).astype(np.int64)
    if not len(videos):
        return [], CONFIDENCES[-1], heard.notes
    said = np.array([heard.found[video][0] if video in heard.found else 0.0 for video in videos.tolist()])
    if sees:
        spread = Spread.of(query.scores(vectors.background(by)), independent_rows(vectors.catalog, by))
        seen = spread.share_of_chance(_picture_scores(vectors, query, videos, by))
    else:
        seen = np.zeros(len(videos))
    scores = joint_scores(seen, said) if sees else said
    order = np.lexsort((videos, -scores))
    kept = keep_best(vectors, videos[order], request.k, request.fold)
    found = [Found(int(group[0]), tuple(group[1:].tolist())) for group in kept]
    place_of = {video: place for place, video in enumerate(videos.tolist())}
    told = said >= seen
    results = []
    described = describe_results(vectors, metadata, request, embedded, found, calibration)
    for row, result in zip(found, described, strict=True):
        place = place_of[row.row]
        results.append(_with_lines(result, heard, row.row, float(scores[place]), bool(told[place]), request))
    best = min(results, key=lambda result: CONFIDENCES.index(result.confidence)).confidence
    return numbered(results, request), best, heard.notes


def joint_scores(seen: NDArray[np.float64], said: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the `(n,)` scores of videos from both of theirs, on the scale on which 1 is where chance ends."""
    scores: NDArray[np.float64] = np.maximum(seen, said) + LESSER_WEIGHT * np.minimum(seen, said)
    return scores


def _picture_scores(vectors: Vectors, query: Query, videos: NDArray[np.int64], by: str) -> NDArray[np.float32]:
    """Return the `(n,)` score of each video's best window, or of the whole video."""
    if by == "video":
        return query.scores(vectors.embeddings(videos, by=by))
    ranges = [np.arange(*vectors.catalog.moment_range(video)) for video in videos.tolist()]
    scores = query.scores(vectors.embeddings(np.concatenate(ranges), by="moment"))
    begins = np.cumsum([0, *map(len, ranges[:-1])])
    best: NDArray[np.float32] = np.maximum.reduceat(scores, begins)
    return best


def _with_lines(
    result: VideoResult, heard: Heard, row: int, score: float, is_told: bool, request: SearchRequest
) -> VideoResult:
    """Return a result with what is said, why it is there, and the moments of both kinds.

    Args:
        result: The result by pictures.
        heard: What the query found in speech.
        row: The video's row in the catalog.
        score: The video's score by both.
        is_told: Whether what is said counts for more: then even a weak line says why the video is there.
        request: The request.
    """
    _, sure = heard.found.get(row, (0.0, None))
    sees = request.search_in != "speech"
    is_seen = sees and at_least(result.confidence, "fair")
    is_said = sure is not None and (at_least(sure, "fair") or not sees or is_told)
    if not is_said:
        return replace(result, score=score)
    assert sure is not None
    lines = heard.lines_of(row, request.num_moments)
    spoken = [_moment(line, result) for line in lines]
    confidence = sure
    if is_seen:
        confidence = min(sure, result.confidence, key=CONFIDENCES.index)
        # At least one of each kind is shown, the said ones first: they are exact.
        num_said = min(len(spoken), max(1, request.num_moments - len(result.moments), request.num_moments // 2))
        spoken = [*spoken[:num_said], *result.moments][: max(request.num_moments, 1)]
    return replace(
        result,
        score=score,
        confidence=confidence,
        why="both" if is_seen else "said",
        lines=tuple(lines),
        moments=tuple(spoken),
    )


def _moment(line: Line, result: VideoResult) -> Moment:
    """Return the moment in which a line is said; for a line without times, that is all of the video's moments."""
    if line.begin_seconds is None or line.end_seconds is None:
        begin = min(moment.begin_seconds for moment in result.moments)
        end = max(moment.end_seconds for moment in result.moments)
        return Moment(begin, end, result.moments[0].best_seconds, line.score, "said")
    return Moment(line.begin_seconds, line.end_seconds, line.begin_seconds, line.score, "said")
