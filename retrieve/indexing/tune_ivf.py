"""Decides how moments are searched: exactly while a scan on this machine keeps the latency budget, else by IVF.

IVF is tuned to a recall of 0.99.

`svb index` calls, after it committed and while it still holds the folder's lock:

    segments = open_segments(out, manifest)
    decision = keep_within_budget(out, segments, budget_seconds=0.1, captions=(C, D) training captions or None)
    logger.info(describe_decision(decision))

`cache/ivf.json` holds the decision for searches and for `svb info`, see `svb.retrieve.searching.ivf`.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from svb.errors import SvbError
from svb.retrieve.searching.ivf import IvfVectors, open_ivf
from svb.retrieve.searching.recall import Truth, draw_queries, find_truth, measure_recall
from svb.retrieve.searching.vectors import SegmentVectors, Vectors
from svb.retrieve.stored.ivf_file import publish_decision, read_decision, read_ivf, write_ivf
from svb.retrieve.stored.segment import Segment

logger = logging.getLogger(__name__)

RECALL = 0.99
# A full scan is faster than inverted lists if there are fewer rows.
MIN_ROWS = 1000
# More lists find rows faster, but take hours to make on few cores.
MAX_LISTS = 4096
TRAINED_ON = 48  # vectors per list; FAISS wants at least 39
# Share of rows that may be added or removed before the lists are made again.
MAX_CHANGED = 0.2
TIMED_QUERIES = 32
# A search asks for so many rows first, because videos have several moments among the nearest.
TIMED_K = 256
ROUNDS = 5
# A scan that takes longer than this is not timed again.
ENOUGH_SECONDS = 3.0
BLOCK = 65536


def keep_within_budget(
    folder: Path,
    segments: Sequence[Segment],
    *,
    budget_seconds: float,
    captions: NDArray[np.floating] | None = None,
) -> dict[str, Any]:
    """Decide how moments are searched, and make the approximate index where that is needed.

    Args:
        folder: The index's; only its one writer may call this.
        segments: All of the index, in the manifest's order.
        budget_seconds: Longest search for one query's nearest moments.
        captions: `(C, D)`, queries to tune with; moments are used if there are none.

    Returns:
        The decision, as written to `cache/ivf.json`; `describe_decision` puts it into words.
    """
    exact = SegmentVectors(segments)
    decision = _still_good(folder, exact, segments, budget_seconds)
    if decision is None:
        kind, queries = draw_queries(exact, captions)
        measured = _measure_scan(exact, segments, queries, budget_seconds)
        decision = {**measured, "file": None, "reason": "", "queries": kind}
        if measured["exact_seconds"] > budget_seconds:
            logger.info(f"{describe_decision(decision)}: trying an approximate index")
            decision |= _try_ivf(folder / "cache", exact, segments, queries, decision)
    publish_decision(folder, decision)
    return decision


def describe_decision(decision: Mapping[str, Any]) -> str:
    """Return a line that tells how moments are searched, why, and how well."""
    exact_ms, budget_ms = 1000 * decision["exact_seconds"], 1000 * decision["budget_seconds"]
    speed = decision["bytes_per_second"] / 1e9
    scan = f"{decision['rows']:,} moments scanned in {exact_ms:.3g} ms ({speed:.1f} GB/s)"
    over = f"{scan}, over the budget of {budget_ms:g} ms"
    if decision["reason"]:
        return f"exact search: {over}; {decision['reason']}"
    if decision["file"] is None:
        within = decision["exact_seconds"] <= decision["budget_seconds"]
        return f"exact search: {scan}, within the budget of {budget_ms:g} ms" if within else f"exact search: {over}"
    return (
        f"approximate search: {over}; {decision['nprobe']:,} of {decision['nlist']:,} lists take "
        f"{1000 * decision['seconds']:.3g} ms with a recall@10 of {decision['recall']:.3f} for moments and "
        f"{decision['recall_videos']:.3f} for videos, on {decision['measured_queries']:,} {decision['queries']} "
        "that it was not tuned with; --exact compares every row"
    )


def _still_good(
    folder: Path, exact: SegmentVectors, segments: Sequence[Segment], budget_seconds: float
) -> dict[str, Any] | None:
    """Return the earlier decision, if rows and budget still allow it."""
    try:
        before = read_decision(folder)
    except SvbError:
        return None
    if before is None or before["embedding_size"] != exact.catalog.embedding_size or not before["rows"]:
        return None
    now, then = ({s.key: s.num_moments for s in segments}, {s["key"]: s["moments"] for s in before["segments"]})
    come, gone = ({key: a[key] for key in a if key not in b} for a, b in ((now, then), (then, now)))
    seconds_a_row = before["exact_seconds"] / before["rows"]
    slow = seconds_a_row * exact.catalog.num_moments > budget_seconds
    little_changed = sum(come.values()) + sum(gone.values()) <= MAX_CHANGED * before["rows"]
    if before["file"] is None:
        kept = not (slow or come or gone)
        if before["reason"]:  # a failed try is not repeated until it could end differently
            kept = slow and little_changed and budget_seconds == before["budget_seconds"]
        return {**before, "budget_seconds": budget_seconds} if kept else None
    fits = before["seconds"] + seconds_a_row * sum(come.values()) <= budget_seconds
    if not (slow and fits and little_changed) or open_ivf(folder, exact, segments)[0] is None:
        return None
    return {**before, "budget_seconds": budget_seconds}


def _measure_scan(
    exact: SegmentVectors, segments: Sequence[Segment], queries: NDArray[np.float32], budget_seconds: float
) -> dict[str, Any]:
    seconds = seconds_a_query(exact, queries[:1]) if len(queries) else 0.0
    scanned = exact.catalog.num_moments * exact.catalog.embedding_size * np.dtype(np.float16).itemsize
    return {
        "format": "svb approximate index",
        "embedding_size": exact.catalog.embedding_size,
        "segments": [{"key": segment.key, "moments": segment.num_moments} for segment in segments],
        "rows": exact.catalog.num_moments,
        "budget_seconds": budget_seconds,
        "exact_seconds": seconds,
        "bytes_per_second": scanned / seconds if seconds else 0.0,
    }


def _try_ivf(
    cache: Path,
    exact: SegmentVectors,
    segments: Sequence[Segment],
    queries: NDArray[np.float32],
    decision: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the decision's fields of an approximate index, or the reason why there is none."""
    if exact.catalog.num_moments < MIN_ROWS:
        return {"reason": f"an approximate index of fewer than {MIN_ROWS:,} moments would be no faster"}
    try:
        made = _make(cache, exact, segments)
        truth = find_truth(exact, segments, queries)
        tuned = _tune({**decision, **made}, read_ivf(cache, {**decision, **made}), exact, segments, truth)
        return {**made, **tuned} if "nprobe" in tuned else tuned
    except (OSError, RuntimeError, MemoryError) as error:  # FAISS reports a full disk as a RuntimeError
        return {"reason": f"an approximate index could not be made ({error})"}


def _make(cache: Path, exact: SegmentVectors, segments: Sequence[Segment]) -> dict[str, Any]:
    """Write the inverted lists of all moments."""
    index = _train(exact)
    for segment in segments:
        for begin in range(0, segment.num_moments, BLOCK):
            index.add(segment.moment_embeddings[begin : begin + BLOCK].astype(np.float32))
    return write_ivf(cache, index)


def _train(exact: SegmentVectors) -> faiss.IndexIVFScalarQuantizer:
    """Return an index without rows whose lists were drawn from a sample."""
    D, M = exact.catalog.embedding_size, exact.catalog.num_moments
    nlist = min(MAX_LISTS, 2 ** round(math.log2(2 * math.sqrt(M))), 2 ** int(math.log2(M / TRAINED_ON)))
    rows = np.random.default_rng(0).choice(M, min(M, TRAINED_ON * nlist), replace=False)
    quantizer = faiss.IndexFlatIP(D)
    fp16, inner_product = faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
    index = faiss.IndexIVFScalarQuantizer(quantizer, D, nlist, fp16, inner_product, False)
    index.train(exact.embeddings(np.sort(rows), by="moment"))
    return index


def _tune(
    decision: Mapping[str, Any],
    index: faiss.IndexIVFScalarQuantizer,
    exact: SegmentVectors,
    segments: Sequence[Segment],
    truth: Truth,
) -> dict[str, Any]:
    """Choose nprobe with half of the queries, and measure with the other half."""
    half = len(truth.queries) // 2
    tuning, held_out = truth.part(slice(half)), truth.part(slice(half, None))
    nprobe = _smallest_nprobe(index, exact, tuning)
    while nprobe <= index.nlist // 2:
        vectors = IvfVectors(
            exact, segments, index, {**decision, "nprobe": nprobe, "recall": 0, "recall_videos": 0}
        )
        recall, recall_videos = measure_recall(vectors, held_out)
        if min(recall, recall_videos) >= RECALL:
            break
        nprobe += max(1, nprobe // 8)  # the tuning half was easier than the other
    else:
        return {"reason": f"a recall of {RECALL} takes more than half of {index.nlist:,} lists"}
    seconds = seconds_a_query(vectors, held_out.queries[:TIMED_QUERIES])
    if seconds > decision["budget_seconds"]:
        slow = f"{nprobe:,} of {index.nlist:,} lists, for a recall of {recall:.3f}, take {1000 * seconds:.3g} ms"
        return {"reason": f"an approximate index would miss it too ({slow})"}
    return {
        "nprobe": nprobe,
        "recall": recall,
        "recall_videos": recall_videos,
        "measured_queries": len(held_out.queries),
        "seconds": seconds,
    }


def _smallest_nprobe(index: faiss.IndexIVFScalarQuantizer, exact: SegmentVectors, truth: Truth) -> int:
    """Return how many lists hold 99 % of the nearest moments, and of the moments of the nearest videos."""
    centroids = index.quantizer.reconstruct_n(0, index.nlist)
    near = truth.queries @ centroids.T  # (Q, nlist)
    needed = []
    for rows in (truth.moment_rows, truth.video_rows):
        held = rows >= 0
        queries = np.nonzero(held)[0]
        _, own = index.quantizer.search(exact.embeddings(rows[held], by="moment"), 1)
        nearer = (near[queries] > near[queries, own[:, 0]][:, None]).sum(axis=1)
        needed.append(int(np.sort(nearer)[math.ceil(RECALL * len(nearer)) - 1]) + 1)
    return max(needed)


def seconds_a_query(vectors: Vectors, queries: NDArray[np.float32]) -> float:
    """Return how long the nearest moments of one query take, on average over some queries.

    The best of a few rounds counts for each query, after one that brings the rows into memory: other work on the
    machine makes a scan slower, and nothing makes it faster.

    Args:
        vectors: The vectors to search.
        queries: `(Q, D)`, at least one.
    """
    vectors.nearest(queries[0], TIMED_K, by="moment", allowed=None)
    rounds: list[list[float]] = []
    begin = time.perf_counter()
    while len(rounds) < ROUNDS and (not rounds or time.perf_counter() - begin < ENOUGH_SECONDS):
        rounds.append([_seconds(vectors, query) for query in queries])
    return float(np.min(rounds, axis=0).mean())


def _seconds(vectors: Vectors, query: NDArray[np.float32]) -> float:
    begin = time.perf_counter()
    vectors.nearest(query, TIMED_K, by="moment", allowed=None)
    return time.perf_counter() - begin
