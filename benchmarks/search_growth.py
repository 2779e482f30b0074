"""What opening and asking one index takes: `python benchmarks/search_growth.py INDEX ROUNDS`."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from svb.retrieve.answer import SearchRequest
from svb.retrieve.search import Searcher

QUERIES = 10


def main() -> None:
    index, rounds = Path(sys.argv[1]), int(sys.argv[2])
    before = resident_mib()
    opening_ms = [1000 * seconds(lambda: Searcher(index)) for _ in range(rounds)]
    searcher = Searcher(index)
    size = searcher.catalog.embedding_size
    queries = np.random.default_rng(1).standard_normal((QUERIES, size)).astype(np.float32)
    request = SearchRequest(text="(given as a vector)")
    for query in queries:  # the first reads the vectors into memory
        searcher.search_embedding(query, request)
    memory_mib = resident_mib() - before
    files = sorted(index.glob("segments/*/moment_embeddings.npy"))
    arrays = [np.load(path, mmap_mode="r").view(np.uint64).reshape(-1) for path in files]
    query_ms, reading_ms = [], []
    for number in range(rounds):  # in turn, so that what else the machine does meets both
        ask = partial(searcher.search_embedding, queries[number % QUERIES], request)
        query_ms.append(1000 * seconds(ask))
        reading_ms.append(1000 * seconds(lambda: read(arrays)))
    measured = {
        "moments": searcher.catalog.num_moments,
        "vectors_mib": sum(array.nbytes for array in arrays) / 2**20,
        "opening_ms": opening_ms,
        "memory_mib": memory_mib,
        "query_ms": query_ms,
        "reading_ms": reading_ms,
    }
    print(json.dumps(measured))


def read(arrays: list[NDArray[np.uint64]]) -> None:
    """Read every byte once, on all cores; nothing that numpy has is faster than xor."""
    pieces = [piece for array in arrays for piece in np.array_split(array, 4 * (os.cpu_count() or 1))]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(np.bitwise_xor.reduce, pieces))


def seconds(work: object) -> float:
    assert callable(work)
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def resident_mib() -> float:
    found = re.search(r"^VmRSS:\s+(\d+) kB$", Path("/proc/self/status").read_text("ascii"), re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1024


if __name__ == "__main__":
    main()
