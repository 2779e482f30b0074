"""Near-duplicates among what a search finds: the same footage again, cut or encoded otherwise."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from svb.retrieve.searching.query import cosines

# MSR-VTT clips that were encoded again in their size came to 0.989 and more with efficientnet-lite0; 0.24 % of the
# clips have another at 0.98 or more, of the same scene.
SAME_COSINE = 0.98
# A copy that was encoded again may have lost or won a few frames.
SAME_DURATION_SECONDS = 1.0
SAME_DURATION_SHARE = 0.05
# Candidates that are compared at once; most often the K that are wanted are among the first.
BLOCK = 256


def fold(
    embeddings_of: Callable[[NDArray[np.int64]], NDArray[np.float32]], durations: NDArray[np.float64], k: int
) -> list[list[int]]:
    """Keep the first K of n candidates that are no near-duplicates of one that is kept already.

    Args:
        embeddings_of: Returns the `(m, D)` embeddings of whole videos, L2-normalised, at m positions.
        durations: `(n,)` seconds, the best candidate first; NaN where not known.
        k: K.

    Returns:
        A list for each one kept, best first: its position, and those of the near-duplicates that it stands for.
        Candidates some way behind the K-th are not looked at.
    """
    kept: list[list[int]] = []
    kept_embeddings: list[NDArray[np.float32]] = []
    for begin in range(0, len(durations), BLOCK):
        if len(kept) == k:
            break
        positions = np.arange(begin, min(begin + BLOCK, len(durations)))
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
