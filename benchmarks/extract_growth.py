"""What does a store's size cost? `python benchmarks/extract_growth.py`.

Time per video, a second run with nothing to do, and memory, with a backbone that costs nothing on tiny videos, each
run in a process of its own. Memory is read from Linux's /proc.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import shared

LOOK_EVERY_SECONDS = 0.3


def measure(folder: Path, options: argparse.Namespace) -> tuple[list[dict[str, Any]], str]:
    """Return what extracting each number of tiny videos took, and what a second run of it did."""
    rows = []
    for count in map(int, options.videos.split(",")):
        print(f"{count} videos", file=sys.stderr)
        shared.make_clips(folder / f"{count}", shared.TINY, count, distinct=4)
        arguments = "--run", folder / f"{count}" / "clips", folder / f"store-{count}"
        first, again = (shared.run_child("extract_growth.py", *arguments) for _ in range(2))
        rows.append({"videos": count, "first": first, "again": again})
    titles = ["videos", "ms a video", "CPU-ms a video", "peak of the main process, MiB", "of a worker"]
    titles += ["nothing to do: `extract`, s", "with its imports"]
    lines = []
    for row in rows:
        first, again = row["first"], row["again"]
        values = 1000 * first["seconds_a_video"], 1000 * first["cpu_seconds_a_video"]
        peaks = first["main_peak_mib"], first["worker_peak_mib"]
        seconds = again["extract_seconds"], again["import_seconds"] + again["extract_seconds"]
        lines.append([f"{row['videos']:,}", *(f"{v:.2f}" for v in values), *(f"{p:.0f}" for p in peaks)])
        lines[-1] += [f"{s:.2f}" for s in seconds]
    return rows, shared.table(titles, lines)


def extract_and_measure(videos: Path, store: Path) -> dict[str, float]:
    """Extract a folder; return seconds, those of a video once the first ones are done, and peaks of memory."""
    began = time.perf_counter()
    from svb.extract.backbones import FAMILIES  # noqa: F401 - torch, which `svb extract` imports where it has work
    from svb.extract.run import extract  # noqa: F401

    imported = time.perf_counter()
    watch = Watch()
    shared.extract_features([videos], store, shared.FREE, on_progress=watch)
    ended = time.perf_counter()
    num_videos = max(1, watch.num_videos - watch.first_videos)
    return {
        "import_seconds": imported - began,
        "extract_seconds": ended - imported,
        "seconds_a_video": (ended - watch.first_seconds) / num_videos,
        "cpu_seconds_a_video": (shared.cpu_seconds() - watch.first_cpu_seconds) / num_videos,
        "main_peak_mib": shared.memory_mib("VmHWM"),
        "worker_peak_mib": watch.worker_peak_mib,
    }


class Watch:
    """Notes when the first videos were done, and now and then the memory of the decode workers.

    Their own peaks are read while they live: what getrusage(2) tells of ended children counts the pages that
    they shared with this process before they became programs of their own.
    """

    def __init__(self) -> None:
        self.num_videos = self.first_videos = 0
        self.first_seconds = self.first_cpu_seconds = math.nan
        self.worker_peak_mib = 0.0
        self._looked = -math.inf

    def __call__(self, progress: Any) -> None:
        now = time.perf_counter()
        if progress.videos_done and not self.first_videos:
            self.first_seconds, self.first_videos, self.num_videos = now, progress.videos_done, progress.num_videos
            self.first_cpu_seconds = shared.cpu_seconds() + sum(map(shared.cpu_seconds_of_process, children()))
        if now - self._looked > LOOK_EVERY_SECONDS:
            self._looked = now
            peaks = [shared.memory_mib("VmHWM", child) for child in children()]
            self.worker_peak_mib = max([self.worker_peak_mib, *peaks])


def children() -> list[str]:
    lists = [path.read_text("ascii") for path in Path("/proc/self/task").glob("*/children")]
    return " ".join(lists).split()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        print(json.dumps(extract_and_measure(Path(sys.argv[2]), Path(sys.argv[3]))))
    else:
        shared.run_benchmark(__doc__, measure, videos=("100,1000,10000", "numbers of videos, joined by commas"))
