"""Graded retrieval measures: what a ranking is worth where more than one video is right, or half right.

- `nDCG` as Wray, Doughty and Damen define it (*On Semantic Similarity in Video Retrieval*, CVPR 2021, equations 5
  to 7): the gain is the relevance itself, the sum goes over the first k places, and k is the number of candidates
  whose relevance is above 0.
- `nDCG@10`: the same over the first 10 places.
- `mAP@R` and `R-Precision` of Musgrave et al. (*A Metric Learning Reality Check*, ECCV 2020), used by ECCV Caption:
  a candidate is right if its relevance is at least `RIGHT_FROM`, and R is the number of right ones.
- `judged@10`: the share of the first 10 candidates that somebody judged.

`... of others` takes a caption's own video, or a video's own captions, out of the candidates. Where candidates are
equally similar, a measure is its mean over all orders of them, so a collapsed model scores chance. A query without
any relevant candidate has no value: it is NaN here, and is left out of means and counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from svb.data.relevance import Relevance
from svb.errors import InputError
from svb.train.retrieval_metrics import require_finite_similarities

Values = NDArray[np.float64]

MEASURES = ("nDCG", "nDCG@10", "mAP@R", "R-Precision")
OF_OTHERS = " of others"
JUDGED = "judged@10"
RIGHT_FROM = 0.5
_AT = 10
# Numbers of a block of candidates: a dozen arrays of 16 MB.
_BLOCK_SIZE = 2**21


def graded_values(
    similarity: NDArray[np.floating], caption_video: NDArray[np.integer], relevance: Relevance
) -> dict[str, Values]:
    """Return every measure of every query under keys such as `t2v/nDCG@10 of others`, in percent.

    Args:
        similarity: `(C, V)`, finite.
        caption_video: `(C,)` column of each caption's own video.
        relevance: The relevance of the C captions and V videos.

    Returns:
        `(C,)` values for t2v and `(V,)` for v2t; NaN for a query without any relevant candidate.

    Raises:
        InputError: A similarity is NaN or infinite, or no caption has a relevant video.
    """
    num_captions, num_videos = similarity.shape
    require_finite_similarities(similarity, range(num_captions), range(num_videos))
    every = slice(0, num_captions), slice(0, num_videos)
    own_video, columns = np.asarray(caption_video), np.arange(num_videos)
    found: dict[str, list[dict[str, Values]]] = {"t2v": [], "v2t": []}
    for rows in _slices(num_captions, num_videos):
        own = own_video[rows, None] == columns[None, :]
        block, judged = relevance.block(rows, every[1]), relevance.judged(rows, every[1])
        found["t2v"].append(_both(similarity[rows], block, own, judged))
    for videos in _slices(num_videos, num_captions):
        own = columns[videos, None] == own_video[None, :]
        block, judged = relevance.block(every[0], videos), relevance.judged(every[0], videos)
        judged = None if judged is None else judged.T
        found["v2t"].append(_both(similarity[:, videos].T, block.T, own, judged))
    values = {
        f"{way}/{name}": np.concatenate([part[name] for part in parts])
        for way, parts in found.items()
        for name in parts[0]
    }
    if np.isnan(values["t2v/nDCG"]).all():
        raise InputError(
            f"no caption has a relevant video by {relevance.name} ({relevance.description}) - choose another "
            "--relevance"
        )
    return values


def graded_means(values: Mapping[str, Values]) -> dict[str, float]:
    """Return the mean of every measure over the queries that have a value; leave out a measure without any.

    `both/...` is the mean over the queries of both directions.
    """
    names = [name.removeprefix("t2v/") for name in values if name.startswith("t2v/")]
    both = {f"both/{name}": np.concatenate([values[f"t2v/{name}"], values[f"v2t/{name}"]]) for name in names}
    kept = {name: held[~np.isnan(held)] for name, held in {**values, **both}.items()}
    return {name: float(held.mean()) for name, held in kept.items() if len(held)}


def left_out(values: Mapping[str, Values]) -> dict[str, int]:
    """Return how many queries have no value, by measure."""
    return {name: int(np.isnan(held).sum()) for name, held in values.items()}


def query_measures(
    similarities: NDArray[np.floating],
    relevances: NDArray[np.floating],
    judged: NDArray[np.bool_] | None = None,
    taken_out: NDArray[np.bool_] | None = None,
) -> dict[str, Values]:
    """Return the measures of Q queries in percent.

    Args:
        similarities: `(Q, N)` to the candidates.
        relevances: `(Q, N)`, at least 0; the gains.
        judged: `(Q, N)` pairs that somebody judged; None leaves `judged@10` out.
        taken_out: `(Q, N)` candidates to take out.

    Returns:
        `(Q,)` values of each of `MEASURES`.
    """
    similarity: Values = similarities.astype(np.float64)
    gains: Values = relevances.astype(np.float64)
    counted = np.full(len(gains), gains.shape[1])
    if taken_out is not None:
        # Behind all others and worth nothing, a candidate changes no sum.
        similarity, gains = np.where(taken_out, -np.inf, similarity), np.where(taken_out, 0.0, gains)
        counted = counted - taken_out.sum(axis=1)
    order = np.argsort(-similarity, axis=1)
    ties = _ties(np.take_along_axis(similarity, order, axis=1))
    ranked = np.take_along_axis(gains, order, axis=1)
    is_right = (ranked >= RIGHT_FROM).astype(np.float64)
    discount = 1 / np.log2(np.arange(2, gains.shape[1] + 2))
    dcg = (_mean_of_ties(ranked, ties) * discount).cumsum(axis=1)
    ideal = (-np.sort(-gains, axis=1) * discount).cumsum(axis=1)
    num_relevant, num_right = (gains > 0).sum(axis=1), is_right.sum(axis=1).astype(np.int64)
    first = np.minimum(_AT, counted)
    found = {
        "nDCG": _at(dcg, num_relevant) / _at(ideal, num_relevant),
        "nDCG@10": _at(dcg, first) / np.where(num_relevant > 0, _at(ideal, first), np.nan),
        "mAP@R": _at(_precision_of_right(is_right, ties).cumsum(axis=1), num_right) / _or_nan(num_right),
        "R-Precision": _at(_mean_of_ties(is_right, ties).cumsum(axis=1), num_right) / _or_nan(num_right),
    }
    if judged is not None:
        is_judged = np.take_along_axis(judged if taken_out is None else judged & ~taken_out, order, axis=1)
        share = _mean_of_ties(is_judged.astype(np.float64), ties).cumsum(axis=1)
        found[JUDGED] = _at(share, first) / _or_nan(first)
    return {name: 100 * values for name, values in found.items()}


def _both(
    similarity: NDArray[np.floating],
    gains: NDArray[np.floating],
    own: NDArray[np.bool_],
    judged: NDArray[np.bool_] | None,
) -> dict[str, Values]:
    others = query_measures(similarity, gains, judged, own)
    return {
        **query_measures(similarity, gains, judged),
        **{f"{name}{OF_OTHERS}": values for name, values in others.items()},
    }


def _slices(num_queries: int, num_candidates: int) -> list[slice]:
    step = max(1, _BLOCK_SIZE // max(1, num_candidates))
    return [slice(begin, min(begin + step, num_queries)) for begin in range(0, num_queries, step)]


@dataclass(frozen=True)
class _Ties:
    """The runs of equal similarities in a flattened `(Q, N)` ranking; most candidates are in none.

    Attributes:
        places: `(M,)` the tied places, run by run.
        sizes: The number of places of each run, at least 2.
    """

    places: NDArray[np.int64]
    sizes: NDArray[np.int64]

    @property
    def begins(self) -> NDArray[np.int64]:
        return np.cumsum(self.sizes) - self.sizes

    def sums(self, ranked: Values) -> Values:
        """Return the sum of `(Q, N)` values over each run."""
        summed: Values = np.add.reduceat(ranked.ravel()[self.places], self.begins)
        return summed


def _ties(ranked: Values) -> _Ties:
    """Return the ties of `(Q, N)` falling similarities; candidates that were taken out are in none."""
    follows = np.zeros(ranked.shape, dtype=bool)
    follows[:, 1:] = (ranked[:, 1:] == ranked[:, :-1]) & np.isfinite(ranked[:, 1:])
    flat = follows.ravel()
    is_tied = flat | np.append(flat[1:], False)
    places = np.flatnonzero(is_tied)
    begins = np.flatnonzero(~flat[places])
    return _Ties(places, np.diff(begins, append=len(places)))


def _mean_of_ties(ranked: Values, ties: _Ties) -> Values:
    """Return `(Q, N)` values with those of tied candidates replaced by their mean."""
    if not len(ties.places):
        return ranked
    mean = ranked.copy()
    mean.ravel()[ties.places] = np.repeat(ties.sums(ranked) / ties.sizes, ties.sizes)
    return mean


def _precision_of_right(is_right: Values, ties: _Ties) -> Values:
    """Return `(Q, N)`: at each place the precision if the candidate is right, else 0, over all orders of ties.

    If t of m tied candidates are right, the j-th of them is right with a chance of t / m, and the j - 1 before it
    then hold (j - 1) (t - 1) / (m - 1) right ones on average.
    """
    counted, place = is_right.cumsum(axis=1), np.arange(1, is_right.shape[1] + 1)
    expected: Values = is_right * counted / place
    if not len(ties.places):
        return expected
    first = ties.places[ties.begins]
    right = np.repeat(ties.sums(is_right), ties.sizes)
    size = np.repeat(ties.sizes, ties.sizes)
    earlier = ties.places - np.repeat(first, ties.sizes)  # j - 1
    # Right ones before the tie: all up to its first candidate, without that candidate itself.
    before = np.repeat(counted.ravel()[first] - is_right.ravel()[first], ties.sizes)
    within = earlier * (right - 1) / (size - 1)
    expected.ravel()[ties.places] = right / size * (before + 1 + within) / place[ties.places % len(place)]
    return expected


def _at(cumulated: Values, count: NDArray[np.integer]) -> Values:
    """Return the sum of the first `count` of each row; NaN where the count is 0."""
    held: Values = cumulated[np.arange(len(cumulated)), np.maximum(count, 1) - 1]
    summed: Values = np.where(count > 0, held, np.nan)
    return summed


def _or_nan(count: NDArray[np.integer]) -> Values:
    found: Values = np.where(count > 0, count, np.nan)
    return found
