"""What does an index's size cost? `python benchmarks/search_growth.py --windows 10000,100000,1000000`.

Opening, memory beside the vectors' size, and a query's time beside that of only reading the vectors, which no exact
search can beat; each index is asked in a process of its own. 1 million windows take 1 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import shared

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SIZE, ROWS_A_VIDEO, SEGMENT_ROWS, QUERIES = 512, 20, 1_000_000, 10


def measure(folder: Path, options: argparse.Namespace) -> tuple[list[dict[str, Any]], str]:
    """Return numbers by size of index, and a table."""
    rows = []
    for num_windows in map(int, options.windows.split(",")):
        index = write_index(folder / f"index{num_windows}", num_windows)
        rows.append(shared.run_child("search_growth.py", "--ask", index, options.rounds))
        shutil.rmtree(index)
    titles = ["windows", "vectors, MiB", "opening, ms", "memory after 10 queries, MiB", "of the vectors'"]
    titles += ["a query, ms", "only reading the vectors, ms", "query / reading"]
    lines = []
    for row in rows:
        lines.append([f"{row['windows']:,}", f"{row['vectors_mib']:,.0f}", shared.spread(row["opening_ms"])])
        lines[-1] += [f"{row['memory_mib']:,.0f}", f"{row['memory_mib'] / row['vectors_mib']:.2f}"]
        lines[-1] += [shared.spread(row["query_ms"]), shared.spread(row["reading_ms"])]
        lines[-1].append(f"{median(row['query_ms']) / median(row['reading_ms']):.2f}")
    return rows, shared.table(titles, lines)


def ask(index: Path, rounds: int) -> dict[str, Any]:
    """Open an index and ask it in turn with only reading its vectors."""
    import numpy as np

    from svb.retrieve.answer import SearchRequest
    from svb.retrieve.search import Searcher

    before = shared.memory_mib("VmRSS")
    opening_ms = [milliseconds(lambda: Searcher(index)) for _ in range(rounds)]
    searcher, request = Searcher(index), SearchRequest(text="(given as a vector)")
    queries = np.random.default_rng(1).standard_normal((QUERIES, SIZE)).astype(np.float32)
    for query in queries:  # the first reads the vectors into memory
        searcher.search_embedding(query, request)
    memory_mib = shared.memory_mib("VmRSS") - before
    files = sorted(index.glob("segments/*/moment_embeddings.npy"))
    arrays = [np.load(path, mmap_mode="r").view(np.uint64).reshape(-1) for path in files]
    query_ms, reading_ms = [], []
    for number in range(rounds):  # in turn, so that what else the machine does meets both
        query = queries[number % QUERIES]
        query_ms.append(milliseconds(lambda: searcher.search_embedding(query, request)))  # noqa: B023
        reading_ms.append(milliseconds(lambda: read(arrays)))
    return {
        "windows": searcher.catalog.num_moments,
        "vectors_mib": sum(array.nbytes for array in arrays) / 2**20,
        "opening_ms": opening_ms,
        "memory_mib": memory_mib,
        "query_ms": query_ms,
        "reading_ms": reading_ms,
    }


def read(arrays: list[NDArray[np.uint64]]) -> None:
    """Read every byte once, on all cores; nothing that numpy has is faster than xor."""
    import numpy as np

    pieces = [piece for array in arrays for piece in np.array_split(array, 4 * (os.cpu_count() or 1))]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(np.bitwise_xor.reduce, pieces))


def milliseconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - began)


def write_index(path: Path, num_windows: int, noise: float | None = None, num_topics: int = 1) -> Path:
    """Write an index of random unit vectors.

    With `noise` they are those of topics, a video's windows of one, with so much noise as long as the topic's.
    """
    from svb.retrieve.stored.manifest import commit, publish_part
    from svb.retrieve.stored.segment import write_segment

    entries: list[dict[str, Any]] = []
    for first in range(0, num_windows, SEGMENT_ROWS):
        segment = random_segment(first, min(SEGMENT_ROWS, num_windows - first), noise, num_topics)
        entry = publish_part(path, "segments", lambda folder, made=segment: write_segment(folder, made))
        entries.append({**entry, "videos": segment.num_videos, "moments": segment.num_moments, "deleted": None})
    empty: dict[str, Any] = {part: [] for part in ("captions", "metadata", "heads", "text")}
    manifest = {
        **{"format": "svb index", "generation": 1, "model": {"kind": "random"}, "model_fingerprint": "0" * 16},
        **{"moments": {"seconds": 1.0, "stride_seconds": 1.0}, "embedding_size": SIZE, "store": ""},
        **{"videos": num_windows // ROWS_A_VIDEO, "moments_total": num_windows, "segments": entries},
        **{"vectors": None, **empty},
    }
    commit(path, manifest)
    return path


def random_segment(first: int, num_windows: int, noise: float | None, num_topics: int) -> Any:
    """Return a segment in memory, reproducible by its first row."""
    import numpy as np

    from svb.retrieve.stored.segment import Segment, StringColumn

    random, num_videos = np.random.default_rng(first), num_windows // ROWS_A_VIDEO
    vectors = np.empty((num_windows, SIZE), np.float16)
    topics = np.random.default_rng(0).standard_normal((num_topics, SIZE), dtype=np.float32)
    for begin in range(0, num_windows, 10_000):
        rows = random.standard_normal((min(10_000, num_windows - begin), SIZE), dtype=np.float32)
        if noise:
            of_videos = topics[random.integers(num_topics, size=len(rows) // ROWS_A_VIDEO)]
            rows = np.repeat(of_videos, ROWS_A_VIDEO, axis=0) + noise * rows
        vectors[begin : begin + 10_000] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    names = [f"video{first // ROWS_A_VIDEO + number:08}" for number in range(num_videos)]
    begins = np.tile(np.arange(ROWS_A_VIDEO, dtype=np.float64), num_videos)
    return Segment(
        key="",
        video_embeddings=vectors[::ROWS_A_VIDEO],
        moment_embeddings=vectors,
        moment_offsets=np.arange(num_videos + 1, dtype=np.int64) * ROWS_A_VIDEO,
        moment_seconds=np.stack([begins, begins + 1], axis=1),
        duration_seconds=np.full(num_videos, float(ROWS_A_VIDEO)),
        size_bytes=np.ones(num_videos, np.int64),
        mtime_ns=np.ones(num_videos, np.int64),
        video_ids=StringColumn.of(names),
        source_paths=StringColumn.of([f"/videos/{name}.mp4" for name in names]),
        content_hashes=StringColumn.of([f"{first + number:064x}" for number in range(num_videos)]),
        deleted=np.empty(0, np.int64),
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--ask"]:
        print(json.dumps(ask(Path(sys.argv[2]), int(sys.argv[3]))))
    else:
        sizes = "10000,100000,1000000", "numbers of windows, joined by commas"
        shared.run_benchmark(__doc__, measure, rounds=(5, "rounds"), windows=sizes)
