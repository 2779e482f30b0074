"""SIGKILL at any moment costs what was not yet published, and nothing else."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import clips
import h5py
import pytest
from extraction import contents

from svb.data.feature_store import FeatureStore, verify_store

PROGRAM = Path(__file__).with_name("extract_in_small_shards.py")
NUM_VIDEOS = 300
# Of 50 kills: in the runs that extract, and in those that merge small shards afterwards.
NUM_KILLS, NUM_KILLS_IN_COMPACTION = 40, 10
NUM_RANKS, NUM_RANK_KILLS = 3, 9


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Cut one long video into clips of half a second to one and a half, all different: one ffmpeg, not hundreds."""
    folder = tmp_path / "many"
    folder.mkdir()
    lengths = [0.5 + 0.5 * (number % 3) for number in range(NUM_VIDEOS)]
    ends = ",".join(str(end) for end in itertools.accumulate(lengths[:-1]))
    cut = ("-force_key_frames", ends, "-f", "segment", "-segment_times", ends, "-reset_timestamps", "1")
    drawn = ("-f", "lavfi", "-i", f"testsrc2=size=64x48:rate=10:duration={sum(lengths)}", "-vf", "hue=h=7*t")
    clips.run_ffmpeg(*drawn, *clips.X264, *cut, str(folder / "%03d.mp4"))
    assert len(list(folder.iterdir())) == NUM_VIDEOS
    (folder / "013.mp4").write_text("no video")
    return folder


class Server:
    """A process that has torch loaded and starts runs: loading it would take most of a run's time."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.run = 0  # the process of the run

    def start(self, videos: Path, out: Path, **options: int) -> None:
        self._process.stdin.write(json.dumps({"videos": str(videos), "out": str(out), **options}) + "\n")
        self._process.stdin.flush()
        self.run = int(self.read())

    def read(self) -> str:
        """Return the next line that the run says."""
        return self._process.stdout.readline().strip()

    def kill(self) -> bool:
        """Kill the run; returns whether it had not ended before."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.run, signal.SIGKILL)
        return self.wait() == -signal.SIGKILL

    def wait(self) -> int:
        """Return the run's exit code."""
        while (line := self.read()) in ("compacting", "waiting"):
            pass
        return int(line)

    def close(self) -> None:
        self._process.communicate(timeout=600)


@pytest.fixture
def servers() -> Iterator[list[Server]]:
    started = [Server() for _ in range(NUM_RANKS)]
    yield started
    for server in started:
        server.close()


def published(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (out / "shards").glob("[0-9]*.h5")}


def videos_in(shards: dict[str, bytes], out: Path) -> Counter[str]:
    found: Counter[str] = Counter()
    for name in shards:
        with h5py.File(out / "shards" / name) as file:
            found.update(file["videos/video_id"].asstr()[...])
    return found


def assert_ends_as_undisturbed(server: Server, videos: Path, out: Path, undisturbed: Path) -> None:
    for folder in (out, undisturbed):
        server.start(videos, folder)
        assert server.wait() == 0
    assert verify_store(out) == []
    assert contents(out) == contents(undisturbed)
    assert sorted(contents(out)) == sorted(map(str, videos.iterdir()))
    # Every video stands once in the store: nothing was done twice, and nothing that was merged is left.
    assert set(videos_in(published(out), out).values()) == {1}
    assert not list(out.rglob(".aside-*"))


@pytest.mark.slow
def test_fifty_kills_and_the_same_bytes(videos: Path, servers: list[Server], tmp_path: Path) -> None:
    out, chance, server = tmp_path / "killed", random.Random(0), servers[0]
    late = tmp_path / "late"
    late.mkdir()
    for number in range(NUM_KILLS_IN_COMPACTION + 1):
        (videos / f"{NUM_VIDEOS - 1 - number:03}.mp4").rename(late / f"{number:03}.mp4")
    seen: dict[str, bytes] = {}
    for kill in range(NUM_KILLS):
        server.start(videos, out, change=chance.randrange(1, 14))
        # Every third falls at any moment: while libraries load, or in the first batch.
        if kill % 3 == 2:
            time.sleep(chance.uniform(0, 1.5))
        else:
            assert server.read() == "waiting"
        assert server.kill()
        shards = published(out)
        assert seen.items() <= shards.items()
        # A video that was published stands in one shard: it was never decoded again.
        assert set(videos_in(shards, out).values()) <= {1}
        assert not shards or verify_store(out) == []
        seen = shards
    records = FeatureStore(out).records
    assert set(videos_in(seen, out)) == set(records) and NUM_KILLS <= len(records) < NUM_VIDEOS
    assert {record.status for record in records.values()} <= {"ok", "unreadable"}

    known = contents(out)
    for number in range(NUM_KILLS_IN_COMPACTION):
        (late / f"{number:03}.mp4").rename(videos / f"late-{number:03}.mp4")  # else there is nothing to do
        server.start(videos, out, change_in_compaction=chance.randrange(1, 20))
        assert [server.read(), server.read()] == ["compacting", "waiting"]
        assert server.kill()
        assert verify_store(out) == []
        assert known.items() <= contents(out).items()
        known = contents(out)
        assert len(known) == NUM_VIDEOS - NUM_KILLS_IN_COMPACTION + number
    (late / f"{NUM_KILLS_IN_COMPACTION:03}.mp4").rename(videos / "last.mp4")
    assert_ends_as_undisturbed(server, videos, out, tmp_path / "undisturbed")


@pytest.mark.slow
def test_killed_ranks_and_the_same_bytes(videos: Path, servers: list[Server], tmp_path: Path) -> None:
    out, chance = tmp_path / "killed", random.Random(0)
    last = (videos / "100.mp4").rename(tmp_path / "last.mp4")
    for rank, server in enumerate(servers):
        server.start(videos, out, change=chance.randrange(1, 40), rank=rank, world_size=NUM_RANKS)
    num_killed = 0
    for kill in range(NUM_RANK_KILLS):
        time.sleep(chance.uniform(0, 1.5))
        rank = kill % NUM_RANKS
        num_killed += servers[rank].kill()
        # The last ones are not stopped any more.
        change = chance.randrange(1, 40) if kill < NUM_RANK_KILLS - NUM_RANKS else 0
        servers[rank].start(videos, out, change=change, rank=rank, world_size=NUM_RANKS)
    assert num_killed >= NUM_RANK_KILLS // 2
    assert [server.wait() for server in servers] == [0] * NUM_RANKS
    assert not list((out / "leases").iterdir())
    # One process goes on alone, and removes what those that were killed left aside.
    last.rename(videos / "last.mp4")
    assert_ends_as_undisturbed(servers[0], videos, out, tmp_path / "undisturbed")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="looks for processes in /proc")
def test_a_killed_run_leaves_no_decoders(videos: Path, servers: list[Server], tmp_path: Path) -> None:
    servers[0].start(videos, tmp_path / "out")
    until = time.monotonic() + 600
    while len(workers := decoders(servers[0].run)) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    assert servers[0].kill() and len(workers) == 2
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
