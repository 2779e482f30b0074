"""Approximate search: IVF over float16 moments, for an index whose exact scan would miss the latency budget.

    ivf, note = open_ivf(folder, exact, segments)    # None if search is exact; a note if it had to fall back
    vectors = ivf or exact                           # both are `Vectors`

Its files are a cache, see `svb.retrieve.stored.ivf_file`. The inverted lists only propose rows: scores come
from the segments, deleted videos are left out, and newer segments are scanned exactly. Files that do not fit are
ignored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from svb.errors import SvbError
from svb.retrieve.searching.vectors import Nearest, SegmentVectors, k_best
from svb.retrieve.stored.ivf_file import read_decision, read_ivf
from svb.retrieve.stored.segment import Segment


def open_ivf(
    folder: Path, exact: SegmentVectors, segments: Sequence[Segment]
) -> tuple[IvfVectors | None, str | None]:
    """Return an index's approximate vectors; or None, and the reason if they should have been there.

    Args:
        folder: The index's.
        exact: The vectors of `segments`.
        segments: The segments in the manifest's order.
    """
    try:
        decision = read_decision(folder)
        if decision is None or decision["file"] is None:
            return None, None
        covered = {entry["key"] for entry in decision["segments"]}
        if not covered & {segment.key for segment in segments}:
            return None, "the approximate index is of other segments: search is exact until the next `svb index`"
        return IvfVectors(exact, segments, read_ivf(folder / "cache", decision), decision), None
    except (SvbError, OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        return None, f"the approximate index is damaged ({error}): search is exact until the next `svb index`"


class IvfVectors:
    """`Vectors` that look for the nearest moments in the nearest inverted lists. Threads may share it.

    Args:
        exact: All vectors.
        segments: The index's segments, in the same order.
        index: The inverted lists; never changed.
        decision: The segments that the lists cover, and the tuning.

    Attributes:
        exact_vectors: Compare every row.
    """

    exact = False

    def __init__(
        self,
        exact: SegmentVectors,
        segments: Sequence[Segment],
        index: faiss.IndexIVFScalarQuantizer,
        decision: Mapping[str, Any],
    ) -> None:
        if index.d != exact.catalog.embedding_size:
            raise ValueError(f"embeddings of {index.d} values, not {exact.catalog.embedding_size}")
        self.exact_vectors, self.catalog = exact, exact.catalog
        self.embeddings, self.background = exact.embeddings, exact.background
        self.recall: float | None = min(decision["recall"], decision["recall_videos"])
        self._index, self._nprobe = index, int(decision["nprobe"])
        # Rows that a scan compares within the budget: if a filter leaves no more than these, a scan misses none.
        self._rows_in_budget = decision["rows"] * decision["budget_seconds"] / decision["exact_seconds"]
        self._place(segments, decision["segments"])

    def _place(self, segments: Sequence[Segment], covered: Sequence[Mapping[str, Any]]) -> None:
        """Find where the rows of each covered segment are now, and which videos no list holds."""
        videos = np.cumsum([0, *(segment.num_videos for segment in segments)])
        moments = np.cumsum([0, *(segment.num_moments for segment in segments)])
        number = {segment.key: place for place, segment in enumerate(segments)}
        self._fresh: NDArray[np.bool_] = np.ones(self.catalog.num_videos, np.bool_)
        self._ends = np.cumsum([entry["moments"] for entry in covered])
        self._begins: list[int | None] = []  # global rows; None if the segment is gone
        for entry in covered:
            place = number.get(entry["key"])
            if place is not None and segments[place].num_moments != entry["moments"]:
                raise ValueError(f"segment {entry['key']} has {segments[place].num_moments} moments")
            self._begins.append(None if place is None else int(moments[place]))
            if place is not None:
                self._fresh[videos[place] : videos[place + 1]] = False
        self._shifts = np.array([begin or 0 for begin in self._begins]) - np.concatenate([[0], self._ends[:-1]])
        self._here = np.array([begin is not None for begin in self._begins])
        self._any_fresh = bool(self._fresh.any())
        self._any_lost = not self._here.all() or self.catalog.any_deleted

    def nearest(
        self, embedding: NDArray[np.float32], k: int, *, by: str, allowed: NDArray[np.bool_] | None
    ) -> Nearest:
        """As `Vectors.nearest`; whole videos are few, and are compared exactly."""
        if by == "video":
            return self.exact_vectors.nearest(embedding, k, by=by, allowed=allowed)
        share, bitmap, counted = 1.0, self._live_bitmap if self._any_lost else None, self.catalog.alive
        if allowed is not None:
            counted = self.catalog.counted(allowed)
            rows = int(self.catalog.moment_counts[counted].sum())
            if rows <= self._rows_in_budget:
                return self.exact_vectors.nearest(embedding, k, by=by, allowed=allowed)
            share, bitmap = rows / self.catalog.num_moments, self._bitmap(counted)
        # If a filter leaves a third of the rows, the ten nearest of them are in three times as many lists.
        nprobe = math.ceil(max(self._nprobe, 2 * k * self._index.nlist / self._index.ntotal) / share)
        proposed = self._proposed(embedding, k, nprobe, bitmap, counted)
        if self._any_fresh:
            fresh = self._fresh if allowed is None else self._fresh & allowed
            proposed = np.concatenate([proposed, self.exact_vectors.nearest(embedding, k, by=by, allowed=fresh)[1]])
        if len(proposed) < k:  # too few lists were probed, or the file is damaged
            return self.exact_vectors.nearest(embedding, k, by=by, allowed=allowed)
        scores = self.embeddings(proposed, by=by) @ embedding
        return k_best([(scores, proposed)], k)

    def _proposed(
        self,
        embedding: NDArray[np.float32],
        k: int,
        nprobe: int,
        bitmap: NDArray[np.uint8] | None,
        counted: NDArray[np.bool_],
    ) -> NDArray[np.int64]:
        """Return the global rows of the k nearest moments in the lists."""
        selector = None if bitmap is None else faiss.IDSelectorBitmap(bitmap)
        params = faiss.SearchParametersIVF(nprobe=min(nprobe, self._index.nlist), sel=selector)
        _, found = self._index.search(embedding[None], min(k, self._index.ntotal), params=params)
        ids = found[0][(found[0] >= 0) & (found[0] < self._index.ntotal)]
        place = np.searchsorted(self._ends, ids, side="right")
        rows = np.unique((ids + self._shifts[place])[self._here[place]])
        # A flipped bit may have changed a row's number: keep only rows that count.
        return rows[counted[self.catalog.videos_of(rows)]]

    @cached_property
    def _live_bitmap(self) -> NDArray[np.uint8]:
        return self._bitmap(self.catalog.alive)

    def _bitmap(self, videos: NDArray[np.bool_]) -> NDArray[np.uint8]:
        """Return which rows of the lists belong to some `(V,)` videos, a bit a row."""
        moments = np.repeat(videos, self.catalog.moment_counts)
        sizes = np.diff(self._ends, prepend=0)
        covered = [
            np.zeros(size, np.bool_) if begin is None else moments[begin : begin + size]
            for begin, size in zip(self._begins, sizes, strict=True)
        ]
        return np.packbits(np.concatenate(covered), bitorder="little")
