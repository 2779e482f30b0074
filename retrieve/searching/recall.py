"""Recall of an approximate index: queries to tune and measure it with, and what an exact scan finds for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import faiss
import numpy as np
from numpy.typing import NDArray

from svb.retrieve.searching.vectors import SegmentVectors, Vectors
from svb.retrieve.stored.segment import Segment

K = 10
# The ten best videos are looked for among this many moments: neighbouring moments of a video are alike.
NUM_MOMENTS = 128
NUM_QUERIES = 1000
# Recall is too coarse if there are fewer captions.
MIN_CAPTIONS = 100
BLOCK = 65536
# Sums in another order differ by less than this.
EPSILON = 1e-5


@dataclass(frozen=True)
class Truth:
    """What an exact scan finds for Q queries; -inf and -1 fill the rows that find fewer.

    Attributes:
        queries: `(Q, D)`.
        moment_scores: `(Q, 10)` of the nearest moments, best first; `moment_rows` are their rows.
        video_scores: `(Q, 10)` of the best moments of the ten best videos; `video_rows` are their rows.
    """

    queries: NDArray[np.float32]
    moment_scores: NDArray[np.float32]
    moment_rows: NDArray[np.int64]
    video_scores: NDArray[np.float32]
    video_rows: NDArray[np.int64]

    def part(self, rows: slice) -> Truth:
        """Return the truth for some of the queries."""
        return Truth(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))


def draw_queries(exact: SegmentVectors, captions: NDArray[np.floating] | None) -> tuple[str, NDArray[np.float32]]:
    """Return the kind of queries, `captions` or `moments`, and `(Q, D)` queries: at most 1,000, always the same.

    Without captions it uses moments, each moved by its own length in a random direction. An index without moments
    has no queries.
    """
    random = np.random.default_rng(1)
    if captions is not None and len(captions) >= MIN_CAPTIONS:
        rows = np.sort(random.choice(len(captions), min(len(captions), NUM_QUERIES), replace=False))
        return "captions", random.permutation(np.asarray(captions[rows], np.float32))
    moments = random.permutation(exact.background("moment"))[:NUM_QUERIES]
    moved = moments + _units(random.normal(size=moments.shape))
    return "moments", _units(moved)


def find_truth(exact: SegmentVectors, segments: Sequence[Segment], queries: NDArray[np.float32]) -> Truth:
    """Compare all queries with all live moments, one block at a time."""
    best_scores = np.full((len(queries), NUM_MOMENTS), -np.inf, np.float32)
    best_rows = np.full((len(queries), NUM_MOMENTS), -1, np.int64)
    live = np.repeat(exact.catalog.alive, exact.catalog.moment_counts)
    first = 0
    for segment in segments:
        for begin in range(0, segment.num_moments, BLOCK):
            block = segment.moment_embeddings[begin : begin + BLOCK]
            rows = np.flatnonzero(live[first + begin : first + begin + len(block)])
            if len(rows):
                k = min(NUM_MOMENTS, len(rows))
                scores, found = faiss.knn(
                    queries, block[rows].astype(np.float32), k, metric=faiss.METRIC_INNER_PRODUCT
                )
                scores = np.concatenate([best_scores, scores], axis=1)
                held = np.concatenate([best_rows, first + begin + rows[found]], axis=1)
                order = np.argsort(-scores, axis=1, kind="stable")[:, :NUM_MOMENTS]
                best_scores, best_rows = (np.take_along_axis(each, order, axis=1) for each in (scores, held))
        first += segment.num_moments
    videos = [
        best_of_videos(exact, scores[rows >= 0], rows[rows >= 0])
        for scores, rows in zip(best_scores, best_rows, strict=True)
    ]
    video_scores, video_rows = (np.stack(side) for side in zip(*videos, strict=True))
    return Truth(queries, best_scores[:, :K], best_rows[:, :K], video_scores, video_rows)


def best_of_videos(
    vectors: Vectors, scores: NDArray[np.float32], rows: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return `(10,)` scores and rows of the best moments of the ten best videos among moments, best first."""
    _, first = np.unique(vectors.catalog.videos_of(rows), return_index=True)
    chosen = np.sort(first)[:K]
    best_scores, best_rows = np.full(K, -np.inf, np.float32), np.full(K, -1, np.int64)
    best_scores[: len(chosen)], best_rows[: len(chosen)] = scores[chosen], rows[chosen]
    return best_scores, best_rows


def measure_recall(vectors: Vectors, truth: Truth) -> tuple[float, float]:
    """Return the shares of the ten nearest moments and of the ten best videos that a search finds.

    Rows as near as the tenth count too: duplicates are equally good.
    """
    shares = []
    for query, moments, videos in zip(truth.queries, truth.moment_scores, truth.video_scores, strict=True):
        ten, _ = vectors.nearest(query, K, by="moment", allowed=None)
        best, _ = best_of_videos(vectors, *vectors.nearest(query, NUM_MOMENTS, by="moment", allowed=None))
        shares.append([_share(ten, moments), _share(best, videos)])
    of_moments, of_videos = np.mean(shares, axis=0).tolist()
    return of_moments, of_videos


def _share(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    wanted = expected[np.isfinite(expected)]
    return float(min(1.0, (found >= wanted[-1] - EPSILON).sum() / len(wanted)))


def _units(rows: NDArray[np.floating]) -> NDArray[np.float32]:
    units: NDArray[np.float32] = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    return units
