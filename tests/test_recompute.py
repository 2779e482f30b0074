"""`svb verify --recompute` finds features that no longer come out as they are held."""

from __future__ import annotations

import shutil
from pathlib import Path

import clips
import h5py
import numpy as np
import pytest
from conftest import RunSvb
from extraction import CLIPS, FRAMES, run

from svb.data.feature_store import FeatureStore
from svb.data.shard import hash_array
from svb.errors import InputError, UsageError
from svb.extract.recompute import _difference, recompute

pytestmark = pytest.mark.usefixtures("toy_backbones")


@pytest.fixture
def store(folder: Path, tmp_path: Path) -> Path:
    run(folder, tmp_path / "out", FRAMES, CLIPS)
    return tmp_path / "out"


def test_what_was_changed_is_found(store: Path, run_svb: RunSvb) -> None:
    ran = run_svb("verify", store, "--recompute", 3)
    assert ran.exit_code == 0, ran.stderr
    assert "recomputed 3 of 4 videos: 6 of 6 comparisons are the same to the bit" in ran.stderr
    (shard,) = FeatureStore(store).shards
    with h5py.File(shard.path, "r+") as file:  # the first feature of the first video, and the checksum with it
        dataset = file[f"{FRAMES}/features"]
        values = dataset[...]
        values[0, 0] += np.float16(0.5)
        dataset[...] = values
        dataset.attrs["sha256"] = hash_array(values)
    assert run_svb("verify", store).exit_code == 0
    ran = run_svb("verify", store, "--recompute", 4)
    assert ran.exit_code == 1
    assert f"{store}, {FRAMES}: video 'a' differs: by up to 0.5, cosine at least 0.9" in ran.stdout


def test_the_last_bit_is_no_difference() -> None:
    held = np.array([[1.0, -1.0, 0.0]], np.float16)
    assert _difference(held, np.nextafter(held, np.float16(2))) == ""
    assert _difference(held, np.array([[1.0, -1.0, -0.0]], np.float16)) == ""
    assert _difference(held, held + np.float16(0.01)).startswith("by up to 0.01")
    assert _difference(held, held[:0]) == "shape (1, 3) held, (0, 3) now"


def test_what_cannot_be_recomputed(store: Path, folder: Path, said: list[str], run_svb: RunSvb) -> None:
    with pytest.raises(UsageError, match="cannot recompute 0 videos"):
        recompute(store, 0)
    clips.make_clip(folder / "a.mp4", seconds=3)  # a file that changed is none to compare with
    assert recompute(store, 10) == []
    assert said[-1].startswith("recomputed 3 of 4 videos")
    shutil.rmtree(folder)
    with pytest.raises(InputError, match=r"none of the 4 videos of .* is where it was, unchanged"):
        recompute(store, 3)
    (folder.parent / "c.csv").write_text("video_id,caption\na,x\n")
    assert run_svb("verify", folder.parent / "c.csv", "--recompute", 1).exit_code == 1


@pytest.mark.slow
def test_workers_change_no_bit_and_batches_hardly_any(extracted_store: Path, folder: Path) -> None:
    # extracted_store: one worker, batches of 4. Batches of another size may run through other kernels.
    name = "offline:efficientnet-lite0"
    held = FeatureStore(extracted_store).load(name)
    for num_workers, batch_size, exact in ((3, 4, True), (2, 7, False), (1, 1, False)):
        out = folder.parent / f"{num_workers}-{batch_size}"
        run(folder, out, name, workers=num_workers, batch_size=batch_size)
        now = FeatureStore(out).load(name)
        assert now.video_ids == held.video_ids and now.times_seconds.tolist() == held.times_seconds.tolist()
        difference = np.abs(held.features.astype(np.float32) - now.features).max()
        assert difference <= 5e-4 * np.abs(held.features).max()
        if exact:
            assert now.features.tobytes() == held.features.tobytes()
