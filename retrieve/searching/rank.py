"""A query as vectors, and the K best videos for it: exact, however many rows must be read to be sure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from svb.errors import StoreError
from svb.retrieve.searching.vectors import Vectors

# Rows that are converted to float32 at once.
BLOCK = 16384
# Embeddings have unit length, within the precision of float16.
MAX_COSINE = 1.01
DO_NEXT = "find it with `svb verify` and restore it, or make the index again with `svb index --rebuild`"

# A scan for some hundred rows takes no longer than one for ten, and often they are enough.
FIRST_ROWS = 256
GROWTH = 8

# MSR-VTT clips encoded again at their own size reach a cosine of at least 0.989 with efficientnet-lite0; 0.24 % of
# the clips have another one at 0.98 or more, from the same scene.
SAME_COSINE = 0.98
# A copy that was encoded again may have lost or gained a few frames.
SAME_DURATION_SECONDS = 1.0
SAME_DURATION_SHARE = 0.05
# Candidates that are compared at once; usually the K wanted are among the first.
FOLDED_AT_ONCE = 256


@dataclass(frozen=True)
class Query:
    """Scores rows by cosines.

    The score of a row is its mean cosine with the wanted texts. An unwanted text lowers it by how much more the row
    resembles that text than rows usually do. It never raises it, so an unwanted text cannot become a wish for its
    opposite.

    Attributes:
        positive: `(D,)`, the mean of the wanted embeddings: a row's product with it is the mean of the cosines.
        negatives: `(N, D)`, the unwanted embeddings.
        floors: `(N,)`, the usual score with each of them: the median over the background.
    """

    positive: NDArray[np.float32]
    negatives: NDArray[np.float32]
    floors: NDArray[np.float32]

    def scores(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the `(n,)` scores of `(n, D)` rows.

        Raises:
            StoreError: A row is damaged.
        """
        scores = cosines(rows, self.positive)
        require_cosines(scores)
        return scores - self.penalties(rows)

    def penalties(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return by how much the unwanted texts lower the scores of `(n, D)` rows, at least 0."""
        excess: NDArray[np.float32] = np.maximum(cosines(rows[:, None], self.negatives) - self.floors, 0).sum(
            axis=1
        )
        return excess


@dataclass(frozen=True)
class EmbeddedRequest:
    """The texts, image or video of a request as embeddings: each `(D,)` float32, L2-normalised.

    Attributes:
        main: The text, image, video or `like` of the request.
        plus: The texts a result must match as well.
        without: The texts a result must not match.
    """

    main: NDArray[np.float32]
    plus: tuple[NDArray[np.float32], ...] = ()
    without: tuple[NDArray[np.float32], ...] = ()

    def query(self, vectors: Vectors, by: str) -> Query:
        """Return the query for the rows of windows (`by` is `moment`) or of videos."""
        return self.query_over(lambda: vectors.background(by))

    def query_over(self, background: Callable[[], NDArray[np.float32]]) -> Query:
        """Return the query for rows of which `background` returns a sample, `(n, D)`."""
        positive = np.stack([self.main, *self.plus]).mean(axis=0)
        if not self.without:
            return Query(positive, np.empty((0, len(positive)), np.float32), np.empty(0, np.float32))
        negatives = np.stack(self.without)
        return Query(positive, negatives, np.median(cosines(background()[:, None], negatives), axis=0))


def cosines(rows: NDArray[np.float32], others: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the products of `(..., D)` rows with others, broadcast against each other.

    They are computed row by row: the threads of a matrix product would cost a query more than they save, and would
    compete with those of other queries. So equal rows also get equal scores, wherever they are.
    """
    products: NDArray[np.float32] = np.vecdot(rows, others)
    return products


def require_cosines(scores: NDArray[np.float32]) -> None:
    """Refuse scores that rows of unit length cannot have: a byte has flipped, which file sizes do not show.

    Raises:
        StoreError: There is one.
    """
    bad = scores[~(np.abs(scores) <= MAX_COSINE)]
    if bad.size:
        raise StoreError(
            f"the index holds a damaged embedding, whose cosine with the query is {float(bad[0]):g} - {DO_NEXT}"
        )


def require_unit_length(rows: NDArray[np.float32]) -> None:
    """Refuse `(n, D)` rows that do not have unit length within the precision of float16.

    Raises:
        StoreError: There is one.
    """
    lengths = np.sqrt(cosines(rows, rows))
    bad = lengths[~(np.abs(lengths - 1) <= MAX_COSINE - 1)]
    if bad.size:
        raise StoreError(
            f"the index holds a damaged embedding, of length {float(bad[0]):g} instead of 1 - {DO_NEXT}"
        )


# --- ranking


@dataclass(frozen=True)
class Found:
    """A video that was found.

    Attributes:
        row: The number of the video in the catalog.
        duplicates: The rows of the near-duplicates listed under it.
    """

    row: int
    duplicates: tuple[int, ...]


@dataclass(frozen=True)
class Candidates:
    """The best videos so far.

    Attributes:
        videos: `(n,)` rows, best first.
        scores: `(n,)`.
        bound: No other video scores higher.
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
    """Return the K best videos, best first; fewer if there are fewer.

    Unwanted texts only lower scores. So a row that a scan for the wanted ones leaves out scores at most as high as
    the last row it finds: once the K-th video scores higher, no scan for more rows can change the answer.

    Args:
        vectors: The index's.
        query: The query.
        k: K.
        by: Whether a video has the score of its best window (`moment`) or of the whole `video`.
        allowed: `(V,)`, the videos that count; None for all.
        folded: Whether near-duplicates count as one.
    """
    num_counted = int(vectors.catalog.counted(allowed).sum())
    # One more than there are: a scan that finds fewer rows than it was asked for has found all.
    all_rows = 1 + (vectors.catalog.num_videos if by == "video" else vectors.catalog.num_moments)
    num_rows = min(max(FIRST_ROWS, 4 * k), all_rows)
    while True:
        candidates = _candidates(vectors, query, num_rows, by, allowed)
        if not len(query.negatives) and len(candidates.videos) == num_counted:
            candidates = replace(candidates, bound=-np.inf)  # the best row of each video comes first
        kept = keep_best(vectors, candidates.videos, k, folded)
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


def keep_best(vectors: Vectors, videos: NDArray[np.int64], k: int, folded: bool) -> list[NDArray[np.int64]]:
    """Return the first K videos, each followed by the near-duplicates that are listed under it."""
    if not folded:
        return [videos[position : position + 1] for position in range(min(k, len(videos)))]
    kept = fold_duplicates(
        lambda positions: vectors.embeddings(videos[positions], by="video"), vectors.catalog.durations[videos], k
    )
    return [videos[positions] for positions in kept]


# --- near-duplicates: the same footage again, cut or encoded otherwise


def fold_duplicates(
    embeddings_of: Callable[[NDArray[np.int64]], NDArray[np.float32]], durations: NDArray[np.float64], k: int
) -> list[list[int]]:
    """Keep the first K of n candidates that are not near-duplicates of one kept before.

    Args:
        embeddings_of: Returns the `(m, D)` embeddings of whole videos, L2-normalised, at m positions.
        durations: `(n,)` seconds, the best candidate first; NaN if unknown.
        k: K.

    Returns:
        A list for each kept candidate, best first: its position, then those of its near-duplicates. Candidates far
        behind the K-th are not compared.
    """
    kept: list[list[int]] = []
    kept_embeddings: list[NDArray[np.float32]] = []
    for begin in range(0, len(durations), FOLDED_AT_ONCE):
        if len(kept) == k:
            break
        positions = np.arange(begin, min(begin + FOLDED_AT_ONCE, len(durations)))
        embeddings = embeddings_of(positions)  # (m, D)
        free: NDArray[np.bool_] = np.ones(len(positions), np.bool_)
        if kept:
            firsts = np.array([group[0] for group in kept])
            same = _same(embeddings, np.stack(kept_embeddings), durations[positions], durations[firsts])
            free &= ~same.any(axis=1)
            for local in np.flatnonzero(~free).tolist():
                kept[int(same[local].argmax())].append(begin + local)
        while free.any() and len(kept) < k:
            first = int(free.argmax())
            free[first] = False
            alone = slice(first, first + 1)
            same = _same(embeddings, embeddings[alone], durations[positions], durations[positions[alone]])[:, 0]
            kept.append([begin + first, *positions[free & same].tolist()])
            kept_embeddings.append(embeddings[first])
            free &= ~same
    return kept


def _same(
    embeddings: NDArray[np.float32],
    others: NDArray[np.float32],
    durations: NDArray[np.float64],
    other_durations: NDArray[np.float64],
) -> NDArray[np.bool_]:
    """Return `(m, n)`, which of m candidates are near-duplicates of which of n others."""
    tolerances = np.maximum(SAME_DURATION_SECONDS, SAME_DURATION_SHARE * other_durations)
    # A comparison with NaN is False.
    similar = np.abs(durations[:, None] - other_durations) <= tolerances
    similar |= np.isnan(durations)[:, None] & np.isnan(other_durations)
    same: NDArray[np.bool_] = similar & (cosines(embeddings[:, None], others) >= SAME_COSINE)
    return same
