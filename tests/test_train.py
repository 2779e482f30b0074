from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import synthetic
import torch
from click.testing import CliRunner

from svb.cli import cli
from svb.data.caption_features import read_caption_features
from svb.data.feature_store import FeatureStore
from svb.data.publish import lock_folder
from svb.errors import InputError, MismatchError, StoreError, UsageError
from svb.train import run as train_run
from svb.train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from svb.train.config import CAPTION_SAMPLING, LOSSES, VARIANTS, TrainConfig
from svb.train.run import build_model, read_run, train
from svb.train.training_data import epoch_batches, positions_of_splits

# Tensors this small are slower on two threads than on one.
torch.set_num_threads(1)

SMALL = TrainConfig(
    embedding_size=32,
    layers=1,
    decoder_size=16,
    decoder_layers=1,
    batch_size=16,
    epochs=6,
    evaluate_every=2,
    learning_rate=2e-3,
    seed=3,
)
Task = tuple[Path, Path]


class Killed(Exception):  # noqa: N818
    """Stands for a kill: nothing catches it."""


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return synthetic.make_task(tmp_path_factory.mktemp("task"))


@pytest.fixture(scope="module")
def whole_run(task: Task, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `SMALL` that nothing interrupted; only to be read."""
    return train(*task, tmp_path_factory.mktemp("runs") / "whole", SMALL)


def contents(run: Path) -> dict[str, bytes]:
    """Return everything that training wrote, by name; config.json names paths and is left out."""
    return {
        str(path.relative_to(run)): path.read_bytes()
        for path in sorted(run.rglob("*"))
        if path.is_file() and path.name != "config.json"
    }


def lines(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def replace(**options: Any) -> TrainConfig:
    return dataclasses.replace(SMALL, **options)


def kill_after(epochs: int) -> Callable[[dict[str, float]], None]:
    def on_epoch(metrics: dict[str, float]) -> None:
        if metrics["epoch"] == epochs:
            raise Killed

    return on_epoch


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("variant", ["none", "cross"])
def test_learns_a_task(task: Task, tmp_path: Path, loss: str, variant: str) -> None:
    config = replace(loss=loss, variant=variant, epochs=30, evaluate_every=30)
    metrics = lines(train(*task, tmp_path / "run", config))
    # 20 videos: chance is 5 %.
    assert metrics[-1]["val/t2v/R@1"] > 50
    assert metrics[-1]["val/v2t/R@1"] > 50
    assert metrics[-1]["loss"] < metrics[0]["loss"]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("caption_sampling", CAPTION_SAMPLING)
def test_every_variant_trains(task: Task, tmp_path: Path, variant: str, caption_sampling: str) -> None:
    config = replace(variant=variant, caption_sampling=caption_sampling, epochs=2)
    metrics = lines(train(*task, tmp_path / "run", config))
    assert [line["epoch"] for line in metrics] == [1, 2]
    assert (metrics[-1]["cross_captioning"] > 0) == (variant != "none")


def test_metrics_say_what_was_measured(whole_run: Path) -> None:
    metrics = lines(whole_run)
    assert [line["epoch"] for line in metrics] == [1, 2, 3, 4, 5, 6]
    assert ["val/t2v/R@1" in line for line in metrics] == [False, True] * 3
    best = load_checkpoint(whole_run / "best")
    assert best.training == {} and best.metrics
    sums = {
        line["epoch"]: sum(line[f"val/{way}/R@{k}"] for way in ("t2v", "v2t") for k in (1, 5, 10))
        for line in metrics
        if "val/t2v/R@1" in line
    }
    assert sums[best.epoch] == max(sums.values())
    assert load_checkpoint(whole_run / "last").epoch == 6


def test_two_runs_of_one_seed_are_the_same_bytes(task: Task, whole_run: Path, tmp_path: Path) -> None:
    again = train(*task, tmp_path / "again", SMALL)
    assert contents(again) == contents(whole_run)
    other = train(*task, tmp_path / "other", replace(seed=4))
    assert contents(other)["last/model.safetensors"] != contents(whole_run)["last/model.safetensors"]


@pytest.mark.parametrize("checkpoint_seconds", [0.0, 1e9])
@pytest.mark.parametrize("after", [1, 4, 5])
def test_killed_at_the_end_of_an_epoch(
    task: Task,
    whole_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    after: int,
    checkpoint_seconds: float,
) -> None:
    monkeypatch.setattr(train_run, "CHECKPOINT_SECONDS", checkpoint_seconds)
    messages: list[str] = []
    with pytest.raises(Killed):
        train(*task, tmp_path / "run", SMALL, on_epoch=kill_after(after))
    seen: list[float] = []
    train(
        *task,
        tmp_path / "run",
        SMALL,
        on_epoch=lambda metrics: seen.append(metrics["epoch"]),
        on_message=messages.append,
    )
    if checkpoint_seconds:  # no checkpoint yet: from the start
        assert seen == [1, 2, 3, 4, 5, 6]
    else:
        assert seen == list(range(after + 1, 7))
        assert f"resuming {tmp_path / 'run'} after epoch {after} of 6" in messages
    assert contents(tmp_path / "run") == contents(whole_run)


@pytest.mark.parametrize("step", [1, 9, 14, 21])
def test_killed_in_the_middle_of_an_epoch(
    task: Task, whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    monkeypatch.setattr(train_run, "CHECKPOINT_SECONDS", 0.0)
    real, calls = train_run.info_nce, 0

    def killing(*arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == step:
            raise Killed
        return real(*arguments)

    monkeypatch.setattr(train_run, "info_nce", killing)
    with pytest.raises(Killed):
        train(*task, tmp_path / "run", SMALL)
    train(*task, tmp_path / "run", SMALL)
    assert contents(tmp_path / "run") == contents(whole_run)


@pytest.mark.parametrize("saves", range(1, 7))
def test_killed_between_any_two_writes(
    task: Task, whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saves: int
) -> None:
    """Kills after the n-th checkpoint was published, best/ or last/: metrics may be ahead or behind."""
    monkeypatch.setattr(train_run, "CHECKPOINT_SECONDS", 0.0)
    real, count = train_run.save_checkpoint, 0

    def killing(folder: Path, checkpoint: Checkpoint) -> None:
        nonlocal count
        real(folder, checkpoint)
        count += 1
        if count == saves:
            raise Killed

    monkeypatch.setattr(train_run, "save_checkpoint", killing)
    with pytest.raises(Killed):
        train(*task, tmp_path / "run", SMALL)
    count = 1000
    train(*task, tmp_path / "run", SMALL)
    assert contents(tmp_path / "run") == contents(whole_run)


def test_a_line_of_metrics_cut_short_is_written_again(
    task: Task, whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_run, "CHECKPOINT_SECONDS", 0.0)
    with pytest.raises(Killed):
        train(*task, tmp_path / "run", SMALL, on_epoch=kill_after(3))
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 4, "loss": 1.')
    train(*task, tmp_path / "run", SMALL)
    assert contents(tmp_path / "run") == contents(whole_run)


_TRAIN_SLOWLY = """
import json, sys, time
import torch
from pathlib import Path
from svb.train import run
torch.set_num_threads(1)
run.CHECKPOINT_SECONDS = 0.0
config = run.TrainConfig(**json.loads(sys.argv[4]))
if sys.argv[5] == "slowly":
    real = run.info_nce
    def slow(*arguments):
        time.sleep(0.02)
        return real(*arguments)
    run.info_nce = slow
run.train(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), config)
"""


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_with_the_same_bytes(
    task: Task, whole_run: Path, tmp_path: Path
) -> None:
    out, random = tmp_path / "run", np.random.default_rng(0)
    arguments = [str(task[0]), str(task[1]), str(out), json.dumps(dataclasses.asdict(SMALL))]
    for _ in range(4):
        process = subprocess.Popen([sys.executable, "-c", _TRAIN_SLOWLY, *arguments, "slowly"])
        while not (out / "metrics.jsonl").exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.4))
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run([sys.executable, "-c", _TRAIN_SLOWLY, *arguments, "at once"], check=True)
    assert contents(out) == contents(whole_run)


def test_another_config_is_refused_naming_the_fields(task: Task, whole_run: Path) -> None:
    before = contents(whole_run)
    with pytest.raises(MismatchError) as caught:
        train(*task, whole_run, replace(batch_size=8, variant="full"))
    assert "config.batch_size: stored 16, wanted 8" in str(caught.value)
    assert "config.variant: stored 'cross', wanted 'full'" in str(caught.value)
    assert "seed" not in str(caught.value)
    assert contents(whole_run) == before


def test_other_data_is_refused(task: Task, whole_run: Path, tmp_path: Path) -> None:
    store, _ = synthetic.make_task(tmp_path, num_train=60, num_val=10)
    with pytest.raises(MismatchError, match=r"data\.val\.videos: stored 20, wanted 10"):
        train(store, task[1], whole_run, SMALL)


def test_a_run_whose_inputs_were_moved_is_taken_up(task: Task, whole_run: Path, tmp_path: Path) -> None:
    store, captions = tmp_path / "moved", tmp_path / "moved.h5"
    shutil.copytree(task[0], store)
    shutil.copy(task[1], captions)
    messages: list[str] = []
    train(store, captions, whole_run, SMALL, on_message=messages.append)
    assert messages[-1].startswith("nothing to do")


def test_a_finished_run_has_nothing_to_do(task: Task, whole_run: Path) -> None:
    before, messages = contents(whole_run), []
    assert train(*task, whole_run, SMALL, on_message=messages.append) == whole_run
    assert messages == [f"nothing to do: {whole_run} has had its 6 epochs"]
    assert contents(whole_run) == before


def copy_run(run: Path, to: Path) -> Path:
    shutil.copytree(run, to)
    return to


@pytest.mark.parametrize("name", ["model.safetensors", "training.pt", "checkpoint.json"])
@pytest.mark.parametrize("kept", [0.0, 0.001, 0.3, 0.9, 0.9999])
def test_a_truncated_checkpoint_is_refused(
    task: Task, whole_run: Path, tmp_path: Path, name: str, kept: float
) -> None:
    run = copy_run(whole_run, tmp_path / "run")
    path = run / "last" / name
    data = path.read_bytes()
    path.write_bytes(data[: min(int(len(data) * kept), len(data) - 2)])
    with pytest.raises(StoreError, match=r"last.*(restore|train again)"):
        load_checkpoint(run / "last")
    with pytest.raises(StoreError):
        train(*task, run, SMALL)


@pytest.mark.parametrize("name", ["model.safetensors", "training.pt", "checkpoint.json"])
def test_a_flipped_byte_in_a_checkpoint_is_never_loaded(whole_run: Path, tmp_path: Path, name: str) -> None:
    run = copy_run(whole_run, tmp_path / "run")
    path = run / "last" / name
    data = path.read_bytes()
    positions = np.linspace(0, len(data) - 2, 60).astype(int) if name != "checkpoint.json" else range(len(data) - 1)
    expected = load_checkpoint(run / "last")
    for position in positions:
        for flip in (0x01, 0x80):
            damaged = bytearray(data)
            damaged[position] ^= flip
            path.write_bytes(damaged)
            try:
                loaded = load_checkpoint(run / "last")
            except StoreError as error:
                assert "restore" in str(error) or "train again" in str(error)
            else:  # white space of the JSON text
                assert name == "checkpoint.json" and data[position : position + 1].isspace()
                assert loaded.epoch == expected.epoch and loaded.metrics == expected.metrics


@pytest.mark.parametrize("flip", [0x01, 0x02])
def test_a_flipped_byte_in_config_json_is_noticed(whole_run: Path, tmp_path: Path, flip: int) -> None:
    path = tmp_path / "config.json"
    data = (whole_run / "config.json").read_bytes()
    expected = read_run(whole_run)
    for position in range(0, len(data) - 1, 3):
        damaged = bytearray(data)
        damaged[position] ^= flip
        path.write_bytes(damaged)
        try:
            assert read_run(tmp_path) == expected
        except StoreError:
            continue
        assert data[position : position + 1].isspace()


@pytest.mark.parametrize("name", ["model.safetensors", "training.pt", "checkpoint.json"])
def test_a_missing_file_is_refused(whole_run: Path, tmp_path: Path, name: str) -> None:
    run = copy_run(whole_run, tmp_path / "run")
    (run / "last" / name).unlink()
    with pytest.raises(StoreError, match="not a whole checkpoint"):
        load_checkpoint(run / "last")


def test_a_checkpoint_of_another_size_is_refused(task: Task, whole_run: Path, tmp_path: Path) -> None:
    run = copy_run(whole_run, tmp_path / "run")
    torch.manual_seed(0)
    description = read_run(run)
    description["config"]["embedding_size"] = 16
    other = build_model(description, 12)
    last = load_checkpoint(run / "last")
    save_checkpoint(run / "last", Checkpoint(3, {}, other.state_dict(), last.training))
    with pytest.raises(
        StoreError, match=r"does not fit its run's config\.json \(.*\(16, .*not \(32, .*train again"
    ):
        train(*task, run, SMALL)


@pytest.mark.parametrize("old_is_set_aside", [False, True])
def test_a_kill_between_the_two_renames_of_a_checkpoint(
    task: Task,
    whole_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    old_is_set_aside: bool,
) -> None:
    monkeypatch.setattr(train_run, "CHECKPOINT_SECONDS", 0.0)
    run = tmp_path / "run"
    with pytest.raises(Killed):
        train(*task, run, SMALL, on_epoch=kill_after(3))
    if old_is_set_aside:
        shutil.copytree(run / "last", run / ".last.old")
    (run / "last").rename(run / ".last.new")
    # Reading finds it without touching a run that may be in training.
    assert load_checkpoint(run / "last").epoch == 3
    assert not (run / "last").exists()
    train(*task, run, SMALL)
    assert contents(run) == contents(whole_run)


def test_reading_leaves_a_checkpoint_that_is_being_replaced_alone(whole_run: Path, tmp_path: Path) -> None:
    run = copy_run(whole_run, tmp_path / "run")
    shutil.copytree(run / "last", run / ".last.new")
    assert load_checkpoint(run / "last").epoch == 6
    assert (run / ".last.new").is_dir()


def test_no_checkpoint_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no checkpoint at .* train first"):
        load_checkpoint(tmp_path / "best")


def test_what_has_no_counterpart_is_said_and_left_out(task: Task, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    videos = {f"v{video}": random.normal(size=(2, 4)) for video in range(8)}
    videos["silent"] = random.normal(size=(2, 4))
    videos["broken"] = np.empty((0, 4))
    store = synthetic.make_store(tmp_path / "features", videos)
    rows = [(f"v{video}", "a dog", "val" if video > 5 else "train") for video in range(8)]
    rows += [("broken", "a dog", "train"), ("gone", "a dog", "train"), ("gone", "a cat", "train")]
    captions = synthetic.make_captions(tmp_path / "captions.h5", rows, random.normal(size=(len(rows), 5)))
    messages: list[str] = []
    train(store, captions, tmp_path / "run", replace(epochs=1), on_message=messages.append)
    assert "2 videos of the caption table have no features and are left out, first 'broken'" in messages
    assert "1 videos of the store have no captions and are left out, first 'silent'" in messages
    assert read_run(tmp_path / "run")["data"]["train"]["videos"] == 6
    assert read_run(tmp_path / "run")["data"]["val"]["videos"] == 2


def test_a_val_split_without_features_is_said_and_done_without(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    store = synthetic.make_store(tmp_path / "features", {f"v{v}": random.normal(size=(2, 4)) for v in range(4)})
    rows = [(f"v{v}", "a dog", "train" if v < 4 else "val") for v in range(6)]
    captions = synthetic.make_captions(tmp_path / "captions.h5", rows, random.normal(size=(6, 5)))
    messages: list[str] = []
    run = train(store, captions, tmp_path / "run", replace(epochs=1), on_message=messages.append)
    assert any("no video of the val split has features" in message for message in messages)
    assert load_checkpoint(run / "best").epoch == 1


def test_val_is_carved_by_seed_from_whole_videos(tmp_path: Path) -> None:
    store, captions = synthetic.make_task(tmp_path, num_train=40, num_val=0, has_split=False)
    table = read_caption_features(captions)

    def carve(seed: int) -> dict[str, set[str]]:
        messages: list[str] = []
        positions = positions_of_splits(table, val_fraction=0.25, seed=seed, on_message=messages.append)
        assert messages == ["the captions have no val split: put 10 of 40 training videos aside as val"]
        assert sorted(positions["train"] + positions["val"]) == list(range(80))
        return {split: {table.table.video_ids[p] for p in where} for split, where in positions.items()}

    first = carve(0)
    assert len(first["val"]) == 10 and not first["val"] & first["train"]
    assert carve(0) == first and carve(1) != first
    run = train(store, captions, tmp_path / "run", replace(epochs=2, val_fraction=0.25))
    assert read_run(run)["data"]["val"]["videos"] == 10
    assert "val/t2v/R@1" in lines(run)[-1]


def test_without_val_the_last_epoch_is_the_best(tmp_path: Path) -> None:
    task = synthetic.make_task(tmp_path, num_train=10, num_val=0, has_split=False)
    run = train(*task, tmp_path / "run", replace(epochs=2, val_fraction=0.0))
    assert load_checkpoint(run / "best").epoch == 2
    assert read_run(run)["data"]["val"] is None


def test_one_video_is_too_few(tmp_path: Path) -> None:
    task = synthetic.make_task(tmp_path, num_train=1, num_val=3)
    with pytest.raises(InputError, match="1 training videos have both features and captions - expected at least 2"):
        train(*task, tmp_path / "run", SMALL)
    assert not (tmp_path / "run").exists()


def test_nothing_in_common_is_an_error(task: Task, tmp_path: Path) -> None:
    store = synthetic.make_store(tmp_path / "features", {f"other{v}": np.ones((2, 24)) for v in range(3)})
    with pytest.raises(InputError, match="must be those of the store, such as 'other0'"):
        train(store, task[1], tmp_path / "run", SMALL)


def test_a_batch_larger_than_the_data_takes_all_of_it(tmp_path: Path) -> None:
    task = synthetic.make_task(tmp_path, num_train=3, num_val=2)
    run = train(*task, tmp_path / "run", replace(batch_size=1000, epochs=1))
    assert lines(run)[0]["epoch"] == 1


@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_of_nan_is_an_error_that_keeps_the_state_before(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: str
) -> None:
    monkeypatch.setattr(train_run, "CHECKPOINT_SECONDS", 0.0)
    real, calls = getattr(train_run, loss), 0

    def diverging(*arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return real(*arguments) * (float("nan") if calls == 10 else 1.0)

    monkeypatch.setattr(train_run, loss, diverging)
    with pytest.raises(InputError, match=r"the loss is nan, .* lower --learning-rate"):
        train(*task, tmp_path / "run", replace(loss=loss))
    last = load_checkpoint(tmp_path / "run" / "last")
    assert last.epoch == 2 and all(tensor.isfinite().all() for tensor in last.model.values())
    assert [line["epoch"] for line in lines(tmp_path / "run")] == [1, 2]


def test_a_gradient_that_is_no_number_in_the_last_step_is_an_error(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_run, "CHECKPOINT_SECONDS", 0.0)
    real, calls = train_run.info_nce, 0

    def diverging(similarity: torch.Tensor, *arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        loss = real(similarity, *arguments)
        if calls == 4:  # 60 videos in batches of 15: the last step of the first epoch
            loss = loss + (similarity - similarity).abs().sqrt().sum()  # value 0, gradient NaN
        return loss

    monkeypatch.setattr(train_run, "info_nce", diverging)
    with pytest.raises(InputError, match="its gradient nan"):
        train(*task, tmp_path / "run", SMALL)
    assert not (tmp_path / "run" / "last").exists()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"embedding_size": 129}, UsageError),
        ({"decoder_size": 129}, UsageError),
        ({"min_word_count": 10_000}, InputError),
    ],
)
def test_options_that_make_no_model_leave_no_run_behind(
    task: Task, tmp_path: Path, options: dict[str, int], error: type[Exception]
) -> None:
    with pytest.raises(error):
        train(*task, tmp_path / "run", replace(**options))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"loss": "hinge"},
        {"variant": "half"},
        {"caption_sampling": "two"},
        {"batch_size": 1},
        {"epochs": 0},
        {"layers": -1},
        {"dropout": 1.0},
        {"val_fraction": 1.5},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"support_temperature": 0.0},
        {"weight_decay": -1.0},
        {"logit_scale": 1e30},
        {"seed": -1},
        {"seed": 2**70},
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        TrainConfig(**options)


@pytest.mark.parametrize("caption_sampling", CAPTION_SAMPLING)
@pytest.mark.parametrize("batch_size", [2, 7, 16, 1000])
def test_an_epoch_is_a_pure_function_that_takes_each_caption_once(caption_sampling: str, batch_size: int) -> None:
    caption_video = np.repeat(np.arange(30), np.random.default_rng(0).integers(1, 5, size=30))

    def draw(seed: int, epoch: int) -> list[np.ndarray]:
        return epoch_batches(
            caption_video, caption_sampling=caption_sampling, batch_size=batch_size, seed=seed, epoch=epoch
        )

    batches = draw(0, 0)
    taken = np.concatenate(batches)
    assert max(map(len, batches)) <= batch_size and max(map(len, batches)) - min(map(len, batches)) <= 1
    if caption_sampling == "all":
        assert sorted(taken) == list(range(len(caption_video)))
    else:
        assert sorted(caption_video[taken]) == list(range(30))
    np.testing.assert_array_equal(taken, np.concatenate(draw(0, 0)))
    assert taken.tolist() != np.concatenate(draw(0, 1)).tolist() != np.concatenate(draw(1, 0)).tolist()
    drawn = {int(caption) for epoch in range(40) for caption in np.concatenate(draw(0, epoch))}
    assert drawn == set(range(len(caption_video)))


def test_videos_of_one_frame_and_of_many_train_together(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    lengths = [1, 1, 40, 3, 100, 2]
    videos = {f"v{v}": random.normal(size=(length, 4)) for v, length in enumerate(lengths)}
    store = synthetic.make_store(tmp_path / "features", videos)
    rows = [(video_id, "a dog and a dog", "train") for video_id in videos]
    captions = synthetic.make_captions(tmp_path / "captions.h5", rows, random.normal(size=(6, 5)))
    run = train(store, captions, tmp_path / "run", replace(epochs=2, val_fraction=0.0, max_frames=8))
    assert lines(run)[-1]["epoch"] == 2


def test_a_shared_space_starts_from_zero_shot(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    features = random.normal(size=(12, 16))
    name = "open_clip:made-up"
    videos = {f"v{v:02}": features[v] + 0.5 * random.normal(size=(3, 16)) for v in range(12)}
    store = synthetic.make_store(tmp_path / "features", videos, backbone=name)
    rows = [(video_id, "a dog and a dog", "train" if v < 6 else "val") for v, video_id in enumerate(videos)]
    captions = synthetic.make_captions(tmp_path / "captions.h5", rows, features, text_encoder=name)
    config = replace(epochs=1, evaluate_every=1, learning_rate=1e-12)
    run = train(store, captions, tmp_path / "run", config)
    assert read_run(run)["shared_space"] is True
    loaded = FeatureStore(store).load(name)
    unit = loaded.features.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    means = np.add.reduceat(unit, loaded.offsets[:-1])[6:]
    similarity = features[6:].astype(np.float16) @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T
    expected = 100 * (similarity.argmax(axis=1) == np.arange(6)).mean()
    assert lines(run)[-1]["val/t2v/R@1"] == pytest.approx(expected)


FIELDS = dataclasses.fields(TrainConfig)
OTHER_CHOICE = {"loss": "max_margin", "variant": "full", "caption_sampling": "all"}
OTHER_RANGE = {"dropout": 0.25, "val_fraction": 0.5, "warmup": 0.5}


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_every_option_has_help_and_changes_the_config(
    field: dataclasses.Field[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    option = f"--{field.name.replace('_', '-')}"
    parameter = next(p for p in cli.commands["train"].params if option in p.opts)
    help_text = getattr(parameter, "help", "")
    assert help_text and len(help_text) > 10
    shown = " ".join(CliRunner().invoke(cli, ["train", "--help"], terminal_width=200).output.split())
    assert option in shown and help_text.split(".")[0][:40] in shown
    value = OTHER_CHOICE.get(field.name) or OTHER_RANGE.get(field.name) or type(field.default)(field.default + 1)
    seen: list[TrainConfig] = []
    monkeypatch.setattr(train_run, "train", lambda store, captions, out, config, **_: seen.append(config) or out)
    result = CliRunner().invoke(cli, ["train", "f", "c", "-o", str(tmp_path / "run"), option, str(value)])
    assert result.exit_code == 0, result.output
    assert seen == [dataclasses.replace(TrainConfig(), **{field.name: value})]
    assert seen[0] != TrainConfig()


def test_the_command_says_what_it_chose_and_prints_the_run(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("features").symlink_to(task[0])
    Path("captions.h5").symlink_to(task[1])
    arguments = ["train", "--epochs", "1", "--embedding-size", "16", "--decoder-size", "16", "--layers", "0"]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    assert result.stdout == "runs/001\n"
    assert "training runs/001 on features and captions.h5" in result.stderr
    assert "epoch   1  loss" in result.stderr and "t2v/R@1" in result.stderr
    assert CliRunner().invoke(cli, arguments).stdout == "runs/002\n"


@pytest.mark.parametrize(("num_videos", "batch_size"), [(2, 2), (3, 2), (5, 2), (7, 3), (100, 128)])
def test_no_batch_has_a_single_caption(num_videos: int, batch_size: int) -> None:
    batches = epoch_batches(np.arange(num_videos), caption_sampling="one", batch_size=batch_size, seed=0, epoch=0)
    assert min(map(len, batches)) >= 2
    assert sorted(np.concatenate(batches)) == list(range(num_videos))


def test_two_trainings_of_one_run_at_once_are_refused(task: Task, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    lock = lock_folder(tmp_path / "run")
    try:
        with pytest.raises(StoreError, match="another process may be writing"):
            train(*task, tmp_path / "run", replace(epochs=1))
    finally:
        os.close(lock)
    assert not (tmp_path / "run" / "config.json").exists()
