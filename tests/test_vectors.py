"""Vectors of several segments, compared with plain numpy over all rows."""

from __future__ import annotations

import os
import signal
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, ClassVar, cast

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
    shape = ((40, 0, [0, 7, 8, 39]), (1, 40, [0]), (25, 41, []))
    return [
        random_segment(number, seed=1 + seed, first=first, deleted=gone if deleted else [])
        for seed, (number, first, gone) in enumerate(shape)
    ]


def all_rows(segments: list[Segment], by: str) -> NDArray[np.float32]:
    return np.concatenate([getattr(s, f"{by}_embeddings") for s in segments]).astype(np.float32)


def make_query(seed: int) -> NDArray[np.float32]:
    return units(np.random.default_rng(seed).normal(size=(1, SIZE)))[0]


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
def test_a_sample_of_the_background_is_of_live_rows_and_always_the_same(
    by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    segments = some_segments(deleted=True)
    everything = SegmentVectors(segments).background(by)
    monkeypatch.setattr(catalog_module, "SAMPLE_ROWS", 20)
    sample = SegmentVectors(segments).background(by)
    assert len(np.unique(sample, axis=0)) == 20 and len(everything) > 60
    assert {row.tobytes() for row in sample} <= {row.tobytes() for row in everything}
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


class FakeGpuIndex(faiss.IndexFlatIP):  # type: ignore[misc]
    """Stands in for FAISS's index on a GPU, which no machine of the tests has."""

    built: ClassVar[list[FakeGpuIndex]] = []
    # FAISS refuses attributes that its class does not have.
    searched, device, resources = 0, 0, cast("weakref.ref[object]", None)

    def __init__(self, resources: object, size: int, config: SimpleNamespace) -> None:
        super().__init__(size)
        self.searched, self.device, self.resources = 0, config.device, weakref.ref(resources)
        FakeGpuIndex.built.append(self)

    def add(self, rows: NDArray[np.float32]) -> None:
        assert not self.ntotal, "a second piece would move the first"
        assert rows.nbytes <= scan_module.GPU_PIECE_BYTES
        super().add(rows)

    def search(self, queries: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        assert k <= scan_module.MAX_K
        self.searched += 1
        return super().search(queries, k)  # type: ignore[no-any-return]


class FakeResources:
    def setTempMemory(self, num_bytes: int) -> None:  # noqa: N802 - FAISS's name
        pass


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
@pytest.mark.parametrize("deleted", [False, True])  # what was deleted is found, and left out
def test_a_gpu_scans_what_it_can(by: str, deleted: bool, fake_gpu: list[FakeGpuIndex]) -> None:
    vectors, query = SegmentVectors(some_segments(deleted=deleted), "auto"), make_query(0)
    everything = np.ones(66, np.bool_)
    expected = vectors.nearest(query, 9, by=by, allowed=everything)
    for number in range(1, 6):
        scores, rows = vectors.nearest(query, 9, by=by, allowed=None)
        assert rows.tolist() == expected[1].tolist() and len(rows) == 9
        np.testing.assert_allclose(scores, expected[0], atol=1e-6)
        assert [index.searched for index in fake_gpu] == ([] if number <= 2 else [number - 2])
    # Neither more rows than it can find, nor a choice of rows, is asked of it.
    assert len(vectors.nearest(query, 51, by=by, allowed=None)[1]) == 51
    assert vectors.nearest(query, 9, by=by, allowed=everything)[1].tolist() == expected[1].tolist()
    assert fake_gpu[0].searched == 3


def test_nobody_waits_while_a_gpu_is_filled(fake_gpu: list[FakeGpuIndex], monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, query = SegmentVectors(some_segments(), "auto"), make_query(0)
    filling, go_on = threading.Event(), threading.Event()
    copy = scan_module.GpuScan._copy

    def slow(self: scan_module.GpuScan) -> Any:
        filling.set()
        assert go_on.wait(600)
        return copy(self)

    def ask() -> list[int]:
        rows: list[int] = vectors.nearest(query, 5, by="moment", allowed=None)[1].tolist()
        return rows

    monkeypatch.setattr(scan_module.GpuScan, "_copy", slow)
    expected = ask()
    assert ask() == expected
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(ask)
        assert filling.wait(600)
        assert [ask() for _ in range(3)] == [expected] * 3
        assert not first.done() and not fake_gpu
        go_on.set()
        assert first.result() == ask() == expected
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
    expected = SegmentVectors(segments).nearest(query, 50, by=by, allowed=None)
    scores, rows = SegmentVectors(segments, "auto").nearest(query, 50, by=by, allowed=None)
    assert rows.tolist() == expected[1].tolist()
    np.testing.assert_allclose(scores, expected[0], atol=1e-6)
    full, rest = divmod(len(all_rows(segments, by)), rows_a_piece)
    assert [index.ntotal for index in fake_gpu] == [*[rows_a_piece] * full, *([rest] if rest else [])]


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
