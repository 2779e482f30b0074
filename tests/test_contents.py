"""The same content under several names is decoded once; names that changed, came and went are told apart."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import clips
import numpy as np
import pytest
from extraction import FRAMES, features, num_extracted, run, statuses, toy

from svb.data.feature_store import FeatureStore, verify_store
from svb.data.feature_store_writer import FeatureStoreWriter
from svb.data.rows import VideoRecord, VideoRows
from svb.errors import StoreError
from svb.extract.compute.pipeline import Contents, Pipeline
from svb.extract.decode.decoder import FrameChunk, VideoProperties
from svb.extract.plan import PlannedVideo
from svb.extract.pool.worker import DUPLICATE, Finished, Started

pytestmark = pytest.mark.usefixtures("toy_backbones")


def frames_decoded(videos: Path | list[Path], out: Path, **options: object) -> tuple[int, list[str]]:
    """Extract; returns how many frames went to the backbones, and the messages."""
    frames: list[int] = [0]
    messages = run(videos, out, on_progress=lambda progress: frames.append(progress.frames_done), **options)
    return frames[-1], messages


class TestRenamed:
    @pytest.mark.parametrize(
        ("names", "is_gone", "words"),
        [
            (["z"], True, "1 renamed, 0 duplicates"),
            (["y", "z"], True, "1 renamed, 1 duplicates"),
            (["z"], False, "0 renamed, 1 duplicates"),
        ],
    )
    def test_new_names_of_a_file_are_not_decoded(
        self, names: list[str], is_gone: bool, words: str, folder: Path, out: Path
    ) -> None:
        before = features(out)
        for name in names:
            shutil.copy(folder / "a.mp4", folder / f"{name}.mp4")
        if is_gone:
            (folder / "a.mp4").unlink()
        frames, messages = frames_decoded(folder, out)
        assert frames == 0 and f"not decoded, because their content is known: {words}" in messages
        after = features(out)
        assert set(after) == {*before, *names} - ({"a"} if is_gone else set())
        for name in names:
            assert after[name].tobytes() == before["a"].tobytes()
            assert FeatureStore(out).records[name].source_path == str(folder / f"{name}.mp4")
        assert verify_store(out) == []
        assert run(folder, out)[-1].startswith("nothing to do")

    def test_a_file_that_was_only_touched_is_not_decoded_again(self, folder: Path, out: Path) -> None:
        os.utime(folder / "a.mp4", ns=(1, 1))
        frames, messages = frames_decoded(folder, out)
        assert frames == 0 and not any("known" in message for message in messages)
        assert FeatureStore(out).records["a"].mtime_ns == 1
        assert run(folder, out)[-1].startswith("nothing to do")

    def test_a_file_from_after_2262_is_extracted_and_known_again(self, folder: Path, tmp_path: Path) -> None:
        """Its time of change in nanoseconds is more than an int64 holds."""
        os.utime(folder / "b.mkv", (15_000_000_000, 15_000_000_000))
        if (folder / "b.mkv").stat().st_mtime_ns < 2**63:
            pytest.skip("this file system holds no time after 2262")
        run(folder, tmp_path / "out")
        assert statuses(tmp_path / "out")["b"] == "ok"
        assert run(folder, tmp_path / "out")[-1].startswith("nothing to do")

    def test_old_content_under_a_new_name_is_not_mixed_up_with_the_new(self, folder: Path, out: Path) -> None:
        before = features(out)
        (folder / "a.mp4").rename(folder / "old-a.mp4")
        clips.make_clip(folder / "a.mp4", seconds=3, filters="hflip")
        run(folder, out)
        after = features(out)
        assert after["old-a"].tobytes() == before["a"].tobytes()
        assert len(after["a"]) == 3 and len(before["a"]) == 1


class TestDuplicates:
    @pytest.mark.parametrize(
        "end", [Finished("ok", "", "pyav", content_hash="same"), Finished("decoder_crash", "killed", "pyav")]
    )
    def test_a_copy_that_stands_before_its_original_is_recorded_too(self, end: Finished) -> None:
        """The workers hash the second file first, so that the first is its copy. One that is killed says none."""
        held: dict[str, tuple[VideoRecord, Mapping[str, VideoRows]]] = {}
        records = SimpleNamespace(add=lambda record, rows: held.update({record.video_id: (record, rows)}))
        contents = Contents([], [], [], held.__getitem__, lambda record: None)
        pipeline = Pipeline([toy()], 4, records, contents=contents)
        copy, original = PlannedVideo("a", Path("a.mp4")), PlannedVideo("b", Path("b.mp4"))
        assert contents.is_wanted(1, original, "same") and not contents.is_wanted(0, copy, "same")
        for position, message in (
            (0, Started(copy)),
            (1, Started(original)),
            (0, Finished(DUPLICATE, "", "pyav", content_hash="same")),
            (1, VideoProperties(1.0, 10.0, 64, 48, 0, "h264")),
            (1, FrameChunk(np.zeros((2, 48, 64, 3), np.uint8), np.arange(2.0))),
            (1, end),
        ):
            pipeline.take(position, message)
        pipeline.finish()
        assert sorted(held) == ["a", "b"]
        assert {(record.status, record.content_hash) for record, _ in held.values()} == {(end.status, "same")}

    def test_a_run_that_loses_a_video_says_so(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        add = FeatureStoreWriter.add

        def losing(writer: FeatureStoreWriter, record: VideoRecord, rows: Mapping[str, VideoRows]) -> None:
            if record.video_id != "b":
                add(writer, record, rows)

        with monkeypatch.context() as patch:
            patch.setattr(FeatureStoreWriter, "add", losing)
            with pytest.raises(StoreError, match=r"1 of 4 planned videos have no record in .*: b - expected one"):
                run(folder, tmp_path / "out")
        run(folder, tmp_path / "out")
        assert set(features(tmp_path / "out")) == {"a", "b", "c", "deep/d"}

    def test_each_content_is_decoded_once(self, folder: Path, toy_store: Path, tmp_path: Path) -> None:
        plain = features(toy_store)
        for name in ("copy1.mp4", "copy2.mp4", "deep/copy3.mp4"):
            shutil.copy(folder / "a.mp4", folder / name)
        frames, messages = frames_decoded(folder, tmp_path / "out", workers=3)
        assert frames == sum(map(len, plain.values()))
        assert "not decoded, because their content is known: 0 renamed, 3 duplicates" in messages
        rows = features(tmp_path / "out")
        assert {rows[name].tobytes() for name in ("copy1", "copy2", "deep/copy3")} == {rows["a"].tobytes()}
        assert rows["a"].tobytes() == plain["a"].tobytes()
        paths = {record.source_path for record in FeatureStore(tmp_path / "out").records.values()}
        assert len(paths) == 7

    def test_copies_of_a_failure_fail_alike_and_are_tried_again_together(
        self, folder: Path, tmp_path: Path
    ) -> None:
        for name, content in (("x.mp4", "no video"), ("y.mp4", "no video"), ("z.mp4", "")):
            (folder / name).write_text(content)
        for retry, num_tried, tries in ((None, 7, (1, 1, 1)), ("empty", 1, (1, 1, 2)), ("all", 3, (2, 2, 3))):
            options = {"retry_failed": retry} if retry else {}
            assert num_extracted(folder, tmp_path / "out", **options) == num_tried
            records = FeatureStore(tmp_path / "out").records
            found = [(records[name].status, records[name].tries) for name in ("x", "y", "z")]
            assert found == list(zip(("unreadable", "unreadable", "empty"), tries, strict=True))


class TestVanished:
    @pytest.mark.parametrize("videos_a_shard", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 256))])
    def test_what_is_gone_is_kept_until_it_is_pruned(
        self, folder: Path, tmp_path: Path, videos_a_shard: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # A removal must hold back what it removes for as long as that is in any shard.
        monkeypatch.setattr("svb.data.feature_store_writer.SHARD_VIDEOS", videos_a_shard)
        run(folder, tmp_path / "out")
        (folder / "a.mp4").rename(tmp_path / "a.mp4")
        (folder / "deep" / "d.avi").unlink()
        messages = run(folder, tmp_path / "out")
        words = f"2 files are gone, first {folder / 'a.mp4'}: their features are kept; --prune takes them out"
        assert any(message.startswith(words) for message in messages)
        assert set(statuses(tmp_path / "out")) == {"a", "b", "c", "deep/d"}
        messages = run(folder, tmp_path / "out", prune=True)
        assert f"2 files are gone, first {folder / 'a.mp4'}: taken out of the store" in messages
        assert set(statuses(tmp_path / "out")) == {"b", "c"}
        clips.make_clip(folder / "new.mp4", filters="negate")
        run(folder, tmp_path / "out", prune=True)
        assert set(statuses(tmp_path / "out")) == set(features(tmp_path / "out")) == {"b", "c", "new"}
        assert verify_store(tmp_path / "out") == []
        (tmp_path / "a.mp4").rename(folder / "a.mp4")  # it comes back
        assert frames_decoded(folder, tmp_path / "out")[0] == 1
        assert set(statuses(tmp_path / "out")) == {"a", "b", "c", "new"}

    def test_videos_of_other_folders_are_left_alone(self, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "other").mkdir()
        clips.make_clip(tmp_path / "other" / "o.mp4", filters="negate")
        run([folder, tmp_path / "other"], tmp_path / "out")
        (tmp_path / "other" / "o.mp4").unlink()
        messages = run(folder, tmp_path / "out", prune=True)
        assert not any("are gone" in message for message in messages)
        assert "o" in statuses(tmp_path / "out")


def test_times_of_their_own_are_not_shared_by_copies(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "deep" / "d.avi", folder / "e.avi")
    (tmp_path / "times.csv").write_text("video_id,time_seconds\ndeep/d,0.5\ne,1.5\ne,2.5\n")
    messages = run(folder, tmp_path / "out", times=tmp_path / "times.csv")
    assert messages[0] == "3 videos are not in the table of times, first 'a': left out"
    loaded = FeatureStore(tmp_path / "out").load(FRAMES)
    assert loaded.video_ids == ["deep/d", "e"]
    np.testing.assert_allclose(loaded.times_seconds, [0.5, 1.5, 2.5])
