"""`svb index` again: what has changed in the store, and nothing else, is done."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import synthetic
from conftest import RunSvb
from indexes import (
    MOMENTS,
    Kept,
    add,
    content,
    edit_store,
    files_of,
    frames_of,
    index,
    open_index,
    remove,
    rename,
    touch,
)

from svb.data.feature_store import FeatureStore
from svb.data.feature_store_writer import FeatureStoreWriter
from svb.data.rows import VideoRows
from svb.errors import InputError
from svb.retrieve.stored.manifest import read_manifest


class TestKeepingUp:
    """A second run does what has changed and nothing else."""

    def test_new_changed_renamed_touched_gone_and_same(
        self, kept: Kept, tmp_path: Path, embedded: list[str]
    ) -> None:
        before = content(kept.out)
        add(kept.store, {"new1": frames_of(1), "new2": frames_of(2), "clip003": frames_of(3)})
        rename(kept.store, {"clip004": "deep/moved", "clip005": "another"})
        touch(kept.store, "clip006", source_path="/elsewhere/clip006.mp4", mtime_ns=7)
        remove(kept.store, "clip007")
        line = "+2 new ~1 changed >2 renamed ^1 touched -1 gone =75 same"
        assert kept.update() == line
        assert sorted(embedded) == ["clip003", "new1", "new2"]
        after = content(kept.out)
        assert set(after) == (set(before) | {"new1", "new2", "deep/moved", "another"}) - {"clip004", "clip005"}
        for old, new in (("clip004", "deep/moved"), ("clip005", "another"), ("clip006", "clip006")):
            assert after[new][:3] == before[old][:3] and after[new] != before[old]
        assert after["deep/moved"][3] == ("/videos/deep/moved.mp4", before["clip004"][3][1])  # type: ignore[index]
        assert after["clip003"][0] != before["clip003"][0]
        assert after["clip007"] == before["clip007"]  # stays until --prune
        same = set(before) - {"clip003", "clip004", "clip005", "clip006"}
        assert {video_id: after[video_id] for video_id in same} == {video_id: before[video_id] for video_id in same}
        # What was brought up to date is what is made at once.
        index(kept.run, tmp_path / "fresh", store=kept.store, **MOMENTS)
        fresh = content(tmp_path / "fresh")
        assert set(after) - set(fresh) == {"clip007"}
        for video_id, made in fresh.items():
            for held, now in zip(after[video_id][:2], made[:2], strict=True):
                vectors = [np.frombuffer(data, np.float16).astype(np.float32) for data in (held, now)]  # type: ignore[call-overload]
                np.testing.assert_allclose(*vectors, atol=1e-3)
            assert after[video_id][2:4] == made[2:4]

    def test_nothing_to_do_writes_nothing(self, kept: Kept, embedded: list[str]) -> None:
        kept.update()  # which now knows the store's new place
        before = files_of(kept.out)
        assert kept.update() == "+0 new ~0 changed >0 renamed -0 gone =80 same"
        assert files_of(kept.out) == before and embedded == []

    def test_nothing_to_do_loads_no_torch(self, built_index: Path, indexed_run: Path) -> None:
        program = (
            "import sys; from svb.cli import run; code = run(['index', sys.argv[1], '-o', sys.argv[2]]);"
            "print(code, [name for name in ('torch', 'pandas', 'scipy') if name in sys.modules])"
        )
        command = [sys.executable, "-c", program, indexed_run, built_index]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        assert ran.stdout == f"{built_index}\n0 []\n", ran.stderr

    def test_prune_takes_out_what_has_gone(self, kept: Kept, run_svb: RunSvb) -> None:
        remove(kept.store, "clip000")
        add(kept.store, {"clip079": np.empty((0, 24))})  # one that fails now has gone as well
        assert kept.update().endswith("-2 gone =78 same")
        assert len(content(kept.out)) == 80
        assert kept.update(prune=True).endswith("-2 gone =78 same")
        assert set(content(kept.out)) == {f"clip{number:03}" for number in range(1, 79)}
        held = json.loads(run_svb("info", kept.out, "--json").stdout)
        assert held["scan"]["budget_seconds"] == 0.1 and held["scan"]["exact_seconds"] > 0
        assert (held["videos"], held["deleted"]["videos"]) == (78, 2)
        assert kept.update(prune=True).endswith("-0 gone =78 same")

    def test_what_has_gone_and_comes_back_is_the_same(self, kept: Kept, embedded: list[str]) -> None:
        expected = content(kept.out)
        rename(kept.store, {"clip000": "away"})
        remove(kept.store, "away")
        assert kept.update().endswith("-1 gone =79 same")
        shutil.rmtree(kept.store)
        shutil.copytree(kept.run.parent / "features", kept.store)
        embedded.clear()
        assert kept.update().endswith("-0 gone =80 same")
        assert content(kept.out) == expected and embedded == []

    def test_two_videos_that_change_places_and_a_copy_are_not_embedded(
        self, kept: Kept, embedded: list[str]
    ) -> None:
        before = content(kept.out)
        rename(kept.store, {"clip000": "clip001", "clip001": "clip000"})
        touch(kept.store, "clip002", video_id="twin")
        line = "+1 new ~2 changed >0 renamed -0 gone =78 same"
        assert kept.update() == line and embedded == []
        after = content(kept.out)
        for now, then in (("clip000", "clip001"), ("clip001", "clip000"), ("twin", "clip002")):
            assert after[now][:3] == before[then][:3]

    def test_what_decoded_further_in_another_try_is_embedded_again(self, kept: Kept, embedded: list[str]) -> None:
        touch(kept.store, "clip000", status="partial")
        assert "~1 changed" in kept.update()

        def retry(held: FeatureStore, writer: FeatureStoreWriter) -> None:
            rows = VideoRows(frames_of(9).astype(np.float16), np.arange(4.0))
            record = dataclasses.replace(held.records["clip000"], status="ok", tries=2)
            writer.add(record, {synthetic.BACKBONE: rows})

        edit_store(kept.store, retry)
        embedded.clear()
        assert "~1 changed" in kept.update() and embedded == ["clip000"]

    def test_an_index_of_which_all_has_gone_is_empty(self, kept: Kept) -> None:
        remove(kept.store, *(f"clip{number:03}" for number in range(80)))
        kept.update(prune=True)
        manifest = read_manifest(kept.out)
        assert (manifest["videos"], manifest["moments_total"], manifest["segments"]) == (0, 0, [])
        assert open_index(kept.out) == [] and manifest["embedding_size"] == 16
        add(kept.store, {"first": frames_of(0)})
        kept.update()
        assert set(content(kept.out)) == {"first"}

    def test_a_store_without_videos_makes_no_index(self, indexed_run: Path, tmp_path: Path) -> None:
        store = synthetic.make_store(tmp_path / "features", {"bad": np.empty((0, 24))})
        with pytest.raises(InputError, match="has no video with features"):
            index(indexed_run, tmp_path / "index", store=store)
        assert not (tmp_path / "index").exists()

    def test_shards_that_were_merged_meanwhile_are_read_anew(
        self, kept: Kept, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        add(kept.store, {"new1": frames_of(1)})
        add(kept.store, {"new2": frames_of(2)})
        load, loads = FeatureStore.load, []

        def merged_before(held: FeatureStore, backbone: str, video_ids: Sequence[str] | None = None) -> Any:
            if not loads:
                with FeatureStoreWriter(kept.store, held.settings, {}) as writer:
                    writer.compact()
            loads.append(video_ids)
            return load(held, backbone, video_ids)

        monkeypatch.setattr(FeatureStore, "load", merged_before)
        kept.update()
        assert len(loads) == 2 and {"new1", "new2"} <= set(content(kept.out))
