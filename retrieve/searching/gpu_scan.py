"""Exact scans on a GPU, through FAISS.

The tests run this against stand-ins: it has not been run on a GPU.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

# FAISS finds no more on a GPU at a time.
MAX_K = 2048
# Copying all rows to the GPU costs about as much as so many scans on the CPU: a single query is better off there.
FIRST_QUERIES = 32
BLOCK = 65536


class GpuScan:
    """Scans rows on the first GPU once enough was asked; says None wherever the CPU must do it.

    Float32 takes twice the memory of the rows, and gives the CPU's scores; FAISS's float16 would round them.

    Args:
        arrays: `(N, D)` float16 each, numbered through.

    Attributes:
        is_usable: Whether there is a GPU, which has not run out of memory yet.
    """

    def __init__(self, arrays: Sequence[NDArray[np.float16]]) -> None:
        self._arrays = arrays
        self._lock = threading.Lock()  # FAISS's GPU indexes may not be searched by two threads at once
        self._queries = 0
        self._index: Any = None
        self._is_filling = False
        self.is_usable = _num_gpus() > 0 and any(len(rows) for rows in arrays)

    def nearest(
        self, embedding: NDArray[np.float32], k: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]] | None:
        """Return the scores and numbers of the k rows with the highest inner product, best first."""
        if not self.is_usable or k > MAX_K or not self._is_ready():
            return None
        try:
            with self._lock:
                if self._index is None:
                    return None
                scores, rows = self._index.search(embedding[None], min(k, self._index.ntotal))
        except RuntimeError:
            self._give_up()
            return None
        order = np.lexsort((rows[0], -scores[0]))
        return scores[0][order], rows[0][order]

    def _is_ready(self) -> bool:
        """Tell whether the GPU has the rows; the first query that finds it worth while fills it, others go on."""
        with self._lock:
            self._queries += 1
            if self._queries <= FIRST_QUERIES or self._is_filling:
                return False
            if self._index is not None:
                return True
            self._is_filling = True
        try:
            self._index = self._copy()
        except RuntimeError:  # above all: not enough memory
            self._give_up()
        finally:
            self._is_filling = False
        return self.is_usable

    def _give_up(self) -> None:
        with self._lock:
            self.is_usable, self._index = False, None

    def _copy(self) -> Any:
        self._resources = faiss.StandardGpuResources()  # must outlive the index
        index = faiss.GpuIndexFlatIP(self._resources, self._arrays[0].shape[1])
        for rows in self._arrays:
            for begin in range(0, len(rows), BLOCK):
                index.add(np.ascontiguousarray(rows[begin : begin + BLOCK], np.float32))
        return index


def _num_gpus() -> int:
    return int(faiss.get_num_gpus()) if hasattr(faiss, "StandardGpuResources") else 0
