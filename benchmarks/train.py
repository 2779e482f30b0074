"""What does training cost? `OMP_NUM_THREADS=1 python benchmarks/train.py --videos 2000 --cross-repeats 2`.

Everything runs side by side in one process on one thread, one epoch of each in turn, in captions per CPU-second,
which other work on the machine disturbs less than seconds on the clock:

- `svb train` itself, through its function, without cross-captioning and with it, rebuilding embeddings (the
  default) and tokens; its checkpoints, of some 0.05 CPU-seconds every 20 s, are left out;
- the same steps on one batch that lies in memory: no trainer of these heads can be faster;
- the same steps fed by a PyTorch DataLoader that reads every video from an HDF5 dataset of its own and pads in
  `collate_fn`, as is usual; with the file kept open, and opened for every video;
- what feeds them alone, without any step;
- the memory that the features of 10,000 videos take, beside their size on disk.

It takes about ten minutes with 9,000 videos. Memory is read from Linux's /proc.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import h5py
import numpy as np
import shared
import torch
from numpy.typing import NDArray
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from svb.data.caption_features import CaptionFeatures, read_caption_features, write_caption_features
from svb.data.caption_table import CaptionTable
from svb.data.feature_store import FeatureStore
from svb.train import loop
from svb.train.config import TrainConfig
from svb.train.model import RetrievalModel
from svb.train.objective import Objective
from svb.train.processes import Processes
from svb.train.run import build_model, read_run, train
from svb.train.training_data import FrameTable, SplitData, epoch_batches, load_split

OURS = "`svb train --variant none`"
CROSS = "`svb train`, the default: embeddings are rebuilt"
TOKENS = "`svb train --rebuild tokens`"
BOUND = "the steps of `--variant none` on one batch in memory"
LOADER = "the same steps, DataLoader over an HDF5 dataset a video"
REOPENED = "the same, the file opened for every video"
OUR_DATA = "no steps: batches as `svb train` gathers them"
LOADER_DATA, REOPENED_DATA = "no steps: the DataLoader", "no steps: the DataLoader, the file opened for every video"
BACKBONE, DIFFERENT_WORDS, WORDS_A_CAPTION = "made_up:frames", 12_000, 9
Item = tuple[torch.Tensor, torch.Tensor, int]


def measure(folder: Path, options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Return the CPU-seconds of every epoch that counts, and the memory, as numbers and as text."""
    torch.set_num_threads(1)
    settings = {"weights_hash": "none", "feature_size": options.feature_size, "precision": "float32"}
    shape = BACKBONE, settings
    store = shared.make_store(folder / "features", *shape, videos=options.videos, frames=options.frames)
    captions = make_captions(folder / "captions.h5", options)
    # The first epoch has the start of the run in it and the last its end: neither counts.
    none = TrainConfig(variant="none", val_fraction=0.0, epochs=options.repeats + 2)
    cross = TrainConfig(val_fraction=0.0, epochs=options.cross_repeats + 2)
    contenders: dict[str, Callable[[], object]] = {}

    def others() -> dict[str, float]:
        if not contenders:  # their heads are those of the run, which says how they are built once it has begun
            contenders.update(make_contenders(folder, store, captions, none))
        return {name: shared.cost_of(contender).cpu_seconds for name, contender in contenders.items()}

    seconds = epochs_of_svb(OURS, store, captions, folder / "none", none, others)
    for name, rebuild in ((CROSS, "embedding"), (TOKENS, "tokens")):
        config = replace(cross, rebuild=rebuild)
        seconds |= epochs_of_svb(name, store, captions, folder / rebuild, config, dict)
    cache = shared.make_store(folder / "cache", *shape, videos=options.memory_videos, frames=options.frames)
    memory = shared.run_child("train.py", "--load", cache)
    return {"cpu_seconds_an_epoch": seconds, "memory": memory}, text_of(seconds, memory, options)


def make_captions(path: Path, options: argparse.Namespace) -> Path:
    """Write random caption features of every video, all in the train split; return `path`."""
    random, total = np.random.default_rng(1), options.videos * options.captions_a_video
    # As in any language a few words are most of the text and most words are rare (Zipf's law).
    often = 1 / np.arange(1, DIFFERENT_WORDS + 1)
    words = random.choice(DIFFERENT_WORDS, size=(total, WORDS_A_CAPTION), p=often / often.sum())
    table = CaptionTable(
        [str(caption) for caption in range(total)],
        [f"video{caption // options.captions_a_video:06}" for caption in range(total)],
        [" ".join(f"word{word}" for word in caption) for caption in words.tolist()],
        ["train"] * total,
        has_split=True,
    )
    features = random.standard_normal((total, options.feature_size), np.float32).astype(np.float16)
    text_encoder = {"name": "made_up:captions", "weights_hash": "another", "feature_size": options.feature_size}
    settings = {"text_encoder": {**text_encoder, "max_tokens": 64}, "table_hash": "none"}
    return write_caption_features(path, CaptionFeatures(table, features, settings))


def epochs_of_svb(
    name: str, store: Path, captions: Path, run: Path, config: TrainConfig, others: Callable[[], dict[str, float]]
) -> dict[str, list[float]]:
    """Train a run and call `others` after each of its epochs; return the CPU-seconds of each by name."""
    # By the clock, which runs on through the others' epochs, a checkpoint would be due after each of ours.
    loop.CHECKPOINT_SECONDS = math.inf
    rounds: list[dict[str, float]] = []
    began = shared.cpu_seconds()

    def on_epoch(metrics: dict[str, float]) -> None:
        nonlocal began
        rounds.append({name: shared.cpu_seconds() - began})
        if metrics["epoch"] < config.epochs:
            rounds[-1] |= others()
        spent = ", ".join(f"{seconds:.2f}" for seconds in rounds[-1].values())
        print(f"{name}, epoch {len(rounds)} of {config.epochs}: {spent} CPU-seconds", file=sys.stderr)
        began = shared.cpu_seconds()

    train(store, captions, run, config, device="cpu", on_epoch=on_epoch)
    return {key: [measured[key] for measured in rounds[1:-1]] for key in rounds[0]}


# What is measured beside `svb train`


@dataclass(frozen=True)
class Batch:
    """B captions and their videos, which svb's own objective reads in the place of a split, at no cost.

    Attributes:
        frame_features: `(B, T, F)` float32.
        frame_mask: `(B, T)` bool.
        caption_features: `(B, F)` float32.
        caption_video: `(B,)` rows of the videos.
    """

    frame_features: torch.Tensor
    frame_mask: torch.Tensor
    caption_features: torch.Tensor
    caption_video: torch.Tensor

    @property
    def frames(self) -> Batch:
        return self

    @property
    def video_of(self) -> NDArray[np.int64]:
        return self.caption_video.numpy()

    def longest(self, rows: NDArray[np.int64]) -> int:
        """Return T of the batch, of which `rows` are all."""
        return self.frame_mask.shape[1]

    def real_places(self, rows: NDArray[np.int64], longest: int) -> NDArray[np.int64]:
        """Return the places of the batch's real frames."""
        return np.flatnonzero(self.frame_mask)

    def gather(self, rows: torch.Tensor, longest: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the frames of the batch, of which `rows` are all."""
        return self.frame_features, self.frame_mask


class Steps:
    """Training steps without `svb train`'s loop: its objective and clipping, AdamW."""

    def __init__(self, model: RetrievalModel, config: TrainConfig) -> None:
        self.model, self.config = model.train(), config
        self.optimizer = torch.optim.AdamW(model.parameters(), config.learning_rate, fused=True)

    def __call__(self, batch: Batch) -> float:
        split: Any = batch
        objective = Objective(self.config, self.model, split, [], None, Processes(), torch.float32)
        size = len(batch.caption_video)
        losses = objective(np.arange(size), np.ones(size, dtype=np.bool_), 0.5)
        self.optimizer.zero_grad(set_to_none=True)
        losses.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.model.limit_scales()
        return float(losses.loss.detach())


class VideoDataset(Dataset[Item]):
    """The usual way to feed a trainer: a video an item, its frames from an HDF5 dataset of its own."""

    def __init__(self, path: Path, split: SplitData, *, keep_open: bool) -> None:
        self.path, self.video_ids = path, split.frames.video_ids
        self.file = h5py.File(path, "r") if keep_open else None
        self.caption_features = split.caption_features.numpy()
        self.begins = np.searchsorted(split.caption_video.numpy(), np.arange(split.num_videos + 1))
        self.random = np.random.default_rng(0)

    def __len__(self) -> int:
        return len(self.video_ids)

    def __getitem__(self, row: int) -> Item:
        with nullcontext(self.file) if self.file else h5py.File(self.path, "r") as file:
            frames = torch.from_numpy(file[self.video_ids[row]][()]).float()  # (T, F)
        caption = self.random.integers(self.begins[row], self.begins[row + 1])
        return frames, torch.from_numpy(self.caption_features[caption]).float(), row


def collate(items: list[Item]) -> Batch:
    """Pad the videos of a batch to the longest and stack them."""
    padded = pad_sequence([frames for frames, _, _ in items], batch_first=True)  # (B, T, F)
    lengths = torch.tensor([len(frames) for frames, _, _ in items])
    frame_mask = torch.arange(padded.shape[1])[None] < lengths[:, None]
    rows = torch.tensor([row for _, _, row in items])
    return Batch(padded, frame_mask, torch.stack([caption for _, caption, _ in items]), rows)


def make_contenders(
    folder: Path, store: Path, captions: Path, config: TrainConfig
) -> dict[str, Callable[[], object]]:
    """Return what is measured beside `svb train`; each function does one epoch."""
    features, device = read_caption_features(captions), torch.device("cpu")
    captions_of_all = range(len(features.table))
    options: dict[str, Any] = {"max_frames": config.max_frames, "device": device}
    split = load_split(FeatureStore(store), BACKBONE, features, captions_of_all, **options)
    hdf5 = folder / "features.h5"
    with h5py.File(hdf5, "w") as file:
        opened = FeatureStore(store)
        for video_id in opened.video_ids:
            file.create_dataset(video_id, data=opened.rows_of(video_id)[BACKBONE].features)
    kept_open, reopened = (
        DataLoader(
            VideoDataset(hdf5, split, keep_open=keep_open), config.batch_size, shuffle=True, collate_fn=collate
        )
        for keep_open in (True, False)
    )
    steps = Steps(build_model(read_run(folder / "none")), config)
    batches = list(batches_of(split, config))
    in_memory = batches[:1] * len(batches)
    return {
        BOUND: lambda: [steps(batch) for batch in in_memory],
        LOADER: lambda: [steps(batch) for batch in kept_open],
        REOPENED: lambda: [steps(batch) for batch in reopened],
        OUR_DATA: lambda: sum(1 for _ in batches_of(split, config)),
        LOADER_DATA: lambda: sum(1 for _ in kept_open),
        REOPENED_DATA: lambda: sum(1 for _ in reopened),
    }


def batches_of(split: SplitData, config: TrainConfig) -> Iterator[Batch]:
    """Yield an epoch's batches as the training loop takes them from memory."""
    options: dict[str, Any] = {"batch_size": config.batch_size, "seed": config.seed, "epoch": 0}
    rows_of = split.caption_video.numpy()
    for drawn in epoch_batches(rows_of, caption_sampling=config.caption_sampling, **options):
        batch = torch.from_numpy(drawn)
        rows = split.caption_video[batch]
        yield Batch(*split.frames.gather(rows), split.caption_features[batch].float(), rows)


def memory_of_cache(store: Path) -> dict[str, float]:
    """Return what a store's features take on disk and, loaded as training loads them, of this process's memory.

    Returns:
        `disk_mib`; `resident_mib` that are held afterwards and `peak_mib` while loading, both beyond what the
        process took before.
    """

    def load(num_videos: int | None) -> FrameTable:
        opened = FeatureStore(store)
        (backbone,) = opened.backbones
        loaded = opened.load(backbone, opened.video_ids[:num_videos])
        return FrameTable.of(loaded, 32, torch.device("cpu"))

    load(1)  # what the first use of a library takes is not the cache's
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew, see proc(5)
    before = shared.memory_mib("VmRSS")
    table = load(None)
    disk_mib = sum(path.stat().st_size for path in (store / "shards").iterdir()) / 2**20
    assert table.features.nbytes / 2**20 < disk_mib
    resident_mib, peak_mib = (shared.memory_mib(field) - before for field in ("VmRSS", "VmHWM"))
    return {"disk_mib": disk_mib, "resident_mib": resident_mib, "peak_mib": peak_mib}


def text_of(seconds: dict[str, list[float]], memory: dict[str, float], options: argparse.Namespace) -> str:
    """Return a table, captions per CPU-second and cost beside `svb train`'s, and what it says of the aims."""
    rows = []
    for name, epochs in seconds.items():
        rates = [options.videos / epoch for epoch in epochs]
        rows.append([name, shared.spread(rates, ".0f"), shared.spread(ratios(seconds, name), ".2f")])
    titles = ["", "captions per CPU-second", "CPU time, of `svb train --variant none` = 1"]
    share, share_of_tokens = (
        shared.spread([100 * (1 - 1 / ratio) for ratio in ratios(seconds, name)], ".0f") for name in (CROSS, TOKENS)
    )
    data = median(seconds[LOADER_DATA]) / median(seconds[OUR_DATA])
    disk, resident, peak = (memory[name] for name in ("disk_mib", "resident_mib", "peak_mib"))
    return f"""{shared.table(titles, rows)}

Without cross-captioning svb reaches {shared.spread(ratios(seconds, BOUND), ".2f")} of the steps alone.
Cross-captioning takes {share} % of the cost, {share_of_tokens} % where tokens are rebuilt.
Batches cost the DataLoader {data:.0f} times as much as svb.
Memory of the cache: {disk:.0f} MiB on disk, {resident:.0f} MiB resident, at most {peak:.0f} MiB while loading."""


def ratios(seconds: dict[str, list[float]], name: str) -> list[float]:
    """Return an epoch's cost in epochs of `svb train --variant none`: of the same round, or of their median."""
    ours = seconds[OURS]
    if name in (CROSS, TOKENS):
        ours = [median(ours)] * len(seconds[name])
    return [epoch / own for epoch, own in zip(seconds[name], ours, strict=True)]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--load"]:
        print(json.dumps(memory_of_cache(Path(sys.argv[2]))))
    else:
        shared.run_benchmark(
            __doc__,
            measure,
            videos=(9_000, "how many"),
            captions_a_video=(20, "how many"),
            frames=(12, "of a video"),
            feature_size=(512, "F"),
            repeats=(5, "epochs counted"),
            cross_repeats=(3, "epochs counted with cross-captioning"),
            memory_videos=(10_000, "videos of the cache whose memory is measured"),
        )
