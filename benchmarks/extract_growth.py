"""What a store's size costs: time per video, a second run with nothing to do, and memory.

As a program, `python benchmarks/extract_growth.py VIDEOS STORE`, it extracts a folder and prints what that took
of a process of its own. Memory is read from Linux's /proc.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from resources_used import cpu_seconds

WORKERS = 2
TINY = ("64x64", "30k", 2)
LOOK_EVERY_SECONDS = 0.3


def measure_growth(folder: Path, counts: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Yield what extracting each number of tiny videos took, and what a second run of it did."""
    from extract_clips import Footage, copies, encode
    from extract_measure import require_all_ok

    from svb.data.feature_store import FeatureStore

    folder.mkdir()
    encoded = [encode(folder / f"encoded{seed}.mp4", Footage(*TINY), seed=seed, rate=8) for seed in range(1, 5)]
    for count in counts:
        print(f"growth: {count} videos", file=sys.stderr)
        videos, store = folder / f"videos-{count}", folder / f"store-{count}"
        copies(encoded, videos, count)
        first, again = run_in_new_process(videos, store), run_in_new_process(videos, store)
        require_all_ok(FeatureStore(store).status_counts(), count)
        yield {"videos": count, "first": first, "again": again}


def run_in_new_process(videos: Path, store: Path) -> dict[str, float]:
    command = [sys.executable, __file__, str(videos), str(store)]
    began = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    measured: dict[str, float] = json.loads(done.stdout)
    return {"process_seconds": time.perf_counter() - began, **measured}


def extract_and_measure(videos: Path, store: Path) -> dict[str, float]:
    """Extract a folder; return seconds, those of a video once the first ones are done, and peaks of memory."""
    began = time.perf_counter()
    from extract_measure import FPS, FREE

    from svb.extract.config import ExtractConfig
    from svb.extract.run import extract

    imported = time.perf_counter()
    watch = Watch()
    config = ExtractConfig(backbones=(FREE,), fps=FPS, workers=WORKERS)
    extract([videos], store, config, on_progress=watch)
    ended = time.perf_counter()
    num_videos = max(1, watch.num_videos - watch.first_videos)
    return {
        "import_seconds": imported - began,
        "extract_seconds": ended - imported,
        "seconds_a_video": (ended - watch.first_seconds) / num_videos,
        "cpu_seconds_a_video": (cpu_seconds() - watch.first_cpu_seconds) / num_videos,
        "main_peak_mib": peak_mib("self"),
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
            self.first_cpu_seconds = cpu_seconds() + sum(map(cpu_seconds_so_far, children()))
        if now - self._looked > LOOK_EVERY_SECONDS:
            self._looked = now
            self.worker_peak_mib = max([self.worker_peak_mib, *map(peak_mib, children())])


def children() -> list[str]:
    lists = [path.read_text("ascii") for path in Path("/proc/self/task").glob("*/children")]
    return " ".join(lists).split()


def cpu_seconds_so_far(process: str) -> float:
    """Return the CPU time of a process that lives."""
    fields = Path(f"/proc/{process}/stat").read_text("utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def peak_mib(process: str) -> float:
    """Return the most memory that a process has had; 0.0 of one that has ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text("ascii")
    except OSError:
        return 0.0
    found = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    return int(found[1]) / 1024 if found else 0.0


def table_of_growth(rows: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table: how each cost grows with the number of videos."""
    lines = [
        "| videos | ms a video | CPU-ms a video | peak of the main process, MiB | of a worker "
        "| nothing to do: `extract`, s | with its imports | the whole process |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        first, again = row["first"], row["again"]
        lines.append(
            f"| {row['videos']:,} | {1000 * first['seconds_a_video']:.2f} "
            f"| {1000 * first['cpu_seconds_a_video']:.2f} | {first['main_peak_mib']:.0f} "
            f"| {first['worker_peak_mib']:.0f} | {again['extract_seconds']:.2f} "
            f"| {again['import_seconds'] + again['extract_seconds']:.2f} | {again['process_seconds']:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(json.dumps(extract_and_measure(Path(sys.argv[1]), Path(sys.argv[2]))))
