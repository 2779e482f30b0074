"""The vectors of an index: what a search asks of them, and exact scans of its segments and caption pools."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from svb.retrieve.answer import CaptionResult
from svb.retrieve.searching.catalog import Catalog
from svb.retrieve.searching.scan import GpuScan, Piece, cut_into_pieces, scan
from svb.retrieve.stored.pools import Pool, open_pool
from svb.retrieve.stored.segment import Segment

Nearest = tuple[NDArray[np.float32], NDArray[np.int64]]


class Vectors(Protocol):
    """The embeddings of a catalog's videos and moments, wherever they lie.

    Attributes:
        catalog: What the rows are.
        exact: Whether `nearest` compares every row.
        recall: If it does not, the measured share of the ten nearest that it finds.
    """

    @property
    def catalog(self) -> Catalog: ...
    @property
    def exact(self) -> bool: ...
    @property
    def recall(self) -> float | None: ...

    def nearest(
        self, embedding: NDArray[np.float32], k: int, *, by: str, allowed: NDArray[np.bool_] | None
    ) -> Nearest:
        """Return the scores and rows of the k nearest, best first; fewer if there are fewer.

        Args:
            embedding: `(D,)`.
            k: How many.
            by: `moment` or `video`: what the rows are.
            allowed: `(V,)`, the videos that count; None for all. Deleted videos never count.
        """
        ...

    def embeddings(self, rows: NDArray[np.int64], *, by: str) -> NDArray[np.float32]:
        """Return `(n, D)` float32."""
        ...

    def background(self, by: str) -> NDArray[np.float32]:
        """Return `(n, D)` of the catalog's `sample_rows`."""
        ...


class SegmentVectors:
    """`Vectors` of segments on this machine; nothing is read before it is needed. Threads may share it.

    Args:
        segments: In the order of the manifest.
    """

    exact = True
    recall: float | None = None

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.catalog = Catalog(segments)
        self._lock = threading.Lock()
        self._backgrounds: dict[str, NDArray[np.float32]] = {}
        self._gpu_scans = {
            "moment": GpuScan([segment.moment_embeddings for segment in segments]),
            "video": GpuScan([segment.video_embeddings for segment in segments]),
        }

    def nearest(
        self, embedding: NDArray[np.float32], k: int, *, by: str, allowed: NDArray[np.bool_] | None
    ) -> Nearest:
        """As `Vectors.nearest`."""
        catalog = self.catalog
        if allowed is None and (found := self._nearest_by_gpu(embedding, k, by)) is not None:
            return found
        if catalog.any_deleted:
            allowed = catalog.counted(allowed)
        if by == "moment":
            selected = None if allowed is None else np.repeat(allowed, catalog.moment_counts)
            return scan(self._moment_pieces, embedding, k, selected)
        return scan(self._video_pieces, embedding, k, allowed)

    def _nearest_by_gpu(self, embedding: NDArray[np.float32], k: int, by: str) -> Nearest | None:
        """Return what a GPU finds; it holds deleted rows too, so it is asked for that many more."""
        catalog = self.catalog
        if not catalog.any_deleted or not self._gpu_scans[by].is_usable:
            return self._gpu_scans[by].nearest(embedding, k)
        gone, of_moments = ~catalog.alive, by == "moment"
        num_gone = int(catalog.moment_counts[gone].sum() if of_moments else gone.sum())
        found = self._gpu_scans[by].nearest(embedding, k + num_gone)
        if found is None:
            return None
        scores, rows = found
        kept = catalog.alive[catalog.videos_of(rows) if of_moments else rows]
        return scores[kept][:k], rows[kept][:k]

    def embeddings(self, rows: NDArray[np.int64], *, by: str) -> NDArray[np.float32]:
        """As `Vectors.embeddings`."""
        found = np.empty((len(rows), self.catalog.embedding_size), np.float32)
        for segment, mine, local in self.catalog.in_segments(rows, by=by):
            found[mine] = getattr(segment, f"{by}_embeddings")[local]
        return found

    def background(self, by: str) -> NDArray[np.float32]:
        """As `Vectors.background`."""
        with self._lock:
            if by not in self._backgrounds:
                self._backgrounds[by] = self.embeddings(self.catalog.sample_rows(by), by=by)
            return self._backgrounds[by]

    @cached_property
    def _moment_pieces(self) -> list[Piece]:
        arrays = [segment.moment_embeddings for segment in self.catalog.segments]
        return _pieces(arrays, self.catalog.moment_begins)

    @cached_property
    def _video_pieces(self) -> list[Piece]:
        arrays = [segment.video_embeddings for segment in self.catalog.segments]
        return _pieces(arrays, self.catalog.video_begins)


def _pieces(arrays: Sequence[NDArray[np.float16]], begins: NDArray[np.int64]) -> list[Piece]:
    return [
        piece
        for array, begin in zip(arrays, begins[:-1].tolist(), strict=True)
        for piece in cut_into_pieces(array, begin)
    ]


class CaptionPools:
    """All pools of an index; opened with the first question. Threads may share it.

    Args:
        folder: The index's.
        manifest: As `svb.retrieve.stored.manifest.read_manifest` gives it.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self._folder = folder
        self._entries: Sequence[Mapping[str, Any]] = manifest["captions"]
        self._lock = threading.Lock()
        self._opened: list[tuple[Pool, list[Piece]]] | None = None

    def __len__(self) -> int:
        """Return the number of captions."""
        return sum(int(entry["captions"]) for entry in self._entries)

    def nearest(self, embedding: NDArray[np.float32], k: int) -> list[CaptionResult]:
        """Return the k captions with the highest cosine similarity, best first; fewer if there are fewer.

        Captions that differ only in case and spaces appear once.

        Args:
            embedding: `(D,)`, L2-normalised.
            k: How many.

        Raises:
            StoreError: A pool is damaged.
        """
        opened, wanted = self._open(), k
        pieces = [piece for _, of_pool in opened for piece in of_pool]
        while k > 0 and pieces:
            scores, rows = scan(pieces, embedding, wanted, None)
            distinct: dict[str, CaptionResult] = {}
            for score, row in zip(scores.tolist(), rows.tolist(), strict=True):
                pool, begin = _pool_of(opened, row)
                caption = " ".join(pool.captions[row - begin].casefold().split())
                if caption not in distinct:
                    distinct[caption] = _result(pool, row - begin, len(distinct) + 1, score)
            if len(distinct) >= k or len(rows) < wanted:
                return list(distinct.values())[:k]
            wanted *= 4  # most of them were alike
        return []

    def _open(self) -> list[tuple[Pool, list[Piece]]]:
        with self._lock:
            if self._opened is None:
                pools = [open_pool(self._folder, entry) for entry in self._entries]
                begins = np.cumsum([0, *map(len, pools)]).tolist()
                pieces = [
                    cut_into_pieces(pool.embeddings, begin) for pool, begin in zip(pools, begins, strict=False)
                ]
                self._opened = list(zip(pools, pieces, strict=True))
            return self._opened


def _pool_of(opened: Sequence[tuple[Pool, list[Piece]]], row: int) -> tuple[Pool, int]:
    """Return the pool that a row lies in, and the row that is its first."""
    return next(
        (pool, of_pool[0].begin) for pool, of_pool in reversed(opened) if of_pool and of_pool[0].begin <= row
    )


def _result(pool: Pool, row: int, rank: int, score: float) -> CaptionResult:
    begin, end = (None if np.isnan(edge) else float(edge) for edge in pool.seconds[row])
    return CaptionResult(rank, score, pool.captions[row], pool.name, pool.video_ids[row], begin, end)
