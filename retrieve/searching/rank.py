"""The K best videos for a query: exact, however many rows must be looked at to be sure."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from svb.retrieve.searching.duplicates import fold
from svb.retrieve.searching.query import BLOCK, Query, require_cosines
from svb.retrieve.searching.vectors import Vectors

# A scan for some hundred rows takes no longer than one for ten, and often all that is needed is among them.
FIRST_ROWS = 256
GROWTH = 8


@dataclass(frozen=True)
class Found:
    """A video that was found.

    Attributes:
        row: Its number.
        duplicates: The rows of near-duplicates that it stands for.
    """

    row: int
    duplicates: tuple[int, ...]


@dataclass(frozen=True)
class Candidates:
    """The best videos so far.

    Attributes:
        videos: `(n,)` rows, best first.
        scores: `(n,)`.
        bound: No other video scores more.
    """

    videos: NDArray[np.int64]
    scores: NDArray[np.float32]
    bound: float


def rank_videos(
    vectors: Vectors,
    query: Query,
    k: int,
    *,
    by: str,
    allowed: NDArray[np.bool_] | None,
    folded: bool,
) -> list[Found]:
    """Return the K best videos, best first.

    What is unwanted only lowers scores. So a row that a scan for what is wanted leaves out scores at most as much
    as the last one it finds: once the K-th video scores more, no scan for more rows can change the answer.

    Args:
        vectors: Of the index.
        query: What to look for.
        k: K; fewer come where fewer are there.
        by: A video's score is that of its best `moment`, or of the whole `video`.
        allowed: `(V,)`, the videos that count; None for all.
        folded: Whether near-duplicates count as one.
    """
    num_counted = int(vectors.catalog.counted(allowed).sum())
    # One more than there are: a scan that finds fewer than it was asked for has found all.
    all_rows = 1 + (vectors.catalog.num_videos if by == "video" else vectors.catalog.num_moments)
    num_rows = min(max(FIRST_ROWS, 4 * k), all_rows)
    while True:
        candidates = _candidates(vectors, query, num_rows, by, allowed)
        if not len(query.negatives) and len(candidates.videos) == num_counted:
            candidates = replace(candidates, bound=-np.inf)  # of each the best row, which comes first
        kept = _keep(vectors, candidates.videos, k, folded)
        found = [Found(int(videos[0]), tuple(videos[1:].tolist())) for videos in kept]
        if candidates.bound == -np.inf:
            return found
        if len(found) == k and candidates.scores[candidates.videos == found[-1].row][0] >= candidates.bound:
            return found
        num_rows = min(GROWTH * num_rows, all_rows)


def _candidates(
    vectors: Vectors, query: Query, num_rows: int, by: str, allowed: NDArray[np.bool_] | None
) -> Candidates:
    scores, rows = vectors.nearest(query.positive, num_rows, by=by, allowed=allowed)
    require_cosines(scores)
    bound = float(scores[-1]) if len(rows) == num_rows else -np.inf
    if len(query.negatives):
        scores = scores - np.concatenate(
            [np.empty(0, np.float32)]
            + [
                query.penalties(vectors.embeddings(rows[begin : begin + BLOCK], by=by))
                for begin in range(0, len(rows), BLOCK)
            ]
        )
    videos = vectors.catalog.videos_of(rows) if by == "moment" else rows
    order = np.lexsort((videos, -scores))
    _, first = np.unique(videos[order], return_index=True)
    best = order[np.sort(first)]
    return Candidates(videos[best], scores[best], bound)


def _keep(vectors: Vectors, videos: NDArray[np.int64], k: int, folded: bool) -> list[NDArray[np.int64]]:
    """Return the first K videos, each with the near-duplicates that are folded under it."""
    if not folded:
        return [videos[position : position + 1] for position in range(min(k, len(videos)))]
    kept = fold(
        lambda positions: vectors.embeddings(videos[positions], by="video"), vectors.catalog.durations[videos], k
    )
    return [videos[positions] for positions in kept]
