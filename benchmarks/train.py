"""What training costs: `OMP_NUM_THREADS=1 python benchmarks/train.py --json train.json`.

Everything runs side by side in one process on one thread, one epoch of each in turn, and is told in captions per
CPU-second, which other work on the machine disturbs less than seconds on the clock:

- `svb train` itself, through its function, without cross-captioning and with it, rebuilding embeddings (the
  default) and tokens; its checkpoints, of some 0.05 CPU-seconds every 20 s, are left out;
- the same steps on one batch that lies in memory: no trainer of these heads can be faster;
- the same steps fed by a PyTorch DataLoader that reads every video from an HDF5 dataset of its own and pads in
  `collate_fn`, as is usual; with the file kept open, and opened for every video;
- what feeds them alone, without any step;
- the memory that the features of 10,000 videos take, beside their size on disk.

It takes about ten minutes; `--videos 2000 --repeats 3` less than two. Memory is read from Linux's /proc.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import made_up_features
import torch
from resources_used import cpu_seconds, cpu_seconds_of, memory_of_cache
from video_loader import Batch, make_loader

from svb.data.caption_features import read_caption_features
from svb.data.feature_store import FeatureStore
from svb.train import loop
from svb.train.config import TrainConfig
from svb.train.model import RetrievalModel
from svb.train.objective import Objective
from svb.train.processes import Processes
from svb.train.run import build_model, read_run, train
from svb.train.training_data import SplitData, epoch_batches, load_split

OURS = "`svb train --variant none`"
CROSS = "`svb train`, the default: embeddings are rebuilt"
TOKENS = "`svb train --rebuild tokens`"
BOUND = "the steps of `--variant none` on one batch in memory"
LOADER = "the same steps, DataLoader over an HDF5 dataset a video"
REOPENED = "the same, the file opened for every video"
OUR_DATA = "no steps: batches as `svb train` gathers them"
LOADER_DATA, REOPENED_DATA = "no steps: the DataLoader", "no steps: the DataLoader, the file opened for every video"


def main() -> None:
    options = parse_options()
    torch.set_num_threads(1)
    shape = {"frames": options.frames, "feature_size": options.feature_size}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        seconds = measure_epochs(Path(folder), options, shape)
        store = made_up_features.make_store(Path(folder) / "cache", videos=options.memory_videos, **shape)
        memory = memory_of_cache(store)
    print(as_table(seconds, options.videos), as_text(seconds, memory), sep="\n\n")
    if options.json:
        measured = {"options": vars(options), "cpu_seconds_an_epoch": seconds, "memory": memory}
        options.json.write_text(json.dumps(measured, indent=2, default=str) + "\n", "utf-8")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=9_000)
    parser.add_argument("--captions-a-video", type=int, default=20)
    parser.add_argument("--frames", type=int, default=12)
    parser.add_argument("--feature-size", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=TrainConfig.batch_size)
    parser.add_argument("--repeats", type=int, default=5, help="epochs counted, after one that warms up")
    parser.add_argument("--cross-repeats", type=int, default=3, help="epochs counted with cross-captioning")
    parser.add_argument(
        "--workers", type=int, default=0, help="processes of the DataLoader; 0 reads in the trainer's"
    )
    parser.add_argument(
        "--memory-videos", type=int, default=10_000, help="videos of the cache whose memory is measured"
    )
    parser.add_argument("--folder", type=Path, help="where features are made and removed again")
    parser.add_argument("--json", type=Path, help="write all that was measured here")
    return parser.parse_args()


def measure_epochs(folder: Path, options: argparse.Namespace, shape: dict[str, int]) -> dict[str, list[float]]:
    """Return the CPU-seconds of every epoch that counts, by what was measured."""
    store = made_up_features.make_store(folder / "features", videos=options.videos, **shape)
    hdf5 = made_up_features.write_dataset_a_video(folder / "features.h5", videos=options.videos, **shape)
    captions = made_up_features.make_captions(
        folder / "captions.h5",
        videos=options.videos,
        captions_a_video=options.captions_a_video,
        feature_size=options.feature_size,
    )
    # The first epoch has the start of the run in it and the last its end: neither counts.
    none = TrainConfig(variant="none", val_fraction=0.0, batch_size=options.batch_size, epochs=options.repeats + 2)
    cross = TrainConfig(val_fraction=0.0, batch_size=options.batch_size, epochs=options.cross_repeats + 2)
    split = load_all(store, captions, none)
    contenders: dict[str, Callable[[], object]] = {}

    def others() -> dict[str, float]:
        if not contenders:  # their heads are those of the run, which says how they are built once it has begun
            contenders.update(make_contenders(folder / "none", hdf5, split, none, options.workers))
        return {name: cpu_seconds_of(contender) for name, contender in contenders.items()}

    seconds = epochs_of_svb(OURS, store, captions, folder / "none", none, others)
    for name, rebuild in ((CROSS, "embedding"), (TOKENS, "tokens")):
        config = replace(cross, rebuild=rebuild)
        seconds |= epochs_of_svb(name, store, captions, folder / rebuild, config, dict)
    return seconds


def epochs_of_svb(
    name: str, store: Path, captions: Path, run: Path, config: TrainConfig, others: Callable[[], dict[str, float]]
) -> dict[str, list[float]]:
    """Train a run and call `others` after each of its epochs; return the CPU-seconds of each by name."""
    # By the clock, which runs on through the others' epochs, a checkpoint would be due after each of ours.
    loop.CHECKPOINT_SECONDS = math.inf
    rounds: list[dict[str, float]] = []
    began = cpu_seconds()

    def on_epoch(metrics: dict[str, float]) -> None:
        nonlocal began
        rounds.append({name: cpu_seconds() - began})
        if metrics["epoch"] < config.epochs:
            rounds[-1] |= others()
        spent = ", ".join(f"{seconds:.2f}" for seconds in rounds[-1].values())
        print(f"{name}, epoch {len(rounds)} of {config.epochs}: {spent} CPU-seconds", file=sys.stderr)
        began = cpu_seconds()

    train(store, captions, run, config, device="cpu", on_epoch=on_epoch)
    return {key: [measured[key] for measured in rounds[1:-1]] for key in rounds[0]}


def make_contenders(
    run: Path, hdf5: Path, split: SplitData, config: TrainConfig, workers: int
) -> dict[str, Callable[[], object]]:
    """Return what is measured beside `svb train`; each function does one epoch."""
    steps = Steps(build_model(read_run(run)), config)
    kept_open, reopened = (
        make_loader(hdf5, split, config.batch_size, workers=workers, keep_open=keep_open)
        for keep_open in (True, False)
    )
    in_memory = list(batches_of(split, config))[:1] * sum(1 for _ in batches_of(split, config))
    return {
        BOUND: lambda: [steps(batch) for batch in in_memory],
        LOADER: lambda: [steps(batch) for batch in kept_open],
        REOPENED: lambda: [steps(batch) for batch in reopened],
        OUR_DATA: lambda: sum(1 for _ in batches_of(split, config)),
        LOADER_DATA: lambda: sum(1 for _ in kept_open),
        REOPENED_DATA: lambda: sum(1 for _ in reopened),
    }


@dataclass(frozen=True)
class OneBatch:
    """A batch in the place of a split: svb's own objective reads it at no cost."""

    batch: Batch

    @property
    def frames(self) -> OneBatch:
        return self

    @property
    def caption_video(self) -> torch.Tensor:
        return self.batch.rows

    @property
    def caption_features(self) -> torch.Tensor:
        return self.batch.caption_features

    def gather(self, rows: torch.Tensor, like: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the frames of the batch, of which `rows` are all."""
        return self.batch.frame_features, self.batch.frame_mask


class Steps:
    """Training steps without `svb train`'s loop: its objective and clipping, AdamW."""

    def __init__(self, model: RetrievalModel, config: TrainConfig) -> None:
        self.model, self.config = model.train(), config
        self.optimizer = torch.optim.AdamW(model.parameters(), config.learning_rate, fused=True)

    def __call__(self, batch: Batch) -> float:
        split: Any = OneBatch(batch)
        objective = Objective(self.config, self.model, split, [], None, Processes(), torch.float32)
        size = len(batch.rows)
        losses = objective(torch.arange(size), torch.ones(size, dtype=torch.bool), 0.5)
        self.optimizer.zero_grad(set_to_none=True)
        losses.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.model.limit_scales()
        return float(losses.loss.detach())


def load_all(store: Path, captions: Path, config: TrainConfig) -> SplitData:
    features = read_caption_features(captions)
    return load_split(
        FeatureStore(store),
        made_up_features.BACKBONE,
        features,
        range(len(features.table)),
        max_frames=config.max_frames,
        device=torch.device("cpu"),
    )


def batches_of(split: SplitData, config: TrainConfig) -> Iterator[Batch]:
    """Yield an epoch's batches as the training loop takes them from memory."""
    drawn = epoch_batches(
        split.caption_video.numpy(),
        caption_sampling=config.caption_sampling,
        batch_size=config.batch_size,
        seed=config.seed,
        epoch=0,
    )
    for batch in map(torch.from_numpy, drawn):
        rows = split.caption_video[batch]
        yield Batch(*split.frames.gather(rows), split.caption_features[batch].float(), rows)


def as_table(seconds: dict[str, list[float]], captions: int) -> str:
    """Return a Markdown table: captions per CPU-second, and how many times as long as `svb train` each takes."""
    lines = ["| | captions per CPU-second | CPU time, of `svb train --variant none` = 1 |", "|---|---|---|"]
    for name, epochs in seconds.items():
        rates = [captions / epoch for epoch in epochs]
        lines.append(f"| {name} | {spread(rates, '.0f')} | {spread(ratios(seconds, name), '.2f')} |")
    return "\n".join(lines)


def as_text(seconds: dict[str, list[float]], memory: dict[str, float]) -> str:
    """Return what the table says of the aims, and the memory."""
    share, share_of_tokens = (
        spread([100 * (1 - 1 / ratio) for ratio in ratios(seconds, name)], ".0f") for name in (CROSS, TOKENS)
    )
    data = statistics.median(seconds[LOADER_DATA]) / statistics.median(seconds[OUR_DATA])
    disk, resident, peak = (memory[name] for name in ("disk_mib", "resident_mib", "peak_mib"))
    return "\n".join(
        [
            "Numbers are median (lowest to highest).",
            f"Without cross-captioning svb reaches {spread(ratios(seconds, BOUND), '.2f')} of the steps alone.",
            f"Of the cost with it {share} % is cross-captioning's, {share_of_tokens} % where tokens are rebuilt.",
            f"Batches cost the DataLoader {data:.0f} times as much as svb.",
            f"Memory of the cache: {disk:.0f} MiB on disk, {resident:.0f} MiB resident "
            f"({resident / disk:.2f} times), at most {peak:.0f} MiB while loading ({peak / disk:.2f} times).",
        ]
    )


def ratios(seconds: dict[str, list[float]], name: str) -> list[float]:
    """Return an epoch's cost in epochs of `svb train --variant none`: of the same round, or of their median."""
    ours = seconds[OURS]
    if len(seconds[name]) != len(ours) or name in (CROSS, TOKENS):
        ours = [statistics.median(ours)] * len(seconds[name])
    return [epoch / own for epoch, own in zip(seconds[name], ours, strict=True)]


def spread(values: list[float], spec: str) -> str:
    low, middle, high = (f"{value:{spec}}" for value in (min(values), statistics.median(values), max(values)))
    return f"{middle} ({low} to {high})"


if __name__ == "__main__":
    main()
