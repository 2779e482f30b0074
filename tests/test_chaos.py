"""SIGKILL at any moment costs what was not yet published, and nothing else."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import clips
import h5py
import pytest

from svb.data.feature_store import FeatureStore, verify_store

PROGRAM = Path(__file__).with_name("extract_in_small_shards.py")
NUM_VIDEOS = 100


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    for number in range(NUM_VIDEOS):
        clips.make_clip(folder / f"{number:02}.mp4", seconds=0.5 + number % 3, filters=f"hue=h={3 * number}")
    (folder / "13.mp4").write_text("no video")
    return folder


def start(videos: Path, out: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, PROGRAM, videos, out], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def published(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (out / "shards").glob("[0-9]*.h5")}


def videos_in(shards: dict[str, bytes], out: Path) -> Counter[str]:
    found: Counter[str] = Counter()
    for name in shards:
        with h5py.File(out / "shards" / name) as file:
            found.update(file["videos/video_id"].asstr()[...])
    return found


def content(out: Path) -> dict[str, tuple[object, ...]]:
    """Return of every video how it ended and the bytes of its rows of both backbones."""
    store = FeatureStore(out)
    rows = {name: store.load(name) for name in ("toy:frames", "toy:clips")}
    found: dict[str, tuple[object, ...]] = {
        video_id: (record.status, record.error, record.content_hash) for video_id, record in store.records.items()
    }
    for loaded in rows.values():
        for video_id, begin, end in zip(loaded.video_ids, loaded.offsets[:-1], loaded.offsets[1:], strict=True):
            span = slice(begin, end)
            found[video_id] += (loaded.features[span].tobytes(), loaded.times_seconds[span].tobytes())
    return found


def kill_after(process: subprocess.Popen[bytes], out: Path, new_shards: int, seconds: float) -> None:
    """Kill a run once it has published so many shards more, and then some time."""
    goal = len(published(out)) + new_shards
    until = time.monotonic() + 60
    while len(published(out)) < goal and process.poll() is None and time.monotonic() < until:
        time.sleep(0.002)
    time.sleep(seconds)
    assert process.poll() is None, "it ended before it could be killed: give it more videos"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_ten_kills_and_the_same_bytes(videos: Path, tmp_path: Path) -> None:
    out, chance = tmp_path / "killed", random.Random(0)
    seen: dict[str, bytes] = {}
    for kill in range(10):
        # Every third falls before anything new is published: while libraries load, or in the first batch.
        new_shards = 0 if kill % 3 == 2 else chance.choice([1, 2])
        kill_after(
            start(videos, out), out, new_shards, chance.uniform(0, 0.05) if new_shards else chance.uniform(0, 3)
        )
        shards = published(out)
        assert seen.items() <= shards.items()
        # A video that was published stands in one shard: it was never decoded again.
        assert set(videos_in(shards, out).values()) <= {1}
        assert verify_store(out) == []
        store = FeatureStore(out)
        assert set(videos_in(shards, out)) == set(store.records)
        assert {record.status for record in store.records.values()} <= {"ok", "unreadable"}
        seen = shards
    assert 10 <= len(FeatureStore(out).records) < NUM_VIDEOS
    for path in (out, tmp_path / "undisturbed"):
        process = start(videos, path)
        _, words = process.communicate(timeout=120)
        assert process.returncode == 0, words
    assert verify_store(out) == []
    assert content(out) == content(tmp_path / "undisturbed")
    assert len(content(out)) == NUM_VIDEOS
    assert not list(out.rglob(".aside-*"))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="looks for processes in /proc")
def test_a_killed_run_leaves_no_decoders(videos: Path, tmp_path: Path) -> None:
    process = start(videos, tmp_path / "out")
    until = time.monotonic() + 60
    while len(workers := decoders(process.pid)) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert len(workers) == 2
    while any(is_decoder(worker) for worker in workers) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(is_decoder(worker) for worker in workers)


def decoders(process_id: int) -> list[str]:
    children: list[str] = []
    for task in Path(f"/proc/{process_id}/task").iterdir():
        with contextlib.suppress(OSError):
            children += (task / "children").read_text().split()
    return [child for child in children if is_decoder(child)]


def is_decoder(process_id: str) -> bool:
    try:
        return b"spawn_main" in Path(f"/proc/{process_id}/cmdline").read_bytes()
    except OSError:
        return False
