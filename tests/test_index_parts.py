"""The parts of an index beside its segments."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import synthetic
from conftest import RunSvb
from indexes import files_of, index, touch
from messages import heard

from svb.data.caption_features import read_caption_features, write_caption_features
from svb.errors import InputError, Interrupted, ModelUnavailableError
from svb.retrieve.indexing.sidecars import SidecarWatch
from svb.retrieve.indexing.verify_index import verify_index
from svb.retrieve.stored.manifest import read_manifest
from svb.retrieve.stored.pools import open_pool


@pytest.mark.usefixtures("words_encoder")
class TestParts:
    """Captions, metadata and settings of the scan."""

    def pools(self, folder: Path) -> dict[str, int]:
        return {entry["name"]: entry["captions"] for entry in read_manifest(folder)["captions"]}

    def sidecar_captions(self, folder: Path) -> list[str]:
        entries = [entry for entry in read_manifest(folder)["captions"] if entry["kind"] == "sidecar"]
        return [caption for entry in entries for caption in open_pool(folder, entry).captions]

    @pytest.mark.parametrize("part", ["captions", "metadata", "heads"])
    @pytest.mark.parametrize("damage", ["cut", "gone"])
    def test_a_damaged_part_is_made_again(
        self, own_index: Path, indexed_run: Path, tmp_path: Path, part: str, damage: str, said: list[str]
    ) -> None:
        (tmp_path / "table.csv").write_text("video_id,place\nclip000,Rome\n")
        index(indexed_run, own_index, metadata=tmp_path / "table.csv")
        before, key = files_of(own_index), read_manifest(own_index)[part][0]["key"]
        file = max((own_index / part / key).iterdir(), key=lambda path: path.stat().st_size)
        if damage == "gone":
            file.unlink()
        else:
            file.write_bytes(file.read_bytes()[:-1])
        index(indexed_run, own_index)
        assert any("is damaged" in line and "making it again" in line for line in said)
        assert verify_index(own_index) == []
        assert set(files_of(own_index)) == set(before)

    def test_pools_are_added_kept_and_replaced(
        self,
        own_index: Path,
        indexed_run: Path,
        tmp_path: Path,
        said: list[str],
        embedded: list[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        mine, other = tmp_path / "mine.txt", tmp_path / "other.txt"
        mine.write_text("a dog\na cat\n")
        other.write_text("a boat\n")
        training = self.pools(own_index)
        index(indexed_run, own_index, pools=(mine, other))
        assert (
            self.pools(own_index) == {**training, "mine.txt": 2, "other.txt": 1} and verify_index(own_index) == []
        )
        before = files_of(own_index)
        index(indexed_run, own_index)
        assert files_of(own_index) == before
        with monkeypatch.context() as patch:  # what is embedded already is not embedded again
            patch.setattr("svb.retrieve.indexing.make_pools.file_pool", None)
            index(indexed_run, own_index, latency_budget_seconds=0.2)
        mine.write_text("a dog\na cat\na tree\n")
        index(indexed_run, own_index)
        assert self.pools(own_index)["mine.txt"] == 3
        mine.unlink()
        index(indexed_run, own_index)
        assert self.pools(own_index)["mine.txt"] == 3
        assert f"{mine} is gone: its captions stay in the index" in said
        index(indexed_run, own_index, pools=(other,))
        assert self.pools(own_index) == {**training, "other.txt": 1} and verify_index(own_index) == []
        with pytest.raises(InputError, match=r"mine\.txt"):
            index(indexed_run, own_index, pools=(mine,))
        assert embedded == []

    def test_sidecars_are_a_pool(
        self, indexed_run: Path, indexed_store: Path, own_index: Path, tmp_path: Path
    ) -> None:
        touch(indexed_store, "clip000", source_path=str(tmp_path / "clip000.mp4"))
        (tmp_path / "clip000.srt").write_text("1\n00:00:01,000 --> 00:00:02,000\na dog barks\n")
        index(indexed_run, own_index, store=indexed_store, sidecars=False)
        assert "sidecars" not in self.pools(own_index)
        index(indexed_run, own_index, store=indexed_store)  # as before
        assert "sidecars" not in self.pools(own_index)
        index(indexed_run, own_index, store=indexed_store, sidecars=True)
        assert self.pools(own_index)["sidecars"] == 1
        (tmp_path / "clip000.de.srt").write_text("1\n00:00:01,000 --> 00:00:02,000\nein Hund bellt\n")
        index(indexed_run, own_index, store=indexed_store)
        assert self.pools(own_index)["sidecars"] == 2 and verify_index(own_index) == []
        before = files_of(own_index)
        index(indexed_run, own_index, store=indexed_store)
        assert files_of(own_index) == before
        for path in tmp_path.glob("clip000.*srt"):
            path.unlink()
        index(indexed_run, own_index, store=indexed_store)
        assert "sidecars" not in self.pools(own_index)

    def test_sidecars_that_come_are_seen_by_a_watching_index(
        self, indexed_run: Path, indexed_store: Path, own_index: Path, tmp_path: Path
    ) -> None:
        folder = tmp_path / "videos"
        folder.mkdir()
        touch(indexed_store, "clip000", source_path=str(folder / "clip000.mp4"))
        srt, seen = folder / "clip000.srt", list[list[str]]()

        @heard
        def on_message(line: str) -> None:
            if " moments of " not in line:  # else a run has ended
                return
            seen.append(self.sidecar_captions(own_index))
            words = ("a dog barks", "a cat")
            if len(seen) > len(words):
                os.kill(os.getpid(), signal.SIGTERM)
            else:
                srt.write_text(f"1\n00:00:01,000 --> 00:00:02,000\n{words[len(seen) - 1]}\n")

        with pytest.raises(Interrupted):
            index(indexed_run, own_index, store=indexed_store, watch=True, watch_seconds=0.05)
        assert seen == [[], ["a dog barks"], ["a cat"]]

    def test_other_files_beside_the_videos_are_not_watched(self, indexed_store: Path, tmp_path: Path) -> None:
        folder = tmp_path / "videos"
        folder.mkdir()
        touch(indexed_store, "clip000", source_path=str(folder / "clip000.mp4"))
        watch = SidecarWatch(indexed_store)
        (folder / "recorder.txt").write_text("a line")
        before = watch.states()
        (folder / "recorder.txt").write_text("a line more")
        assert watch.states() == before
        (folder / "clip000.de.vtt").write_text("WEBVTT")
        assert watch.states() != before

    def test_a_text_encoder_that_was_away_makes_the_tower_when_it_is_back(
        self, own_index: Path, indexed_run: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def away(settings: object, device: object) -> None:
            raise ModelUnavailableError("the hub is away")

        with monkeypatch.context() as patch:
            patch.setattr("svb.retrieve.model.embedder.load_matching_text_encoder", away)
            for _ in range(2):
                index(indexed_run, own_index, latency_budget_seconds=0.2)
        assert [line for line in said if "tower" in line] == ["no text tower: the hub is away"] * 2
        said.clear()
        for _ in range(2):
            index(indexed_run, own_index)
        assert len([line for line in said if "was not exported" in line]) == 1

    def test_a_rebuild_goes_on_with_the_settings(
        self, indexed_run: Path, indexed_store: Path, own_index: Path, tmp_path: Path, run_svb: RunSvb
    ) -> None:
        mine, table = tmp_path / "mine.txt", tmp_path / "table.csv"
        mine.write_text("a dog\n")
        table.write_text("video_id,place\nclip000,Oslo\n")
        asked: dict[str, Any] = {"pools": (mine,), "metadata": table, "sidecars": False}
        asked |= {"moment_seconds": 3, "moment_stride_seconds": 0.5, "latency_budget_seconds": 0.3}
        index(indexed_run, own_index, store=indexed_store, rebuild=True, **asked)
        before = read_manifest(own_index)
        assert before["moments"] == {"seconds": 3, "stride_seconds": 0.5}
        index(indexed_run, own_index, store=indexed_store, rebuild=True)
        after = read_manifest(own_index)
        assert after["generation"] == before["generation"] + 1
        for name in ("inputs", "moments", "metadata", "captions", "segments"):
            assert after[name] == before[name]
        # What has gone since is not left out in silence.
        mine.unlink()
        with pytest.raises(InputError, match=r"mine\.txt, which the index was made with, is gone"):
            index(indexed_run, own_index, store=indexed_store, rebuild=True)
        table.unlink()
        with pytest.raises(InputError, match=r"table\.csv, .* is gone .* --no-metadata"):
            index(indexed_run, own_index, store=indexed_store, rebuild=True, no_pools=True)
        assert read_manifest(own_index) == after
        without = ("--no-pools", "--no-metadata")
        ran = run_svb("index", indexed_run, "-o", own_index, "--store", indexed_store, "--rebuild", *without)
        assert ran.exit_code == 0, ran.stderr
        assert "mine.txt" not in self.pools(own_index) and read_manifest(own_index)["metadata"] == []

    def test_pools_and_metadata_are_kept_and_can_be_taken_out_again(
        self, own_index: Path, indexed_run: Path, tmp_path: Path
    ) -> None:
        mine, table = tmp_path / "mine.txt", tmp_path / "table.csv"
        mine.write_text("a dog\n")
        table.write_text("video_id,place,year\nclip000,Oslo,2020\nclip001,Rome,2021\n")
        before = read_manifest(own_index)
        index(indexed_run, own_index, pools=(mine,), metadata=table)
        (entry,) = read_manifest(own_index)["metadata"]
        assert entry["columns"] == {"place": "text", "year": "number"} and verify_index(own_index) == []
        assert "mine.txt" in self.pools(own_index)
        table.unlink()
        index(indexed_run, own_index)
        assert read_manifest(own_index)["metadata"] == [entry]
        index(indexed_run, own_index, no_pools=True, no_metadata=True)
        after = read_manifest(own_index)
        for name in ("inputs", "captions", "metadata", "segments"):
            assert after[name] == before[name]
        assert verify_index(own_index) == [] and not list((own_index / "metadata").iterdir())

    def test_the_latency_budget_is_kept(
        self, own_index: Path, indexed_run: Path, run_svb: RunSvb, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("svb.retrieve.indexing.tune_ivf.seconds_a_query", lambda vectors, queries: 0.2)
        ran = run_svb("index", indexed_run, "-o", own_index, "--latency-budget", "250ms")
        assert ran.exit_code == 0 and "within the budget of 250 ms" in ran.stderr
        shutil.rmtree(own_index / "cache")
        ran = run_svb("index", indexed_run, "-o", own_index)
        assert "within the budget of 250 ms" in ran.stderr and (own_index / "cache" / "ivf.json").is_file()

    def test_other_captions_need_no_rebuild(
        self, own_index: Path, indexed_run: Path, tmp_path: Path, embedded: list[str]
    ) -> None:
        rows = [("clip000", "a dog", "train"), ("clip001", "a cat", "train")]
        path = synthetic.make_captions(tmp_path / "captions.h5", rows, np.eye(2, 20))
        made = read_caption_features(path)
        write_caption_features(path, dataclasses.replace(made, settings={**made.settings, "table_hash": "other"}))
        index(indexed_run, own_index, captions=path)
        assert self.pools(own_index) == {"training": 2} and embedded == []
