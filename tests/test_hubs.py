from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from messages import heard
from numpy.typing import NDArray
from segments import clustered, make_segment, publish_segment, random_segment, units

from svb.data.caption_table import CaptionTable
from svb.errors import StoreError
from svb.retrieve.indexing import make_hubs, video_scores
from svb.retrieve.indexing.hubs_on_val import Val, describe, measure_on_val
from svb.retrieve.indexing.make_hubs import Bank, index_hubs, segment_hubs, without_deleted
from svb.retrieve.measure.hub_normalisation import QB_NORM_SCALE, QueryBank, qb_norm, query_bank
from svb.retrieve.searching.hubs import Hubs, combine
from svb.retrieve.stored.segment import Segment

SIZE = 16
BY = ("moment", "video")


def make_bank(number: int, seed: int = 0, *, video_ids: Sequence[str] | None = None) -> Bank:
    return Bank(clustered(number, SIZE, seed), [*(video_ids or [""] * number)], "key")


def dense(segments: Sequence[Segment], queries: NDArray[np.float32], by: str) -> NDArray[np.float32]:
    """Return `(Q, L)` scores with the live videos, one by one."""
    columns = []
    for segment in segments:
        for row in range(segment.num_videos):
            begin, end = segment.moment_offsets[row : row + 2]
            rows = (
                segment.moment_embeddings[begin:end] if by == "moment" else segment.video_embeddings[row : row + 1]
            )
            if row not in segment.deleted:
                columns.append((queries @ rows.astype(np.float32).T).max(axis=1))
    return np.stack(columns, axis=1)


def dense_bank(segments: Sequence[Segment], bank: Bank, by: str) -> QueryBank:
    scores, live = dense(segments, bank.embeddings, by), live_ids(segments)
    for caption, video_id in enumerate(bank.video_ids):
        if video_id in live:
            scores[caption, live.index(video_id)] = -1.0
    return query_bank([scores], QB_NORM_SCALE)


def live_ids(segments: Sequence[Segment]) -> list[str]:
    return [s.video_ids[row] for s in segments for row in range(s.num_videos) if row not in s.deleted]


def live_rows(segments: Sequence[Segment]) -> NDArray[np.int64]:
    alive = [np.isin(np.arange(s.num_videos), s.deleted, invert=True) for s in segments]
    return np.flatnonzero(np.concatenate(alive))


def some_segments(*, deleted: bool = False) -> list[Segment]:
    segments = [random_segment(30, size=SIZE, seed=1), random_segment(1, size=SIZE, seed=2, first=30)]
    segments.append(random_segment(20, size=SIZE, seed=3, first=31))
    if deleted:
        segments[0] = replace(segments[0], deleted=np.array([0, 7, 8, 29]))
        segments[2] = replace(segments[2], deleted=np.array([4]))
    return segments


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("deleted", [False, True])
@pytest.mark.parametrize("rows", [1, 13, 16_384])
def test_segments_together_say_what_the_dense_computation_says(
    by: str, deleted: bool, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(video_scores, "ROWS", rows)
    monkeypatch.setattr(make_hubs, "BLOCK", 7)
    segments, owned = some_segments(deleted=deleted), [f"v{row % 60}" for row in range(40)]
    bank = make_bank(40, video_ids=owned)
    together = combine([segment_hubs(segment, bank, by) for segment in segments], QB_NORM_SCALE)
    expected, live = dense_bank(segments, bank, by), live_rows(segments)
    np.testing.assert_allclose(together.log_sums[live], expected.log_sums, rtol=1e-5)
    assert together.is_hub[live].tolist() == expected.is_hub.tolist()
    assert together.is_hub.sum() == expected.is_hub.sum() > 5


@pytest.mark.parametrize("by", BY)
def test_equally_good_videos_are_hubs_each_of_them(by: str) -> None:
    rows = np.eye(SIZE, dtype=np.float32)
    segments = [make_segment([rows[:1], rows[:1], rows[1:2]]), make_segment([rows[:1], rows[2:3]], first=3)]
    bank = Bank(rows[:2], ["", ""], "key")
    together = combine([segment_hubs(segment, bank, by) for segment in segments], QB_NORM_SCALE)
    assert together.is_hub.tolist() == [True, True, True, True, False]


@pytest.mark.parametrize("by", BY)
def test_a_caption_says_nothing_about_its_own_video(by: str) -> None:
    segment, captions = random_segment(20, size=SIZE, seed=1), 12
    own = segment.video_embeddings[:captions].astype(np.float32)
    strange = segment_hubs(segment, Bank(own, [""] * captions, "key"), by)
    bank = Bank(own, [f"v{row}" for row in range(captions)], "key")
    hubs = segment_hubs(segment, bank, by)
    assert (strange.log_sums[:captions] - hubs.log_sums[:captions] > 0).all()
    np.testing.assert_allclose(strange.log_sums[captions:], hubs.log_sums[captions:])
    if by == "video":
        assert strange.best_rows.tolist() == [[row, row] for row in range(captions)]
    assert all(caption != row for caption, row in hubs.best_rows.tolist())


@pytest.mark.parametrize("by", BY)
def test_deleting_videos_after_and_before_is_the_same(by: str) -> None:
    bank, segment = make_bank(60), random_segment(30, size=SIZE, seed=1)
    hubs, random = segment_hubs(segment, bank, by), np.random.default_rng(0)
    assert without_deleted(hubs, segment, bank, by) is hubs
    for number in (1, 5, 25, 30):
        thinned = replace(segment, deleted=np.sort(random.choice(30, number, replace=False)))
        after, before = without_deleted(hubs, thinned, bank, by), segment_hubs(thinned, bank, by)
        np.testing.assert_allclose(after.log_sums, before.log_sums)
        np.testing.assert_allclose(after.best_scores, before.best_scores, rtol=1e-5)
        assert {*map(tuple, after.best_rows.tolist())} == {*map(tuple, before.best_rows.tolist())}
    assert not len(after.best_rows) and (after.best_scores == -1).all()


def make_table(rows: Sequence[tuple[str, str, str]]) -> tuple[CaptionTable, dict[str, list[int]]]:
    """Return a table of `(video_id, caption, split)`, and the positions of its splits."""
    table = CaptionTable(
        [str(row) for row in range(len(rows))],
        [row[0] for row in rows],
        [row[1] for row in rows],
        [row[2] for row in rows],
        has_split=True,
    )
    positions = {split: [p for p, row in enumerate(rows) if row[2] == split] for split in ("train", "val", "test")}
    return table, positions


def embed(positions: list[int]) -> NDArray[np.float32]:
    return np.concatenate([clustered(1, SIZE, seed=1000 + position) for position in positions])


def make_index(
    out: Path, segments: Sequence[Segment], rows: Sequence[tuple[str, str, str]], **options: Any
) -> dict[str, Any]:
    """Publish segments and their hubs; returns what the manifest would hold."""
    table, splits = make_table(rows)
    published = [publish_segment(out, segment) for segment in segments]
    written = [replace(segment, key=entry["key"]) for segment, (_, entry) in zip(segments, published, strict=True)]
    options = {"previous": [], "embed": embed, "model_fingerprint": "model", **options}
    hubs, normalise = index_hubs(out, written, table=table, splits=splits, **options)
    return {"segments": [entry for _, entry in published], "hubs": hubs, "normalise": normalise}


def captions_of(num_train: int, val: Sequence[str] = ()) -> list[tuple[str, str, str]]:
    train = [(f"v{row % 20}", f"caption {row}", "train") for row in range(num_train)]
    return [*train, *[(video_id, f"of {video_id}", "val") for video_id in val]]


@pytest.mark.parametrize("by", BY)
def test_a_search_reorders_as_the_dense_computation_does(tmp_path: Path, by: str) -> None:
    segments = some_segments(deleted=True)
    manifest = make_index(tmp_path, segments, captions_of(80))
    hubs = Hubs.open(tmp_path, manifest)
    assert hubs is not None
    table, _ = make_table(captions_of(80))
    bank = dense_bank(segments, Bank(embed([*range(80)]), table.video_ids, ""), by)
    queries, live = clustered(60, SIZE, seed=5), live_rows(segments)
    similarity = dense(segments, queries, by)
    expected, reordered = qb_norm(similarity, bank), 0
    for row, scores in enumerate(similarity):
        np.testing.assert_allclose(hubs.reorder(scores, live, by), expected[row], atol=1e-4)
        finds = bool(bank.is_hub[scores.argmax()])
        assert hubs.finds_hub(scores, live, by) == finds
        reordered += finds
        # A search has only some candidates; with the best among them it orders those alike.
        some = np.argsort(-scores)[:9]
        np.testing.assert_allclose(hubs.reorder(scores[some], live[some], by), expected[row][some], atol=1e-4)
    assert 0 < reordered < 60
    assert hubs.reorder(np.empty(0), np.empty(0, np.int64), by).shape == (0,)
    assert not hubs.finds_hub(np.empty(0), np.empty(0, np.int64), by)


@pytest.mark.parametrize("by", BY)
def test_rivals_are_all_that_could_come_before_the_kth(tmp_path: Path, by: str) -> None:
    segments = some_segments()
    hubs = Hubs.open(tmp_path, make_index(tmp_path, segments, captions_of(80)))
    assert hubs is not None
    some_are_none = False
    for scores in dense(segments, clustered(30, SIZE, seed=5), by):
        everyone, order = np.arange(len(scores)), np.argsort(-scores)
        keys = hubs.reorder(scores, everyone, by)
        if not hubs.finds_hub(scores, everyone, by):
            continue
        for seen in (3, 10, 40):
            kth = np.sort(keys[order[:seen]])[::-1][2]
            rivals = hubs.rivals(float(scores[order[seen - 1]]), float(kth), by)
            unseen = order[seen:]
            assert rivals[unseen[keys[unseen] > kth]].all()
            some_are_none = some_are_none or not rivals[unseen].any()
    assert some_are_none


def test_only_new_segments_are_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    segments, computed = some_segments(), []
    original = segment_hubs

    def counted(segment: Segment, *arguments: Any) -> Any:
        computed.append(segment.num_videos)
        return original(segment, *arguments)

    monkeypatch.setattr(make_hubs, "segment_hubs", counted)
    first = make_index(tmp_path, segments[:2], captions_of(50))
    assert computed == [30, 30, 1, 1]
    computed.clear()
    second = make_index(tmp_path, segments, captions_of(50), previous=first["hubs"])
    assert computed == [20, 20] and second["hubs"][:2] == first["hubs"]
    computed.clear()
    thinned = [replace(segments[0], deleted=np.arange(10)), *segments[1:]]
    third = make_index(tmp_path, thinned, captions_of(50), previous=second["hubs"])
    assert not computed and third["hubs"][1:] == second["hubs"][1:]
    assert third["hubs"][0]["key"] != second["hubs"][0]["key"]
    # Other captions, or another model, make another bank: then every segment is computed.
    for changed in ({"rows": captions_of(51)}, {"model_fingerprint": "other"}):
        computed.clear()
        options = {"rows": captions_of(50), "previous": second["hubs"], **changed}
        make_index(tmp_path, segments, options.pop("rows"), **options)
        assert computed == [30, 30, 1, 1, 20, 20]


def test_a_damaged_part_is_computed_again(tmp_path: Path) -> None:
    first = make_index(tmp_path, some_segments(), captions_of(50))
    file = tmp_path / "hubs" / first["hubs"][0]["key"] / "moment_log_sums.npy"
    held = file.read_bytes()
    file.write_bytes(held[:-8])
    hubs = Hubs.open(tmp_path, first)
    assert hubs is not None
    with pytest.raises(StoreError, match=r"moment_log_sums.npy has .* bytes, not .*--normalise off"):
        hubs.reorder(np.ones(1), np.zeros(1, np.int64), "moment")
    again = make_index(tmp_path, some_segments(), captions_of(50), previous=first["hubs"])
    assert again["hubs"] == first["hubs"] and file.read_bytes() == held


@pytest.mark.parametrize("rows", [[("v1", "a", "val"), ("v2", "b", "test")], []])
def test_without_a_train_split_there_is_no_bank(tmp_path: Path, rows: list[tuple[str, str, str]]) -> None:
    manifest = make_index(tmp_path, some_segments(), rows)
    assert manifest["hubs"] == [] and manifest["normalise"] is None
    assert Hubs.open(tmp_path, manifest) is None


def test_an_index_whose_hubs_are_not_of_every_segment_has_none(tmp_path: Path) -> None:
    manifest = make_index(tmp_path, some_segments(), captions_of(50))
    assert Hubs.open(tmp_path, {**manifest, "hubs": manifest["hubs"][1:]}) is None
    assert Hubs.open(tmp_path, manifest) is not None
    empty = make_index(tmp_path / "empty", [], captions_of(50))
    assert empty["normalise"] is None and Hubs.open(tmp_path / "empty", empty) is None


def test_without_a_val_split_nothing_tells_whether_it_helps(tmp_path: Path) -> None:
    lines = heard()
    manifest = make_index(tmp_path, some_segments(), captions_of(50))
    normalise = manifest["normalise"]
    assert normalise["helps"] is False and normalise["by"]["moment"] == {"helps": False, "val": None}
    assert (normalise["bank"], normalise["candidates"], normalise["scale"]) == (50, 51, 20.0)
    what = "normalisation against hubs (50 captions, 51 videos)"
    assert lines == [f"{what}: off, as no captions of a val split tell whether it helps"]
    # Captions of videos that are not in the index, or no longer, tell nothing either.
    thinned = [replace(segment, deleted=np.arange(min(5, segment.num_videos))) for segment in some_segments()]
    manifest = make_index(tmp_path, thinned, captions_of(50, val=["v3", "elsewhere"]))
    assert manifest["normalise"]["by"]["video"]["val"] is None


def hubby_world(num_videos: int = 120, *, hub: bool, seed: int = 0) -> tuple[list[Segment], Callable[..., Any]]:
    """Return videos, and a function that makes queries near to some; with `hub`, a few videos are near to each.

    Half of each text's length points where all texts do, and so do hubs: the gap between texts and videos.
    """
    random = np.random.default_rng(seed)
    gap = np.eye(SIZE)[0] * 1.2
    topics = units(random.normal(size=(num_videos, SIZE)))
    videos = topics.copy()
    if hub:
        videos[:8] = units(0.5 * topics[:8] + gap)
    segment = make_segment([np.stack([video, video]) for video in videos])

    def queries(rows: NDArray[np.int64], number: int) -> NDArray[np.float32]:
        noise = 0.25 * np.random.default_rng(number).normal(size=(len(rows), SIZE))
        return units(topics[rows] + noise + (gap if hub else 0))

    return [segment], queries


@pytest.mark.parametrize("hub", [True, False])
def test_it_is_on_only_where_it_helps_on_val(hub: bool) -> None:
    segments, queries = hubby_world(hub=hub)
    random = np.random.default_rng(3)
    train, asked = random.integers(0, 60, 300), random.integers(60, 120, 200)
    bank = Bank(queries(train, 1), [f"v{row}" for row in train], "key")
    banks = {by: combine([segment_hubs(segments[0], bank, by)], QB_NORM_SCALE) for by in BY}
    val = Val(queries(asked, 2), [f"v{row}" for row in asked])
    normalise = measure_on_val(segments, banks, val)
    measured = normalise["by"]["moment"]["val"]
    similarity = dense(segments, val.embeddings, "moment")
    plain, normalised = (
        100 * (scores.argmax(axis=1) == asked).mean()
        for scores in (similarity, qb_norm(similarity, banks["moment"]))
    )
    assert (measured["R@1"], measured["normalised_R@1"]) == pytest.approx((plain, normalised))
    assert measured["captions"] == 200 and normalise["candidates"] == 120
    assert normalise["helps"] == normalise["by"]["moment"]["helps"] == hub
    assert (measured["low"] > 0) == hub
    if hub:
        assert normalised > plain + 5
    assert measured["low"] <= normalised - plain <= measured["high"]
    line, turned = describe({**normalise, "bank": 300}), "on" if hub else "off"
    what = "normalisation against hubs (300 captions, 120 videos)"
    assert line.startswith(f"{what}: {turned}, t2v R@1 on val {plain:.1f} -> {normalised:.1f} (gain ")
    assert line.endswith("200 captions)")


def test_a_gain_within_the_noise_is_none() -> None:
    segments, queries = hubby_world(hub=True)
    random = np.random.default_rng(3)
    train, asked = random.integers(0, 60, 300), np.array([60, 61, 62, 63])
    bank = Bank(queries(train, 1), [""] * 300, "key")
    banks = {by: combine([segment_hubs(segments[0], bank, by)], QB_NORM_SCALE) for by in BY}
    # Four captions of four videos, one of which is found better: chance does that often.
    for number in range(50):
        val = Val(queries(asked, number), [f"v{row}" for row in asked])
        measured = measure_on_val(segments, banks, val)["by"]["moment"]
        if measured["val"]["normalised_R@1"] == measured["val"]["R@1"] + 25:
            assert measured["helps"] is False
            return
    pytest.fail("no such four captions")


def test_the_bank_and_val_are_bounded_and_stay_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[int]] = []

    def noted(positions: list[int]) -> NDArray[np.float32]:
        asked.append(positions)
        return embed(positions)

    monkeypatch.setattr(make_hubs, "BANK_CAPTIONS", 30)
    monkeypatch.setattr(make_hubs, "VAL_CAPTIONS", 4)
    rows = captions_of(100, val=[f"v{row}" for row in range(20)])
    first = make_index(tmp_path, some_segments(), [*rows, *rows[:10]], embed=noted)  # ten are said twice
    assert first["normalise"]["bank"] == 30 and first["normalise"]["by"]["moment"]["val"]["captions"] == 4
    bank, val = asked
    assert len({rows[position % 120][1] for position in bank}) == 30 and len(val) == 4
    asked.clear()
    make_index(tmp_path, some_segments(), rows, embed=noted)
    assert asked == [bank, val]
    asked.clear()
    make_index(tmp_path, some_segments(), [*rows, ("v1", "one more", "train")], embed=noted)
    assert len({*asked[0]} & {*bank}) >= 29


def test_the_search_side_imports_neither_torch_nor_scipy() -> None:
    heavy = "{'torch', 'scipy', 'pandas', 'h5py'} & {*sys.modules}"
    code = f"import sys, svb.retrieve.searching.hubs, svb.retrieve.searching.ivf; print(*({heavy}))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []
