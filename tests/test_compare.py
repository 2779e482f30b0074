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
from conftest import Ran, RunSvb
from runs import as_of_an_older_svb, change_config

from svb.errors import InputError, MismatchError, StoreError
from svb.retrieve.compare import compare
from svb.retrieve.evaluate import evaluate
from svb.retrieve.measure.paired import paired_differences
from svb.retrieve.measure.query_ranks import read_ranks
from svb.train.config import TrainConfig
from svb.train.run import train

Edit = Callable[[dict[str, Any]], object]
DAMAGED = "is not a whole file of ranks .* - write it again with"
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


def test_files_of_ranks(whole: Path, tmp_path: Path) -> None:
    evaluate(whole / "a" / "seed-0", checkpoint="last", ranks=tmp_path / "a.npz")
    comparison = compare(tmp_path / "a.npz", whole / "b" / "seed-0")
    assert comparison.differences == compare(whole / "a" / "seed-0", whole / "b" / "seed-0").differences
    with pytest.raises(InputError, match=r"a\.npz holds one file of ranks, .*b seeds 0, 1 - expected the same"):
        compare(tmp_path / "a.npz", whole / "b")


def test_a_checkpoint_chosen_on_the_split_is_said(runs: Path, run_svb: RunSvb) -> None:
    evaluate(runs / "a" / "seed-0", checkpoint="best")
    ran = run_svb("compare", runs / "a" / "seed-0", runs / "b" / "seed-0")
    is_last = "seed-0, seed 0, last checkpoint" in ran.stdout.splitlines()[0]  # it may be the best one, too
    assert ("this split chose a checkpoint" in ran.stdout) != is_last
    evaluate(runs / "a" / "seed-0", checkpoint="best", split="train")
    evaluate(runs / "b" / "seed-0", checkpoint="best", split="train")
    assert "this split chose" not in run_svb("compare", runs / "a" / "seed-0", runs / "b" / "seed-0").stdout


def set_items(**items: tuple[Any, Any]) -> Edit:
    def edit(held: dict[str, Any]) -> None:
        for name, (place, value) in items.items():
            held[name][place] = value

    return edit


def with_one_more_video(held: dict[str, Any]) -> None:
    held["video_ids"], held["v2t"] = np.append(held["video_ids"], "clip099"), np.append(held["v2t"], 1.0)


@pytest.mark.parametrize(
    ("edit", "error", "words"),
    [
        (set_items(caption_ids=(3, "99")), MismatchError,
         "caption 4 is '63' of 'clip031' in .*a/seed-0.*, '99' of 'clip031' in"),
        (set_items(caption_video_ids=(3, "clip030")), MismatchError,
         "caption 4 is '63' of 'clip031' in .*, '63' of 'clip030' in"),
        (set_items(video_ids=(19, "x"), caption_video_ids=(slice(38, 40), "x")), MismatchError,
         "caption 39 is '98' of 'clip049'"),
        (with_one_more_video, MismatchError, "has 20 videos, .* 21: the first extra one is 'clip099' in"),
        (lambda held: held.update(v2t_convention="best"), MismatchError,
         "with the v2t convention 'set', .* with 'best' - evaluate both in the same way"),
        (lambda held: held.pop("caption_video_ids"), InputError,
         "older svb wrote .*: it lacks caption_video_ids - write it again with"),
        (lambda held: held.update(t2v=held["t2v"][:-1]), StoreError, DAMAGED),
        (set_items(caption_video_ids=(0, "nowhere")), StoreError, DAMAGED),
        (lambda held: held.pop("t2v"), StoreError, DAMAGED),
    ],
)  # fmt: skip
def test_ranks_that_do_not_fit_are_refused(runs: Path, edit: Edit, error: type[Exception], words: str) -> None:
    path = runs / "b" / "seed-0" / "ranks.npz"
    with np.load(path) as file:
        held = dict(file)
    edit(held)
    np.savez(path, **held)
    with pytest.raises(error, match=words):
        compare(runs / "a" / "seed-0", runs / "b" / "seed-0")


@pytest.mark.parametrize("data", [lambda data: b"", lambda data: data[:-100], lambda data: b"no ranks"])
def test_damaged_ranks_are_refused(runs: Path, run_svb: RunSvb, data: Callable[[bytes], bytes]) -> None:
    path = runs / "b" / "seed-0" / "ranks.npz"
    path.write_bytes(data(path.read_bytes()))
    assert_refused(run_svb("compare", runs / "a", runs / "b"), "is not a whole file of ranks")


def test_other_evaluations_are_refused(runs: Path, tmp_path: Path, run_svb: RunSvb) -> None:
    a, b = runs / "a" / "seed-0", runs / "b" / "seed-0"
    evaluate(b, split="train")
    ran = run_svb("compare", a, b)
    assert_refused(ran, "is on the val split, ")
    assert "on train - evaluate both on the same split" in ran.stderr
    shutil.copy(a / "ranks.npz", b / "ranks.npz")
    with pytest.raises(MismatchError, match=r"belongs to other weights than .*b/seed-0 holds now"):
        compare(a, b)
    (b / "ranks.npz").unlink()
    assert_refused(run_svb("compare", a, b), f"no ranks at {b}/ranks.npz - write them with `svb evaluate {b}`")
    assert_refused(run_svb("compare", tmp_path / "x", a), "is not a run and holds none - expected a run")


def test_sets_that_are_no_pair_are_refused(runs: Path) -> None:
    shutil.copytree(runs / "a" / "seed-0", runs / "a" / "seed-zero")
    with pytest.raises(InputError, match="both have the seed 0 - expected one run per seed"):
        compare(runs / "a", runs / "b")
    shutil.rmtree(runs / "a" / "seed-zero")
    (runs / "b" / "seed-1").rename(runs / "seed-1")
    with pytest.raises(InputError, match=r"a holds seeds 0, 1, .*b seeds 0 - expected the same seeds"):
        compare(runs / "a", runs / "b")
    shutil.rmtree(runs / "a" / "seed-1")
    (runs / "seed-1").rename(runs / "a" / "seed-1")
    with pytest.raises(InputError, match=r"differ in more than their seed \(dropout: 0\.5 and 0\.0\)"):
        compare(runs / "a", runs / "b")


def test_a_run_of_an_older_svb_is_compared(runs: Path) -> None:
    """One of its options had another name, which its fingerprint holds too."""
    expected = compare(runs / "a", runs / "b").differences
    change_config(runs / "a" / "seed-0", as_of_an_older_svb)
    evaluate(runs / "a" / "seed-0", checkpoint="last")
    assert compare(runs / "a", runs / "b").differences == expected
