"""What ends `svb index` early: kills at every write, signals, changes to come; the index is whole after each."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import synthetic
from indexes import MOMENTS, add, content, edit_store, frames_of, index, remove, rename, touch
from messages import heard

from svb.errors import InputError, Interrupted, MismatchError, StoreError, UsageError
from svb.retrieve.index import watch
from svb.retrieve.indexing import embed_segment
from svb.retrieve.indexing.verify_index import verify_index
from svb.retrieve.stored.manifest import read_manifest
from svb.train.config import TrainConfig
from svb.train.run import train

PROGRAM = Path(__file__).with_name("index_killed.py")
CONFIG = TrainConfig(embedding_size=8, variant="none", batch_size=16, epochs=1, learning_rate=2e-3)
# Of all writes of a run, those at which the test of every day kills.
NUM_KILLS = 5


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    return train(*synthetic.make_task(folder, num_train=16, num_val=8), folder / "run", CONFIG)


class World:
    """An index, and a store that has changed since: a run adds, changes, renames, deletes and merges."""

    def __init__(self, trained: Path, folder: Path) -> None:
        self.trained, self.folder = trained, folder
        self.store = Path(shutil.copytree(trained.parent / "features", folder / "features"))
        self.before = index(trained, folder / "before", store=self.store, **MOMENTS)
        add(self.store, {f"new{number:02}": frames_of(number) for number in range(10)})
        add(self.store, {"clip001": frames_of(100), "clip002": frames_of(101)})
        rename(self.store, {"clip003": "moved", "clip004": "deep/moved"})
        touch(self.store, "clip005", mtime_ns=5)
        remove(self.store, *(f"clip{number:03}" for number in range(6, 16)))
        edit_store(self.store, lambda held, writer: writer.compact())
        self.seen: set[str] = set()
        self._process = subprocess.Popen(
            [sys.executable, PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        code, self.num_writes = self.run(self.copy("undisturbed"), -1)
        assert code == 0
        self.after = folder / "undisturbed"

    def copy(self, name: str) -> Path:
        shutil.rmtree(self.folder / name, ignore_errors=True)
        return Path(shutil.copytree(self.before, self.folder / name))

    def run(self, out: Path, n: int) -> tuple[int, int]:
        """Run with a kill at the n-th write, or undisturbed; returns the exit code and the number of writes."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([str(self.trained), str(self.store), str(out), n]) + "\n")
        self._process.stdin.flush()
        code, num_writes = self._process.stdout.readline().split()
        return int(code), int(num_writes)

    def close(self) -> None:
        self._process.communicate()


@pytest.fixture(scope="module")
def world(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = World(trained, tmp_path_factory.mktemp("world"))
    yield made
    made.close()


def without_generation(folder: Path) -> dict[str, Any]:
    return {key: value for key, value in read_manifest(folder).items() if key != "generation"}


def kill_at(world: World, n: int) -> int:
    """Kill a run at its n-th write, check what is left, and go on; returns how many videos were held."""
    out = world.copy("killed")
    assert world.run(out, n) == (-signal.SIGKILL, n)
    assert verify_index(out) == []
    before, held, after = content(world.before), content(out), content(world.after)
    # Each video is as it was before or as it is afterwards, and none is lost that is in both.
    for video_id, video in held.items():
        assert video in (before.get(video_id), after.get(video_id)), video_id
    assert set(before) & set(after) <= set(held)
    # Of a renamed one there is either name, not both or none.
    assert ("clip003" in held) != ("moved" in held) and ("clip004" in held) != ("deep/moved" in held)
    generation = read_manifest(out)["generation"]
    assert read_manifest(world.before)["generation"] <= generation <= read_manifest(world.after)["generation"]
    state = state_of(out)
    if state in world.seen:  # a kill before and one after a sync leave the same, from which all goes on alike
        return len(held)
    world.seen.add(state)
    assert world.run(out, -1)[0] == 0
    assert content(out) == after
    assert without_generation(out) == without_generation(world.after)
    assert files_below(out) == files_below(world.after)  # nothing that was half-done is left
    return len(held)


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if "cache" not in path.parts}


def state_of(folder: Path) -> str:
    """Return a hash of all that lies in a folder, whatever the names of what is half-done."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*"), key=lambda path: re.sub(r"\.aside-\w+", "", str(path))):
        digest.update(re.sub(r"\.aside-\w+", ".aside", str(path.relative_to(folder))).encode())
        digest.update(path.read_bytes() if path.is_file() else b"/")
    return digest.hexdigest()


def test_the_run_that_is_killed_does_all_there_is(world: World) -> None:
    before, after = read_manifest(world.before), read_manifest(world.after)
    assert after["generation"] - before["generation"] >= 4  # copies, two segments, and the end
    assert len(after["segments"]) == 1 and before["segments"] != after["segments"]
    held = content(world.after)
    assert {"moved", "deep/moved", "new00", "new09", "clip001", "clip005"} <= set(held)
    assert not {"clip003", "clip004", "clip006"} & set(held)
    assert verify_index(world.after) == []


def test_kills_at_some_writes(world: World) -> None:
    chance = random.Random(0)
    counts = {kill_at(world, n) for n in sorted(chance.sample(range(1, world.num_writes + 1), NUM_KILLS))}
    assert len(counts) > 1  # states of before, of between and of after were seen


@pytest.mark.slow
def test_kills_at_every_write(world: World) -> None:
    for n in range(1, world.num_writes + 1):
        kill_at(world, n)


@pytest.mark.slow
def test_kills_of_the_run_that_goes_on(world: World) -> None:
    chance = random.Random(1)
    for _ in range(10):
        out = world.copy("killed")
        while world.run(out, chance.randrange(20, world.num_writes))[0] != 0:
            assert verify_index(out) == []
        assert content(out) == content(world.after) and without_generation(out) == without_generation(world.after)


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_signal_ends_a_run_after_its_segment(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, exit_code: int
) -> None:
    monkeypatch.setattr(embed_segment, "SEGMENT_VIDEOS", 10)
    out, expected = tmp_path / "index", "10 of 24 videos of this run are in"

    def stop(done: int, total: int) -> None:
        if done == 0:
            os.kill(os.getpid(), number)

    with pytest.raises(Interrupted, match=f"interrupted - {expected}") as caught:
        index(trained, out, on_progress=stop)
    assert caught.value.exit_code == exit_code
    assert verify_index(out) == [] and len(content(out)) == 10
    index(trained, out)
    assert len(content(out)) == 24


class TestWatch:
    """`--watch`: what changes is brought in until a signal comes."""

    @pytest.mark.parametrize("rebuild", [False, True])  # which is made once
    def test_it_goes_on_when_the_store_has_changed(self, trained: Path, tmp_path: Path, rebuild: bool) -> None:
        store = Path(shutil.copytree(trained.parent / "features", tmp_path / "features"))
        out = index(trained, tmp_path / "index", store=store) if rebuild else tmp_path / "index"
        said = heard()

        @heard
        def on_message(line: str) -> None:
            if line.startswith("watching"):
                add(store, {"new": frames_of(1)})
            if line.startswith("+1 new"):
                os.kill(os.getpid(), signal.SIGTERM)

        with pytest.raises(Interrupted) as caught:
            index(trained, out, store=store, rebuild=rebuild, watch=True, watch_seconds=0.05)
        assert caught.value.exit_code == 75
        assert len(content(out)) == 25 and verify_index(out) == []
        assert [line for line in said if " same" in line] == [
            "+24 new ~0 changed >0 renamed -0 gone =0 same",
            "+1 new ~0 changed >0 renamed -0 gone =24 same",
        ]

    def test_a_run_that_is_replaced_by_another_ends_it(
        self, trained: Path, indexed_run: Path, tmp_path: Path
    ) -> None:
        run = Path(shutil.copytree(trained, tmp_path / "run"))
        store = Path(shutil.copytree(trained.parent / "features", tmp_path / "features"))

        @heard
        def on_message(line: str) -> None:
            if line.startswith("watching"):
                shutil.rmtree(run)
                shutil.copytree(indexed_run, run)
                add(store, {"clip000": frames_of(1)})

        with pytest.raises(MismatchError, match=r"model\.weights: stored"):
            index(run, tmp_path / "index", store=store, watch=True, watch_seconds=0.05)
        assert verify_index(tmp_path / "index") == []

    @pytest.mark.parametrize(
        "error", [StoreError("a shard is damaged"), OSError("the disk is full"), InputError("the table is empty")]
    )
    def test_what_may_pass_is_told_and_tried_again(self, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
        """The run that fails is the second; a third one, after which a signal comes, is tried by and by."""
        monkeypatch.setattr("svb.retrieve.index.RETRY_SECONDS", 0.1)
        state, said = [0], heard()
        work = Mock(side_effect=[None, error, lambda: os.kill(os.getpid(), signal.SIGINT)])
        heard(lambda line: state.append(1))  # something has changed, once

        def run() -> None:
            if (then := work()) is not None:
                then()

        with pytest.raises(Interrupted, match="stopped watching"):
            watch(run, lambda: len(state) > 1, 0.01)
        assert work.call_count == 3
        assert said[1] == f"{error} - trying again when something changes, or in 0.1 s"

    @pytest.mark.parametrize(
        ("error", "runs_before"),
        [(UsageError("means nothing"), 3), (MismatchError("another model"), 3), (StoreError("damaged"), 0)],
    )
    def test_what_the_user_must_decide_or_fails_at_once_ends_it(self, error: Exception, runs_before: int) -> None:
        states = iter(range(100))
        with pytest.raises(type(error), match=str(error)):
            watch(Mock(side_effect=[*[None] * runs_before, error]), lambda: next(states), 0.01)

    def test_what_cannot_be_looked_at_for_a_while_is_told_once_and_no_change_is_no_work(self) -> None:
        looks, runs, said = [0], list[str](), heard()

        def watched() -> int:
            looks[0] += 1
            if 1 < looks[0] < 6:
                raise OSError("the folder is away")
            if looks[0] == 12:
                os.kill(os.getpid(), signal.SIGTERM)
            return 0

        with pytest.raises(Interrupted):
            watch(lambda: runs.append("run"), watched, 0.01)
        assert [line.partition(" - ")[0] for line in said[1:]] == ["the folder is away"] and runs == ["run"]
