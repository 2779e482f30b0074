"""Leases between real processes: every unit once, a dead holder's units to the others, no clock but the disk's."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import IO
from unittest import mock

import pytest

from svb.errors import StoreError, UsageError
from svb.extract.plan import PlannedVideo
from svb.extract.together import leases as leases_module
from svb.extract.together.leases import RANK_VARIABLES, Leases, rank_and_world, start_at, units

# A noisy machine may not run a thread for tenths of a second: where a live holder must keep its lease, it has
# STALE of them; where one is to become stale, its file is dated back instead of waiting.
HEARTBEAT, STALE = 0.1, 30.0
PATIENCE_SECONDS = 300.0
FORK = multiprocessing.get_context("fork")


def planned(count: int) -> list[PlannedVideo]:
    return [PlannedVideo(f"v{number}", Path(f"/videos/v{number}.mp4")) for number in range(count)]


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not holds():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def date_back(folder: Path, key: str, seconds: float) -> None:
    path = folder / f"{key}.lease"
    os.utime(path, (path.stat().st_mtime - seconds,) * 2)


def work(folder: Path, done: Path, rank: int, world: int, stale_seconds: float) -> None:
    """Do every unit that nobody has done, until all are: a line in `done/KEY` for each time it was done."""
    left = start_at(units(planned(200), 1), rank, world)
    with Leases(folder, f"worker {rank}", HEARTBEAT, stale_seconds) as leases:
        while left:
            for unit in left:
                if (done / unit.key).exists() or not leases.acquire(unit.key):
                    continue
                if not (done / unit.key).exists():  # done between the look and the lease
                    time.sleep(0.005)  # without leases, others begin it too
                    with (done / unit.key).open("a") as file:
                        file.write(f"{rank}\n")
                leases.release(unit.key)
            left = [unit for unit in left if not (done / unit.key).exists()]
            time.sleep(0.01)


def hold(folder: Path, keys: Sequence[str], stale_seconds: float, connection: Connection) -> None:
    """Take leases, then answer every message with what is held, without leaving again in order."""
    leases = Leases(folder, "holder", HEARTBEAT, stale_seconds)
    assert all(leases.acquire(key) for key in keys)
    while True:
        connection.send(leases.held)
        connection.recv()


def race(folder: Path, keys: Sequence[str], name: str, connection: Connection) -> None:
    """Take each key at the moment when the others are told to, and say which are held; again and again."""
    with Leases(folder, name, HEARTBEAT, STALE) as leases:
        while True:
            connection.send(sorted(leases.held))
            connection.recv()
            for key in keys:
                leases.acquire(key)


@pytest.fixture
def start() -> Iterator[Callable[..., BaseProcess]]:
    """Return a function that starts a process, which is killed at the end whatever became of it."""
    processes: list[BaseProcess] = []

    def call(target: Callable[..., None], *arguments: object) -> BaseProcess:
        process = FORK.Process(target=target, args=arguments, daemon=True)
        process.start()
        processes.append(process)
        return process

    yield call
    for process in processes:
        process.kill()
        process.join()


Start = Callable[..., BaseProcess]


def start_holder(start: Start, folder: Path, keys: Sequence[str], stale: float) -> tuple[BaseProcess, Connection]:
    ours, theirs = FORK.Pipe()
    process = start(hold, folder, keys, stale, theirs)
    assert ours.recv() == set(keys)
    return process, ours


def kill(process: BaseProcess, number: int) -> None:
    assert process.pid is not None
    os.kill(process.pid, number)


def work_together(start: Start, folder: Path, num_workers: int, stale: float) -> dict[str, int]:
    """Return how often each unit was done by several processes that do all of them."""
    done = folder.parent / "done"
    done.mkdir()
    for worker in [start(work, folder, done, rank, num_workers, stale) for rank in range(num_workers)]:
        worker.join(PATIENCE_SECONDS)
        assert worker.exitcode == 0
    assert list(folder.iterdir()) == []
    return {path.name: len(path.read_text().split()) for path in done.iterdir()}


class TestManyProcesses:
    keys = tuple(unit.key for unit in units(planned(200), 1))

    def test_every_unit_is_done_exactly_once(self, start: Start, tmp_path: Path) -> None:
        assert work_together(start, tmp_path / "leases", 4, STALE) == dict.fromkeys(self.keys, 1)

    def test_others_finish_what_a_killed_process_held(self, start: Start, tmp_path: Path) -> None:
        holder, _ = start_holder(start, tmp_path / "leases", self.keys[::40], 0.8)
        kill(holder, signal.SIGKILL)
        # One that gets no time for so long is robbed, and does a unit again.
        assert work_together(start, tmp_path / "leases", 2, 0.8).keys() == set(self.keys)

    def test_a_suspended_holder_notices_that_it_was_robbed(self, start: Start, tmp_path: Path) -> None:
        holder, connection = start_holder(start, tmp_path, ["a", "b"], 0.5)
        kill(holder, signal.SIGSTOP)
        with Leases(tmp_path, "thief", HEARTBEAT, 0.5) as thief:
            wait_until(lambda: thief.acquire("a"))
            kill(holder, signal.SIGCONT)

            def seen_by_the_holder() -> set[str]:
                connection.send(None)
                held: set[str] = connection.recv()
                return held

            # What nobody stole it renews, and holds again.
            wait_until(lambda: seen_by_the_holder() == {"b"})
            assert json.loads((tmp_path / "a.lease").read_text())["owner"] == "thief"

    def test_one_of_many_thieves_wins(self, start: Start, tmp_path: Path) -> None:
        keys = [str(number) for number in range(40)]
        holder, _ = start_holder(start, tmp_path, keys, STALE)
        kill(holder, signal.SIGKILL)
        holder.join()
        pipes = [FORK.Pipe() for _ in range(3)]
        for number, (_, theirs) in enumerate(pipes):
            start(race, tmp_path, keys, f"thief {number}", theirs)
        assert [ours.recv() for ours, _ in pipes] == [[]] * 3
        for key in keys:
            date_back(tmp_path, key, 100)

        def held() -> list[str]:
            for ours, _ in pipes:
                ours.send(None)
            return sorted(key for ours, _ in pipes for key in ours.recv())

        first = held()
        # A third that comes while a lease is given back wins too, until its holder notices.
        assert set(first) == set(keys) and len(first) <= len(keys) + 4
        wait_until(lambda: held() == sorted(keys))


class TestOneProcess:
    def test_a_live_lease_says_who_holds_it_and_is_refused_until_it_is_released(self, tmp_path: Path) -> None:
        tmp_path = tmp_path / "made" / "here"
        with Leases(tmp_path, "one") as one, Leases(tmp_path, "two") as two:
            assert one.acquire("a") and one.acquire("a") and one.held == {"a"}
            content = json.loads((tmp_path / "a.lease").read_text())
            assert (content["owner"], content["pid"]) == ("one", os.getpid())
            assert content["host"] and len(content["nonce"]) == 32
            assert not two.acquire("a") and two.held == set()
            two.release("a")
            assert (tmp_path / "a.lease").exists()
            one.release("a")
            assert not (tmp_path / "a.lease").exists() and one.held == set()
            assert two.acquire("a") and not one.acquire("a")

    def test_the_heartbeat_keeps_a_lease_and_closing_leaves_nothing(self, tmp_path: Path) -> None:
        with Leases(tmp_path, "one", HEARTBEAT, STALE) as one, Leases(tmp_path, "two", HEARTBEAT, STALE) as two:
            assert one.acquire("a")
            date_back(tmp_path, "a", 100)
            wait_until(lambda: time.time() - (tmp_path / "a.lease").stat().st_mtime < STALE)
            assert not two.acquire("a") and one.held == {"a"}
            one.close()
        assert one.held == set() and list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("seconds", [100, -100])
    def test_age_is_by_the_disk_s_clock(
        self, seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        wrong = time.time() + 10**6
        monkeypatch.setattr(time, "time", lambda: wrong)
        with Leases(tmp_path, "dead") as dead, Leases(tmp_path, "thief") as thief:
            assert dead.acquire("a") and not thief.acquire("a")
            date_back(tmp_path, "a", seconds / 2)
            assert not thief.acquire("a")
            date_back(tmp_path, "a", seconds / 2)
            assert thief.acquire("a") and thief.held == {"a"}
            dead.release("a")
            assert json.loads((tmp_path / "a.lease").read_text())["owner"] == "thief"

    def test_a_lease_whose_maker_was_killed_before_it_wrote(self, tmp_path: Path) -> None:
        (tmp_path / "a.lease").touch()
        with Leases(tmp_path, "one") as leases:
            assert not leases.acquire("a")
            date_back(tmp_path, "a", 100)
            assert leases.acquire("a")

    @pytest.mark.parametrize("overtaken_by", ["a new holder", "a heartbeat"])
    def test_a_lease_that_lived_again_while_a_thief_looked_stays(
        self, overtaken_by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with Leases(tmp_path, "old") as old, Leases(tmp_path, "new") as new, Leases(tmp_path, "slow") as slow:
            assert old.acquire("a")
            date_back(tmp_path, "a", 100)
            read, looks = leases_module._read, []

            def read_and_be_overtaken(path: Path) -> tuple[bytes, int] | None:
                looks.append(path)
                seen = read(path)
                if len(looks) == 1:
                    old._renew("a") if overtaken_by == "a heartbeat" else new.acquire("a")
                return seen

            monkeypatch.setattr(leases_module, "_read", read_and_be_overtaken)
            assert not slow.acquire("a")
            holder = {"a heartbeat": "old", "a new holder": "new"}[overtaken_by]
            assert json.loads((tmp_path / "a.lease").read_text())["owner"] == holder
            new._renew("a")
            old._renew("a")
            held = {"old": old.held, "new": new.held, "slow": slow.held}
            assert {name: keys for name, keys in held.items() if keys} == {holder: {"a"}}
            assert [path.name for path in tmp_path.iterdir()] == ["a.lease"]

    def test_what_the_dead_left_is_swept(self, tmp_path: Path) -> None:
        (tmp_path / "alive.lease").touch()
        for name in ("done.lease", ".lease-0123", "notes.txt"):
            (tmp_path / name).touch()
            os.utime(tmp_path / name, (time.time() - 100,) * 2)
        with Leases(tmp_path, "one"):
            assert sorted(path.name for path in tmp_path.iterdir()) == ["alive.lease", "notes.txt"]


class TestErrors:
    def test_a_folder_that_vanished(self, tmp_path: Path) -> None:
        with Leases(tmp_path / "leases", "one", HEARTBEAT, STALE) as leases:
            assert leases.acquire("a")
            shutil.rmtree(tmp_path / "leases")
            with pytest.raises(StoreError, match=r"cannot keep leases in .*leases \(No such file or directory\)"):
                leases.acquire("b")
            wait_until(lambda: leases.held == set())
            leases.release("a")

    def test_a_folder_that_cannot_be_one(self, tmp_path: Path) -> None:
        (tmp_path / "leases").touch()
        with pytest.raises(StoreError, match=r"cannot keep leases in .* - expected a folder .*: mend its"):
            Leases(tmp_path / "leases", "one")
        tmp_path.chmod(0o500)
        folder = Path("/sys") if os.geteuid() == 0 else tmp_path  # root may write to any folder of a disk
        with pytest.raises(StoreError, match=r"\((Permission denied|Read-only file system)\)"):
            Leases(folder, "one")

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
    def test_a_full_disk_leaves_no_half_a_lease(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def open_full(path: Path, mode: str) -> IO[bytes]:
            assert mode == "xb"
            path.touch()
            return open("/dev/full", "wb")  # noqa: PTH123

        with Leases(tmp_path, "one") as leases:
            with monkeypatch.context() as patch, pytest.raises(StoreError, match="No space left on device"):
                patch.setattr(Path, "open", open_full)
                leases.acquire("a")
            assert leases.held == set() and list(tmp_path.iterdir()) == []

    def test_a_hiccup_is_forgiven_a_long_one_is_not(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        fail = mock.Mock(side_effect=OSError(errno.EIO, "Input/output error"))
        with Leases(tmp_path, "one", HEARTBEAT, 1.0) as leases:
            assert leases.acquire("a")
            with monkeypatch.context() as patch:
                patch.setattr(os, "utime", fail)
                wait_until(lambda: fail.call_count >= 2)
                wait_until(lambda: leases.held == set())
            # The file is still there and its own: the next heartbeat that succeeds makes it held again.
            wait_until(lambda: leases.held == {"a"})

    @pytest.mark.parametrize(("heartbeat", "stale"), [(0, 1), (-1, 1), (2, 1), (1, 1), (float("nan"), 1)])
    def test_a_heartbeat_that_is_too_slow(self, heartbeat: float, stale: float, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=rf"a heartbeat every {heartbeat} s - expected more than 0 and less"):
            Leases(tmp_path, "one", heartbeat, stale)


class TestUnits:
    def test_consecutive_and_complete(self) -> None:
        videos = planned(7)
        cut = units(videos, 3)
        assert [video for unit in cut for video in unit.videos] == videos
        assert [len(unit.videos) for unit in cut] == [3, 3, 1]
        assert len({unit.key for unit in cut}) == 3 and all(unit.key.isalnum() for unit in cut)
        assert cut == units(planned(7), 3) and units([], 3) == []
        with pytest.raises(UsageError, match="units of 0 videos - expected 1 or more"):
            units(videos, 0)

    def test_a_key_is_of_ids_and_paths(self) -> None:
        paths = [("a", "/a"), ("b", "/a"), ("a", "/b"), ("a", os.fsdecode(b"/\xff")), ("a/", "a")]
        assert len({units([PlannedVideo(name, Path(path))], 1)[0].key for name, path in paths}) == 5

    def test_ranks_begin_far_from_each_other_and_go_round(self) -> None:
        cut = units(planned(10), 1)
        walks = [start_at(cut, rank, 4) for rank in range(4)]
        assert [cut.index(walk[0]) for walk in walks] == [0, 2, 5, 7]
        assert walks[3] == [*cut[7:], *cut[:7]]
        assert start_at([], 1, 2) == []
        assert [start_at(cut[:2], rank, 5)[0] for rank in range(5)] == [*cut[:1] * 3, *cut[1:2] * 2]


class TestRankAndWorld:
    @pytest.fixture(autouse=True)
    def no_launcher(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in (name for pair in RANK_VARIABLES for name in pair):
            monkeypatch.delenv(name, raising=False)

    def test_none_and_several(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert rank_and_world() is None
        monkeypatch.setenv("SLURM_NTASKS", "8")  # as in a shell of salloc
        assert rank_and_world() is None
        for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("SLURM_PROCID", "5"), ("SLURM_NTASKS", "9")):
            monkeypatch.setenv(name, value)
        assert rank_and_world() == (1, 2)  # torchrun goes first

    @pytest.mark.parametrize("pair", RANK_VARIABLES)
    def test_every_launcher(self, pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(pair[0], "3")
        monkeypatch.setenv(pair[1], "8")
        assert rank_and_world() == (3, 8)
        ranks, worlds = ("8", "-1", "1.5", "three", "\u00b2"), ("0", "-1", "many")
        for name, values, words in ((pair[0], ranks, "from 0 to 7"), (pair[1], worlds, "from 1")):
            for value in values:
                monkeypatch.setenv(name, value)
                with pytest.raises(UsageError, match=f"{name} is '{value}' - expected a whole number {words}"):
                    rank_and_world()
        monkeypatch.setenv(pair[0], "0")
        monkeypatch.setenv(pair[1], "1")
        assert rank_and_world() is None
