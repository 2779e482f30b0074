"""Is `svb extract` faster than the usual recipe? `python benchmarks/extract_recipe.py --videos 48`.

The recipe: ffprobe tells a video's size, one ffmpeg writes its frames at the wanted rate as raw RGB into a pipe,
PIL resizes them on the CPU, the network takes them all at once in float32, and a file is saved for each video.
Neither the steps nor their options are tuned: this is what most repositories' `extract_features.py` does. Both run
on the same two cores, side by side in every round.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import shared

if TYPE_CHECKING:
    import numpy as np
    from torch import nn
    from torchvision import transforms

CORES = 2


def measure(folder: Path, options: argparse.Namespace) -> tuple[list[dict[str, shared.Cost]], str]:
    """Return the costs of the recipe and of svb, in rounds, and their table; nothing where there is no ffprobe."""
    if shutil.which("ffprobe") is None or shutil.which("ffmpeg") is None:
        return [], "No ffprobe on the PATH: nothing was measured (Debian's package `ffmpeg` has one)."
    import torch

    shared.pin_to(CORES)
    torch.set_num_threads(CORES)
    clips = shared.make_clips(folder / "short", shared.SHORT, options.videos)
    lead = shared.make_clips(folder / "lead", shared.LEAD_IN, CORES)
    saved = folder / "recipe"
    saved.mkdir()
    # The first run on a machine exports the backbone's graph, which is no part of the comparison.
    shared.extract_with(shared.LITE0, folder, workers=CORES)(lead)
    rounds = []
    for number in range(options.rounds):
        print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
        svb = shared.extract_with(shared.LITE0, folder, workers=CORES)
        rounds.append(
            {
                "the recipe, one process": cost_in_processes(1, clips, saved),
                "the recipe, two processes of one thread each": cost_in_processes(2, clips, saved),
                "svb": shared.cold_and_steady(svb, lead, clips)[1],
            }
        )
    title = f"{len(clips)} clips of {shared.SHORT}, `{shared.LITE0}`, float32, on {CORES} cores"
    return rounds, f"{title}\n\n{shared.table_against(rounds, len(clips))}"


def cost_in_processes(num_processes: int, paths: Sequence[Path], saved: Path) -> shared.Cost:
    """Return the cost in new processes that share the cores and the videos, after one video in each.

    Not in this one, in which svb has changed how memory is asked for.
    """
    import torch

    context = multiprocessing.get_context("spawn")
    threads = (CORES // num_processes,)
    with ProcessPoolExecutor(num_processes, context, torch.set_num_threads, threads) as pool:
        list(pool.map(warm_up, [(paths[0], saved)] * num_processes))
        began = time.perf_counter()
        cpu = sum(pool.map(cpu_seconds_of_video, [(path, saved) for path in paths]))
        return shared.Cost(time.perf_counter() - began, cpu)


def warm_up(video: tuple[Path, Path]) -> None:
    extract_video(*video)
    time.sleep(2)  # busy, so that the next process gets the next one


def cpu_seconds_of_video(video: tuple[Path, Path]) -> float:
    return shared.cost_of(lambda: extract_video(*video)).cpu_seconds


def extract_video(path: Path, saved: Path) -> None:
    """Save one video's `(T, F)` features."""
    import numpy as np
    import torch
    from PIL import Image

    batch = torch.stack([preprocess()(Image.fromarray(frame)) for frame in read_frames(path)])
    with torch.no_grad():
        features = network()(batch)
    np.save(saved / f"{path.stem}.npy", features.numpy())


def read_frames(path: Path) -> np.ndarray:
    """Return `(T, H, W, 3)` uint8, a frame a second."""
    import numpy as np

    probe = ["ffprobe", "-v", "error", "-print_format", "json", "-show_format", "-show_streams", str(path)]
    streams = json.loads(subprocess.run(probe, capture_output=True, check=True).stdout)["streams"]
    video = next(stream for stream in streams if stream["codec_type"] == "video")
    write = ["-vf", "fps=1", "-f", "rawvideo", "-pix_fmt", "rgb24", "pipe:"]
    decode = ["ffmpeg", "-nostdin", "-loglevel", "error", "-i", str(path), *write]
    pixels = subprocess.run(decode, capture_output=True, check=True).stdout
    return np.frombuffer(pixels, np.uint8).reshape(-1, video["height"], video["width"], 3)


@cache
def preprocess() -> transforms.Compose:
    from torchvision import transforms

    steps: list[Any] = [transforms.Resize(224, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(224)]
    return transforms.Compose(
        [*steps, transforms.ToTensor(), transforms.Normalize((127 / 255,) * 3, (128 / 255,) * 3)]
    )


@cache
def network() -> nn.Module:
    from svb.extract.backbones import offline

    return offline.load(shared.LITE0, shared.LITE0.partition(":")[2], "").module.eval()


if __name__ == "__main__":
    rounds = 3, "how often everything is measured, in turn"
    shared.run_benchmark(__doc__, measure, rounds=rounds, videos=(16, "clips of 15 s"))
