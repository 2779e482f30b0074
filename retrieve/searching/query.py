"""A query as vectors: what a video should be like, and what it should not."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from svb.errors import StoreError
from svb.retrieve.searching.vectors import Vectors

# Rows that are taken as float32 at once.
BLOCK = 16384
# Embeddings are of unit length, but for float16.
MAX_COSINE = 1.01
WAY_OUT = "find it with `svb verify` and restore it, or make the index again with `svb index --rebuild`"


@dataclass(frozen=True)
class Query:
    """Scores rows by cosines.

    Wanted texts count by the mean of their cosines. An unwanted one takes off by how much more a row is like it
    than rows are as a rule; it never adds, so that a negative cannot turn into a wish for its contrary.

    Attributes:
        positive: `(D,)`, the mean of the wanted embeddings: a row's product with it is the mean of the cosines.
        negatives: `(N, D)`, the unwanted embeddings.
        floors: `(N,)`, what score with each is usual: the median over the background.
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
        """Return by how much the unwanted lowers the scores of `(n, D)` rows, at least 0."""
        excess: NDArray[np.float32] = np.maximum(cosines(rows[:, None], self.negatives) - self.floors, 0).sum(
            axis=1
        )
        return excess


def cosines(rows: NDArray[np.float32], others: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the products of `(..., D)` rows with others, broadcast against each other.

    Row by row: the threads of a matrix product would cost a query more than they save, and take turns with those
    of other queries; and equal rows score the same wherever they stand.
    """
    products: NDArray[np.float32] = np.vecdot(rows, others)
    return products


def require_cosines(scores: NDArray[np.float32]) -> None:
    """Refuse scores that rows of unit length cannot have: a byte has flipped, which files' sizes do not tell.

    Raises:
        StoreError: There is one.
    """
    bad = scores[~(np.abs(scores) <= MAX_COSINE)]
    if bad.size:
        raise StoreError(
            f"the index holds a damaged embedding, whose cosine with the query is {float(bad[0]):g} - {WAY_OUT}"
        )


def require_unit_length(rows: NDArray[np.float32]) -> None:
    """Refuse `(n, D)` rows that are not of unit length, but for float16; as `require_cosines`."""
    lengths = np.sqrt(cosines(rows, rows))
    bad = lengths[~(np.abs(lengths - 1) <= MAX_COSINE - 1)]
    if bad.size:
        raise StoreError(
            f"the index holds a damaged embedding, of length {float(bad[0]):g} instead of 1 - {WAY_OUT}"
        )


@dataclass(frozen=True)
class Wish:
    """All that is asked for, embedded: each `(D,)` float32, L2-normalised.

    Attributes:
        main: The query itself.
        plus: What shall fit as well.
        without: What shall not fit.
    """

    main: NDArray[np.float32]
    plus: tuple[NDArray[np.float32], ...] = ()
    without: tuple[NDArray[np.float32], ...] = ()

    def query(self, vectors: Vectors, by: str) -> Query:
        """Return the query for rows that are moments or videos."""
        positive = np.stack([self.main, *self.plus]).mean(axis=0)
        if not self.without:
            return Query(positive, np.empty((0, len(positive)), np.float32), np.empty(0, np.float32))
        negatives = np.stack(self.without)
        return Query(positive, negatives, np.median(cosines(vectors.background(by)[:, None], negatives), axis=0))
