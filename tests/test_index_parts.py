"""The parts of an index beside its segments."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import synthetic
from conftest import RunSvb
from indexes import Kept, files_of, touch
from messages import heard

from svb.data.caption_features import read_caption_features, write_caption_features
from svb.errors import InputError, Interrupted, ModelUnavailableError
from svb.retrieve.indexing.sidecars import SidecarWatch
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
    def test_a_damaged_part_is_made_again(self, kept: Kept, tmp_path: Path, part: str, damage: str) -> None:
        (tmp_path / "table.csv").write_text("video_id,place\nclip000,Rome\n")
        kept.update(metadata=tmp_path / "table.csv")
        before, key = files_of(kept.out), read_manifest(kept.out)[part][0]["key"]
        file = max((kept.out / part / key).iterdir(), key=lambda path: path.stat().st_size)
        if damage == "gone":
            file.unlink()
        else:
            file.write_bytes(file.read_bytes()[:-1])
        kept.update()
        assert any("is damaged" in line and "making it again" in line for line in kept.said)
        assert set(files_of(kept.out)) == set(before)

    def test_pools_and_metadata_are_added_kept_replaced_and_taken_out(
        self, kept: Kept, tmp_path: Path, embedded: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        mine, other, table = tmp_path / "mine.txt", tmp_path / "other.txt", tmp_path / "table.csv"
        mine.write_text("a dog\na cat\n")
        other.write_text("a boat\n")
        table.write_text("video_id,place,year\nclip000,Oslo,2020\nclip001,Rome,2021\n")
        without, training = read_manifest(kept.out), self.pools(kept.out)
        kept.update(pools=(mine, other), metadata=table)
        assert self.pools(kept.out) == {**training, "mine.txt": 2, "other.txt": 1}
        (entry,) = read_manifest(kept.out)["metadata"]
        assert entry["columns"] == {"place": "text", "year": "number"}
        table.unlink()
        kept.update()
        assert read_manifest(kept.out)["metadata"] == [entry]
        before = files_of(kept.out)
        kept.update()
        assert files_of(kept.out) == before
        with monkeypatch.context() as patch:  # what is embedded already is not embedded again
            patch.setattr("svb.retrieve.indexing.make_pools.file_pool", None)
            kept.update(latency_budget_seconds=0.2)
        mine.write_text("a dog\na cat\na tree\n")
        kept.update()
        assert self.pools(kept.out)["mine.txt"] == 3
        mine.unlink()
        kept.update()
        assert self.pools(kept.out)["mine.txt"] == 3
        assert f"{mine} is gone: its captions stay in the index" in kept.said
        kept.update(pools=(other,))
        assert self.pools(kept.out) == {**training, "other.txt": 1}
        with pytest.raises(InputError, match=r"mine\.txt"):
            kept.update(pools=(mine,))
        kept.update(no_pools=True, no_metadata=True, latency_budget_seconds=0.1)
        for name in ("captions", "metadata", "segments"):
            assert read_manifest(kept.out)[name] == without[name]
        assert not list((kept.out / "metadata").iterdir()) and embedded == []

    def test_sidecars_are_a_pool(self, kept: Kept, tmp_path: Path) -> None:
        touch(kept.store, "clip000", source_path=str(tmp_path / "clip000.mp4"))
        (tmp_path / "clip000.srt").write_text("1\n00:00:01,000 --> 00:00:02,000\na dog barks\n")
        kept.update(sidecars=False)
        assert "sidecars" not in self.pools(kept.out)
        kept.update()  # as before
        assert "sidecars" not in self.pools(kept.out)
        kept.update(sidecars=True)
        assert self.pools(kept.out)["sidecars"] == 1
        (tmp_path / "clip000.de.srt").write_text("1\n00:00:01,000 --> 00:00:02,000\nein Hund bellt\n")
        kept.update()
        assert self.pools(kept.out)["sidecars"] == 2
        before = files_of(kept.out)
        kept.update()
        assert files_of(kept.out) == before
        for path in tmp_path.glob("clip000.*srt"):
            path.unlink()
        kept.update()
        assert "sidecars" not in self.pools(kept.out)

    def test_sidecars_that_come_are_seen_by_a_watching_index(self, kept: Kept, tmp_path: Path) -> None:
        folder = tmp_path / "videos"
        folder.mkdir()
        touch(kept.store, "clip000", source_path=str(folder / "clip000.mp4"))
        srt, seen = folder / "clip000.srt", list[list[str]]()

        @heard
        def on_message(line: str) -> None:
            if " moments of " not in line:  # else a run has ended
                return
            seen.append(self.sidecar_captions(kept.out))
            words = ("a dog barks", "a cat")
            if len(seen) > len(words):
                os.kill(os.getpid(), signal.SIGTERM)
            else:
                srt.write_text(f"1\n00:00:01,000 --> 00:00:02,000\n{words[len(seen) - 1]}\n")

        with pytest.raises(Interrupted):
            kept.update(watch=True, watch_seconds=0.05)
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
        self, kept: Kept, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        away = Mock(side_effect=ModelUnavailableError("the hub is away"))
        with monkeypatch.context() as patch:
            patch.setattr("svb.retrieve.model.embedder.load_matching_text_encoder", away)
            for _ in range(2):
                kept.update(latency_budget_seconds=0.2)
        for _ in range(2):
            kept.update()
        told = [line.partition(" (")[0] for line in kept.said if "tower" in line or "was not exported" in line]
        assert told[:2] == ["no text tower: the hub is away"] * 2 and len(told) == 3

    def test_a_rebuild_goes_on_with_the_settings(self, kept: Kept, tmp_path: Path, run_svb: RunSvb) -> None:
        mine, table = tmp_path / "mine.txt", tmp_path / "table.csv"
        mine.write_text("a dog\n")
        table.write_text("video_id,place\nclip000,Oslo\n")
        asked: dict[str, Any] = {"pools": (mine,), "metadata": table, "sidecars": False}
        asked |= {"moment_seconds": 3, "moment_stride_seconds": 0.5, "latency_budget_seconds": 0.3}
        kept.update(rebuild=True, **asked)
        before = read_manifest(kept.out)
        assert before["moments"] == {"seconds": 3, "stride_seconds": 0.5}
        kept.update(rebuild=True)
        after = read_manifest(kept.out)
        assert after["generation"] == before["generation"] + 1
        for name in ("inputs", "moments", "metadata", "captions", "segments"):
            assert after[name] == before[name]
        # What has gone since is not left out in silence.
        mine.unlink()
        with pytest.raises(InputError, match=r"mine\.txt, which the index was made with, is gone"):
            kept.update(rebuild=True)
        table.unlink()
        with pytest.raises(InputError, match=r"table\.csv, .* is gone .* --no-metadata"):
            kept.update(rebuild=True, no_pools=True)
        assert read_manifest(kept.out) == after
        without = ("--no-pools", "--no-metadata")
        ran = run_svb("index", kept.run, "-o", kept.out, "--store", kept.store, "--rebuild", *without)
        assert ran.exit_code == 0, ran.stderr
        assert "mine.txt" not in self.pools(kept.out) and read_manifest(kept.out)["metadata"] == []

    def test_the_latency_budget_is_kept(
        self, own_index: Path, indexed_run: Path, run_svb: RunSvb, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("svb.retrieve.indexing.tune_ivf.seconds_a_query", lambda vectors, queries: 0.2)
        ran = run_svb("index", indexed_run, "-o", own_index, "--latency-budget", "250ms")
        assert ran.exit_code == 0 and "within the budget of 250 ms" in ran.stderr
        shutil.rmtree(own_index / "cache")
        ran = run_svb("index", indexed_run, "-o", own_index)
        assert "within the budget of 250 ms" in ran.stderr and (own_index / "cache" / "ivf.json").is_file()

    def test_other_captions_need_no_rebuild(self, kept: Kept, tmp_path: Path, embedded: list[str]) -> None:
        rows = [("clip000", "a dog", "train"), ("clip001", "a cat", "train")]
        path = synthetic.make_captions(tmp_path / "captions.h5", rows, np.eye(2, 20))
        made = read_caption_features(path)
        write_caption_features(path, dataclasses.replace(made, settings={**made.settings, "table_hash": "other"}))
        kept.update(captions=path)
        assert self.pools(kept.out) == {"training": 2} and embedded == []
