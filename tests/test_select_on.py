"""Nothing is chosen on test but by force; a run that was is stamped wherever it is shown."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import synthetic
from conftest import RunSvb, assert_refused
from messages import heard
from runs import Task, lines, recall_sums

from svb.data.caption_features import read_caption_features
from svb.errors import InputError
from svb.train.checkpoint import load_checkpoint
from svb.train.config import TrainConfig, selection_note
from svb.train.run import read_run, train

CONFIG = TrainConfig(embedding_size=16, variant="none", batch_size=16, epochs=4, evaluate_every=2, seed=3)
STAMP = "SELECTED ON TEST"


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    """Return a store and captions with a train and a test split, as MSR-VTT 1k-A has them."""
    folder = tmp_path_factory.mktemp("task")
    store, captions = synthetic.make_task(folder)
    held = read_caption_features(captions)
    splits = ["test" if split == "val" else split for split in held.table.splits]
    rows = list(zip(held.table.video_ids, held.table.captions, splits, strict=True))
    return store, synthetic.make_captions(folder / "1k-a.h5", rows, held.features)


@pytest.fixture(scope="module")
def forced(task: Task, tmp_path_factory: pytest.TempPathFactory) -> Path:
    messages, out = heard(), tmp_path_factory.mktemp("runs") / "forced"
    train(*task, out, replace(CONFIG, select_on="test"))
    assert messages[0] == selection_note("test")
    return out


@pytest.fixture(scope="module")
def unforced(task: Task, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(*task, tmp_path_factory.mktemp("runs") / "unforced", CONFIG)


def test_unforced_nothing_of_test_is_seen_or_stamped(
    task: Task, unforced: Path, run_svb: RunSvb, tmp_path: Path
) -> None:
    held = read_caption_features(task[1])
    is_test = np.array(held.table.splits) == "test"
    features = np.where(is_test[:, None], -held.features, held.features)
    rows = list(zip(held.table.video_ids, held.table.captions, held.table.splits, strict=True))
    other = synthetic.make_captions(tmp_path / "other.h5", rows, features)
    blind = train(task[0], other, tmp_path / "run", CONFIG)
    for file in ("best/model.safetensors", "metrics.jsonl"):
        assert (blind / file).read_bytes() == (unforced / file).read_bytes()
    description = read_run(unforced)
    assert description["config"]["select_on"] == "val" and {*description["data"]} == {"train", "val"}
    assert description["data"]["val"]["videos"] == 6
    assert not [name for line in lines(unforced) for name in line if name.startswith("test")]
    assert STAMP not in run_svb("info", unforced).stdout + run_svb("evaluate", unforced).stdout
    measured = json.loads(run_svb("evaluate", unforced, "--split", "test", "--json").stdout)
    assert (measured["selected_on"], measured["selected_on_split"]) == ("val", False)


def test_forced_it_is_chosen_by_test(forced: Path) -> None:
    description, best = read_run(forced), load_checkpoint(forced / "best")
    assert description["config"]["select_on"] == "test"
    assert description["data"]["val"] is None and description["data"]["test"]["videos"] == 20
    assert description["data"]["train"]["videos"] == 60  # none is put aside as val
    sums = recall_sums(forced, "test")
    assert len(sums) == 2 and sums[best.epoch] == max(sums.values())
    assert not [name for line in lines(forced) for name in line if name.startswith("val")]


def test_every_output_is_stamped(forced: Path, run_svb: RunSvb, tmp_path: Path) -> None:
    assert STAMP in run_svb("info", forced).stdout
    assert STAMP in json.loads(run_svb("info", forced, "--json").stdout)["note"]
    for checkpoint, is_flattered in (("best", True), ("last", False)):
        for split in ("test", "train"):
            given = ("evaluate", forced, "--split", split, "--checkpoint", checkpoint)
            shown = run_svb(*given, "--ranks", tmp_path / "ranks.npz").stdout
            held = json.loads(run_svb(*given, "--json").stdout)
            assert STAMP in shown and held["selected_on"] == "test"
            on_split = is_flattered and split == "test"
            assert held["selected_on_split"] == on_split == ("this split chose the checkpoint" in shown)
            with np.load(tmp_path / "ranks.npz") as ranks:
                assert ranks["selected_on"] == "test"


def test_the_command_stamps_and_resumes(task: Task, run_svb: RunSvb, tmp_path: Path) -> None:
    command = ("train", *task, "--embedding-size", 16, "--variant", "none", "--epochs", 1, "-o", tmp_path / "run")
    said = run_svb(*command, "--select-on", "test").stderr
    assert STAMP in said and "test t2v/R@1" in said and "val t2v" not in said
    again = run_svb(*command, "--select-on", "test").stderr
    assert STAMP in again and "nothing to do" in again
    assert_refused(run_svb(*command), "select_on: stored 'test', wanted 'val'")


def test_without_a_test_split(tmp_path: Path) -> None:
    task = synthetic.make_task(tmp_path)
    with pytest.raises(InputError, match=r"no video of a test split .* --select-on test needs .* leave the"):
        train(*task, tmp_path / "run", replace(CONFIG, select_on="test"))
    assert not (tmp_path / "run").exists()


def test_both_choices_side_by_side(
    task: Task, unforced: Path, forced: Path, run_svb: RunSvb, tmp_path: Path
) -> None:
    run = unforced
    ran = run_svb("evaluate", run, "--split", "test", "--beside", forced)
    assert ran.exit_code == 0, ran
    alone, other = (run_svb("evaluate", one, "--split", "test").stdout for one in (run, forced))
    assert ran.stdout == f"Chosen on val:\n{alone}\nChosen on test, as much of the field does:\n{other}"
    assert STAMP in other and STAMP not in alone
    assert f"{forced} was trained on 60 videos, {run} on 54: the captions name no val split" in ran.stderr
    held = json.loads(run_svb("evaluate", run, "--split", "test", "--beside", forced, "--json").stdout)
    assert (held["selected_on"], held["beside"]["selected_on"]) == ("val", "test")
    odd = train(*task, tmp_path / "odd", replace(CONFIG, seed=4))
    for arguments, words in (
        ((run, "--beside", forced), "is too good on test, not on val - measure --split test"),
        ((forced, "--split", "test", "--beside", run), f"{forced} was not trained with --select-on val - name"),
        ((odd, "--split", "test", "--beside", forced), "differ in more than --select-on (seed: 4 and 3)"),
    ):
        ran = run_svb("evaluate", *arguments)
        assert ran.exit_code and words in ran.stderr, ran
