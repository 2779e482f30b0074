"""What tests of trainings share: small options, kills, and what a run holds."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import synthetic

from svb.data.description import publish_description
from svb.data.feature_store import FeatureStore
from svb.train.config import TrainConfig
from svb.train.run import read_run

SMALL = TrainConfig(
    embedding_size=32,
    layers=1,
    rebuild="tokens",
    decoder_size=16,
    decoder_layers=1,
    batch_size=16,
    epochs=6,
    evaluate_every=2,
    learning_rate=2e-3,
    seed=3,
)
# Of `tiny_task`: 2 epochs of 3 steps of 4 captions.
TINY = dataclasses.replace(
    SMALL, embedding_size=8, layers=0, decoder_size=8, batch_size=4, epochs=2, evaluate_every=1
)
Task = tuple[Path, Path]


class Killed(Exception):  # noqa: N818
    """Stands for a kill: nothing catches it."""


def tiny_task(folder: Path) -> Task:
    return synthetic.make_task(folder, num_train=12, num_val=6, feature_size=10, text_size=8)


def contents(run: Path) -> dict[str, bytes]:
    """Return what training learned and measured, by name.

    Without config.json, which names paths, the curves, which name times, and previous/, whose age depends on how
    long steps took.
    """
    folders = (run / "best", run / "last")
    files = [path for folder in folders for path in folder.rglob("*")]
    files += [run / "metrics.jsonl", run / "vocabulary.json"]
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(files) if path.is_file()}


def lines(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def recall_sums(run: Path, split: str) -> dict[float, float]:
    """Return by epoch the sum of recalls that chooses a checkpoint, where it was measured."""
    names = [f"{split}/{way}/R@{k}" for way in ("t2v", "v2t") for k in (1, 5, 10)]
    return {line["epoch"]: sum(line[name] for name in names) for line in lines(run) if names[0] in line}


def small(**options: Any) -> TrainConfig:
    return dataclasses.replace(SMALL, **options)


def tiny(**options: Any) -> TrainConfig:
    return dataclasses.replace(TINY, **options)


def kill_after(epochs: int) -> Callable[[dict[str, float]], None]:
    def on_epoch(metrics: dict[str, float]) -> None:
        if metrics["epoch"] == epochs:
            raise Killed

    return on_epoch


def without_features(store: Path, out: Path, *video_ids: str) -> Path:
    """Copy a made-up store, and have videos fail in it."""
    loaded = FeatureStore(store).load(synthetic.BACKBONE)
    parts = zip(loaded.video_ids, np.split(loaded.features, loaded.offsets[1:-1]), strict=True)
    return synthetic.make_store(out, {v: part[:0] if v in video_ids else part for v, part in parts})


def change_config(run: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change what a run's config.json says, as if it had been written so."""
    description = read_run(run)
    change(description)
    publish_description(run / "config.json", {k: v for k, v in description.items() if k != "format_version"})


def as_of_an_older_svb(description: dict[str, Any]) -> None:
    """Give an option the name that it once had."""
    description["config"]["decoder"] = description["config"].pop("caption_decoder")
