"""A search against plain numpy over all rows: exact whatever is asked, filtered, folded or deleted."""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from indexes import (
    clustered,
    embed_text,
    make_segment,
    naive_scores,
    random_segment,
    text_vector,
    units,
    write_index,
)
from numpy.typing import NDArray

from svb.errors import InputError, StoreError, UsageError
from svb.retrieve.answer import Answer, SearchRequest
from svb.retrieve.model.query_embedder import QueryEmbedder
from svb.retrieve.search import Searcher
from svb.retrieve.searching import rank
from svb.retrieve.searching.results import video_key
from svb.retrieve.stored.metadata import publish_metadata
from svb.retrieve.stored.segment import Segment

EMBED_TEXT = QueryEmbedder.embed_text
SIZE = 32
BY = ("moment", "video")
TEXT = SearchRequest(text="a dog")


@pytest.fixture(autouse=True)
def without_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(QueryEmbedder, "embed_text", embed_text)


def some_segments() -> list[Segment]:
    return [
        random_segment(40, seed=1, deleted=[0, 7, 8, 39]),
        random_segment(1, seed=2, first=40),
        random_segment(25, seed=3, first=41),
    ]


@pytest.fixture(scope="module")
def filtered(tmp_path_factory: pytest.TempPathFactory) -> Searcher:
    return Searcher(filtered_world(tmp_path_factory.mktemp("filtered")))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Segment]]:
    """An index of 62 live videos in three segments; only to be read."""
    return write_index(tmp_path_factory.mktemp("world"), some_segments())


@pytest.fixture(scope="module")
def searcher(world: tuple[Path, list[Segment]]) -> Iterator[Searcher]:
    """Yield a searcher to which the larger segments are many pieces."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("svb.retrieve.searching.vectors.PIECE_BYTES", 1000)
        yield Searcher(world[0])


def found(answer: Answer) -> list[str]:
    return [result.video_id for result in answer.results]


def best_first(scores: dict[str, float]) -> list[str]:
    return sorted(scores, key=lambda video_id: -scores[video_id])


def check(answer: Answer, scores: dict[str, float], k: int) -> None:
    """Compare an answer with every video's score."""
    expected = best_first(scores)[:k]
    assert found(answer) == expected
    assert [result.score for result in answer.results] == pytest.approx([scores[v] for v in expected], abs=1e-5)
    assert [result.rank for result in answer.results] == list(range(1, len(expected) + 1))


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("k", [1, 10, 10_000])
@pytest.mark.parametrize("first", [2, 256])
@pytest.mark.parametrize("share", [None, 0.5, 0.1])
@pytest.mark.parametrize(("plus", "without"), [((), ()), (("a", "b"), ()), ((), ("c",)), (("a",), ("c", "d"))])
def test_videos_are_found_exactly(
    world: tuple[Path, list[Segment]],
    searcher: Searcher,
    monkeypatch: pytest.MonkeyPatch,
    by: str,
    k: int,
    first: int,
    share: float | None,
    plus: tuple[str, ...],
    without: tuple[str, ...],
) -> None:
    """Also where the first scan sees only the least wanted rows of a video, and where only some may be found."""
    monkeypatch.setattr(rank, "FIRST_ROWS", first)
    wanted, unwanted = [text_vector(text) for text in ("a dog", *plus)], [text_vector(text) for text in without]
    scores = naive_scores(world[1], by, wanted, unwanted)
    num_windows = sum(np.delete(np.diff(s.moment_offsets), s.deleted).sum() for s in world[1])
    if share is not None:
        random = np.random.default_rng(0)
        scores = {video_id: score for video_id, score in scores.items() if random.random() < share}
    folders = () if share is None else tuple(f"/videos/{video_id}.mp4" for video_id in scores)
    request = SearchRequest(text="a dog", by=by, k=k, plus=plus, without=without, folders=folders, fold=False)
    answer = searcher.search(request)
    check(answer, scores, k)
    assert (answer.num_videos, answer.exact, answer.recall, answer.generation) == (len(scores), True, None, 1)
    assert share is not None or answer.num_windows == num_windows
    assert set(answer.elapsed_seconds) == {"embed", "load", "scan", "total"}
    assert not answer.captions and not answer.notes


@pytest.mark.parametrize("by", BY)
def test_the_scan_goes_on_until_no_other_row_can_be_better(
    tmp_path: Path, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The nearest hundred videos are just what is not wanted; the answer lies far behind them."""
    monkeypatch.setattr(rank, "FIRST_ROWS", 8)
    wanted, unwanted = text_vector("a dog"), text_vector("a cat")
    random = np.random.default_rng(0)
    near = units(wanted + unwanted + 0.05 * random.normal(size=(100, SIZE)))
    far = units(0.3 * wanted + random.normal(size=(200, SIZE)) / np.sqrt(SIZE))
    folder, segments = write_index(tmp_path, [make_segment([row[None] for row in np.concatenate([near, far])])])
    request = SearchRequest(text="a dog", without=("a cat",), by=by, k=3, fold=False)
    answer = Searcher(folder).search(request)
    check(answer, naive_scores(segments, by, [wanted], [unwanted]), 3)
    assert all(int(video_id[1:]) >= 100 for video_id in found(answer))


@pytest.mark.parametrize("many", [1, 40])
def test_a_video_of_many_near_moments_leaves_room_for_others(
    tmp_path: Path, many: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank, "FIRST_ROWS", 4)
    wanted, random = text_vector("a dog"), np.random.default_rng(0)
    long = units(wanted + 0.05 * random.normal(size=(50 * many, SIZE)))
    others = clustered(30, SIZE, 5)
    folder, segments = write_index(tmp_path, [make_segment([long, *(row[None] for row in others)])])
    answer = Searcher(folder).search(SearchRequest(text="a dog", k=5, fold=False))
    check(answer, naive_scores(segments, "moment", [wanted]), 5)


@pytest.mark.parametrize("by", BY)
def test_moments_and_curves_are_of_the_video(
    world: tuple[Path, list[Segment]], searcher: Searcher, by: str
) -> None:
    answer = searcher.search(SearchRequest(text="a dog", by=by, k=62, with_curves=True, num_moments=2))
    assert all(result.curve is None for result in searcher.search(TEXT).results)
    for result in answer.results:
        segment = next(s for s in world[1] if result.video_id in s.video_ids.tolist())
        row = segment.video_ids.tolist().index(result.video_id)
        own = slice(*segment.moment_offsets[row : row + 2].tolist())
        scores = segment.moment_embeddings[own].astype(np.float32) @ text_vector("a dog")
        assert result.curve is not None
        assert result.curve.scores == pytest.approx(scores.tolist(), abs=1e-6)
        assert result.curve.times_seconds == tuple(segment.moment_seconds[own].mean(axis=1).tolist())
        assert 1 <= len(result.moments) <= 2
        assert result.moments[0].score == pytest.approx(float(scores.max()), abs=1e-6)
        for moment in result.moments:
            assert 0 <= moment.begin_seconds < moment.end_seconds <= segment.moment_seconds[own][-1, 1]
        assert result.duration_seconds == segment.duration_seconds[row]
        assert result.source_path == f"/videos/{result.video_id}.mp4"
        assert result.key == video_key(result.video_id)


def test_the_like_of_a_video_is_not_itself(world: tuple[Path, list[Segment]], searcher: Searcher) -> None:
    segment = world[1][2]
    scores = naive_scores(world[1], "video", [segment.video_embeddings[3].astype(np.float32)])
    itself = segment.video_ids[3]
    own = scores.pop(itself)
    answer = searcher.search(SearchRequest(like=itself, by="video", k=100, fold=False))
    assert found(answer) == best_first(scores) and own == max(own, *scores.values())
    assert answer.num_videos == 61
    for gone in ("v7", "nobody"):  # the first was deleted
        with pytest.raises(InputError, match=rf"the index has no video '{gone}'"):
            searcher.search(SearchRequest(like=gone))
    info = searcher.video(video_key("v3"))
    assert info is not None and (info.video_id, info.source_path) == ("v3", "/videos/v3.mp4")
    assert [searcher.video(key) for key in (video_key("v7"), "", "../v3", "v3")] == [None] * 4


# Near-duplicates


def copies() -> list[Segment]:
    """Return 30 videos near a text, each with two near copies and one of another length."""
    random, videos = np.random.default_rng(0), []
    for _ in range(30):
        row = units(text_vector("a dog") + 0.3 * random.normal(size=(1, SIZE)))
        for num_moments in (2, 2, 2, 9):
            near = units(row + 0.005 * random.normal(size=(1, SIZE)))
            videos.append(np.repeat(near, num_moments, axis=0))
    return [make_segment(videos)]


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("first", [4, 256])
def test_near_duplicates_are_folded_and_k_filled_up(
    tmp_path: Path, by: str, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank, "FIRST_ROWS", first)
    monkeypatch.setattr(rank, "FOLDED_AT_ONCE", 16)
    folder, segments = write_index(tmp_path, copies())
    searcher = Searcher(folder)
    ranked = best_first(naive_scores(segments, by, [text_vector("a dog")]))
    # Of each four videos the best of three stands for the two others; the longer one stands for itself.
    expected: dict[tuple[int, bool], str] = {}
    for video_id in ranked:
        expected.setdefault((int(video_id[1:]) // 4, int(video_id[1:]) % 4 == 3), video_id)
    for k in (12, 1000):
        folded = searcher.search(SearchRequest(text="a dog", by=by, k=k)).results
        assert [result.video_id for result in folded] == [*expected.values()][:k]
    for result in folded:
        number = int(result.video_id[1:])
        others = {number // 4 * 4 + copy for copy in range(3)} - {number} if number % 4 != 3 else set()
        assert {int(video_id[1:]) for video_id in result.duplicates} == others
    flat = searcher.search(SearchRequest(text="a dog", by=by, k=12, fold=False)).results
    assert [result.video_id for result in flat] == ranked[:12] and not any(result.duplicates for result in flat)


# Filters


def filtered_world(folder: Path) -> Path:
    segment = random_segment(12, seed=4)
    ids = [f"{where}/clip{row}" for row, where in enumerate(("a", "a/b", "ab", "c") * 3)]
    segment = replace(
        segment,
        video_ids=type(segment.video_ids).of(ids),
        source_paths=type(segment.source_paths).of(f"/archive/{video_id}.mp4" for video_id in ids),
        duration_seconds=np.array([*np.arange(11) * 10.0, np.nan]),
        mtime_ns=np.array([1_700_000_000 + row * 86_400 for row in range(12)]) * 10**9,
    )
    (folder / "table.csv").write_text(
        "video_id,year,place\n" + "".join(f"{video_id},{2000 + row},x\n" for row, video_id in enumerate(ids[:6]))
    )
    entry = publish_metadata(folder, folder / "table.csv", ids)
    return write_index(folder, [segment], metadata=[entry])[0]


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({"folders": ("a",)}, {0, 1, 4, 5, 8, 9}),
        ({"folders": ("a/b/", "./c")}, {1, 3, 5, 7, 9, 11}),
        ({"folders": ("/archive/ab",)}, {2, 6, 10}),
        ({"min_duration_seconds": 80}, {8, 9, 10}),
        ({"max_duration_seconds": 20}, {0, 1, 2}),
        ({"min_duration_seconds": 10, "max_duration_seconds": 30, "folders": ("a",)}, {1}),
        ({"after": "2023-11-25T12:00+00:00"}, {11}),
        ({"before": "2023-11-15T12:00+00:00", "min_duration_seconds": 0}, {0}),
        ({"where": ("year>=2002",)}, {2, 3, 4, 5}),
        ({"where": ("year>=2002", "place=x"), "folders": ("a",)}, {4, 5}),
    ],
)
def test_filters_narrow_what_is_compared(filtered: Searcher, filters: dict[str, Any], expected: set[int]) -> None:
    for by in BY:
        answer = filtered.search(SearchRequest(text="a dog", by=by, k=20, **filters))
        assert {int(video_id.split("clip")[1]) for video_id in found(answer)} == expected
        assert answer.num_videos == len(expected) and not answer.notes


def test_an_answer_says_what_took_its_time(
    world: tuple[Path, list[Segment]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0

    def takes(seconds: float, value: Any) -> Any:
        nonlocal now
        now += seconds
        return value

    tower = SimpleNamespace(
        max_tokens=9, num_tokens=len, embed=lambda texts: takes(2.0, np.stack([*map(text_vector, texts)]))
    )
    clock = SimpleNamespace(perf_counter=lambda: now, time=time.time)
    for module in ("searching.searcher", "model.query_embedder"):
        monkeypatch.setattr(f"svb.retrieve.{module}.time", clock)
    monkeypatch.setattr(rank, "FIRST_ROWS", 256)
    monkeypatch.setattr(QueryEmbedder, "embed_text", EMBED_TEXT)
    monkeypatch.setattr(QueryEmbedder, "_tower", property(lambda self: takes(5.0, tower)))
    searcher = Searcher(shutil.copytree(world[0], tmp_path / "index"))
    nearest = searcher.vectors.nearest
    monkeypatch.setattr(searcher.vectors, "nearest", lambda *given, **more: takes(0.5, nearest(*given, **more)))
    for embed, load in ((7.0, 5.0), (0.0, 0.0)):  # its embedding is kept
        took = searcher.search(SearchRequest(text="a dog", fold=False)).elapsed_seconds
        assert took == {"embed": embed, "load": load, "scan": 0.5, "total": embed + 0.5}


def test_a_date_without_a_zone_is_of_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC-3")
    time.tzset()
    try:
        folder = filtered_world(tmp_path)
        # The first file is of 22:13:20 UTC on November 14th: of the 15th three hours east of there.
        for after, number in (("2023-11-15", 12), ("2023-11-15T01:13:21", 11)):
            assert Searcher(folder).search(SearchRequest(text="a dog", after=after)).num_videos == number
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize(
    ("filters", "said"),
    [
        ({"folders": ("nowhere", "b")}, "the folder 'nowhere' or 'b' leaves nothing: none of the 12 videos passes"),
        ({"min_duration_seconds": 1e6}, "the duration of at least 1e+06 s leaves nothing"),
        ({"after": "2100-01-01"}, "the date after 2100-01-01 leaves nothing"),
        ({"folders": ("c",), "where": ("year=2001",)}, "'year=2001' leaves nothing: none of the 3 videos"),
        ({"after": "yesterday"}, "after is 'yesterday' - expected a date such as"),
        ({"before": "2023-13-01"}, "before is '2023-13-01' - expected a date"),
        ({"folders": ("",)}, "a folder is empty - name one"),
        ({"where": ("colour=red",)}, "no column 'colour' - expected one of year, place"),
    ],
)
def test_filters_that_leave_nothing_are_named_and_wrong_ones_refused(
    filtered: Searcher, filters: dict[str, Any], said: str
) -> None:
    try:
        answer = filtered.search(SearchRequest(text="a dog", **filters))
    except (UsageError, InputError) as error:
        assert "leaves nothing" not in said and said in str(error)
    else:
        assert not answer.results and answer.confidence == "weak" and answer.num_videos == 0
        assert said in answer.notes[0]


# Confidence


def test_what_stands_out_is_strong_and_the_rest_can_be_left_out(tmp_path: Path) -> None:
    wanted = text_vector("a dog")
    hit = units(wanted + 0.05 * np.random.default_rng(0).normal(size=(3, SIZE)))
    others = [row[None] for row in units(np.random.default_rng(1).normal(size=(400, SIZE)))]
    searcher = Searcher(write_index(tmp_path, [make_segment([hit, *others])])[0])
    answer = searcher.search(SearchRequest(text="a dog"))
    assert (answer.confidence, found(answer)[0], answer.results[0].confidence) == ("strong", "v0", "strong")
    assert answer.results[-1].confidence == "weak"
    only = searcher.search(SearchRequest(text="a dog", min_confidence="strong"))
    assert found(only) == ["v0"] and only.results[0].rank == 1
    nothing = searcher.search(SearchRequest(text="quite another thing", min_confidence="strong"))
    assert not nothing.results and nothing.confidence in ("fair", "weak")


# Embeddings, threads, generations


def test_an_embedding_of_any_length_answers_as_its_text_and_one_without_is_refused(searcher: Searcher) -> None:
    with pytest.raises(UsageError, match=r"the embedding is \(8,\) - expected \(32,\)"):
        searcher.search_embedding(np.ones(8, np.float32), TEXT)
    for value, said in ((np.nan, "nan - expected finite numbers"), (np.inf, "inf"), (0.0, r"0\.0")):
        with pytest.raises(UsageError, match=f"the embedding has the length {said}"):
            searcher.search_embedding(np.full(SIZE, value, np.float32), TEXT)
    answer, expected = searcher.search_embedding(3 * text_vector("a dog"), TEXT), searcher.search(TEXT)
    assert found(answer) == found(expected)
    assert [r.score for r in answer.results] == pytest.approx([r.score for r in expected.results], abs=1e-6)


def test_threads_share_a_searcher(world: tuple[Path, list[Segment]]) -> None:
    asked = itertools.product(("a dog", "a cat", "snow"), BY, ((), ("a boat",)))
    requests = [SearchRequest(text=text, by=by, without=out, with_curves=True) for text, by, out in asked]
    expected = [Searcher(world[0]).search(request).results for request in requests]
    searcher = Searcher(world[0])
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(searcher.search, requests * 8))
    assert [answer.results for answer in answers] == expected * 8


def test_a_searcher_answers_from_the_generation_it_opened(tmp_path: Path) -> None:
    folder, _ = write_index(tmp_path, [random_segment(20, seed=1)])
    old = Searcher(folder)
    expected = old.search(TEXT).results
    assert not old.is_stale() and not old.is_stale()
    write_index(folder, [random_segment(5, seed=9)], generation=2)
    assert len(list((folder / "segments").iterdir())) == 1
    assert old.is_stale() and old.is_stale()
    assert old.search(TEXT).results == expected
    assert (len(old), old.generation, len(Searcher(folder)), Searcher(folder).generation) == (20, 1, 5, 2)
    shutil.rmtree(folder)
    assert old.search(TEXT).results == expected and not old.is_stale()


def test_a_file_that_went_with_a_commit_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = write_index(tmp_path, [random_segment(20, seed=1)])
    old = Searcher(folder)

    def lost(self: QueryEmbedder, text: str, what: str = "the query") -> NDArray[np.float32]:
        if self is old._opened.embedder:
            raise StoreError("the text tower is missing")
        return text_vector(text)

    monkeypatch.setattr(QueryEmbedder, "embed_text", lost)

    def embedded() -> Answer:
        return old.search_embedding(text_vector("a boat"), replace(TEXT, plus=("a dog",)))

    for question in (lambda: old.search(TEXT), embedded, lambda: old.embed_text("a dog")):
        with pytest.raises(StoreError, match="is missing"):  # nothing was committed: it is lost
            question()
    write_index(folder, [random_segment(5, seed=9)], generation=2)
    assert old.search(TEXT).generation == embedded().generation == 2
    np.testing.assert_array_equal(old.embed_text("a dog"), text_vector("a dog"))


def test_an_empty_index_says_so(tmp_path: Path) -> None:
    segment = random_segment(3)
    for number, segments in enumerate(([], [replace(segment, deleted=np.arange(3))])):
        answer = Searcher(write_index(tmp_path / str(number), segments)[0]).search(TEXT)
        assert not answer.results and answer.notes == ("the index holds no videos - add some with `svb index`",)
        assert (answer.num_videos, answer.num_windows, answer.confidence) == (0, 0, "weak")


@pytest.mark.parametrize("by", BY)
def test_all_videos_are_found_in_one_scan(tmp_path: Path, by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    segments = [make_segment([clustered(400, SIZE, seed) for seed in range(9)])]
    searcher = Searcher(write_index(tmp_path, segments)[0])
    nearest, asked = searcher.vectors.nearest, list[int]()

    def counted(embedding: NDArray[np.float32], num_rows: int, **options: Any) -> Any:
        asked.append(num_rows)
        return nearest(embedding, num_rows, **options)

    monkeypatch.setattr(searcher.vectors, "nearest", counted)
    expected = best_first(naive_scores(segments, by, [text_vector("a dog")]))
    for k in (9, 10, 10**9):
        asked.clear()
        assert found(searcher.search(SearchRequest(text="a dog", by=by, k=k, fold=False))) == expected
        assert max(asked) <= 3601 and sum(asked) < 3 * 3601


@pytest.mark.parametrize("by", BY)
def test_a_filter_does_not_make_an_answer_surer(searcher: Searcher, by: str) -> None:
    everything = searcher.search(SearchRequest(text="a dog", by=by, k=100, fold=False))
    levels = {result.video_id: (result.score, result.confidence) for result in everything.results}
    assert {confidence for _, confidence in levels.values()} != {"strong"}
    for result in everything.results:
        path = result.source_path
        (alone,) = searcher.search(SearchRequest(text="a dog", by=by, folders=(path,))).results
        assert (alone.score, alone.confidence) == levels[result.video_id]


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("where", [0, 5, 19])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 6e4, -300.0, "makes it the best"])
def test_a_flipped_byte_in_an_embedding_is_found_by_the_search_that_meets_it(
    tmp_path: Path, by: str, where: int, value: Any
) -> None:
    folder, _ = write_index(tmp_path, [random_segment(20, seed=1)])
    (path,) = folder.glob(f"segments/*/{by}_embeddings.npy")
    rows, query = np.load(path), text_vector("a dog")
    said, number = "whose cosine", 3
    if value == "makes it the best":  # by a cosine that a row may have
        said, number = r"of length \d\.\d+ instead of 1", int(np.abs(query).argmax())
        value = rows[where, number] + (0.97 - rows[where].astype(np.float32) @ query) / query[number]
    rows[where, number] = value
    np.save(path, rows)
    searcher = Searcher(folder)
    with pytest.raises(StoreError, match=rf"holds a damaged embedding, {said} .* `svb verify`"):
        searcher.search(SearchRequest(text="a dog", by=by))
    if by == "video":
        with pytest.raises(StoreError, match=r"holds a damaged embedding, .* `svb verify`"):
            searcher.search(SearchRequest(like=f"v{where}"))
