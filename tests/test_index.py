"""`svb index`: what an index holds, and that every commit leaves it whole."""

from __future__ import annotations

import dataclasses
import itertools
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import synthetic
from conftest import RunSvb
from indexes import (
    CONFIG,
    MOMENTS,
    Kept,
    add,
    content,
    edit_manifest,
    files_of,
    frames_of,
    index,
    only_segment,
    open_index,
    remove,
)

from svb.data.description import publish_description
from svb.data.feature_store import FeatureStore
from svb.data.publish import FolderLock
from svb.data.rows import FrameFeatures
from svb.errors import InputError, MismatchError, StoreError
from svb.retrieve.indexing import embed_segment, index_writer
from svb.retrieve.indexing.verify_index import verify_index
from svb.retrieve.stored import manifest as manifest_module
from svb.retrieve.stored.manifest import read_manifest, read_whole
from svb.retrieve.stored.segment import Segment, StringColumn, open_segments
from svb.train.run import train


def fail(*arguments: Any, **options: Any) -> Any:
    raise OSError("the disk is full")


@pytest.fixture(scope="module")
def other(indexed_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another run on the same store."""
    config = dataclasses.replace(CONFIG, seed=1, embedding_size=8)
    task = (indexed_run.parent / "features", indexed_run.parent / "captions.h5")
    return train(*task, tmp_path_factory.mktemp("other") / "run", config)


class TestContent:
    """What an index holds."""

    def test_all_videos_with_embeddings_of_length_1(self, built_index: Path, indexed_run: Path) -> None:
        segment = only_segment(built_index)
        store = FeatureStore(indexed_run.parent / "features")
        assert segment.video_ids.tolist() == store.video_ids
        assert segment.content_hashes.tolist() == [store.records[v].content_hash for v in store.video_ids]
        assert segment.duration_seconds.tolist() == [store.records[v].duration_seconds for v in store.video_ids]
        for embeddings in (segment.video_embeddings, segment.moment_embeddings):
            np.testing.assert_allclose(np.linalg.norm(embeddings.astype(np.float64), axis=1), 1, atol=1e-3)

    def test_moments_lie_within_the_video_and_cover_every_frame(self, indexed_run: Path, tmp_path: Path) -> None:
        lengths = [1, 2, 3, 9, 30]
        durations = {"v01": 0.2, "v02": 1.5, "v09": float("nan"), "v30": 29.2}
        videos = {f"v{length:02}": frames_of(length, length) for length in lengths}
        store = synthetic.make_store(tmp_path / "features", videos, durations_seconds=durations)
        for seconds, stride in ((4.0, 2.0), (1.0, 1.0), (2.5, 0.7), (100.0, 3.0)):
            options = {"moment_seconds": seconds, "moment_stride_seconds": stride, "rebuild": True}
            segment = only_segment(index(indexed_run, tmp_path / "index", store=store, **options))
            assert math.isnan(segment.duration_seconds[lengths.index(9)])
            for video, length in enumerate(lengths):
                begins, ends = segment.moment_seconds[slice(*segment.moment_offsets[video : video + 2])].T
                end = durations.get(f"v{length:02}", length)
                assert (begins < ends).all() and (ends - begins <= seconds + 1e-9).all() and begins[0] == 0
                assert (ends <= (length if np.isnan(end) else end) + 1e-6).all()
                assert np.diff(begins) == pytest.approx(stride)
                for time_seconds in range(length):
                    assert ((begins - 1e-6 <= time_seconds) & (time_seconds < ends)).any(), (length, time_seconds)

    def test_one_moment_as_long_as_the_video_is_the_video(self, indexed_run: Path, tmp_path: Path) -> None:
        segment = only_segment(index(indexed_run, tmp_path / "index", moment_seconds=1000))
        np.testing.assert_allclose(segment.moment_embeddings, segment.video_embeddings, atol=1e-3)

    def test_the_same_run_gives_the_same_index(self, indexed_run: Path, built_index: Path, tmp_path: Path) -> None:
        again = index(indexed_run, tmp_path / "index", **MOMENTS)
        assert (again / "manifest.json").read_bytes() == (built_index / "manifest.json").read_bytes()
        segment = only_segment(again)  # opened without reading vectors
        assert all(isinstance(a.base, np.memmap) for a in (segment.video_embeddings, segment.moment_embeddings))


@pytest.mark.parametrize("strings", [[], [""], ["a", "", "ünïcödé 🎬", "x" * 1000], ["", ""]])
def test_a_column_of_strings_comes_back(strings: list[str], tmp_path: Path) -> None:
    StringColumn.of(strings).write(tmp_path, "name")
    column = StringColumn.open(tmp_path, "name")
    assert column.tolist() == list(column) == strings
    assert [column[row] for row in range(len(column))] == strings
    for row in (-1, len(strings)):
        with pytest.raises(IndexError, match=f"row {row} of a column"):
            column[row]


class TestUsage:
    """What means nothing is refused before anything is written."""

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ("--latency-budget 0ms", "--latency-budget got '0ms' - expected more than zero"),
            ("--latency-budget 100", "--latency-budget got '100' - expected a time with its unit"),
            ("--latency-budget fast", "expected a time with its unit, such as 100ms or 0.1s"),
            ("--latency-budget nanms", "expected"),
            ("--watch-seconds 5", "got --watch-seconds 5 without --watch"),
            ("--watch --watch-seconds 0", "watch_seconds is 0.0 - expected a number above 0"),
            ("--pool a.txt --no-pools", "got --pool and --no-pools - give one of them"),
            ("--metadata a.csv --no-metadata", "got --metadata and --no-metadata - give one of them"),
            ("--moment-seconds 0", "expected"),
            ("--moment-seconds nan", "expected"),
            ("--moment-stride-seconds 0", "expected"),
            ("--moment-stride-seconds nan", "expected"),
            ("--moment-seconds 2 --moment-stride-seconds 3", "expected"),
        ],
    )
    def test_options(self, indexed_run: Path, tmp_path: Path, run_svb: RunSvb, arguments: str, words: str) -> None:
        ran = run_svb("index", indexed_run, "-o", tmp_path / "index", *arguments.split())
        assert ran.exit_code == 2 and words in ran.stderr and not (tmp_path / "index").exists()

    @pytest.mark.parametrize("option", ["out", "metadata", "pools"])
    def test_a_path_that_a_manifest_cannot_note(self, indexed_run: Path, tmp_path: Path, option: str) -> None:
        path = tmp_path / "table\udcff.csv"
        path.write_text("video_id,place\nx,Rome\n")
        options: dict[str, Any] = {"out": tmp_path / "index"}
        options[option] = (path,) if option == "pools" else path
        with pytest.raises(InputError, match=r"csv' is not UTF-8, which an index cannot store - rename"):
            index(indexed_run, **options)
        assert not (tmp_path / "index").exists()

    def test_a_file_where_the_index_should_be_and_no_run(self, indexed_run: Path, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="is neither a run"):
            index(tmp_path, tmp_path / "index")
        assert not (tmp_path / "index").exists()
        (tmp_path / "index").write_text("mine")
        with pytest.raises(InputError, match="index is a file - expected a folder for the index"):
            index(indexed_run, tmp_path / "index")
        assert (tmp_path / "index").read_text() == "mine"


class TestSegments:
    """Memory and loss are bounded by a segment: it is committed by itself."""

    def test_each_is_committed_and_a_run_that_fails_goes_on(
        self, indexed_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, embedded: list[str]
    ) -> None:
        out, commits = tmp_path / "index", []
        monkeypatch.setattr(embed_segment, "SEGMENT_VIDEOS", 30)
        monkeypatch.setattr(index_writer, "choose_merges", lambda segments: [])
        commit = index_writer.commit

        def check(folder: Path, manifest: Mapping[str, Any]) -> None:
            if len(commits) == 2:
                raise OSError("the disk is full")
            commit(folder, manifest)
            assert verify_index(folder) == []
            commits.append((len(content(folder)), manifest["generation"]))

        monkeypatch.setattr(index_writer, "commit", check)
        with pytest.raises(OSError, match="the disk is full"):
            index(indexed_run, out)
        assert commits == [(30, 1), (60, 2)] and verify_index(out) == [] and len(content(out)) == 60
        monkeypatch.setattr(index_writer, "commit", commit)
        embedded.clear()
        index(indexed_run, out)
        assert sorted(embedded) == [f"clip{number:03}" for number in range(60, 80)]
        assert [segment.num_videos for segment in open_index(out)] == [30, 30, 20]
        assert read_manifest(out)["captions"] and read_manifest(out)["heads"]

    def test_a_run_that_fails_at_its_end_is_finished_by_the_next(
        self, indexed_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, embedded: list[str]
    ) -> None:
        (tmp_path / "table.csv").write_text("video_id,place\nclip000,Rome\n")
        with monkeypatch.context() as patch, pytest.raises(OSError, match="the disk is full"):
            patch.setattr("svb.retrieve.indexing.index_parts.publish_metadata", fail)
            index(indexed_run, tmp_path / "index", metadata=tmp_path / "table.csv")
        manifest = read_manifest(tmp_path / "index")
        assert manifest["videos"] == 80 and manifest["metadata"] == []
        embedded.clear()
        index(indexed_run, tmp_path / "index")
        assert len(read_manifest(tmp_path / "index")["metadata"]) == 1 and embedded == []

    @pytest.mark.parametrize(
        ("limit", "value", "sizes"),
        [("SEGMENT_VIDEOS", 32, [32, 32, 16]), ("SEGMENT_BYTES", 1, [1] * 80), ("SEGMENT_MOMENTS", 1, [1] * 80)],
    )
    def test_limits(
        self, indexed_run: Path, monkeypatch: pytest.MonkeyPatch, limit: str, value: int, sizes: list[int]
    ) -> None:
        monkeypatch.setattr(embed_segment, limit, value)
        store = FeatureStore(indexed_run.parent / "features")
        windows = embed_segment.MomentWindows(4, 2)
        batches = list(embed_segment.embedding_batches(store, synthetic.BACKBONE, store.video_ids, windows))
        assert [len(batch) for batch in batches] == sizes
        assert sorted(itertools.chain(*batches)) == store.video_ids

    def test_merging_changes_no_video(
        self, indexed_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(embed_segment, "SEGMENT_VIDEOS", 7)
        with monkeypatch.context() as patch:
            patch.setattr(index_writer, "choose_merges", lambda segments: [])
            out = index(indexed_run, tmp_path / "index")
            before = content(out)
            assert len(open_index(out)) == 12
        monkeypatch.setattr(index_writer, "BLOCK_ROWS", 10)
        index(indexed_run, out)
        assert len(open_index(out)) == 1 and content(out) == before and verify_index(out) == []
        assert len(list((out / "segments").iterdir())) == 1

    def test_a_segment_with_many_deletions_is_copied_without_them(self, kept: Kept) -> None:
        (key,) = (entry["key"] for entry in read_manifest(kept.out)["segments"])
        remove(kept.store, *(f"clip{number:03}" for number in range(5)))
        kept.update(prune=True)
        (entry,) = read_manifest(kept.out)["segments"]
        assert entry["key"] == key and entry["deleted"]["videos"] == 5
        remove(kept.store, *(f"clip{number:03}" for number in range(5, 30)))
        kept.update(prune=True)
        (entry,) = read_manifest(kept.out)["segments"]
        assert entry["key"] != key and entry["deleted"] is None and entry["videos"] == 50
        assert not list((kept.out / "tombstones").iterdir())

    def test_there_are_few_segments_and_rows_are_seldom_copied(self) -> None:
        for seed in range(20):
            random, sizes, moved = np.random.default_rng(seed), list[int](), 0
            for _ in range(300):
                sizes.append(int(random.integers(1, 50)))
                for begin, end in reversed(index_writer.choose_merges([of_size(size) for size in sizes], 2000)):
                    moved += sum(sizes[begin:end])
                    sizes[begin:end] = [sum(sizes[begin:end])]
                small = [size for size in sizes if size < 2000]
                assert small == sizes[len(sizes) - len(small) :]
                assert all(size > sum(small[s + 1 :]) for s, size in enumerate(small) if s + 1 < len(small))
            assert moved <= sum(sizes) * math.log2(2000) and max(sizes) < 2 * 2000
        full = [of_size(size) for size in (100, 100, 5, 100, 1, 2)]  # are left alone
        assert index_writer.choose_merges(full, 100) == [(4, 6)] and index_writer.choose_merges([], 100) == []


def moments_of(times: Sequence[float], duration: float, seconds: float, stride: float) -> list[tuple[float, float]]:
    """Return the moments that `svb index` makes of frames at some times."""
    loaded = FrameFeatures(
        ["a"], np.zeros((len(times), 2), np.float16), np.array(times, np.float64), np.array([0, len(times)])
    )
    rows, offsets, found = embed_segment._moments(loaded, [duration], embed_segment.MomentWindows(seconds, stride))
    assert offsets.tolist() == [0, len(rows)]
    for (first, number), (begin, _) in zip(rows.tolist(), found.tolist(), strict=True):
        inside = [place for place, time in enumerate(times) if begin - 1e-6 <= time < begin + seconds - 1e-6]
        assert inside == list(range(first, first + number))
    return [(begin, end) for begin, end in found.tolist()]


def test_every_window_that_has_a_frame_is_a_moment() -> None:
    random = np.random.default_rng(0)
    for _ in range(300):
        stride = float(random.uniform(0.2, 3))
        seconds = stride * float(random.uniform(1, 4))
        times = np.sort(random.uniform(5, 5 + random.uniform(1, 40), random.integers(1, 12))).round(2)
        end = embed_segment._end_seconds(times, 0.0)
        begins = [times[0] + n * stride for n in range(200)]
        # The last window is the first that reaches the end.
        last = next(n for n, begin in enumerate(begins) if begin + seconds >= end - 1e-9)
        expected = [
            begin
            for begin in begins[: last + 1]
            if any(begin - 1e-6 <= time < begin + seconds - 1e-6 for time in times)
        ]
        found = moments_of(times.tolist(), 0.0, seconds, stride)
        assert [begin for begin, _ in found] == pytest.approx(expected)


def test_times_that_are_far_off_or_all_the_same_make_moments_too() -> None:
    assert moments_of([0, 1, 1e10], 0.0, 4, 2)[0] == (0, 4) and len(moments_of([0, 1, 1e10], 0.0, 4, 2)) < 5
    for times in ([0.0], [0.0, 0.0], [7.5, 7.5, 7.5]):
        assert moments_of(times, 0.0, 4, 2) == [(times[0], times[0] + embed_segment.SHORTEST_SECONDS)]


def of_size(num_moments: int) -> Any:
    """Return what choosing merges looks at, of a segment of videos of one moment."""
    return SimpleNamespace(
        num_moments=num_moments,
        num_videos=num_moments,
        moment_offsets=np.arange(num_moments + 1),
        deleted=np.arange(0),
    )


class TestCommits:
    """The manifest is the commit point, and what it names is there."""

    def test_a_rebuild_that_fails_leaves_the_old_index(
        self, own_index: Path, indexed_run: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = content(own_index)
        with monkeypatch.context() as patch, pytest.raises(OSError, match="the disk is full"):
            patch.setattr(manifest_module, "publish_description", fail)
            index(indexed_run, own_index, moment_seconds=1, moment_stride_seconds=1, rebuild=True)
        assert content(own_index) == before and verify_index(own_index) == []
        index(indexed_run, own_index)
        assert {len(list((own_index / part).iterdir())) for part in ("segments", "captions", "heads")} == {1}

    def test_an_index_that_is_committed_while_it_is_opened_is_opened_again(
        self, own_index: Path, indexed_run: Path
    ) -> None:
        manifests = []

        def open_late(manifest: dict[str, Any]) -> list[Segment]:
            manifests.append(manifest["generation"])
            if len(manifests) == 1:
                index(indexed_run, own_index, moment_seconds=1, rebuild=True)
            return open_segments(own_index, manifest)

        (segment,) = read_whole(own_index, open_late)
        assert manifests[1] > manifests[0] and (np.diff(segment.moment_seconds).max()) <= 1

    @pytest.mark.parametrize("damage", ["cut", "gone"])
    def test_a_damaged_segment_is_made_again(self, kept: Kept, damage: str) -> None:
        add(kept.store, {"new": frames_of(1)})
        kept.update()
        before = content(kept.out)
        first, second = read_manifest(kept.out)["segments"]
        path = kept.out / "segments" / second["key"] / "moment_embeddings.npy"
        if damage == "cut":
            path.write_bytes(path.read_bytes()[:-1])
        else:
            shutil.rmtree(path.parent)
        kept.update()
        assert content(kept.out) == before
        assert read_manifest(kept.out)["segments"] == [first, second]
        assert any(f"segments/{second['key']} is damaged" in line and "its 1 videos" in line for line in kept.said)
        assert f"+1 new ~0 changed >0 renamed -0 gone ={len(before) - 1} same" in kept.said

    def test_a_segment_that_cannot_be_read_now_is_not_given_up(
        self, own_index: Path, indexed_run: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = read_manifest(own_index)
        monkeypatch.setattr("svb.retrieve.stored.segment.require_sizes", fail)
        with pytest.raises(StoreError, match="the disk is full"):
            index(indexed_run, own_index)
        assert read_manifest(own_index) == before

    def test_building_into_a_folder_removes_nothing_of_others(self, indexed_run: Path, tmp_path: Path) -> None:
        mine = tmp_path / "captions" / "mine"
        mine.mkdir(parents=True)
        (tmp_path / "captions" / "notes.txt").write_text("keep")
        index(indexed_run, tmp_path)
        index(indexed_run, tmp_path, moment_seconds=1, rebuild=True)
        assert mine.is_dir() and (tmp_path / "captions" / "notes.txt").read_text() == "keep"

    def test_there_is_one_writer(self, own_index: Path, indexed_run: Path, run_svb: RunSvb) -> None:
        lock = FolderLock(own_index)
        lock.take()
        before = files_of(own_index)
        ran = run_svb("index", indexed_run, "-o", own_index)
        assert ran.exit_code == 1
        assert f"cannot lock {own_index} for writing - another process is writing to it" in ran.stderr
        assert files_of(own_index) == before and len(content(own_index)) == 80  # readers need no lock
        lock.close()
        assert run_svb("index", indexed_run, "-o", own_index).exit_code == 0


class TestAnotherModel:
    """What two models made is never put into one index, and never wiped in silence."""

    def test_it_is_refused_with_the_two_ways_out(
        self, own_index: Path, other: Path, tmp_path: Path, run_svb: RunSvb
    ) -> None:
        before = files_of(own_index)
        ran = run_svb("index", other, "-o", own_index)
        assert ran.exit_code == 1 and files_of(own_index) == before
        assert f"{own_index} was made with another model or other moments (" in ran.stderr
        assert "model.config.embedding_size: stored 16, wanted 8" in ran.stderr
        assert "model.weights: stored " in ran.stderr
        assert "write to another folder with -o, or make the index again with --rebuild" in ran.stderr
        assert run_svb("index", other, "-o", tmp_path / "another").exit_code == 0
        assert only_segment(tmp_path / "another").embedding_size == 8
        generation = read_manifest(own_index)["generation"]
        assert run_svb("index", other, "-o", own_index, "--rebuild").exit_code == 0
        assert only_segment(own_index).embedding_size == 8 and verify_index(own_index) == []
        assert read_manifest(own_index)["generation"] == generation + 1  # in one commit

    def test_other_moments_are_refused_and_those_of_before_need_not_be_named(
        self, own_index: Path, indexed_run: Path
    ) -> None:
        before = files_of(own_index)
        for options in ({"moment_seconds": 4.0}, {"moment_stride_seconds": 2.0}):
            with pytest.raises(MismatchError, match=r"moments\.stride_seconds: stored 1\.0, wanted 2\.0"):
                index(indexed_run, own_index, **options)
        assert files_of(own_index) == before
        index(indexed_run, own_index)
        index(indexed_run, own_index, **MOMENTS)
        assert read_manifest(own_index)["moments"] == {"seconds": 3.0, "stride_seconds": 1.0}

    def test_a_run_that_was_moved_is_the_same(
        self, indexed_run: Path, own_index: Path, tmp_path: Path, embedded: list[str]
    ) -> None:
        index(Path(shutil.copytree(indexed_run, tmp_path / "moved")), own_index)
        assert embedded == []

    def test_a_format_of_before_is_refused_and_rebuilt(
        self, own_index: Path, indexed_run: Path, run_svb: RunSvb
    ) -> None:
        manifest = {key: value for key, value in read_manifest(own_index).items() if key != "format_version"}
        publish_description(own_index / "manifest.json", manifest)
        for command in (("index", indexed_run, "-o", own_index), ("verify", own_index), ("info", own_index)):
            ran = run_svb(*command)
            assert ran.exit_code == 1
            assert "manifest.json has format 1 - this svb reads format 2: make the index again" in ran.stderr
            assert f"`svb index --rebuild -o {own_index}`" in ran.stderr
        assert run_svb("index", indexed_run, "-o", own_index, "--rebuild").exit_code == 0
        assert verify_index(own_index) == []
        edit_manifest(own_index, format_version=3)
        with pytest.raises(StoreError, match="has format 3 - this svb reads up to 2; upgrade svb"):
            read_manifest(own_index)

    def test_parts_of_older_versions_are_ignored_and_left_out(self, own_index: Path, indexed_run: Path) -> None:
        (own_index / "hubs" / ("0" * 16)).mkdir(parents=True)
        hubs = [{"key": "0" * 16, "files": {}, "sizes": {}, "segment": "of old", "bank": "of captions"}]
        edit_manifest(own_index, hubs=hubs, normalise={"helps": True}, generation=7)
        before = content(own_index)
        assert verify_index(own_index) == [] and len(before) == 80
        index(indexed_run, own_index)
        manifest = read_manifest(own_index)
        assert manifest["generation"] == 8 and not {"hubs", "normalise"} & set(manifest)
        assert content(own_index) == before and not list((own_index / "hubs").iterdir())
