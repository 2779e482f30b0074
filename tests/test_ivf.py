from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from indexes import clustered, make_segment, random_segment, units
from messages import heard
from numpy.typing import NDArray

from svb.data.description import publish_description
from svb.retrieve.indexing import tune_ivf
from svb.retrieve.indexing.tune_ivf import describe_decision, keep_within_budget, seconds_a_query
from svb.retrieve.searching import recall
from svb.retrieve.searching.ivf import IvfVectors, open_ivf
from svb.retrieve.searching.vectors import SegmentVectors
from svb.retrieve.stored.ivf_file import read_decision, read_ivf, verify_ivf
from svb.retrieve.stored.segment import Segment

SIZE = 32
NOTHING_FITS = 1e-9


@pytest.fixture(scope="module", autouse=True)
def without_a_clock() -> Iterator[None]:
    """Have a search of the lists take 1 ms and one of all rows a microsecond each, on any machine."""

    def seconds(vectors: Any, queries: NDArray[np.float32]) -> float:
        return 0.001 if isinstance(vectors, IvfVectors) else 1e-6 * vectors.catalog.num_moments

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tune_ivf, "seconds_a_query", seconds)
        yield


@pytest.fixture(scope="module")
def segments() -> list[Segment]:
    return [random_segment(1500, seed=1), random_segment(900, seed=2, first=1500)]


@pytest.fixture(scope="module")
def built_once(segments: list[Segment], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    assert build(folder, segments)["file"] is not None
    return folder


@pytest.fixture
def built(built_once: Path, tmp_path: Path) -> Path:
    """Return an index's folder with an approximate index of `segments`, which the test may damage."""
    return Path(shutil.copytree(built_once, tmp_path / "built"))


def brute_force(
    segments: Sequence[Segment], query: NDArray[np.float32], k: int, allowed: NDArray[np.bool_] | None = None
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    scores = np.concatenate([segment.moment_embeddings.astype(np.float32) @ query for segment in segments])
    alive = [np.isin(np.arange(segment.num_videos), segment.deleted, invert=True) for segment in segments]
    counted = np.concatenate(alive) & (True if allowed is None else allowed)
    owners = np.concatenate([np.diff(segment.moment_offsets) for segment in segments])
    rows = np.flatnonzero(np.repeat(counted, owners))
    best = rows[np.lexsort((rows, -scores[rows]))][:k]
    return scores[best], best


def build(
    folder: Path, segments: Sequence[Segment], budget_seconds: float = 0.004, **options: Any
) -> dict[str, Any]:
    return keep_within_budget(folder, segments, budget_seconds=budget_seconds, **options)


def decision_of(folder: Path) -> dict[str, Any]:
    decision = read_decision(folder)
    assert decision is not None
    return decision


def opened(folder: Path, segments: Sequence[Segment]) -> IvfVectors:
    vectors, note = open_ivf(folder, SegmentVectors(segments), segments)
    assert vectors is not None, note
    return vectors


def every_list(vectors: IvfVectors) -> IvfVectors:
    """Have every list probed: then nothing is missed and answers are those of an exact scan."""
    vectors._nprobe = vectors._index.nlist
    vectors._rows_in_budget = 0.0
    return vectors


def assert_is_exact(
    vectors: IvfVectors, segments: Sequence[Segment], k: int, allowed: NDArray[np.bool_] | None = None
) -> None:
    for query in clustered(8, SIZE, seed=7):
        scores, rows = vectors.nearest(query, k, by="moment", allowed=allowed)
        expected, expected_rows = brute_force(segments, query, k, allowed)
        np.testing.assert_allclose(scores, expected, atol=1e-5)
        differ = rows != expected_rows  # where two are as near as each other
        np.testing.assert_allclose(scores[differ], expected[differ], atol=1e-6)
        assert len(set(rows.tolist())) == len(rows)


def test_within_the_budget_search_stays_exact_and_says_so(
    tmp_path: Path, segments: list[Segment], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune_ivf, "seconds_a_query", seconds_a_query)  # by the real clock
    lines = heard()
    decision = build(tmp_path, segments, 10.0)
    assert decision["file"] is None and not lines
    rows = sum(segment.num_moments for segment in segments)
    said = describe_decision(decision)
    assert said.startswith(f"exact search: {rows:,} moments scanned in ")
    assert said.endswith(", within the budget of 10000 ms")
    assert decision["bytes_per_second"] == pytest.approx(rows * SIZE * 2 / decision["exact_seconds"])
    assert open_ivf(tmp_path, SegmentVectors(segments), segments) == (None, None)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["ivf.json"]


@pytest.mark.parametrize("with_captions", [True, False])
def test_a_missed_budget_makes_an_index_with_the_recall_that_it_claims(
    tmp_path: Path, segments: list[Segment], with_captions: bool
) -> None:
    captions = clustered(600, SIZE, seed=5).astype(np.float16) if with_captions else None
    lines = heard()
    decision = build(tmp_path, segments, captions=captions)
    assert len(lines) == 1 and lines[0].endswith(": trying an approximate index")
    assert decision["queries"] == ("captions" if with_captions else "moments")
    assert decision["measured_queries"] == (300 if with_captions else 500)
    assert decision["recall"] >= 0.99 and decision["recall_videos"] >= 0.99
    assert decision["nprobe"] <= decision["nlist"] // 2
    vectors, exact = opened(tmp_path, segments), SegmentVectors(segments)
    assert not vectors.exact
    assert vectors.recall == min(decision["recall"], decision["recall_videos"])
    assert f"{decision['nprobe']} of {decision['nlist']} lists take 1 ms" in describe_decision(decision)
    assert verify_ivf(tmp_path) == []

    def recall_of(queries: NDArray[np.float32]) -> float:
        found = (vectors.nearest(query, 10, by="moment", allowed=None)[0] for query in queries)
        hits = [
            scores >= brute_force(segments, q, 10)[0][-1] - 1e-5 for q, scores in zip(queries, found, strict=True)
        ]
        return float(np.mean(hits))

    # The claim is of the half that was not tuned with; queries that neither half has seen find as much.
    queries = recall.find_truth(exact, segments, recall.draw_queries(exact, captions)[1]).queries
    assert decision["recall"] == pytest.approx(recall_of(queries[-decision["measured_queries"] :]))
    assert recall_of(clustered(300, SIZE, seed=6)) >= 0.98


def test_the_truth_is_a_brute_force_scan(segments: list[Segment], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recall, "BLOCK", 700)
    some = [replace(segments[0], deleted=np.array([0, 5, 700])), segments[1]]
    exact, queries = SegmentVectors(some), clustered(20, SIZE, seed=8)
    truth = recall.find_truth(exact, some, queries)
    for row, query in enumerate(queries):
        scores, rows = brute_force(some, query, 10**6)
        np.testing.assert_allclose(truth.moment_scores[row], scores[:10], atol=1e-6)
        videos: dict[int, float] = {}
        for score, video in zip(scores, exact.catalog.videos_of(rows), strict=True):
            videos.setdefault(int(video), float(score))
        np.testing.assert_allclose(truth.video_scores[row], [*videos.values()][:10], atol=1e-6)
        assert exact.catalog.videos_of(truth.video_rows[row]).tolist() == [*videos][:10]


def test_with_every_list_probed_it_is_an_exact_scan(built: Path, segments: list[Segment]) -> None:
    """Also of what was deleted, filtered out, has come, gone or changed places since it was built."""
    random, new = np.random.default_rng(3), random_segment(50, seed=9, first=2400)
    thinned = [
        replace(each, deleted=np.sort(random.choice(each.num_videos, 200, replace=False))) for each in segments
    ]
    for now in (
        segments,
        thinned,
        [*segments, new],
        [segments[1], new, segments[0]],
        [segments[1]],
        [new, replace(segments[1], deleted=np.arange(0, 900, 3))],
    ):
        vectors = every_list(opened(built, now))
        for k in (1, 10, 200) if now is segments else (40,):
            assert_is_exact(vectors, now, k)
        for share in (0.9, 0.3, 0.01, 0.0) if now is thinned else (0.6,):
            assert_is_exact(vectors, now, 50, random.random(vectors.catalog.num_videos) < share)
    vectors, exact, query = every_list(opened(built, segments)), SegmentVectors(segments), clustered(1, SIZE, 7)[0]
    found, expected = (each.nearest(query, 10, by="video", allowed=None) for each in (vectors, exact))
    np.testing.assert_array_equal(found, expected)  # whole videos are compared exactly always
    rows = sum(segment.num_moments for segment in segments)
    assert len(vectors.nearest(query, rows + 5, by="moment", allowed=None)[1]) == rows
    none, note = open_ivf(built, SegmentVectors([new]), [new])
    assert none is None and note is not None and "other segments" in note


def test_a_filter_keeps_the_recall(built: Path, segments: list[Segment]) -> None:
    vectors = opened(built, segments)
    random, found = np.random.default_rng(4), []
    vectors._rows_in_budget = 0.0
    for query in clustered(200, SIZE, seed=6):
        allowed = random.random(vectors.catalog.num_videos) < 0.25
        expected = brute_force(segments, query, 10, allowed)[1]
        rows = vectors.nearest(query, 10, by="moment", allowed=allowed)[1]
        found.append(len({*rows.tolist()} & {*expected.tolist()}))
    assert np.mean(found) / 10 >= 0.98


def test_few_enough_rows_are_scanned_exactly(
    built: Path, segments: list[Segment], monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = opened(built, segments)  # with a budget of 4,000 rows
    monkeypatch.setattr(vectors, "_proposed", lambda *arguments: pytest.fail("the lists were searched"))
    allowed = np.arange(vectors.catalog.num_videos) < 700  # of about 5 moments each
    assert 2500 < vectors.catalog.moment_counts[allowed].sum() < 4000
    assert_is_exact(vectors, segments, 10, allowed)


def test_made_again_only_when_it_must_be(built: Path, segments: list[Segment]) -> None:
    made, cache = decision_of(built), built / "cache"
    for leftover in (".aside-1.ivf", "building.ivf", "moments-of-before.ivf"):  # of a run that was killed
        (cache / leftover).write_bytes(b"half")
    little = [*segments, random_segment(50, seed=9, first=2400)]
    assert build(built, segments) == build(built, little) == made
    assert {path.name for path in cache.iterdir()} == {"ivf.json", made["file"]}
    assert build(built, little, 0.003) == {**made, "budget_seconds": 0.003}
    much = [*segments, random_segment(600, seed=9, first=2400)]
    grown = build(built, much)
    assert grown["rows"] == sum(segment.num_moments for segment in much) and grown["file"] != made["file"]
    assert {path.name for path in cache.iterdir()} == {"ivf.json", grown["file"]}
    assert opened(built, much)._any_fresh is False
    assert build(built, segments[:1])["rows"] == segments[0].num_moments
    assert build(built, segments[:1], 1.0)["file"] is None
    assert [path.name for path in cache.iterdir()] == ["ivf.json"]
    tight = build(built, segments, 0.00105)  # 50 us are left for rows that no list holds
    assert build(built, [*segments, random_segment(5, seed=9, first=2400, most=5)], 0.00105) == tight
    assert build(built, [*segments, random_segment(40, seed=9, first=2400)], 0.00105)["file"] != tight["file"]


def few(num_videos: int) -> list[Segment]:
    return [random_segment(num_videos, seed=1)] if num_videos else []


def without_clusters() -> list[Segment]:
    moments = units(np.random.default_rng(0).normal(size=(3000, SIZE)))
    return [make_segment(np.split(moments, 1000))]


def on_a_full_disk(patch: pytest.MonkeyPatch) -> None:
    def full(index: Any, path: str) -> None:
        Path(path).write_bytes(b"half of it")
        raise RuntimeError("No space left on device")

    patch.setattr(tune_ivf.faiss, "write_index", full)


@pytest.mark.parametrize(
    ("made_of", "budget_seconds", "words"),
    [
        (None, NOTHING_FITS, r"over the budget of 1e-06 ms; an approximate index would miss it too \("),
        (without_clusters, 0.002, "a recall of 0.99 takes more than half of "),
        (lambda: few(3), NOTHING_FITS, "fewer than 1,000 moments"),
        (lambda: few(0), NOTHING_FITS, ""),
        (None, 0.004, r"could not be made \(.*No space left on device"),
    ],
)
def test_where_no_index_would_do_search_stays_exact_and_says_why(
    tmp_path: Path,
    segments: list[Segment],
    monkeypatch: pytest.MonkeyPatch,
    made_of: Callable[[], list[Segment]] | None,
    budget_seconds: float,
    words: str,
) -> None:
    now = segments if made_of is None else made_of()
    if "No space" in words:
        on_a_full_disk(monkeypatch)
    decision = build(tmp_path, now, budget_seconds)
    assert decision["file"] is None and re.search(words, describe_decision(decision))
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["ivf.json"]
    assert open_ivf(tmp_path, SegmentVectors(segments), segments) == (None, None)
    if budget_seconds == NOTHING_FITS:
        with monkeypatch.context() as patch:
            patch.setattr(tune_ivf, "_try_ivf", lambda *arguments: pytest.fail("it was tried again"))
            assert build(tmp_path, now, NOTHING_FITS) == decision
        assert (build(tmp_path, now)["file"] is None) == (now is not segments)  # with a budget that it can keep


def flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def test_a_damaged_file_is_not_believed(built: Path, segments: list[Segment]) -> None:
    decision, note_file = decision_of(built), built / "cache" / "ivf.json"
    file, exact = built / "cache" / decision["file"], SegmentVectors(segments)
    held, described = file.read_bytes(), note_file.read_bytes()
    damages: list[tuple[Path, bytes | None]] = [
        *((file, data) for data in (None, held[:-100], held + b"\0", flipped(held, decision["head_bytes"] - 9))),
        *((note_file, data) for data in (b"{", described.replace(b'"nprobe": ', b'"nprobe": 1'))),
    ]
    for path, data in damages:
        path.unlink() if data is None else path.write_bytes(data)
        vectors, note = open_ivf(built, exact, segments)
        assert vectors is None and note is not None and verify_ivf(built)
        assert note.startswith("the approximate index is damaged (") and "search is exact" in note
        file.write_bytes(held)
        note_file.write_bytes(described)
    publish_description(note_file, {**decision, "embedding_size": 8})
    assert open_ivf(built, exact, segments)[0] is None
    build(built, segments)
    assert opened(built, segments) and verify_ivf(built) == []


@pytest.mark.parametrize("noise", ["ones", "random"])
def test_damaged_lists_make_no_wrong_row(built: Path, segments: list[Segment], noise: str) -> None:
    decision = decision_of(built)
    file, random = built / "cache" / decision["file"], np.random.default_rng(0)
    held = np.frombuffer(file.read_bytes(), np.uint8).copy()
    lists = held[decision["head_bytes"] :]
    places = random.random(len(lists)) < 0.2
    lists[places] = 255 if noise == "ones" else random.integers(0, 256, int(places.sum()))
    file.write_bytes(held.tobytes())
    assert verify_ivf(built) == [f"{file} has changed since it was written"]  # not seen when it is opened
    now = [replace(segments[0], deleted=np.arange(0, 1500, 2)), segments[1]]
    vectors = opened(built, now)
    vectors._rows_in_budget = 0.0
    for allowed in (None, np.arange(vectors.catalog.num_videos) % 3 > 0):
        for query in clustered(20, SIZE, seed=3):
            scores, rows = vectors.nearest(query, 10, by="moment", allowed=allowed)
            all_scores, all_rows = brute_force(now, query, 10**6, allowed)
            true = dict(zip(all_rows.tolist(), all_scores.tolist(), strict=True))
            np.testing.assert_allclose(scores, [true[row] for row in rows.tolist()], atol=1e-5)
            assert len(set(rows.tolist())) == 10 and (np.diff(scores) <= 0).all()


def test_threads_share_it(built: Path, segments: list[Segment]) -> None:
    vectors = opened(built, segments)
    filters = [None, np.arange(vectors.catalog.num_videos) % 2 > 0]
    asked = [(query, allowed) for query in clustered(40, SIZE, seed=3) for allowed in filters] * 4

    def search(question: tuple[NDArray[np.float32], NDArray[np.bool_] | None]) -> list[int]:
        rows: list[int] = vectors.nearest(question[0], 10, by="moment", allowed=question[1])[1].tolist()
        return rows

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(search, asked)) == [search(question) for question in asked]


def test_the_clock_takes_the_best_of_a_few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([0.5, 0.2, 0.4, 0.3, 0.6, 0.1, 0.5, 0.5, 0.5, 0.5])
    monkeypatch.setattr(tune_ivf, "_seconds", lambda vectors, query: next(seconds))
    vectors = SegmentVectors([random_segment(3)])
    assert seconds_a_query(vectors, clustered(2, SIZE, 0)) == pytest.approx((0.4 + 0.1) / 2)


def test_lists_are_mapped_not_read_to_memory(built: Path, segments: list[Segment]) -> None:
    decision = decision_of(built)
    index = read_ivf(built / "cache", decision)
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no /proc here")
    assert index.ntotal and decision["file"] in maps.read_text()
