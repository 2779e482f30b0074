"""`svb info`: a screenful for a person, and everything for a machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
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


def test_a_store_with_failures_names_the_command_that_lists_them(tmp_path: Path, run_svb: RunSvb) -> None:
    import numpy as np
    import synthetic

    store = synthetic.make_store(tmp_path / "features", {"a": np.ones((2, 3)), "b": np.empty((0, 3))})
    shown = run_svb("info", store).stdout
    assert "1 ok, 1 unreadable" in shown and f"next: svb info {store} --failures\n" in shown
    assert "'b'" in run_svb("info", store, "--failures").stdout
