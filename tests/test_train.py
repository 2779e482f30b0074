from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import synthetic
import torch
from click.testing import CliRunner
from conftest import RunSvb
from host_waits import HostWaits
from messages import heard
from numpy.typing import NDArray
from runs import SMALL, Task, as_of_an_older_svb, change_config, contents, lines, recall_sums, small

from svb.cli import cli
from svb.data.caption_features import read_caption_features
from svb.data.publish import lock_folder
from svb.errors import InputError, MismatchError, StoreError, UsageError
from svb.train import loop, objective
from svb.train import run as train_run
from svb.train.checkpoint import load_checkpoint
from svb.train.config import CAPTION_SAMPLING, TrainConfig, stored_options
from svb.train.run import read_run, train
from svb.train.training_data import draw_captions, epoch_batches, positions_of_splits


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return synthetic.make_task(tmp_path_factory.mktemp("task"))


@pytest.fixture(scope="module")
def whole_run(task: Task, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `SMALL` that nothing interrupted, saved once, at its end; only to be read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "CHECKPOINT_SECONDS", 1e9)
        return train(*task, tmp_path_factory.mktemp("runs") / "whole", SMALL)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss": "max_margin", "variant": "none"},
        {"loss": "max_margin", "rebuild": "embedding", "memory_bank": 20},
    ],
)
def test_learns_a_task(task: Task, tmp_path: Path, options: dict[str, Any]) -> None:
    metrics = lines(train(*task, tmp_path / "run", small(**options, epochs=20, evaluate_every=20)))
    # 20 videos: chance is 5 %.
    assert metrics[-1]["val/t2v/R@1"] > 50 and metrics[-1]["val/v2t/R@1"] > 50
    assert metrics[-1]["loss"] < metrics[0]["loss"]


def test_metrics_say_what_was_measured(whole_run: Path) -> None:
    sums, best = recall_sums(whole_run, "val"), load_checkpoint(whole_run / "best")
    assert [line["epoch"] for line in lines(whole_run)] == [1, 2, 3, 4, 5, 6] and [*sums] == [2, 4, 6]
    assert best.training == {} and best.metrics and sums[best.epoch] == max(sums.values())
    assert load_checkpoint(whole_run / "last").epoch == 6


def test_another_config_or_other_data_are_refused_and_moved_data_are_not(
    task: Task, whole_run: Path, tmp_path: Path
) -> None:
    before = contents(whole_run)
    with pytest.raises(MismatchError) as caught:
        train(*task, whole_run, small(batch_size=8, variant="full"))
    assert "config.batch_size: stored 16, wanted 8" in str(caught.value)
    assert "config.variant: stored 'cross', wanted 'full'" in str(caught.value)
    assert "seed" not in str(caught.value)
    store, _ = synthetic.make_task(tmp_path, num_train=60, num_val=10)
    with pytest.raises(MismatchError, match=r"data\.val\.videos: stored 20, wanted 10"):
        train(store, task[1], whole_run, SMALL)
    moved, captions = shutil.copytree(task[0], tmp_path / "moved"), shutil.copy(task[1], tmp_path / "moved.h5")
    older = Path(shutil.copytree(whole_run, tmp_path / "older"))
    change_config(older, as_of_an_older_svb)
    for run, given in ((whole_run, (moved, captions)), (older, task)):
        messages = heard()
        assert train(*given, run, SMALL) == run
        assert messages == [f"nothing to do: {run} is already trained for 6 epochs"]
        assert contents(run) == before


def make_random_task(folder: Path, lengths: dict[str, int], rows: list[tuple[str, str, str]]) -> Task:
    """Write videos of so many random frames each, and captions with random features."""
    random = np.random.default_rng(0)
    videos = {video_id: random.normal(size=(length, 4)) for video_id, length in lengths.items()}
    store = synthetic.make_store(folder / "features", videos)
    return store, synthetic.make_captions(folder / "captions.h5", rows, random.normal(size=(len(rows), 5)))


def test_what_has_no_counterpart_is_said_and_left_out(tmp_path: Path) -> None:
    rows = [(f"v{video}", "a dog", "val" if video > 5 else "train") for video in range(8)]
    rows += [("broken", "a dog", "train"), ("gone", "a dog", "train"), ("gone", "a cat", "train")]
    # Videos of one frame and of many train together.
    lengths = {f"v{video}": length for video, length in enumerate((1, 1, 40, 3, 100, 2, 2, 2))}
    task = make_random_task(tmp_path, {**lengths, "silent": 2, "broken": 0}, rows)
    messages = heard()
    train(*task, tmp_path / "run", small(epochs=2, max_frames=8))
    assert "2 videos of the caption table have no features and are left out, first 'broken'" in messages
    assert "1 videos of the store have no captions and are left out, first 'silent'" in messages
    data = read_run(tmp_path / "run")["data"]
    assert (data["train"]["videos"], data["val"]["videos"]) == (6, 2)


@pytest.mark.parametrize(("split", "val_fraction"), [("val", 0.1), ("train", 0.0)])
def test_without_val_the_last_epoch_is_the_best(tmp_path: Path, split: str, val_fraction: float) -> None:
    rows = [(f"v{v}", "a dog", "train" if v < 4 else split) for v in range(6)]
    task = make_random_task(tmp_path, {f"v{v}": 2 for v in range(4)}, rows)
    messages = heard()
    run = train(*task, tmp_path / "run", small(epochs=2, val_fraction=val_fraction))
    assert any("no video of the val split has features" in said for said in messages) == (split == "val")
    assert load_checkpoint(run / "best").epoch == 2 and read_run(run)["data"]["val"] is None


def test_val_is_carved_from_whole_videos_whatever_the_seed(tmp_path: Path) -> None:
    store, captions = synthetic.make_task(tmp_path, num_train=40, num_val=0, has_split=False)
    table = read_caption_features(captions)

    def carve() -> dict[str, set[str]]:
        messages = heard()
        positions = positions_of_splits(table, val_fraction=0.25)
        assert messages == ["the captions have no val split: holding out 10 of 40 training videos as val"]
        assert sorted(positions["train"] + positions["val"]) == list(range(80))
        return {split: {table.table.video_ids[p] for p in where} for split, where in positions.items()}

    first = carve()
    assert len(first["val"]) == 10 and not first["val"] & first["train"]
    options = {"epochs": 2, "val_fraction": 0.25}
    runs = [train(store, captions, tmp_path / str(seed), small(**options, seed=seed)) for seed in (0, 1)]
    assert read_run(runs[0])["data"]["val"]["videos"] == 10
    assert read_run(runs[1])["data"] == read_run(runs[0])["data"]
    assert "val/t2v/R@1" in lines(runs[0])[-1]


def test_too_little_in_common_is_an_error(task: Task, tmp_path: Path) -> None:
    one = synthetic.make_task(tmp_path, num_train=1, num_val=3)
    with pytest.raises(InputError, match="1 training videos have both features and captions - expected at least 2"):
        train(*one, tmp_path / "run", SMALL)
    store = synthetic.make_store(tmp_path / "other", {f"other{v}": np.ones((2, 24)) for v in range(3)})
    with pytest.raises(InputError, match="must be those of the store, such as 'other0'"):
        train(store, task[1], tmp_path / "run", SMALL)
    assert not (tmp_path / "run").exists()


def test_captions_without_a_known_word_and_fewer_than_a_batch_train(tmp_path: Path) -> None:
    rows = [(f"v{v}", caption, "train") for v, caption in enumerate(("a dog", "a dog", "?!", "zebra"))]
    task = make_random_task(tmp_path, {f"v{v}": 2 for v in range(4)}, rows)
    messages = heard()
    run = train(*task, tmp_path / "run", small(epochs=2, val_fraction=0.0, batch_size=1000))
    assert messages == ["the batch size 1000 exceeds the data: every batch holds all 4 captions"]
    assert all(line["cross_captioning"] > 0 for line in lines(run))
    assert json.loads((run / "vocabulary.json").read_text())["words"] == ["a", "dog"]


@pytest.mark.parametrize(
    "options",
    [
        {"variant": "none", "loss": "max_margin", "intra_modal_weight": 0.5},
        {"rebuild": "embedding", "memory_bank": 20, "decode_fraction": 0.5, "layers": 1, "convolution": 3},
        {"rebuild": "embedding", "variant": "identity", "pooling": "attention"},
        {"rebuild": "tokens", "memory_bank": 20, "variant": "hybrid"},
        {"rebuild": "tokens", "memory_bank": 7, "support_values": "pooled", "caption_sampling": "all"},
    ],
)
def test_a_step_waits_for_the_device_once(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    step, waits = loop.Loop._run_step, []

    def counted(self: loop.Loop, interrupted: Callable[[], int]) -> bool:
        with HostWaits() as host:
            is_interrupted = step(self, interrupted)
        waits.append(host.seen)
        return is_interrupted

    monkeypatch.setattr(loop.Loop, "_run_step", counted)
    train(*task, tmp_path / "run", small(**options, epochs=2))
    # It reads the loss, its parts and the norm of the gradient together; the first also the lengths of all videos.
    assert len(waits) >= 8 and waits[1:] == [["cpu"]] * (len(waits) - 1) and len(waits[0]) <= 3


@pytest.mark.parametrize(("save_seconds", "steps"), [(0.5, 20), (4.0, 80)])
def test_costly_checkpoints_are_written_less_often(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save_seconds: float, steps: int
) -> None:
    now, saved = 0.0, []
    step, save = loop.Loop._run_step, loop.save_checkpoint

    def of_a_second(self: loop.Loop, interrupted: Callable[[], int]) -> bool:
        nonlocal now
        now += 1
        return step(self, interrupted)

    def costly(folder: Path, *arguments: Any, **options: Any) -> None:
        nonlocal now
        if folder.name == "last":
            now += save_seconds
            saved.append(now)
        save(folder, *arguments, **options)

    monkeypatch.setattr(loop.time, "monotonic", lambda: now)
    monkeypatch.setattr(loop.Loop, "_run_step", of_a_second)
    monkeypatch.setattr(loop, "save_checkpoint", costly)
    train(*task, tmp_path / "run", small(variant="none", layers=0, batch_size=8, epochs=18, evaluate_every=18))
    assert {round(later - earlier - save_seconds) for earlier, later in itertools.pairwise(saved[:-1])} == {steps}


NAN, INF = float("nan"), float("inf")
# In which call, of two a step and four steps an epoch, how, what is said, and where the state before stands.
SPOILT: dict[str, tuple[int, Callable[..., torch.Tensor], str, tuple[int, int]]] = {
    "loss": (19, lambda cost, of: cost * NAN, r"the loss is nan, .* lower --learning-rate", (2, 1)),
    "gradient": (8, lambda cost, of: cost + (of - of).abs().sqrt(), "its gradient nan", (0, 3)),
}


@pytest.mark.parametrize("what", SPOILT)
def test_what_is_no_number_is_an_error_that_keeps_the_state_before(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    call, spoil, words, saved = SPOILT[what]
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    real, calls = objective.info_nce, 0

    def diverging(positive: torch.Tensor, *arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        cost: torch.Tensor = real(positive, *arguments)
        return spoil(cost, positive) if calls == call else cost

    monkeypatch.setattr(objective, "info_nce", diverging)
    with pytest.raises(InputError, match=words):
        train(*task, tmp_path / "run", SMALL)
    last = load_checkpoint(tmp_path / "run" / "last")
    assert (last.epoch, last.training["steps"]) == saved
    assert all(tensor.isfinite().all() for tensor in last.model.values())
    if saved[0]:
        assert [line["epoch"] for line in lines(tmp_path / "run")] == [1, 2]


@pytest.mark.parametrize(
    "options",
    [{"embedding_size": 129}, {"memory_bank": 10**12}, {"decoder_size": 129}, {"min_word_count": 10_000}],
)
def test_options_that_make_no_model_leave_no_run_behind(
    task: Task, tmp_path: Path, options: dict[str, int]
) -> None:
    with pytest.raises(InputError if "min_word_count" in options else UsageError):
        train(*task, tmp_path / "run", small(**options))
    assert not (tmp_path / "run").exists()


BAD_VALUES: dict[str, list[Any]] = {
    **{name: ["other"] for name in ("loss", "variant", "caption_sampling", "pooling", "negatives", "rebuild")},
    **{"support_values": ["video"], "select_on": ["train"], "caption_decoder": ["lstm", "t5:"]},
    **{name: [0, -1] for name in ("epochs", "evaluate_every", "embedding_size", "max_frames", "decoder_size")},
    **{"decoder_layers": [0], "min_word_count": [0], "batch_size": [0, 1], "convolution": [2, -3]},
    **{"layers": [-1], "memory_bank": [-1], "captions_per_video": [-1], "seed": [-1, 2**70]},
    **{"dropout": [1.0], "val_fraction": [1.5], "warmup": [1.0], "negatives_warmup": [1.0, -0.1]},
    **{"margin": [-0.1, INF], "intra_modal_weight": [-1.0], "cross_captioning_weight": [-1.0, NAN]},
    **{"decode_fraction": [0.0, 1.5, NAN], "learning_rate": [0.0, NAN], "support_temperature": [0.0]},
    **{"weight_decay": [-1.0], "logit_scale": [0.0, 1e30], "caption_relevance": ["group"]},
    **{"relevant_from": [-0.1, 1.1, NAN], "soft_label_weight": [-1.0], "soft_label_temperature": [0.0]},
    **{"retrieval_scale": [-8.0, INF]},
}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"loss": "info_loob"}, "a learned logit scale, which would only grow - add --no-learn-logit-scale"),
        ({"relevance_margin": True}, "info_nce has no margin - add --loss max_margin"),
        ({"retrieval_scale": 8.0, "intra_modal_weight": 1.0}, r"retrieval_scale is 8\.0 with intra_modal_weight 1"),
        *(({name: value}, rf"{name} is .* - expected") for name, values in BAD_VALUES.items() for value in values),
    ],
    ids=str,
)
def test_values_out_of_range_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        TrainConfig(**options)


@pytest.mark.parametrize("given", [("--decode-fraction", "0"), ("--memory-bank", "-1"), ("--rebuild", "images")])
def test_the_command_refuses_them_in_one_line(given: tuple[str, str], run_svb: RunSvb, tmp_path: Path) -> None:
    ran = run_svb("train", "features", "captions.h5", "-o", tmp_path / "run", *given)
    assert ran.exit_code == 2 and ran.stdout == ""
    assert given[0].strip("-").replace("-", "_") in ran.stderr.replace("--rebuild", "rebuild")
    assert "Traceback" not in ran.stderr and not (tmp_path / "run").exists()


def test_few_captions_a_video_are_drawn_once_by_seed(tmp_path: Path) -> None:
    store, captions = synthetic.make_task(tmp_path, num_train=20, num_val=3, captions_a_video=4)
    features = read_caption_features(captions)
    positions = [p for p, split in enumerate(features.table.splits) if split == "train"]
    for number in (1, 2, 3):
        drawn = draw_captions(features, positions, number, seed=0)
        assert drawn == draw_captions(features, positions, number, seed=0) == sorted(set(drawn))
        assert set(drawn) < set(positions)
        videos = [features.table.video_ids[position] for position in drawn]
        assert {videos.count(video_id) for video_id in videos} == {number} and len(set(videos)) == 20
        assert drawn != draw_captions(features, positions, number, seed=1)
        taken = {p % 4 for seed in range(30) for p in draw_captions(features, positions, number, seed)}
        assert taken == {0, 1, 2, 3}
    data = read_run(train(store, captions, tmp_path / "run", small(epochs=1, captions_per_video=1)))["data"]
    assert (data["train"]["captions"], data["val"]["captions"]) == (20, 3 * 4)


def draw_batches(caption_video: NDArray[np.int64], batch_size: int, **options: Any) -> list[NDArray[np.int64]]:
    options = {"caption_sampling": "one", "seed": 0, "epoch": 0, **options}
    return epoch_batches(caption_video, batch_size=batch_size, **options)


@pytest.mark.parametrize(("videos", "batch_size"), [(2, 2), (3, 2), (5, 2), (7, 3), (100, 128)])
def test_no_batch_has_a_single_caption(videos: int, batch_size: int) -> None:
    batches = draw_batches(np.arange(videos), batch_size)
    assert min(map(len, batches)) >= 2 and sorted(np.concatenate(batches)) == list(range(videos))


@pytest.mark.parametrize("caption_sampling", CAPTION_SAMPLING)
@pytest.mark.parametrize("batch_size", [2, 7, 16, 1000])
def test_an_epoch_is_a_pure_function_that_takes_each_caption_once(caption_sampling: str, batch_size: int) -> None:
    caption_video = np.repeat(np.arange(30), np.random.default_rng(0).integers(1, 5, size=30))

    def draw(**options: int) -> list[int]:
        batches = draw_batches(caption_video, batch_size, caption_sampling=caption_sampling, **options)
        assert max(map(len, batches)) <= batch_size and max(map(len, batches)) - min(map(len, batches)) <= 1
        return [int(caption) for caption in np.concatenate(batches)]

    taken = draw()
    if caption_sampling == "all":
        assert sorted(taken) == list(range(len(caption_video)))
    else:
        assert sorted(caption_video[taken]) == list(range(30))
    assert taken == draw() != draw(epoch=1) != draw(seed=1)
    assert {caption for epoch in range(40) for caption in draw(epoch=epoch)} == {*range(len(caption_video))}


def test_a_shared_space_starts_from_zero_shot(tmp_path: Path) -> None:
    random, name = np.random.default_rng(0), "open_clip:made-up"
    features = random.normal(size=(12, 16))
    videos = {f"v{v:02}": features[v] + 0.5 * random.normal(size=(3, 16)) for v in range(12)}
    store = synthetic.make_store(tmp_path / "features", videos, backbone=name)
    rows = [(video_id, "a dog and a dog", "train" if v < 6 else "val") for v, video_id in enumerate(videos)]
    captions = synthetic.make_captions(tmp_path / "captions.h5", rows, features, text_encoder=name)
    run = train(store, captions, tmp_path / "run", small(epochs=1, evaluate_every=1, learning_rate=1e-12))
    assert read_run(run)["shared_space"] is True
    unit = np.stack([*videos.values()][6:]).astype(np.float16).astype(np.float64)  # (6, 3, 16)
    means = (unit / np.linalg.norm(unit, axis=2, keepdims=True)).mean(axis=1)
    similarity = features[6:].astype(np.float16) @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T
    expected = 100 * (similarity.argmax(axis=1) == np.arange(6)).mean()
    assert lines(run)[-1]["val/t2v/R@1"] == pytest.approx(expected)


FIELDS = dataclasses.fields(TrainConfig)
OTHER_VALUE = {
    **dict.fromkeys(("dropout", "val_fraction", "warmup", "negatives_warmup", "decode_fraction"), 0.25),
    "caption_decoder": "t5:somewhere",
}


def other_value(field: dataclasses.Field[Any]) -> Any:
    if field.name in OTHER_VALUE:
        return OTHER_VALUE[field.name]
    default = getattr(TrainConfig(), field.name)
    if choices := field.metadata.get("choices"):
        return next(choice for choice in choices if choice != default)
    return not default if isinstance(default, bool) else type(default)(default + 1)


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_every_option_has_help_and_changes_the_config(
    field: dataclasses.Field[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    option = f"--{field.name.replace('_', '-')}"
    parameter = next(p for p in cli.commands["train"].params if option in p.opts)
    assert len(getattr(parameter, "help", "")) > 10
    value = other_value(field)
    given = [option, str(value)]
    if isinstance(value, bool):
        given = [option if value else f"--no-{option[2:]}"]
    # What an option goes with has to be asked for too.
    also = {
        "caption_decoder": {"rebuild": "tokens"},
        "loss": {"learn_logit_scale": False},
        "relevance_margin": {"loss": "max_margin"},
    }.get(field.name, {})
    for name, wanted in also.items():
        flag = name.replace("_", "-")
        given += [f"--no-{flag}"] if wanted is False else [f"--{flag}", str(wanted)]
    seen: list[TrainConfig] = []
    monkeypatch.setattr(train_run, "train", lambda store, captions, out, config, **_: seen.append(config) or out)
    result = CliRunner().invoke(cli, ["train", "f", "c", "-o", str(tmp_path / "run"), *given])
    assert result.exit_code == 0, result.output
    assert seen == [TrainConfig(**also, **{field.name: value})]
    assert seen[0] != TrainConfig()


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, (3.0, 2.0, "pooled")),
        ({"loss": "max_margin"}, (0.0, 0.1, "pooled")),
        ({"rebuild": "tokens"}, (0.0, 0.1, "frames")),
        ({"loss": "max_margin", "soft_label_weight": 0.3, "support_values": "frames"}, (0.3, 0.1, "frames")),
        ({"soft_label_weight": 0, "cross_captioning_weight": 1}, (0.0, 1.0, "pooled")),  # whole numbers too
    ],
)
def test_weights_that_were_tuned_with_info_nce_are_defaults_there_only(
    options: dict[str, Any], wanted: tuple[float, float, str]
) -> None:
    config = TrainConfig(**options)
    assert (config.soft_label_weight, config.cross_captioning_weight, config.support_values) == wanted


def test_a_run_made_before_soft_labels_had_none() -> None:
    held = dataclasses.asdict(TrainConfig())
    del held["soft_label_weight"]
    assert TrainConfig(**stored_options(held)).soft_label_weight == 0


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


def test_two_trainings_of_one_run_at_once_are_refused(task: Task, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    lock = lock_folder(tmp_path / "run")
    try:
        with pytest.raises(StoreError, match="another process is writing to it"):
            train(*task, tmp_path / "run", small(epochs=1))
    finally:
        os.close(lock)
    assert not (tmp_path / "run" / "config.json").exists()
