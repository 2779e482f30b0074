"""The moments of a video that match a query: where its score curve peaks, and from when to when.

A video is scored in overlapping windows of fixed length. A window's score is that of all its frames. As windows
slide over an event, the score rises from the level of the rest of the video to the peak. Half way up, the window
lies half inside the event: its middle is at the event's edge. So an event lasts as long as the curve, read between
the windows' middles, stays above half height. Of an event shorter than a window, the curve only tells that the
window contains it. The level of the rest is the mean of all scores below half height, which in turn depends on that
level: the smallest such level is taken, so that an event may fill most of a video.

`benchmarks/moments.py` compares this with whole videos and fixed chunks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from svb.retrieve.answer import Curve, Moment

HALF = 0.5
# Smaller waves of a curve are noise, in standard deviations of the query's scores over the index.
NOISE = 0.5

Scores = NDArray[np.floating]


def find_moments(
    window_seconds: NDArray[np.float64], scores: Scores, deviation: float, num_moments: int
) -> list[Moment]:
    """Return a video's best moments, best first; they do not overlap.

    Every moment after the first reaches at least half the height of the first.

    Args:
        window_seconds: `(M, 2)` half-open intervals of its windows, ascending; M is at least 1.
        scores: `(M,)` of the windows.
        deviation: Standard deviation of the query's scores over the index.
        num_moments: The most to return.
    """
    rest = _level_of_rest(scores, deviation)
    found: list[Moment] = []
    free = np.ones(len(scores), np.bool_)
    while free.any() and len(found) < num_moments:
        best = int(np.where(free, scores, -np.inf).argmax())
        if found and scores[best] < _half_height(rest, found[0].score):
            break
        moment = _around(window_seconds, scores, best, _half_height(rest, float(scores[best])), found)
        middles = window_seconds.mean(axis=1)
        free &= (middles < moment.begin_seconds) | (middles >= moment.end_seconds)
        free[best] = False
        found.append(moment)
    return found


def curve_of(window_seconds: NDArray[np.float64], scores: Scores) -> Curve:
    """Return the scores of `(M, 2)` windows over their middles."""
    return Curve(tuple(window_seconds.mean(axis=1).tolist()), tuple(scores.tolist()))


def _level_of_rest(scores: Scores, deviation: float) -> float:
    peak, rest = float(scores.max()), float(scores.min())
    # Each round takes in more and higher scores, so it ends.
    while (below := scores < _half_height(rest, peak)).any() and (mean := float(scores[below].mean())) > rest:
        rest = mean
    return min(rest, peak - NOISE * deviation)


def _half_height(rest: float, peak: float) -> float:
    return rest + HALF * (peak - rest)


def _around(
    window_seconds: NDArray[np.float64], scores: Scores, best: int, level: float, found: Sequence[Moment]
) -> Moment:
    """Return the stretch around a window in which the curve stays above a level, without moments found before."""
    best_seconds = float(window_seconds[best].mean())
    end = _edge(window_seconds, scores, best, level)
    # The same, backwards in time.
    begin = -_edge(-window_seconds[::-1, ::-1], scores[::-1], len(scores) - 1 - best, level)
    begin = max([begin, *(m.end_seconds for m in found if m.end_seconds <= best_seconds)])
    end = min([end, *(m.begin_seconds for m in found if m.begin_seconds > best_seconds)])
    return Moment(begin, end, best_seconds, float(scores[best]))


def _edge(window_seconds: NDArray[np.float64], scores: Scores, best: int, level: float) -> float:
    """Return when the curve crosses a level after a window, or the end of the footage if it does not."""
    begins, ends = window_seconds.T
    # A window that begins after the one before has ended is beyond a gap in the footage.
    stops = (scores[best + 1 :] < level) | (begins[best + 1 :] > ends[best:-1])
    last = best + (int(stops.argmax()) if stops.any() else len(stops))
    if last + 1 == len(scores) or begins[last + 1] > ends[last]:
        return float(ends[last])
    middle, following = window_seconds[last : last + 2].mean(axis=1).tolist()
    share = (float(scores[last]) - level) / (float(scores[last]) - float(scores[last + 1]))
    return float(middle + share * (following - middle))
