"""Hubs at search: a query's candidates reordered by QB-Norm, with what `svb index` found out about them.

hubs/<key>/, a part for each segment of V videos, made by `svb.retrieve.indexing.make_hubs` with a bank of Q
captions; <by> is `moment` or `video`, what a video's score is:

<by>_log_sums.npy       (V,) float64, log of the sum over the bank of exp(scale * score)
<by>_best_scores.npy    (Q,) float32, the best score of each caption of the bank in this segment, -1 for none
<by>_best_rows.npy      (N, 2) int64, caption and row of every live video that has its best score

A caption of the bank says nothing about its own video: with it, videos that were trained on would be pushed back.

How a search uses it (rows are global video rows, scores are cosines):

    hubs = Hubs.open(folder, manifest)                 # None where the index has none
    if hubs is not None and (asked_for or hubs.helps(by)):
        keys = hubs.reorder(scores, rows, by)          # (n,) sort by these, downwards; scores stay what is shown
        rivals = hubs.rivals(scores[-1], kth_key, by)  # (V,) bool: which could still come before the K-th, unseen
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svb.errors import StoreError
from svb.retrieve.measure.hub_normalisation import QueryBank, qb_norm
from svb.retrieve.stored.segment import require_sizes

# The least that a cosine can be: what a caption of the bank counts for with its own video.
LOWEST = -1.0


@dataclass(frozen=True)
class SegmentHubs:
    """What a bank says about a segment's videos, for one way of ranking; see the layout above."""

    log_sums: NDArray[np.float64]
    best_scores: NDArray[np.float32]
    best_rows: NDArray[np.int64]


class Hubs:
    """What the bank says about all videos of an index; nothing is read before it is needed.

    Args:
        folder: The index's.
        manifest: Its manifest, with `hubs` and `normalise`.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self._folder = folder
        self._normalise: Mapping[str, Any] = manifest["normalise"]
        of_segment = {entry["segment"]: entry for entry in manifest["hubs"]}
        self._entries = [of_segment[segment["key"]] for segment in manifest["segments"]]

    @classmethod
    def open(cls, folder: Path, manifest: Mapping[str, Any]) -> Hubs | None:
        """Return an index's hubs; None where it has none, or not of every segment."""
        known = {entry["segment"] for entry in manifest["hubs"]}
        wanted = {segment["key"] for segment in manifest["segments"]}
        if manifest["normalise"] is None or not wanted or not wanted <= known:
            return None
        return cls(folder, manifest)

    def helps(self, by: str) -> bool:
        """Tell whether captions of the val split found their videos better with it, beyond chance."""
        return bool(self._normalise["by"][by]["helps"])

    def finds_hub(self, scores: NDArray[np.floating], rows: NDArray[np.integer], by: str) -> bool:
        """Tell whether the best of a query's candidates is a hub: only then is the order another."""
        best = rows[scores == scores.max()] if len(scores) else rows
        return bool(self._bank(by).is_hub[best].any())

    def reorder(self, scores: NDArray[np.floating], rows: NDArray[np.integer], by: str) -> NDArray[np.float64]:
        """Return the keys by which a query's candidates are ordered, the highest first.

        Args:
            scores: `(n,)` of the query with each candidate, the best video of all among them.
            rows: `(n,)` global video rows.
            by: What the scores are of, `moment` or `video`.

        Returns:
            `(n,)` comparable within this query alone.

        Raises:
            StoreError: The files are damaged.
        """
        if not len(scores):
            return np.empty(0)
        bank = self._bank(by)
        keys: NDArray[np.float64] = qb_norm(
            scores[None], QueryBank(bank.log_sums[rows], bank.is_hub[rows], bank.scale)
        )[0]
        return keys

    def rivals(self, score: float, key: float, by: str) -> NDArray[np.bool_]:
        """Return which videos could have a key above `key` although their score is at most `score`.

        Only of a query that finds a hub; the order of another is that of its scores. A search that has seen
        all videos above `score` is complete once it has seen these too.

        Returns:
            `(V,)` by global video row.
        """
        bank = self._bank(by)
        rivals: NDArray[np.bool_] = bank.scale * float(score) - bank.log_sums > key
        return rivals

    def _bank(self, by: str) -> QueryBank:
        return self._moment_bank if by == "moment" else self._video_bank

    # Two threads that come first may both read it, to the same end.
    @cached_property
    def _moment_bank(self) -> QueryBank:
        return self._read("moment")

    @cached_property
    def _video_bank(self) -> QueryBank:
        return self._read("video")

    def _read(self, by: str) -> QueryBank:
        return combine([read_hubs(self._folder, entry, by) for entry in self._entries], self._normalise["scale"])


def combine(segments: list[SegmentHubs], scale: float) -> QueryBank:
    """Return what a bank says about all videos, from what it says about each segment's.

    Args:
        segments: In the order in which their videos are numbered through.
        scale: The inverse temperature.
    """
    sizes = [len(segment.log_sums) for segment in segments]
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    best = np.max([segment.best_scores for segment in segments], axis=0)  # (Q,)
    is_hub = np.zeros(starts[-1], bool)
    for start, segment in zip(starts[:-1], segments, strict=True):
        captions, rows = segment.best_rows.T
        is_hub[start + rows[segment.best_scores[captions] == best[captions]]] = True
    return QueryBank(np.concatenate([segment.log_sums for segment in segments]), is_hub, scale)


def read_hubs(folder: Path, entry: Mapping[str, Any], by: str) -> SegmentHubs:
    """Read a part.

    Raises:
        StoreError: A file is missing or damaged.
    """
    path = folder / "hubs" / entry["key"]
    try:
        require_sizes(path, entry["sizes"])
        names = ("log_sums", "best_scores", "best_rows")
        return SegmentHubs(*(np.load(path / f"{by}_{name}.npy", allow_pickle=False) for name in names))
    except (OSError, ValueError, EOFError) as error:
        raise StoreError(
            f"{path} is damaged ({error}) - search with `--normalise off`, or make the index again with "
            "`svb index --rebuild`"
        ) from error
