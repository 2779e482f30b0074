"""How long one query takes on this machine."""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from svb.retrieve.searching.vectors import Vectors

# As many as a search asks for first: videos have several moments among the nearest.
K = 256
ROUNDS = 5
# A scan that takes longer than this needs no second look.
ENOUGH_SECONDS = 3.0


def seconds_a_query(vectors: Vectors, queries: NDArray[np.float32]) -> float:
    """Return how long the nearest moments of one query take, on average over some queries.

    Of each query the best of a few rounds counts, after one that brings the rows into memory: other work on the
    machine makes a scan slower, and nothing makes it faster.

    Args:
        vectors: To be searched.
        queries: `(Q, D)`, at least one.
    """
    vectors.nearest(queries[0], K, by="moment", allowed=None)
    rounds: list[list[float]] = []
    begin = time.perf_counter()
    while len(rounds) < ROUNDS and (not rounds or time.perf_counter() - begin < ENOUGH_SECONDS):
        rounds.append([_seconds(vectors, query) for query in queries])
    return float(np.min(rounds, axis=0).mean())


def _seconds(vectors: Vectors, query: NDArray[np.float32]) -> float:
    begin = time.perf_counter()
    vectors.nearest(query, K, by="moment", allowed=None)
    return time.perf_counter() - begin
