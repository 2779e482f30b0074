"""The vectors of an index: what a search asks of them, and exact scans of its segments and caption pools.

On the CPU, FAISS reads float16 rows in place, so a mapped file is never copied. The GPU's half has only been
tested with mocks, on machines without a GPU.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import faiss
import numpy as np
from numpy.typing import NDArray

from svb.retrieve.answer import CaptionResult
from svb.retrieve.searching.catalog import Catalog
from svb.retrieve.stored.pools import Pool, open_pool
from svb.retrieve.stored.segment import Segment

Nearest = tuple[NDArray[np.float32], NDArray[np.int64]]


class Vectors(Protocol):
    """The embeddings of a catalog's videos and moments, in files or on a server.

    Attributes:
        catalog: The videos and moments of the rows.
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
            by: `moment` or `video`, the kind of rows.
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
        segments: The segments in the order of the manifest.
        device: Device that scans after many searches; `auto` takes the first GPU that FAISS can use, if any.
    """

    exact = True
    recall: float | None = None

    def __init__(self, segments: Sequence[Segment], device: str = "cpu") -> None:
        self.catalog = Catalog(segments)
        self._lock = threading.Lock()
        self._backgrounds: dict[str, NDArray[np.float32]] = {}
        self._gpu_scans = {
            by: GpuScan([getattr(segment, f"{by}_embeddings") for segment in segments], device)
            for by in ("moment", "video")
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
        return self._pieces("moment", self.catalog.moment_begins)

    @cached_property
    def _video_pieces(self) -> list[Piece]:
        return self._pieces("video", self.catalog.video_begins)

    def _pieces(self, by: str, begins: NDArray[np.int64]) -> list[Piece]:
        arrays = [getattr(segment, f"{by}_embeddings") for segment in self.catalog.segments]
        parts = zip(arrays, begins[:-1].tolist(), strict=True)
        return [piece for array, begin in parts for piece in cut_into_pieces(array, begin)]


class CaptionPools:
    """All pools of an index, opened with the first query. Threads may share it.

    Args:
        folder: The index's folder.
        manifest: The index's manifest.
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
                cut = [cut_into_pieces(pool.embeddings, begin) for pool, begin in zip(pools, begins, strict=False)]
                self._opened = list(zip(pools, cut, strict=True))
            return self._opened


def _pool_of(opened: Sequence[tuple[Pool, list[Piece]]], row: int) -> tuple[Pool, int]:
    """Return the pool that holds a row, and the pool's first row."""
    return next(
        (pool, of_pool[0].begin) for pool, of_pool in reversed(opened) if of_pool and of_pool[0].begin <= row
    )


def _result(pool: Pool, row: int, rank: int, score: float) -> CaptionResult:
    begin, end = (None if np.isnan(edge) else float(edge) for edge in pool.seconds[row])
    return CaptionResult(rank, score, pool.captions[row], pool.name, pool.video_ids[row], begin, end)


# --- scans through FAISS


# One thread scans this much at a time, in about 2.5 ms: fewer bytes are not worth the hand-over.
PIECE_BYTES = 64 << 20
BLOCK = 65536
# The most that FAISS finds on a GPU at a time.
MAX_K = 2048
# Copying all rows to the GPU costs about as much as this many scans on the CPU.
FIRST_QUERIES = 32
# Size of one index on the GPU, as float32. FAISS adds so many rows in one piece; with a second piece it would move
# the first one, and so hold all rows twice.
GPU_PIECE_BYTES = 255 << 20
# Memory that FAISS may take besides the rows; by default it takes 1.5 GB.
GPU_SCRATCH_BYTES = 128 << 20


@dataclass(frozen=True)
class Piece:
    """Neighbouring rows that one thread scans.

    Attributes:
        begin: The number of its first row among all rows of the scan.
        rows: `(N, D)` float16, contiguous; `index` points into it.
        index: FAISS's view of it.
    """

    begin: int
    rows: NDArray[np.float16]
    index: faiss.Index


def cut_into_pieces(rows: NDArray[np.float16], begin: int) -> list[Piece]:
    """Prepare a scan of `(N, D)` rows, the first of which has the number `begin`; read none of them yet."""
    num_pieces = max(1, -(-rows.nbytes // PIECE_BYTES)) if len(rows) else 0
    edges = [len(rows) * piece // num_pieces for piece in range(num_pieces + 1)] if num_pieces else []
    return [
        Piece(begin + first, part := np.ascontiguousarray(rows[first:end]), _view(part))
        for first, end in pairwise(edges)
    ]


def scan(
    pieces: Sequence[Piece], embedding: NDArray[np.float32], k: int, selected: NDArray[np.bool_] | None
) -> Nearest:
    """Return the scores and numbers of the k rows with the highest inner product, best first.

    All scans of a process share as many threads as it has cores, however many queries run at once.

    Args:
        pieces: The rows, in order.
        embedding: `(D,)`.
        k: How many; fewer if there are fewer rows.
        selected: `(N,)`, whether each row counts; None for all.
    """
    masks = [None if selected is None else selected[p.begin : p.begin + len(p.rows)] for p in pieces]
    jobs = [
        _threads(os.getpid()).submit(_scan_piece, piece, embedding, k, mask)
        for piece, mask in zip(pieces, masks, strict=True)
        if mask is None or mask.any()
    ]
    found = [job.result() for job in jobs]
    return k_best(found, k)


def k_best(parts: Sequence[Nearest], k: int) -> Nearest:
    """Return the scores and rows of the k best of some parts, best first; of equal scores the lower rows."""
    if not parts:
        return np.empty(0, np.float32), np.empty(0, np.int64)
    scores, rows = (np.concatenate(side) for side in zip(*parts, strict=True))
    order = np.lexsort((rows, -scores))[:k]
    return scores[order], rows[order]


def _scan_piece(piece: Piece, embedding: NDArray[np.float32], k: int, mask: NDArray[np.bool_] | None) -> Nearest:
    params = None
    if mask is not None and not mask.all():  # a selector costs half as much again as the scan
        params = faiss.SearchParameters(sel=faiss.IDSelectorBitmap(np.packbits(mask, bitorder="little")))
    scores, rows = piece.index.search(embedding[None], min(k, len(piece.rows)), params=params)
    held = rows[0] >= 0
    return scores[0][held], rows[0][held] + piece.begin


@functools.cache
def _threads(process: int) -> ThreadPoolExecutor:
    """Return the process's threads; a forked process has none of its parent's and makes its own."""
    cores = len(os.sched_getaffinity(process)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # One thread for each piece: OpenMP's own threads would compete with the pool's.
    return ThreadPoolExecutor(cores, "scan", initializer=faiss.omp_set_num_threads, initargs=(1,))


def _view(rows: NDArray[np.float16]) -> faiss.Index:
    """Return an exact inner-product index over rows that are not copied, and must outlive it.

    A FAISS that cannot use foreign memory copies them.
    """
    index = faiss.IndexScalarQuantizer(rows.shape[1], faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
    if not hasattr(faiss, "MaybeOwnedVectorUInt8"):
        for begin in range(0, len(rows), BLOCK):
            index.add(np.ascontiguousarray(rows[begin : begin + BLOCK], np.float32))
        return index
    pointer = faiss.swig_ptr(rows.view(np.uint8).reshape(-1))
    # The empty index's owner means nobody: Python keeps the rows alive, so FAISS need not.
    index.codes = faiss.MaybeOwnedVectorUInt8.create_view(pointer, rows.nbytes, index.codes.owner)
    index.ntotal = len(rows)
    return index


class GpuScan:
    """Scans rows on a GPU after enough queries; returns None when the CPU must do it.

    Before, it does not even look for a GPU, which takes longer than a search. Float32 takes twice
    the memory of the rows, and gives the CPU's scores; FAISS's float16 would round them.

    Args:
        arrays: `(N, D)` float16 each, numbered through.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.

    Attributes:
        is_usable: False once it is known that no GPU can be used, or that its memory is too small.
    """

    def __init__(self, arrays: Sequence[NDArray[np.float16]], device: str = "auto") -> None:
        self._arrays = arrays
        self._lock = threading.Lock()  # FAISS's GPU indexes may not be searched by two threads at once
        self._queries = 0
        self._pieces: list[Any] = []
        self._resources: Any = None
        self._is_filling = False
        kind, _, number = device.partition(":")
        self._gpu = int(number) if number.isdecimal() else 0
        self.is_usable = kind in ("auto", "cuda") and any(len(rows) for rows in arrays)

    def nearest(self, embedding: NDArray[np.float32], k: int) -> Nearest | None:
        """Return the scores and numbers of the k rows with the highest inner product, best first."""
        if not self.is_usable or k > MAX_K or not self._is_ready():
            return None
        try:
            found, begin = [], 0
            with self._lock:
                if not self._pieces:
                    return None
                for piece in self._pieces:
                    scores, rows = piece.search(embedding[None], min(k, piece.ntotal))
                    found.append((scores[0], rows[0] + begin))
                    begin += piece.ntotal
        except RuntimeError:
            self._give_up()
            return None
        return k_best(found, k)

    def _is_ready(self) -> bool:
        """Tell whether the GPU has the rows; the first query that makes copying worthwhile copies them."""
        with self._lock:
            self._queries += 1
            if self._queries <= FIRST_QUERIES or self._is_filling:
                return False
            if self._pieces:
                return True
            self._is_filling = True
        try:
            if self._gpu >= _num_gpus():
                self._give_up()
            else:
                self._pieces = self._copy()
        except RuntimeError:  # above all: not enough memory
            self._give_up()
        finally:
            self._is_filling = False
        return self.is_usable

    def _give_up(self) -> None:
        with self._lock:
            self.is_usable, self._pieces, self._resources = False, [], None

    def _copy(self) -> list[Any]:
        size = self._arrays[0].shape[1]
        self._resources = faiss.StandardGpuResources()  # must outlive the pieces
        self._resources.setTempMemory(GPU_SCRATCH_BYTES)
        config = faiss.GpuIndexFlatConfig()
        config.device = self._gpu
        step = max(1, GPU_PIECE_BYTES // (4 * size))
        ends, pieces = np.cumsum([len(rows) for rows in self._arrays]), []
        for begin in range(0, int(ends[-1]), step):
            parts = [
                rows[max(0, begin - end + len(rows)) : max(0, begin + step - end + len(rows))]
                for rows, end in zip(self._arrays, ends.tolist(), strict=True)
            ]
            pieces.append(faiss.GpuIndexFlatIP(self._resources, size, config))
            pieces[-1].add(np.concatenate(parts, dtype=np.float32))
        return pieces


def _num_gpus() -> int:
    return int(faiss.get_num_gpus()) if hasattr(faiss, "StandardGpuResources") else 0
