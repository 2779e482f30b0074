"""Vectors of several segments, compared with plain numpy over all rows."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar

import faiss
import numpy as np
import pytest
from indexes import random_segment, units
from numpy.typing import NDArray

from svb.retrieve.searching import catalog as catalog_module
from svb.retrieve.searching import vectors as scan_module
from svb.retrieve.searching.vectors import SegmentVectors
from svb.retrieve.stored.segment import Segment

SIZE = 32
BY = ("moment", "video")


def some_segments(*, deleted: bool = False) -> list[Segment]:
    segments = [
        random_segment(40, seed=1),
        random_segment(1, seed=2, first=40),
        random_segment(25, seed=3, first=41),
    ]
    if deleted:
        segments[0] = replace(segments[0], deleted=np.array([0, 7, 8, 39]))
        segments[1] = replace(segments[1], deleted=np.array([0]))
    return segments


def all_rows(segments: list[Segment], by: str) -> NDArray[np.float32]:
    return np.concatenate([getattr(s, f"{by}_embeddings") for s in segments]).astype(np.float32)


def owners(segments: list[Segment], by: str) -> NDArray[np.int64]:
    counts = np.concatenate([np.diff(s.moment_offsets) for s in segments])
    return np.repeat(np.arange(len(counts)), counts if by == "moment" else 1)


def make_query(seed: int) -> NDArray[np.float32]:
    return units(np.random.default_rng(seed).normal(size=(1, SIZE)))[0]


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("deleted", [False, True])
@pytest.mark.parametrize("share", [None, 1.0, 0.5, 0.02, 0.0])
def test_the_nearest_rows_are_found_exactly(
    by: str, deleted: bool, share: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan_module, "PIECE_BYTES", 1000)  # of the larger segments many pieces
    segments = some_segments(deleted=deleted)
    vectors, random = SegmentVectors(segments), np.random.default_rng(0)
    for seed, k in itertools.product(range(3), (1, 7, 10_000)):
        query = make_query(seed)
        allowed = None if share is None else random.random(66) < share
        scores = all_rows(segments, by) @ query
        counts = vectors.catalog.counted(allowed)
        rows = np.flatnonzero(counts[owners(segments, by)])
        expected = rows[np.argsort(-scores[rows])][:k]
        found_scores, found = vectors.nearest(query, k, by=by, allowed=allowed)
        assert found.tolist() == expected.tolist()
        np.testing.assert_allclose(found_scores, scores[expected], atol=1e-6)


def test_a_faiss_that_lends_no_memory_finds_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    query, lent = make_query(0), SegmentVectors(some_segments())
    expected = lent.nearest(query, 20, by="moment", allowed=None)
    monkeypatch.delattr(faiss, "MaybeOwnedVectorUInt8")
    monkeypatch.setattr(scan_module, "BLOCK", 7)
    found = SegmentVectors(some_segments()).nearest(query, 20, by="moment", allowed=None)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_rows_are_scanned_where_they_lie() -> None:
    segment = random_segment(40)
    vectors = SegmentVectors([segment])
    query = make_query(0)
    vectors.nearest(query, 1, by="moment", allowed=None)
    segment.moment_embeddings[17] = 2 * query  # seen at once: nothing was copied
    scores, rows = vectors.nearest(query, 1, by="moment", allowed=None)
    assert rows.tolist() == [17] and scores[0] == pytest.approx(2, abs=1e-2)


@pytest.mark.parametrize("by", BY)
def test_the_background_is_of_live_rows_and_always_the_same(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    segments = some_segments(deleted=True)
    vectors = SegmentVectors(segments)
    live = all_rows(segments, by)[vectors.catalog.alive[owners(segments, by)]]
    np.testing.assert_array_equal(vectors.background(by), live)
    monkeypatch.setattr(catalog_module, "SAMPLE_ROWS", 20)
    sample = SegmentVectors(segments).background(by)
    assert len(np.unique(sample, axis=0)) == 20
    assert {row.tobytes() for row in sample} <= {row.tobytes() for row in live}
    np.testing.assert_array_equal(SegmentVectors(segments).background(by), sample)


def test_a_forked_process_scans_too() -> None:
    vectors, query = SegmentVectors(some_segments()), make_query(0)
    expected = vectors.nearest(query, 3, by="moment", allowed=None)[1].tolist()
    child = os.fork()
    if child == 0:
        signal.alarm(600)  # a scan that waits for threads of the parent would wait for ever
        found = vectors.nearest(query, 3, by="moment", allowed=None)[1].tolist()
        os._exit(0 if found == expected else 1)
    assert os.waitpid(child, 0)[1] == 0


class FakeGpuIndex:
    """Stands in for FAISS's index on a GPU, which no machine of the tests has."""

    built: ClassVar[list[FakeGpuIndex]] = []

    def __init__(self, resources: object, size: int, config: SimpleNamespace) -> None:
        self._index = faiss.IndexFlatIP(size)
        self.searched, self.device, self.resources = 0, config.device, weakref.ref(resources)
        FakeGpuIndex.built.append(self)

    def add(self, rows: NDArray[np.float32]) -> None:
        assert not self._index.ntotal, "a second piece would move the first"
        assert rows.nbytes <= scan_module.GPU_PIECE_BYTES
        self._index.add(rows)

    @property
    def ntotal(self) -> int:
        return int(self._index.ntotal)

    def search(self, queries: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        assert k <= scan_module.MAX_K
        self.searched += 1
        return self._index.search(queries, k)  # type: ignore[no-any-return]


class FakeResources:
    scratch = -1

    def setTempMemory(self, num_bytes: int) -> None:  # noqa: N802 - FAISS's name
        self.scratch = num_bytes


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> list[FakeGpuIndex]:
    monkeypatch.setattr(FakeGpuIndex, "built", [])
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    monkeypatch.setattr(faiss, "StandardGpuResources", FakeResources, raising=False)
    monkeypatch.setattr(faiss, "GpuIndexFlatConfig", SimpleNamespace, raising=False)
    monkeypatch.setattr(faiss, "GpuIndexFlatIP", FakeGpuIndex, raising=False)
    monkeypatch.setattr(scan_module, "FIRST_QUERIES", 2)
    monkeypatch.setattr(scan_module, "MAX_K", 50)
    return FakeGpuIndex.built


@pytest.mark.parametrize("by", BY)
def test_a_gpu_scans_what_it_can(by: str, fake_gpu: list[FakeGpuIndex]) -> None:
    segments, query = some_segments(), make_query(0)
    vectors = SegmentVectors(segments, "auto")
    everything = np.ones(66, np.bool_)
    expected = vectors.nearest(query, 9, by=by, allowed=everything)
    for number in range(1, 6):
        scores, rows = vectors.nearest(query, 9, by=by, allowed=None)
        assert rows.tolist() == expected[1].tolist()
        np.testing.assert_allclose(scores, expected[0], atol=1e-6)
        assert [index.searched for index in fake_gpu] == ([] if number <= 2 else [number - 2])
    # Neither more rows than it can find, nor a choice of rows, is asked of it.
    assert len(vectors.nearest(query, 51, by=by, allowed=None)[1]) == 51
    assert vectors.nearest(query, 9, by=by, allowed=everything)[1].tolist() == expected[1].tolist()
    assert fake_gpu[0].searched == 3
    # What was deleted is found, and left out.
    deleted = SegmentVectors(some_segments(deleted=True), "auto")
    expected = deleted.nearest(query, 9, by=by, allowed=everything)
    for _ in range(4):
        scores, rows = deleted.nearest(query, 9, by=by, allowed=None)
        assert rows.tolist() == expected[1].tolist() and len(rows) == 9
        np.testing.assert_allclose(scores, expected[0], atol=1e-6)
    assert [index.searched for index in fake_gpu] == [3, 2]


def test_nobody_waits_while_a_gpu_is_filled(fake_gpu: list[FakeGpuIndex], monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, query = SegmentVectors(some_segments(), "auto"), make_query(0)
    filling, go_on = threading.Event(), threading.Event()
    copy = scan_module.GpuScan._copy

    def slow(self: scan_module.GpuScan) -> Any:
        filling.set()
        assert go_on.wait(600)
        return copy(self)

    monkeypatch.setattr(scan_module.GpuScan, "_copy", slow)
    expected = vectors.nearest(query, 5, by="moment", allowed=None)[1].tolist()
    vectors.nearest(query, 5, by="moment", allowed=None)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(vectors.nearest, query, 5, by="moment", allowed=None)
        assert filling.wait(600)
        for _ in range(3):
            assert vectors.nearest(query, 5, by="moment", allowed=None)[1].tolist() == expected
        assert not first.done() and not fake_gpu
        go_on.set()
        assert first.result()[1].tolist() == expected
    assert vectors.nearest(query, 5, by="moment", allowed=None)[1].tolist() == expected
    assert [index.searched for index in fake_gpu] == [2]


def test_a_gpu_without_enough_memory_is_done_without(
    fake_gpu: list[FakeGpuIndex], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: FakeGpuIndex, queries: NDArray[np.float32], k: int) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(FakeGpuIndex, "search", fail)
    vectors, query = SegmentVectors(some_segments(), "auto"), make_query(0)
    found = [vectors.nearest(query, 5, by="moment", allowed=None)[1].tolist() for _ in range(5)]
    assert found == [found[0]] * 5 and len(fake_gpu) == 1
    assert fake_gpu[0].resources() is None, "its memory is given back"


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("rows_a_piece", [1, 7, 1000])
def test_a_gpu_holds_the_rows_of_all_segments_in_pieces(
    by: str, rows_a_piece: int, fake_gpu: list[FakeGpuIndex], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan_module, "GPU_PIECE_BYTES", rows_a_piece * 4 * SIZE)
    monkeypatch.setattr(scan_module, "FIRST_QUERIES", 0)
    segments, query = some_segments(), make_query(0)
    vectors, total = SegmentVectors(segments, "auto"), len(all_rows(segments, by))
    expected = SegmentVectors(segments).nearest(query, 50, by=by, allowed=None)
    scores, rows = vectors.nearest(query, 50, by=by, allowed=None)
    assert rows.tolist() == expected[1].tolist()
    np.testing.assert_allclose(scores, expected[0], atol=1e-6)
    assert [index.ntotal for index in fake_gpu] == [
        min(rows_a_piece, total - begin) for begin in range(0, total, rows_a_piece)
    ]


@pytest.mark.parametrize(
    ("device", "used"), [("cpu", None), ("auto", 0), ("cuda", 0), ("cuda:1", 1), ("cuda:2", None), ("mps", None)]
)
def test_the_gpu_that_scans_is_the_one_named(
    fake_gpu: list[FakeGpuIndex], monkeypatch: pytest.MonkeyPatch, device: str, used: int | None
) -> None:
    counted: list[int] = []
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: counted.append(1) or 2)
    vectors, query = SegmentVectors(some_segments(), device), make_query(0)
    for number in range(1, 5):
        vectors.nearest(query, 5, by="moment", allowed=None)
        assert number > 2 or not counted, "the first searches look for no GPU"
    assert [index.device for index in fake_gpu] == ([] if used is None else [used])
    assert len(counted) == (device in ("auto", "cuda", "cuda:1", "cuda:2"))
