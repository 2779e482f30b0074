"""`svb compare`: the paired differences of two runs, or of two sets of runs, from their saved ranks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import synthetic
import torch
from conftest import Ran, RunSvb

from svb.errors import InputError, MismatchError, StoreError
from svb.retrieve.compare import compare
from svb.retrieve.evaluate import evaluate
from svb.retrieve.measure.paired import paired_differences
from svb.retrieve.measure.query_ranks import read_ranks
from svb.train.config import TrainConfig
from svb.train.run import train

torch.set_num_threads(1)

SMALL = TrainConfig(
    embedding_size=16, variant="none", batch_size=16, epochs=3, evaluate_every=1, learning_rate=5e-3
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`a` and `b` hold runs of seeds 0 and 1 that differ in their dropout; only to be read."""
    folder = tmp_path_factory.mktemp("runs")
    store, captions = synthetic.make_task(folder, num_train=30, num_val=20)
    for name, dropout in (("a", 0.5), ("b", 0.0)):
        for seed in (0, 1):
            config = replace(SMALL, dropout=dropout, seed=seed)
            run = train(store, captions, folder / name / f"seed-{seed}", config, device="cpu")
            evaluate(run, checkpoint="last")
    return folder


@pytest.fixture
def runs(whole: Path, tmp_path: Path) -> Path:
    """A copy of `whole` that the test may change."""
    return Path(shutil.copytree(whole, tmp_path / "own"))


def change(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    with np.load(path) as file:
        held = dict(file)
    edit(held)
    np.savez(path, **held)


def assert_refused(ran: Ran, words: str) -> None:
    assert ran.exit_code == 1 and not ran.stdout and "Traceback" not in ran.stderr, ran
    assert ran.stderr.splitlines()[-1].startswith("svb: ") and words in ran.stderr, ran.stderr


def test_two_runs(whole: Path, run_svb: RunSvb) -> None:
    ran = run_svb("compare", whole / "a" / "seed-0", whole / "b" / "seed-1")
    assert ran.exit_code == 0
    lines = ran.stdout.splitlines()
    assert lines[:3] == [
        f"A: {whole}/a/seed-0, seed 0, last checkpoint",
        f"B: {whole}/b/seed-1, seed 1, last checkpoint",
        "val: 40 captions against 20 videos",
    ]
    ranks = [read_ranks(whole / run / "ranks.npz") for run in ("a/seed-0", "b/seed-1")]
    expected = paired_differences(ranks[:1], ranks[1:])
    rows = {line[:8].strip(): line.split() for line in lines[4:]}
    assert list(rows) == [difference.metric.replace("/", " ") for difference in expected]
    for difference in expected:
        values = rows[difference.metric.replace("/", " ")][2:]
        assert values[:3] == [f"{difference.a:.1f}", f"{difference.b:.1f}", f"{difference.difference:+.2f}"]
        assert values[3:6] == [f"{difference.over_videos.low:+.2f}", "to", f"{difference.over_videos.high:+.2f}"]
    assert "one pair of runs" in ran.stderr


def test_sets_of_runs_are_paired_by_seed(whole: Path, run_svb: RunSvb) -> None:
    comparison = compare(whole / "a", whole / "b")
    of_a, of_b = ([read_ranks(whole / side / f"seed-{seed}" / "ranks.npz") for seed in (0, 1)] for side in "ab")
    assert comparison.differences == paired_differences(of_a, of_b)
    assert comparison.a.seeds == (0, 1) and comparison.differences[0].over_seeds is not None
    ran = run_svb("compare", whole / "a", whole / "b", "--json")
    held = json.loads(ran.stdout)
    assert held == json.loads(json.dumps(comparison.as_json())) and not ran.stderr
    assert held["b"]["seeds"] == [0, 1] and held["split"] == "val" and not held["selected_on_split"]
    assert held["differences"][0]["over_seeds"]["p"] == comparison.differences[0].over_seeds.p


def test_a_run_does_not_differ_from_itself(whole: Path) -> None:
    for difference in compare(whole / "a", whole / "a").differences:
        assert (difference.difference, difference.over_videos.p) == (0.0, 1.0)


def test_files_of_ranks(whole: Path, tmp_path: Path) -> None:
    evaluate(whole / "a" / "seed-0", checkpoint="last", ranks=tmp_path / "a.npz")
    comparison = compare(tmp_path / "a.npz", whole / "b" / "seed-0")
    assert comparison.differences == compare(whole / "a" / "seed-0", whole / "b" / "seed-0").differences
    with pytest.raises(
        InputError, match=r"a\.npz holds one file of ranks, .*b seeds 0, 1 - expected the same seeds"
    ):
        compare(tmp_path / "a.npz", whole / "b")


def test_a_checkpoint_chosen_on_the_split_is_said(runs: Path, run_svb: RunSvb) -> None:
    evaluate(runs / "a" / "seed-0", checkpoint="best")
    ran = run_svb("compare", runs / "a" / "seed-0", runs / "b" / "seed-0")
    is_last = "seed-0, seed 0, last checkpoint" in ran.stdout.splitlines()[0]  # it may be the best one, too
    assert ("was chosen on this split" in ran.stdout) != is_last
    evaluate(runs / "a" / "seed-0", checkpoint="best", split="train")
    evaluate(runs / "b" / "seed-0", checkpoint="best", split="train")
    assert "was chosen" not in run_svb("compare", runs / "a" / "seed-0", runs / "b" / "seed-0").stdout


def test_missing_ranks_name_the_command(runs: Path, run_svb: RunSvb) -> None:
    (runs / "a" / "seed-1" / "ranks.npz").unlink()
    ran = run_svb("compare", runs / "a", runs / "b")
    assert_refused(ran, f"no ranks at {runs}/a/seed-1/ranks.npz - write them with `svb evaluate {runs}/a/seed-1`")


def test_another_split_is_refused(runs: Path, run_svb: RunSvb) -> None:
    evaluate(runs / "b" / "seed-0", split="train")
    ran = run_svb("compare", runs / "a" / "seed-0", runs / "b" / "seed-0")
    assert_refused(ran, "is of the val split, ")
    assert "of train - evaluate both on the same split" in ran.stderr


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        ({"caption_ids": (3, "99")}, "caption 4 is '63' of 'clip031' in .*a/seed-0.*, '99' of 'clip031' in"),
        ({"caption_video_ids": (3, "clip030")}, "caption 4 is '63' of 'clip031' in .*, '63' of 'clip030' in"),
        ({"video_ids": (19, "x"), "caption_video_ids": (slice(38, 40), "x")}, "caption 39 is '98' of 'clip049'"),
    ],
)  # fmt: skip
def test_other_queries_are_refused_naming_the_first(runs: Path, edit: dict[str, Any], words: str) -> None:
    def apply(held: dict[str, Any]) -> None:
        for name, (row, value) in edit.items():
            held[name][row] = value

    change(runs / "b" / "seed-0" / "ranks.npz", apply)
    with pytest.raises(MismatchError, match=words):
        compare(runs / "a" / "seed-0", runs / "b" / "seed-0")


def test_a_larger_gallery_is_refused(runs: Path) -> None:
    def apply(held: dict[str, Any]) -> None:
        held["video_ids"] = np.append(held["video_ids"], "clip099")
        held["v2t"] = np.append(held["v2t"], 1.0)

    change(runs / "b" / "seed-0" / "ranks.npz", apply)
    with pytest.raises(MismatchError, match=r"has 20 videos, .* 21: first more is 'clip099' in .*b/seed-0"):
        compare(runs / "a" / "seed-0", runs / "b" / "seed-0")


def test_another_convention_is_refused(runs: Path) -> None:
    evaluate(runs / "b" / "seed-0", checkpoint="last", v2t_convention="best")
    with pytest.raises(MismatchError, match=r"with the v2t convention 'set', .* with 'best' - evaluate both alike"):
        compare(runs / "a" / "seed-0", runs / "b" / "seed-0")


def test_ranks_of_other_weights_are_refused(runs: Path) -> None:
    shutil.copy(runs / "a" / "seed-0" / "ranks.npz", runs / "b" / "seed-0" / "ranks.npz")
    with pytest.raises(MismatchError, match=r"was measured on other weights than .*b/seed-0 holds now"):
        compare(runs / "a" / "seed-0", runs / "b" / "seed-0")


def test_ranks_of_an_older_svb_are_refused(runs: Path) -> None:
    change(runs / "b" / "seed-0" / "ranks.npz", lambda held: held.pop("caption_video_ids"))
    with pytest.raises(InputError, match=r"by an older svb: it lacks caption_video_ids - write it again with"):
        compare(runs / "a" / "seed-0", runs / "b" / "seed-0")


def damage_nothing_left(path: Path) -> None:
    path.write_bytes(b"")


def damage_cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def damage_text(path: Path) -> None:
    path.write_text("no ranks")


def damage_too_few(path: Path) -> None:
    change(path, lambda held: held.update(t2v=held["t2v"][:-1]))


def damage_unknown_video(path: Path) -> None:
    change(path, lambda held: held["caption_video_ids"].__setitem__(0, "nowhere"))


def damage_no_ranks(path: Path) -> None:
    change(path, lambda held: held.pop("t2v"))


@pytest.mark.parametrize(
    "damage",
    [damage_nothing_left, damage_cut, damage_text, damage_too_few, damage_unknown_video, damage_no_ranks],
)
def test_damaged_ranks_are_refused(runs: Path, run_svb: RunSvb, damage: Callable[[Path], None]) -> None:
    damage(runs / "b" / "seed-0" / "ranks.npz")
    with pytest.raises(StoreError, match=r"is not a whole file of ranks .* - write it again with"):
        compare(runs / "a" / "seed-0", runs / "b" / "seed-0")
    assert_refused(run_svb("compare", runs / "a", runs / "b"), "is not a whole file of ranks")


def test_what_is_no_run_is_refused(tmp_path: Path, run_svb: RunSvb) -> None:
    assert_refused(run_svb("compare", tmp_path, tmp_path), "is no run and holds none - expected a run")


def test_other_seeds_are_refused(runs: Path) -> None:
    shutil.rmtree(runs / "b" / "seed-1")
    with pytest.raises(InputError, match=r"a holds seeds 0, 1, .*b seeds 0 - expected the same seeds"):
        compare(runs / "a", runs / "b")


def test_runs_of_several_settings_are_no_set(runs: Path) -> None:
    with pytest.raises(InputError, match="both have the seed 0 - expected one run a seed"):
        shutil.copytree(runs / "a" / "seed-0", runs / "a" / "seed-zero")
        compare(runs / "a", runs / "b")
    shutil.rmtree(runs / "a" / "seed-zero")
    shutil.rmtree(runs / "a" / "seed-1")
    shutil.copytree(runs / "b" / "seed-1", runs / "a" / "seed-1")
    with pytest.raises(InputError, match=r"differ in more than their seed \(dropout: 0\.5 and 0\.0\)"):
        compare(runs / "a", runs / "b")
