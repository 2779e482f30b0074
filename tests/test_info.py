"""`svb info`: a screenful for a person, and everything for a machine."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import synthetic
from conftest import RunSvb

# What is described, the first lines of it, and the commands to go on with.
SUMMARIES = {
    "features": (
        ["a feature store", "videos 80 ok", "synthetic:frames 351 rows of 24 numbers, float32", "frames fps 1"],
        ["svb train {path} captions.h5"],
    ),
    "captions.h5": (
        ["a caption features file", "captions 160 of 80 videos", "train 120 captions", "val 40 captions"],
        ["svb train features/ {path}"],
    ),
    "run": (
        ["a run", "videos by synthetic:frames", "captions by synthetic:words", "model variant none, loss info_nce"],
        ["svb evaluate {path}", "svb index {path} -o index/"],
    ),
    "index": (
        ["an index", "videos 80, and 0 that were deleted", "windows 221 of 3 s, every 1 s"],
        ['svb search "a dog runs" --index {path}', "svb serve --index {path}"],
    ),
}


@pytest.mark.parametrize("name", SUMMARIES)
def test_a_screenful_and_what_to_do_next(
    name: str, indexed_run: Path, request: pytest.FixtureRequest, run_svb: RunSvb
) -> None:
    path = request.getfixturevalue("built_index") if name == "index" else indexed_run.parent / name
    shown = run_svb("info", path).stdout
    assert len(shown.splitlines()) <= 24
    expected, steps = SUMMARIES[name]
    words = [" ".join(line.split()) for line in shown.splitlines()]
    assert words[0] == f"{path}: {expected[0]}"
    assert all(any(word.startswith(line) for word in words) for line in expected[1:]), words
    assert [word for word in words if word.startswith("next: ")] == [f"next: {s.format(path=path)}" for s in steps]
    assert words[-1] == f"more: svb info {path} --all"

    held = json.loads(run_svb("info", path, "--json").stdout)
    everything = run_svb("info", path, "--all").stdout.splitlines()
    assert everything[:2] == [f"path: {path}", f"kind: {held['kind']}"] and len(everything) > len(held)


def test_a_run_is_described_without_torch(indexed_run: Path) -> None:
    code = "import sys; from svb.cli import run; sys.exit(run(sys.argv[1:]) or 'torch' in sys.modules)"
    command = [sys.executable, "-c", code, "info", str(indexed_run)]
    shown = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "best" in shown.stdout and "R@1" in shown.stdout


def test_a_store_with_failures_names_the_command_that_lists_them(tmp_path: Path, run_svb: RunSvb) -> None:
    store = synthetic.make_store(tmp_path / "features", {"a": np.ones((2, 3)), "b": np.empty((0, 3))})
    shown = run_svb("info", store).stdout
    assert "1 ok, 1 unreadable" in shown and f"next: svb info {store} --failures\n" in shown
    assert "'b'" in run_svb("info", store, "--failures").stdout


def test_a_card_says_how_a_run_was_made_and_how_good_it_is(
    indexed_run: Path, tmp_path: Path, run_svb: RunSvb
) -> None:
    run = Path(shutil.copytree(indexed_run, tmp_path / "run"))
    assert "`svb evaluate" in _card(run, run_svb)
    evaluated = json.loads(run_svb("evaluate", run, "--relevance", "words", "--json").stdout)
    run_svb("evaluate", run, "--checkpoint", "last", "--ranks", run / "last.npz")
    held, card = json.loads(run_svb("info", run, "--json").stdout), _card(run, run_svb)
    data = held["data"]["val"]
    for expected in (
        f"| val | {data['videos']} | {data['captions']} | `{data['ids']}` |",
        f"`best` is epoch {held['best']['epoch']}, `last` is epoch {held['last']['epoch']}",
        *(f"| {name} | {value} |" for name, value in held["config"].items()),
        "| t2v/nDCG@10 of others by words |",
        "The val split chose this checkpoint",
        f"svb evaluate {run} --split val --checkpoint best --relevance words\n",
        f"svb evaluate {run} --split val --checkpoint last --ranks {run / 'last.npz'}\n",
    ):
        assert expected in card
    # Metrics are those of the evaluation, within their intervals.
    for name in ("t2v/R@1", "v2t/R@10"):
        row = next(line for line in card.splitlines() if line.startswith(f"| {name} |"))
        _, value, interval = (cell.strip() for cell in row.strip("| ").split("|"))
        low, high = map(float, interval.split(" to "))
        assert value == f"{evaluated['metrics'][name]:.2f}" and low <= float(value) <= high
    # Its command makes the run again: all options agree.
    (command,) = [line for line in card.splitlines() if line.startswith("svb train ")]
    assert "--backbone" in command, "the store may hold several"
    assert "nothing to do" in run_svb(*shlex.split(command)[1:]).stderr


def test_a_card_has_no_metrics_of_other_weights(indexed_run: Path, tmp_path: Path, run_svb: RunSvb) -> None:
    run = Path(shutil.copytree(indexed_run, tmp_path / "run"))
    store, captions = indexed_run.parent / "features", indexed_run.parent / "captions.h5"
    run_svb("train", store, captions, "-o", tmp_path / "other", "--epochs", "1", "--seed", "9", "--variant", "none")
    run_svb("evaluate", tmp_path / "other", "--ranks", run / "other.npz")
    ran = run_svb("info", run, "--card", tmp_path / "card.md")
    assert "left out of the card" in ran.stderr and "t2v/R@1" not in (tmp_path / "card.md").read_text()
    ran = run_svb("info", store, "--card", tmp_path / "x.md")
    assert ran.exit_code == 1 and "is a feature store - --card goes with a run" in ran.stderr


def _card(run: Path, run_svb: RunSvb) -> str:
    path = run.parent / "card.md"
    assert run_svb("info", run, "--card", path).stdout == f"{path}\n"
    return path.read_text("utf-8")
