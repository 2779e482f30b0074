"""Whatever ends a training before its time, taken up again it ends with the bytes of one that nothing ended."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import RunSvb
from messages import heard, stop_hearing
from runs import TINY, Killed, Task, contents, kill_after, lines, tiny

from svb.errors import StoreError
from svb.train import loop, objective
from svb.train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from svb.train.config import TrainConfig
from svb.train.run import build_model, read_run, read_vocabulary, train

KINDS: dict[str, dict[str, Any]] = {
    "tokens": {},
    "embedding": {"rebuild": "embedding", "layers": 1, "convolution": 3, "pooling": "attention"},
    "memory bank": {"memory_bank": 7, "learn_support_temperature": True},
    "pooled memory bank": {
        **{"memory_bank": 30, "support_values": "pooled", "rebuild": "embedding", "variant": "full"},
    },
    "some captions": {"decode_fraction": 0.5, "variant": "hybrid", "learn_logit_scale": False},
    "margins": {
        **{"loss": "max_margin", "negatives": "semi_hard", "intra_modal_weight": 0.5, "variant": "identity"},
        **{"caption_sampling": "all", "captions_per_video": 1},
    },
    "no decoder": {"variant": "none"},
}


@pytest.fixture(scope="module")
def whole_runs(task: Task, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the run of a kind that nothing interrupted, saved once, at its end; only to be read."""
    folder = tmp_path_factory.mktemp("runs")

    @functools.cache
    def whole_run(kind: str) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "CHECKPOINT_SECONDS", 1e9)
            return train(*task, folder / kind, tiny(**KINDS[kind]))

    return whole_run


@pytest.fixture(scope="module")
def whole_run(whole_runs: Callable[[str], Path]) -> Path:
    return whole_runs("tokens")


@pytest.fixture(scope="module")
def stopped_run(task: Task, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run killed 2 of 3 steps into its second epoch of two; only to be copied."""
    out = tmp_path_factory.mktemp("runs") / "stopped"
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 1, 2)
        with pytest.raises(Killed):
            train(*task, out, TINY)
    assert place(out / "last") == (1, 2) and place(out / "previous") == (1, 1)
    return out


@pytest.fixture
def own_run(stopped_run: Path, tmp_path: Path) -> Path:
    """Return a copy of `stopped_run` that the test may damage."""
    return Path(shutil.copytree(stopped_run, tmp_path / "run"))


@pytest.fixture
def ends_as_whole(task: Task, whole_run: Path) -> Callable[[Path], None]:
    """Return a function that trains a run to its end, and asserts that it has the bytes of `whole_run`."""

    def go_on(run: Path) -> None:
        train(*task, run, TINY)
        assert contents(run) == contents(whole_run)

    return go_on


def place(checkpoint: Path) -> tuple[int, int]:
    """Return how many epochs a checkpoint has had, and how many steps of the next."""
    loaded = load_checkpoint(checkpoint)
    return loaded.epoch, loaded.training["steps"]


def damage(checkpoint: Path, name: str = "training.pt") -> None:
    data = bytearray((checkpoint / name).read_bytes())
    data[len(data) // 2] ^= 1
    (checkpoint / name).write_bytes(data)


def stop_after(patch: pytest.MonkeyPatch, epoch: int, steps: int) -> None:
    """Save after every step, and kill after that one."""
    patch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    real = save_checkpoint

    def killing(folder: Path, checkpoint: Checkpoint, previous: Path | None = None) -> None:
        real(folder, checkpoint, previous)
        if (checkpoint.epoch, checkpoint.training.get("steps")) == (epoch, steps):
            raise Killed

    patch.setattr(loop, "save_checkpoint", killing)


@pytest.mark.parametrize("kind", KINDS)
def test_killed_after_every_single_save(
    kind: str, task: Task, whole_runs: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    real, killed, messages = save_checkpoint, set(), heard()
    out, config = tmp_path / "run", tiny(**KINDS[kind])

    def killing(folder: Path, checkpoint: Checkpoint, previous: Path | None = None) -> None:
        real(folder, checkpoint, previous)
        moment = (folder.name, checkpoint.epoch, checkpoint.training.get("steps"))
        if moment not in killed:
            killed.add(moment)
            raise Killed

    monkeypatch.setattr(loop, "save_checkpoint", killing)
    for _ in range(20):
        with contextlib.suppress(Killed):
            train(*task, out, config)
            break
    saved = {(epoch, steps) for name, epoch, steps in killed if name == "last"}
    assert saved == {(0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0)}
    assert ("best", 1, None) in killed
    for epoch, within in ((0, " and 1 of 3 steps"), (1, ""), (1, " and 2 of 3 steps")):
        assert f"resuming {out} after epoch {epoch} of 2{within}" in messages
    assert messages[-1] == f"nothing to do: {out} is already trained for 2 epochs"
    assert contents(out) == contents(whole_runs(kind))


def test_two_runs_of_one_seed_are_the_same_bytes(task: Task, whole_run: Path, tmp_path: Path) -> None:
    assert contents(train(*task, tmp_path / "again", TINY)) == contents(whole_run)
    other = train(*task, tmp_path / "other", tiny(seed=4))
    assert contents(other)["last/model.safetensors"] != contents(whole_run)["last/model.safetensors"]


def act_in(patch: pytest.MonkeyPatch, step: int, act: Callable[[], object]) -> None:
    """Act in the middle of a step, counted from 1."""
    real, calls = objective.info_nce, 0

    def acting(*arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 2 * step - 1:  # two calls a step
            act()
        return real(*arguments)

    patch.setattr(objective, "info_nce", acting)


def interrupt(*numbers: int) -> None:
    """Send signals to this process."""
    for number in numbers:
        os.kill(os.getpid(), number)


@pytest.mark.parametrize("step", [1, 3, 5])
def test_killed_in_the_middle_of_a_step_that_nothing_saved(
    task: Task, whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    with monkeypatch.context() as patch:
        act_in(patch, step, mock.Mock(side_effect=Killed))
        with pytest.raises(Killed):
            train(*task, tmp_path / "run", TINY)
    seen: list[float] = []
    train(*task, tmp_path / "run", TINY, on_epoch=lambda metrics: seen.append(metrics["epoch"]))
    assert seen == [1, 2]
    assert contents(tmp_path / "run") == contents(whole_run)


def test_a_line_of_metrics_cut_short_is_written_again(
    task: Task, ends_as_whole: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    with pytest.raises(Killed):
        train(*task, tmp_path / "run", TINY, on_epoch=kill_after(1))
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 2, "loss": 1.')
    ends_as_whole(tmp_path / "run")


def arguments_of(config: TrainConfig) -> list[str]:
    """Return the command line's options of a config, where it differs from the default."""
    options: list[str] = []
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), field.name.replace("_", "-")
        if value != field.default:
            is_switch = isinstance(value, bool)
            options += [f"--{'' if value else 'no-'}{name}"] if is_switch else [f"--{name}", str(value)]
    return options


@pytest.mark.parametrize(
    ("number", "kind", "step", "said"),
    [
        (signal.SIGINT, "tokens", 1, "after epoch 0 of 2 and 1 of 3 steps"),
        (signal.SIGTERM, "memory bank", 5, "after epoch 1 of 2 and 2 of 3 steps"),
        (signal.SIGTERM, "embedding", 3, "after epoch 1 of 2"),
    ],
)
def test_an_interrupt_ends_the_step_and_saves(
    number: int,
    kind: str,
    step: int,
    said: str,
    task: Task,
    whole_runs: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    run_svb: RunSvb,
) -> None:
    out, before = tmp_path / "run", signal.getsignal(number)
    arguments = ["train", *task, "-o", out, *arguments_of(tiny(**KINDS[kind]))]
    act_in(monkeypatch, step, functools.partial(interrupt, number))
    ran = run_svb(*arguments)
    assert ran.exit_code == 130 and ran.stdout == ""
    assert ran.stderr.splitlines()[-1].startswith("svb: interrupted - ")
    assert place(out / "last") == divmod(step, 3)
    assert signal.getsignal(number) is before
    ran = run_svb(*arguments)
    assert ran.exit_code == 0, ran.stderr
    assert f"resuming {out} {said}\n" in ran.stderr
    assert contents(out) == contents(whole_runs(kind))


def test_an_interrupt_in_the_last_step_comes_too_late(
    task: Task, whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    act_in(monkeypatch, 6, functools.partial(interrupt, signal.SIGTERM))
    assert contents(train(*task, tmp_path / "run", TINY)) == contents(whole_run)


@pytest.mark.parametrize("moment", ["evaluation", "second interrupt"])
def test_other_interrupts_are_not_lost(
    task: Task, ends_as_whole: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    real, last = loop.split_metrics, tmp_path / "run" / "last"

    def interrupting(*arguments: Any) -> dict[str, float]:
        interrupt(signal.SIGINT)
        return real(*arguments)

    with monkeypatch.context() as patch:
        if moment == "evaluation":
            patch.setattr(loop, "split_metrics", interrupting)
        else:  # which stops at once
            act_in(patch, 5, functools.partial(interrupt, signal.SIGINT, signal.SIGTERM))
        with pytest.raises(KeyboardInterrupt):
            train(*task, tmp_path / "run", TINY)
    assert place(last) == (1, 1) if moment == "evaluation" else not last.exists()
    ends_as_whole(tmp_path / "run")


def test_a_thread_may_train_though_it_gets_no_signals(task: Task, whole_run: Path, tmp_path: Path) -> None:
    thread = threading.Thread(target=train, args=(*task, tmp_path / "run", TINY))
    thread.start()
    thread.join()
    assert contents(tmp_path / "run") == contents(whole_run)


@pytest.mark.parametrize("name", ["model.safetensors", "training.pt", "checkpoint.json"])
def test_a_checkpoint_truncated_at_every_kilobyte(
    task: Task, ends_as_whole: Callable[[Path], None], own_run: Path, name: str
) -> None:
    path = own_run / "last" / name
    data = path.read_bytes()

    def killing(message: str) -> None:
        if message.startswith("resuming"):
            raise Killed

    for size in [*range(0, len(data), 1024), len(data) - 2]:
        path.write_bytes(data[:size])
        messages = heard()
        heard(killing)
        with pytest.raises(Killed):
            train(*task, own_run, TINY)
        stop_hearing()
        said, resuming = messages
        assert str(own_run / "last") in said and "restore" in said
        assert said.endswith(f"; continuing from the checkpoint before it, {own_run / 'previous'}")
        assert resuming == f"resuming {own_run} after epoch 1 of 2 and 1 of 3 steps"
    ends_as_whole(own_run)


@pytest.mark.parametrize("missing", ["model.safetensors", "training.pt", "checkpoint.json", "."])
def test_a_checkpoint_that_lacks_a_file_or_all(
    ends_as_whole: Callable[[Path], None], own_run: Path, missing: str
) -> None:
    path = own_run / "last" / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    messages = heard()
    ends_as_whole(own_run)
    assert f"continuing from the checkpoint before it, {own_run / 'previous'}" in messages[0]
    # Without any checkpoint the run starts again.
    for name in ("last", "previous"):
        shutil.rmtree(own_run / name)
    ends_as_whole(own_run)


def test_a_damaged_checkpoint_never_takes_the_place_of_the_one_before_it(
    task: Task, ends_as_whole: Callable[[Path], None], own_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage(own_run / "last")
    with monkeypatch.context() as patch:
        stop_after(patch, 1, 2)
        with pytest.raises(Killed):
            train(*task, own_run, TINY)
    assert place(own_run / "last") == (1, 2) and place(own_run / "previous") == (1, 1)
    damage(own_run / "last")
    ends_as_whole(own_run)


def test_a_finished_run_with_a_damaged_end_does_its_last_step_again(
    task: Task, ends_as_whole: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    run = train(*task, tmp_path / "run", TINY)
    damage(run / "last")
    messages = heard()
    ends_as_whole(run)
    assert messages[1] == f"resuming {run} after epoch 1 of 2 and 2 of 3 steps"


def test_two_damaged_checkpoints_are_an_error_that_changes_nothing(task: Task, own_run: Path) -> None:
    damage(own_run / "last")
    damage(own_run / "previous")
    before = contents(own_run)
    with pytest.raises(StoreError, match=r"/last/training\.pt is not what was written - restore .* train again"):
        train(*task, own_run, TINY)
    shutil.rmtree(own_run / "last")
    with pytest.raises(StoreError, match=r"/previous/training\.pt is not what was written"):
        train(*task, own_run, TINY)
    assert {name: data for name, data in before.items() if "last" not in name} == contents(own_run)


def test_a_damaged_best_checkpoint_is_said_and_replaced(task: Task, own_run: Path) -> None:
    path = own_run / "best" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    messages = heard()
    train(*task, own_run, TINY)
    assert len(messages) == 2 and str(path) in messages[1]
    assert messages[1].endswith("; the best evaluation from here on will replace it")
    assert load_checkpoint(own_run / "best").epoch == 2
    damage(own_run / "best", "model.safetensors")
    with pytest.raises(StoreError, match=r"/best/model\.safetensors is not what was written"):
        train(*task, own_run, TINY)


def test_a_checkpoint_of_another_size_is_refused(task: Task, own_run: Path) -> None:
    torch.manual_seed(0)
    description = read_run(own_run)
    description["config"]["embedding_size"] = 16
    other = build_model(description, with_decoder=True, vocabulary=read_vocabulary(own_run))
    last = load_checkpoint(own_run / "last")
    save_checkpoint(own_run / "last", Checkpoint(1, {}, other.state_dict(), last.training))
    with pytest.raises(StoreError, match=r"does not fit its run's config\.json \(.*\(16, .*not \(8, .*train again"):
        train(*task, own_run, TINY)


Snapshot = dict[str, bytes | None]


def take(folder: Path) -> Snapshot:
    """Return every file's bytes, and None for a folder."""
    found = {}
    for root, folders, names in os.walk(folder):
        inside = Path(root).relative_to(folder)
        found |= {str(inside / name): None for name in folders}
        found |= {str(inside / name): (Path(root) / name).read_bytes() for name in names}
    return found


def put(snapshot: Snapshot, folder: Path) -> Path:
    for name, data in snapshot.items():
        if data is None:
            (folder / name).mkdir(parents=True, exist_ok=True)
        else:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
    return folder


def test_killed_at_any_moment_of_a_checkpoint(
    task: Task,
    ends_as_whole: Callable[[Path], None],
    own_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every state that the run's folder goes through while a checkpoint is written can be gone on from."""
    snapshots: list[Snapshot] = []

    def look() -> None:
        seen = take(own_run)
        if seen not in snapshots:
            snapshots.append(seen)

    def watched(change: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            look()
            result = change(*arguments, **options)
            look()
            return result

        return call

    real = save_checkpoint

    def watching(folder: Path, checkpoint: Checkpoint, previous: Path | None = None) -> None:
        if folder.name == "best":
            return real(folder, checkpoint)
        with pytest.MonkeyPatch.context() as patch:
            for name in ("mkdir", "fsync", "rename", "replace", "unlink", "rmdir"):
                patch.setattr(os, name, watched(getattr(os, name)))
            real(folder, checkpoint, previous)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
        patch.setattr(loop, "save_checkpoint", watching)
        with pytest.raises(Killed):
            train(*task, own_run, TINY)
    states = {tuple(sorted({name.split("/")[0] for name in snapshot})) for snapshot in snapshots}
    assert any("last" not in state for state in states) and any("previous" not in state for state in states)
    assert len(snapshots) > 12
    for number, snapshot in enumerate(snapshots):
        run = put(snapshot, tmp_path / str(number))
        assert place(run / "last") in {(1, 2), (2, 0)}
        assert take(run) == snapshot, "reading touches nothing of a run that may be in training"
        ends_as_whole(run)
        assert not list(run.glob(".*")), "what the kill left is tidied up"


_TRAIN_SLOWLY = """
import json, sys, time
import torch
from pathlib import Path
from svb.train import loop, objective, run
loop.CHECKPOINT_SECONDS = 0.0
run.draw_curves = lambda folder: folder
config = run.TrainConfig(**json.loads(sys.argv[4]))
if sys.argv[5] == "slowly":
    real, calls = objective.info_nce, 0
    def slow(*arguments):
        global calls
        calls += 1
        time.sleep(0.01 if calls < 6 * 5 else 3600)  # in its fifth epoch it waits to be killed
        return real(*arguments)
    objective.info_nce = slow
run.train(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), config)
"""


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_with_the_same_bytes(task: Task, tmp_path: Path) -> None:
    config = tiny(epochs=24, evaluate_every=8, memory_bank=9)
    whole, out, random = train(*task, tmp_path / "whole", config), tmp_path / "run", np.random.default_rng(0)
    arguments = [str(task[0]), str(task[1]), str(out), json.dumps(dataclasses.asdict(config))]
    for _ in range(4):
        done = len(lines(out)) if (out / "metrics.jsonl").exists() else 0
        process = subprocess.Popen([sys.executable, "-c", _TRAIN_SLOWLY, *arguments, "slowly"])
        while (not (out / "metrics.jsonl").exists() or len(lines(out)) == done) and process.poll() is None:
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.2))
        assert process.poll() is None, "it ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run([sys.executable, "-c", _TRAIN_SLOWLY, *arguments, "at once"], check=True)
    assert contents(out) == contents(whole)
