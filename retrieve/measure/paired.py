"""Is B better than A, or could it be chance? Paired differences of measures, with two kinds of intervals.

Over videos: queries are paired, those of one video stay together, and videos are drawn again with replacement (a
bootstrap over clusters). The interval says how far the difference would move with other videos of the same kind,
for these trained models and a gallery of this difficulty.

Over seeds: runs are paired by seed, and Student's t applies to their differences. The interval says how far the
difference would move with other trainings, for these videos.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtr, stdtrit

from svb.errors import UsageError
from svb.retrieve.measure.query_ranks import Ranks, require_comparable
from svb.train.retrieval_metrics import ranks_metrics

RECALLS = ("t2v/R@1", "t2v/R@5", "t2v/R@10", "v2t/R@1", "v2t/R@10")
RESAMPLES = 10_000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """The range of a difference with 95 % confidence, and how often chance alone gets that far from 0.

    Attributes:
        low: The lower end, in percentage points.
        high: The upper end, in percentage points.
        p: Two-sided p-value of no difference.
    """

    low: float
    high: float
    p: float


@dataclass(frozen=True)
class Difference:
    """B - A of one recall or graded measure.

    Attributes:
        metric: `t2v/R@1`, `t2v/nDCG@10 of others by words` and so on.
        a: Mean over A's runs, in percent.
        b: Mean over B's runs, in percent.
        difference: `b - a`, in percentage points.
        over_videos: The interval from resampled videos.
        over_seeds: The interval from the seeds' differences; None for a single pair, or if all differ equally.
        num_pairs: Number of pairs of runs.
    """

    metric: str
    a: float
    b: float
    difference: float
    over_videos: Interval
    over_seeds: Interval | None
    num_pairs: int


def paired_differences(
    a: Sequence[Ranks], b: Sequence[Ranks], *, resamples: int = RESAMPLES, seed: int = 0
) -> list[Difference]:
    """Compare two sets of evaluations, paired in order.

    Args:
        a: The evaluations of one model, one per seed.
        b: The ranks of another model, on the same queries.
        resamples: How often videos are drawn again.
        seed: The seed of the draws, which all metrics share.

    Raises:
        UsageError: The sets are empty or differ in size.
        MismatchError: Queries differ; the error names the first.
    """
    if not a or len(a) != len(b):
        raise UsageError(
            f"cannot pair {len(a)} evaluations with {len(b)} - expected the same number of both, at least one"
        )
    for other in (*a[1:], *b):
        require_comparable(a[0], other)
    queries = a[0].queries
    video_of = {"t2v": queries.caption_video(), "v2t": np.arange(len(queries.video_ids))}
    graded = shared_graded([*a, *b])
    sums, sizes, differences = [], [], []  # M of each: (V,), (V,), (S,)
    for metric in (*RECALLS, *graded):
        way, _, k = metric.partition("/R@")
        if metric in graded:
            way = metric.partition("/")[0]
            # Whether a query has a value depends on the relevance alone, which all share: (S, Q).
            gains = np.stack([in_b.graded[metric] - in_a.graded[metric] for in_a, in_b in zip(a, b, strict=True)])
            counted = ~np.isnan(gains[0])
            hits, of_video = gains[:, counted] / 100, video_of[way][counted]
        else:
            # Whole numbers, so that no difference is exactly 0 in every resample: (S, Q) of -1, 0 and 1.
            hits = np.stack(
                [_hits(in_b, way, int(k)) - _hits(in_a, way, int(k)) for in_a, in_b in zip(a, b, strict=True)]
            )
            of_video = video_of[way]
        sums.append(np.bincount(of_video, hits.sum(axis=0), len(queries.video_ids)))
        sizes.append(len(a) * np.bincount(of_video, minlength=len(queries.video_ids)))
        differences.append(100 * hits.mean(axis=1))
    draws = resampled_ratios(np.stack(sums, axis=1), np.stack(sizes, axis=1), resamples, seed)  # (R, M)
    of_a, of_b = (
        [{**ranks_metrics(ranks.t2v, ranks.v2t), **ranks.graded_means()} for ranks in side] for side in (a, b)
    )
    return [
        Difference(
            metric,
            float(np.mean([metrics[metric] for metrics in of_a])),
            float(np.mean([metrics[metric] for metrics in of_b])),
            float(100 * sums[m].sum() / sizes[m].sum()),
            percentile_interval(100 * draws[:, m]),
            t_interval(differences[m]) if len(a) > 1 else None,
            len(a),
        )
        for m, metric in enumerate((*RECALLS, *graded))
    ]


def intervals(ranks: Ranks) -> dict[str, tuple[float, Interval]]:
    """Return the recalls and graded measures of one evaluation, each with its interval over videos."""
    worst = {way: np.full_like(getattr(ranks, way), np.inf) for way in ("t2v", "v2t")}
    nothing = replace(ranks, **worst, graded={name: 0 * values for name, values in ranks.graded.items()})
    return {one.metric: (one.b, one.over_videos) for one in paired_differences([nothing], [ranks])}


def shared_graded(evaluations: Sequence[Ranks]) -> list[str]:
    """Return the graded measures of t2v and v2t that all evaluations have, without those that no query has."""
    first = evaluations[0]
    return [
        name
        for name, values in first.graded.items()
        if all(name in other.graded for other in evaluations) and not np.isnan(values).all()
    ]


def resampled_ratios(
    sums: NDArray[np.float64], sizes: NDArray[np.int64], resamples: int, seed: int
) -> NDArray[np.float64]:
    """Draw V clusters with replacement, R times, and take the mean of each draw.

    Args:
        sums: `(V, M)` sums over the members of each cluster.
        sizes: `(V, M)` numbers of members.
        resamples: R.
        seed: The seed of the draws.

    Returns:
        `(R, M)` sums of the drawn clusters divided by their sizes.
    """
    num_clusters, num_columns = sums.shape
    random = np.random.default_rng(seed)
    both = np.concatenate([sums, sizes], axis=1)  # (V, 2 M)
    ratios = np.empty((resamples, num_columns))
    chunk = max(1, 2_000_000 // num_clusters)  # limits the memory to some tens of MB
    for begin in range(0, resamples, chunk):
        rows = min(chunk, resamples - begin)
        drawn = random.integers(0, num_clusters, (rows, num_clusters))
        drawn += np.arange(rows)[:, None] * num_clusters
        # The number of times that each cluster was drawn makes the sums of clusters one matrix product.
        counts = np.bincount(drawn.ravel(), minlength=rows * num_clusters).reshape(rows, num_clusters)
        totals = counts.astype(np.float64) @ both
        # A draw of videos without any query of a measure has the difference 0.
        ratios[begin : begin + rows] = totals[:, :num_columns] / np.maximum(totals[:, num_columns:], 1)
    return ratios


def percentile_interval(draws: NDArray[np.float64]) -> Interval:
    """Return the middle 95 % of `(R,)` resampled differences, and as p twice the smaller share beyond 0."""
    low, high = np.percentile(draws, [50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)])
    beyond = min((draws <= 0).sum(), (draws >= 0).sum())
    # Counting one more of each keeps a p-value from R draws above 1 / R.
    return Interval(float(low), float(high), float(min(1.0, 2 * (beyond + 1) / (len(draws) + 1))))


def t_interval(differences: NDArray[np.float64]) -> Interval | None:
    """Return Student's 95 % interval of the mean of `(S,)` differences, S at least 2, and p of the paired t-test.

    Return None if all seeds differ by exactly the same amount other than zero: recalls of few queries are so coarse
    that this says nothing about other seeds.
    """
    count, mean = len(differences), float(differences.mean())
    error = float(differences.std(ddof=1)) / math.sqrt(count)
    reach = float(stdtrit(count - 1, (1 + CONFIDENCE) / 2)) * error
    if error == 0:
        return Interval(0.0, 0.0, 1.0) if mean == 0 else None
    return Interval(mean - reach, mean + reach, 2 * float(stdtr(count - 1, -abs(mean) / error)))


def is_chance(ranks: Ranks) -> bool:
    """Tell whether t2v ranks are no better than guessing: their mean beats chance by at most 3 standard errors.

    Captions of one video count together. A collapsed model, whose similarities are all equal, is at chance.
    """
    video_of, num_videos = ranks.queries.caption_video(), len(ranks.queries.video_ids)
    means = np.bincount(video_of, ranks.t2v, num_videos) / np.bincount(video_of, minlength=num_videos)  # (V,)
    error = means.std(ddof=1) / math.sqrt(num_videos) if num_videos > 1 else 0.0
    return bool(means.mean() + 3 * error >= (num_videos + 1) / 2)


def difference_texts(difference: Difference) -> list[str]:
    """Return the difference, then interval and p over videos and over seeds, as tables show them."""
    intervals = (difference.over_videos, difference.over_seeds)
    return [
        f"{difference.difference:+.2f}",
        *(text for interval in intervals for text in _interval_texts(interval)),
    ]


def _interval_texts(interval: Interval | None) -> list[str]:
    if interval is None:
        return ["unknown", ""]
    p = f"{interval.p:.3f}" if interval.p >= 0.001 else "<0.001"
    return [f"{interval.low:+.2f} to {interval.high:+.2f}", p]


def _hits(ranks: Ranks, way: str, k: int) -> NDArray[np.int64]:
    return ((ranks.t2v if way == "t2v" else ranks.v2t) <= k).astype(np.int64)
