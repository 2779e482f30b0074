"""The curves of a training: what TensorBoard reads back, and the picture."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from runs import Killed, Task, kill_after, lines, tiny
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from svb.train import loop
from svb.train import run as train_run
from svb.train.epoch_log import PANELS, draw_curves
from svb.train.run import train


@pytest.fixture(autouse=True)
def with_a_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other tests train without one."""
    monkeypatch.setattr(train_run, "draw_curves", draw_curves)


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Return (epoch, value) of every scalar as TensorBoard shows them."""
    # A run taken up several times in one second: files are read in order of their names.
    files = sorted((run / "tensorboard").iterdir(), key=lambda file: file.stat().st_mtime_ns)
    for number, file in enumerate(files):
        file.rename(file.with_name(f"events.out.tfevents.{number:010}.test"))
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def picture(run: Path) -> NDArray[np.uint8]:
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    with Image.open(run / "curves.png") as image:
        return np.asarray(image.convert("RGB"))


def assert_scalars_are_the_metrics(run: Path) -> None:
    held, metrics = scalars(run), lines(run)
    assert set(held) == {name for line in metrics for name in line} - {"epoch"}
    for name, points in held.items():
        expected = [(line["epoch"], line[name]) for line in metrics if name in line]
        np.testing.assert_allclose(points, expected, rtol=1e-6, err_msg=name)


def test_a_training_has_its_curves(task: Task, tmp_path: Path) -> None:
    config = tiny(epochs=4, evaluate_every=2)
    run = train(*task, tmp_path / "run", config)
    assert_scalars_are_the_metrics(run)
    held = scalars(run)
    assert {name for names in PANELS.values() for name in names if not name.startswith("test/")} <= set(held)
    assert [epoch for epoch, _ in held["loss"]] == [1, 2, 3, 4]
    assert [epoch for epoch, _ in held["val/t2v/R@1"]] == [2, 4]
    # Batches of 4: the weights are shared among 3 videos.
    assert all(0 < value <= math.log(3) + 1e-6 for _, value in held["support_entropy"])
    shown = picture(run)
    height, width, _ = shown.shape
    for row in np.split(shown[: height // 2 * 2], 2):
        for panel in np.split(row[:, : width // 3 * 3], 3, axis=1):
            blue = (panel.astype(int) == (31, 119, 180)).all(axis=2)  # the first colour of lines
            assert blue.sum() > 50
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.parent != run}
    drawn = (run / "curves.png").stat().st_mtime_ns
    train(*task, run, config)  # a finished run is left alone
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.parent != run} == before
    assert (run / "curves.png").stat().st_mtime_ns == drawn
    # Without val there are curves, too.
    kept = [{k: v for k, v in line.items() if "val/" not in k} for line in lines(run)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    assert draw_curves(run) == run / "curves.png"
    assert not np.array_equal(picture(run), shown)


@pytest.mark.parametrize("has_file", [False, True])
def test_before_the_first_epoch_nothing_is_drawn(tmp_path: Path, has_file: bool) -> None:
    if has_file:
        (tmp_path / "metrics.jsonl").touch()
    draw_curves(tmp_path)
    assert not (tmp_path / "curves.png").exists()


def test_a_resumed_training_hides_what_came_after_its_checkpoint(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, config = tmp_path / "run", tiny(epochs=5)
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    with pytest.raises(Killed):
        train(*task, out, config, on_epoch=kill_after(1))
    # From here on nothing is saved but the end: two epochs are lost, which TensorBoard was told of.
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 1e9)
    with pytest.raises(Killed):
        train(*task, out, config, on_epoch=kill_after(3))
    assert [epoch for epoch, _ in scalars(out)["loss"]] == [1, 2, 3]
    killed = picture(out)
    # Other values than before, so that those which were lost can be told apart.
    monkeypatch.setattr(loop.RetrievalModel, "logit_scale", property(lambda model: torch.tensor(77.0)))
    train(*task, out, config)
    held = scalars(out)
    assert [epoch for epoch, _ in held["loss"]] == [1, 2, 3, 4, 5]
    assert [value for _, value in held["logit_scale"]][1:] == [77.0] * 4
    assert held["logit_scale"][0][1] != 77.0
    assert_scalars_are_the_metrics(out)
    assert not np.array_equal(picture(out), killed), "the curves are drawn anew"
