"""Feature extraction as it is usually written, beside svb: ffprobe, ffmpeg, PIL, one video a batch, float32.

`ffprobe` tells a video's size, one `ffmpeg` writes its frames at the wanted rate as raw RGB into a pipe, PIL
resizes them on the CPU, the network takes them all at once, and a file is saved for each video. Neither the
steps nor their options are tuned: this is what most repositories' `extract_features.py` does.
"""

from __future__ import annotations

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
from typing import Any

import imageio_ffmpeg
import numpy as np
import torch
from extract_clips import ClipSet
from extract_measure import LITE0, Cost, cold_and_steady, cost_of, extract_with, ours, pin_to, table_against
from PIL import Image
from torch import nn
from torchvision import transforms

from svb.extract.backbones import offline

CORES = 2
RECIPE = "the recipe, one process"
TWICE = "the recipe, two processes of one thread"


def measure_recipe(
    clips: ClipSet, lead: Sequence[Path], folder: Path, rounds: int, workers: int = 2
) -> dict[str, Any]:
    """Return the costs of the recipe and of svb, in rounds; only the versions where there is no ffprobe."""
    measured: dict[str, Any] = {
        "clips": clips.name,
        "videos": len(clips.paths),
        "programs": programs(),
        "rounds": [],
    }
    if measured["programs"]["ffprobe"] is None:
        return measured
    pin_to(CORES)
    torch.set_num_threads(CORES)
    saved = folder / "recipe"
    saved.mkdir()
    for number in range(rounds):
        print(f"recipe, {clips.name}: round {number + 1} of {rounds}", file=sys.stderr)
        taken = {
            RECIPE: cost_in_processes(1, clips.paths, saved),
            TWICE: cost_in_processes(2, clips.paths, saved),
        }
        for name, precision in ours().items():
            _, taken[name] = cold_and_steady(
                extract_with(LITE0, precision, folder, workers), lead[:workers], clips.paths
            )
        measured["rounds"].append(taken)
    return measured


def programs() -> dict[str, str | None]:
    """Return the first line of each program's version, None for an ffprobe that is not there."""
    found = {"ffmpeg": ffmpeg(), "ffprobe": shutil.which("ffprobe")}
    return {name: program and f"{program}: {version_line(program)}" for name, program in found.items()}


def version_line(program: str) -> str:
    done = subprocess.run([program, "-version"], capture_output=True, text=True, check=True)
    return done.stdout.partition(" Copyright")[0]


def ffmpeg() -> str:
    return shutil.which("ffmpeg") or str(imageio_ffmpeg.get_ffmpeg_exe())


def cost_in_processes(num_processes: int, paths: Sequence[Path], saved: Path) -> Cost:
    """Return the cost in new processes that share the cores and the videos, after one video in each.

    Not in this one, in which svb has changed how memory is asked for.
    """
    context = multiprocessing.get_context("spawn")
    threads = CORES // num_processes
    with ProcessPoolExecutor(num_processes, context, torch.set_num_threads, (threads,)) as pool:
        list(pool.map(warm_up, [(paths[0], saved)] * num_processes))
        began = time.perf_counter()
        cpu = sum(pool.map(cpu_seconds_of_video, [(path, saved) for path in paths]))
        return Cost(time.perf_counter() - began, cpu)


def warm_up(video: tuple[Path, Path]) -> None:
    extract_video(*video)
    time.sleep(2)  # busy, so that the next process gets the next one


def cpu_seconds_of_video(video: tuple[Path, Path]) -> float:
    return cost_of(lambda: extract_video(*video)).cpu_seconds


def extract_video(path: Path, saved: Path) -> None:
    """Save one video's `(T, F)` features."""
    batch = torch.stack([preprocess()(Image.fromarray(frame)) for frame in read_frames(path)])
    with torch.no_grad():
        features = network()(batch)
    np.save(saved / f"{path.stem}.npy", features.numpy())


def read_frames(path: Path, frames_a_second: int = 1) -> np.ndarray:
    """Return `(T, H, W, 3)` uint8."""
    probe = ["ffprobe", "-v", "error", "-print_format", "json", "-show_format", "-show_streams", str(path)]
    streams = json.loads(subprocess.run(probe, capture_output=True, check=True).stdout)["streams"]
    video = next(stream for stream in streams if stream["codec_type"] == "video")
    write = ["-vf", f"fps={frames_a_second}", "-f", "rawvideo", "-pix_fmt", "rgb24", "pipe:"]
    decode = [ffmpeg(), "-nostdin", "-loglevel", "error", "-i", str(path), *write]
    pixels = subprocess.run(decode, capture_output=True, check=True).stdout
    return np.frombuffer(pixels, np.uint8).reshape(-1, video["height"], video["width"], 3)


@cache
def preprocess() -> transforms.Compose:
    return transforms.Compose(
        [
            transforms.Resize(224, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize((127 / 255,) * 3, (128 / 255,) * 3),
        ]
    )


@cache
def network() -> nn.Module:
    return offline.load(LITE0, LITE0.partition(":")[2], "").module.eval()


def table_of_recipe(measured: dict[str, Any]) -> str:
    """Return a Markdown table: both in videos per second and CPU-seconds a video, on the same cores."""
    if not measured["rounds"]:
        return "No ffprobe on the PATH: the recipe is left out (Debian's package `ffmpeg` has one)."
    with_what = "; ".join(str(program) for program in measured["programs"].values())
    title = f"{measured['videos']} clips of {measured['clips']}, `{LITE0}`, on {CORES} cores; {with_what}"
    return f"{title}\n\n{table_against(measured['rounds'], measured['videos'])}"
