"""What the benchmarks share: running one, costs of a piece of work, clips, made-up features, tables.

Nothing heavy is imported here: a decode worker imports the main module again, and must start as fast as that of
`svb extract`.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import platform
import re
import resource
import statistics
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from svb.extract.backbones.backbone import Backbone

MSRVTT_MINI = Path(__file__).resolve().parents[2] / "shared" / "msrvtt-mini"
LITE0, FREE = "offline:efficientnet-lite0", "free:four-pixels"
BATCH_SIZE, FRAME_RATE = 32, 30
ALL_CORES = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
Option = tuple[Any, str]


# Running a benchmark


def run_benchmark(
    doc: str | None, measure: Callable[[Path, argparse.Namespace], tuple[Any, str]], **more: Option
) -> None:
    """Parse options, measure in a folder that is removed again, print the table, and write all numbers.

    Args:
        doc: The docstring of the benchmark, its help.
        measure: Returns what was measured and a text with its table.
        more: Options of this benchmark: default and help.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (default, said) in more.items():
        kind: Any = type(default) if default is not None else Path
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=kind, default=default, help=f"{said} (default: {default})")
    parser.add_argument("--folder", type=Path, help="where to work; everything in it is removed again")
    parser.add_argument("--json", type=Path, help="write all that was measured here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        measured, text = measure(Path(folder), options)
    print(f"Numbers are median (lowest to highest).\n\n{text}")
    if options.json:
        machine = {"cores": os.cpu_count(), "platform": platform.platform()}
        everything = {"options": vars(options), "machine": machine, "measured": measured}
        options.json.write_text(json.dumps(everything, indent=2, default=_plain) + "\n", "utf-8")


def run_child(program: str, *arguments: object) -> Any:
    """Run a program of this folder in a process of its own and return the JSON that it prints."""
    import sys

    command = [sys.executable, Path(__file__).with_name(program), *map(str, arguments)]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


def _plain(value: object) -> object:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [titles, ["---"] * len(titles), *rows]
    return (
        "\n".join(f"| {' | '.join(line)} |" for line in lines).replace("| --- ", "|---").replace("|--- |", "|---|")
    )


def spread(values: Sequence[float], spec: str = ".3g") -> str:
    """Return `median (lowest to highest)`, one value by itself."""
    low, middle, high = (f"{value:{spec}}" for value in (min(values), statistics.median(values), max(values)))
    return middle if len(values) == 1 else f"{middle} ({low} to {high})"


# Costs


@dataclass(frozen=True)
class Cost:
    """What a piece of work took: on the clock, and CPU time with that of the processes it started."""

    wall_seconds: float
    cpu_seconds: float

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.wall_seconds - other.wall_seconds, self.cpu_seconds - other.cpu_seconds)


def cpu_seconds() -> float:
    """Return the CPU time, user and system, of this process and of its children that have ended."""
    both = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


def cost_of(work: Callable[[], object]) -> Cost:
    """Return the cost of a call whose processes have all ended when it returns."""
    began, cpu_began = time.perf_counter(), cpu_seconds()
    work()
    return Cost(time.perf_counter() - began, cpu_seconds() - cpu_began)


def cold_and_steady(
    run: Callable[[Sequence[Path]], object], lead: Sequence[Path], clips: Sequence[Path]
) -> tuple[Cost, Cost]:
    """Return the cost of a start, and that of the clips alone.

    `run` is called with the lead-in clips, then with these and the clips; the difference is the clips'. A lead-in
    clip is decoded in no time into one full batch, so the first call starts and ends everything once, and what
    overlaps at the start and the end of the second is in both. The time from the first video done to the last
    would take frames that were decoded ahead as free.
    """
    cold = cost_of(lambda: run(lead))
    return cold, cost_of(lambda: run([*lead, *clips])) - cold


def cpu_seconds_of_process(process: int | str) -> float:
    """Return the CPU time of a process that lives."""
    fields = Path(f"/proc/{process}/stat").read_text("utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory_mib(field: str, process: int | str = "self") -> float:
    """Return `VmRSS`, the memory that a process has, or `VmHWM`, the most it has had; 0.0 if it has ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text("ascii")
    except OSError:
        return 0.0
    found = re.search(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)
    return int(found[1]) / 1024 if found else 0.0


def pin_to(num_cores: int) -> None:
    """Keep this process, and all that it starts from here on, to the first of its cores, where that is possible."""
    if hasattr(os, "sched_setaffinity"):
        for thread in Path("/proc/self/task").iterdir():  # a thread that runs already keeps its own cores
            with contextlib.suppress(ProcessLookupError):  # it has ended since
                os.sched_setaffinity(int(thread.name), sorted(ALL_CORES)[:num_cores])


def table_against(rounds: Sequence[dict[str, Cost]], videos: int, extra: dict[str, str] | None = None) -> str:
    """Return a Markdown table of what was measured beside `svb`, which is so many times as fast, round by round.

    Args:
        rounds: Costs by name, `svb` among them.
        videos: How many were extracted in each.
        extra: One more column by name; its title is the value of `""`.
    """
    titles = ["", "videos/s", "CPU-s a video", "cores busy", "svb is faster, times", "CPU time of svb's, times"]
    rows = []
    for name in rounds[0]:
        pairs = [(costs[name], costs["svb"]) for costs in rounds if name in costs]
        row = [name, spread([videos / cost.wall_seconds for cost, _ in pairs])]
        row.append(spread([cost.cpu_seconds / videos for cost, _ in pairs]))
        row.append(spread([cost.cpu_seconds / cost.wall_seconds for cost, _ in pairs], ".2f"))
        row.append(spread([cost.wall_seconds / svb.wall_seconds for cost, svb in pairs], ".2f"))
        row.append(spread([cost.cpu_seconds / svb.cpu_seconds for cost, svb in pairs], ".2f"))
        rows.append(row + ([extra.get(name, "")] if extra else []))
    return table(titles + ([extra[""]] if extra else []), rows)


# svb's extraction, and a backbone that costs nothing


def extract_with(
    backbone: str, folder: Path, *, workers: int, precision: str = "float32", engine: str = "auto"
) -> Callable[[Sequence[Path]], Path]:
    """Return `svb.extract.run.extract` with its settings; every call makes a store of its own."""
    from svb.data.feature_store import FeatureStore

    def run(clips: Sequence[Path]) -> Path:
        store = extract_features(
            clips, folder / f"store-{time.monotonic_ns()}", backbone, workers, precision, engine=engine
        )
        require_all_ok(FeatureStore(store).status_counts(), len(clips))
        return store

    return run


def extract_features(
    videos: Sequence[Path],
    out: Path,
    backbone: str,
    workers: int = 2,
    precision: str = "auto",
    *,
    fps: float = 1.0,
    engine: str = "auto",
    on_progress: Callable[[Any], None] = lambda progress: None,
) -> Path:
    """Extract with one backbone on the CPU."""
    from svb.extract.backbones import FAMILIES
    from svb.extract.config import ExtractConfig
    from svb.extract.run import extract

    FAMILIES["free"] = __name__
    options: dict[str, Any] = {"batch_size": BATCH_SIZE, "precision": precision, "device": "cpu", "engine": engine}
    config = ExtractConfig(backbones=(backbone,), fps=fps, workers=workers, **options)
    return extract(videos, out, config, on_progress=on_progress)


def require_all_ok(statuses: Mapping[str, int], num_videos: int) -> None:
    """Raise where a video failed: what it did not cost must not be counted."""
    if dict(statuses) != {"ok": num_videos}:
        raise RuntimeError(f"videos ended as {dict(statuses)} - expected {num_videos} ok; see `svb info STORE`")


def load(name: str, model: str, weights: str) -> Backbone:
    """Load `free:four-pixels`: what is left of an extraction is decoding and svb itself."""
    from torch import nn

    from svb.extract.backbones.backbone import Backbone
    from svb.extract.backbones.transform import Transform

    # (B, 3, 16, 16) -> (B, 12): the first pixel of each of four squares.
    pool = nn.Sequential(nn.AvgPool2d(1, stride=8), nn.Flatten())
    half = (0.5, 0.5, 0.5)
    return Backbone(name, pool, Transform(16, half, half), 12, weights_hash="none")


# Clips


@dataclass(frozen=True)
class Footage:
    """What a clip is made as."""

    size: str
    bit_rate: str
    seconds: int
    frame_rate: int = FRAME_RATE

    def __str__(self) -> str:
        return f"{self.seconds} s, {self.size.partition('x')[2]}p"


SHORT, MEDIUM = Footage("426x240", "300k", 15), Footage("854x480", "1000k", 60)
TINY, LEAD_IN = Footage("64x64", "30k", 2, 8), Footage("64x64", "30k", BATCH_SIZE, 1)
# Options of the benchmarks that measure several sets of clips.
CLIP_SETS = {
    "short": (16, "clips of 15 s"),
    "medium": (3, "clips of 60 s"),
    "long": (1, "clips of --long-seconds, measured in one round"),
    "long_seconds": (600, "length of a long clip"),
    "msrvtt": (32, "clips of the small MSR-VTT"),
}
# Longer clips repeat a piece: encoding ten minutes would take longer than measuring them.
ENCODED_FRAMES = 900


def clip_sets(folder: Path, options: argparse.Namespace) -> Iterator[tuple[str, list[Path], int]]:
    """Yield each set's name, clips and rounds: none for a count of 0 or where MSR-VTT's clips are missing."""
    long = Footage("1280x720", "2500k", options.long_seconds)
    made = (SHORT, options.short), (MEDIUM, options.medium), (long, options.long)
    for footage, count in made:
        if count:
            clips = make_clips(folder / footage.size, footage, count)
            yield str(footage), clips, 1 if footage is long else options.rounds
    if options.msrvtt and MSRVTT_MINI.is_dir():
        clips = sorted((MSRVTT_MINI / "clips").glob("*.mp4"))[: options.msrvtt]
        yield "msrvtt-mini", clips, options.rounds


def make_clips(folder: Path, footage: Footage, count: int, distinct: int = 2) -> list[Path]:
    """Encode a few distinct clips, and copy them to `count` files that differ: svb would notice a second copy.

    A moving test pattern with noise on every pixel of every frame, H.264 by x264's `medium`. The bit rate is that
    of such footage on the web: it, and the preset's tools, are what decoding costs. Noise alone would fill any
    bit rate, a test pattern alone none.
    """
    (folder / "clips").mkdir(parents=True)
    encoded = [_encode(folder / f"{number}.mp4", footage, number + 1) for number in range(min(count, distinct))]
    contents = [path.read_bytes() for path in encoded]
    paths = [folder / "clips" / f"clip{number:05d}.mp4" for number in range(count)]
    for number, (path, content) in enumerate(zip(paths, itertools.cycle(contents), strict=False)):
        path.write_bytes(content + struct.pack(">I4sQ", 16, b"free", number))  # a box that decoders skip
    return paths


def _encode(path: Path, footage: Footage, seed: int) -> Path:
    repeats = math.ceil(footage.seconds * footage.frame_rate / ENCODED_FRAMES)
    pattern = f"testsrc2=size={footage.size}:rate={footage.frame_rate}:duration={footage.seconds / repeats}"
    x264 = ["-c:v", "libx264", "-preset", "medium", "-b:v", footage.bit_rate, "-pix_fmt", "yuv420p"]
    piece = path.with_suffix(".piece.mp4")
    ffmpeg("-f", "lavfi", "-i", f"{pattern},noise=alls=12:allf=t+u:all_seed={seed}", *x264, piece)
    ffmpeg("-stream_loop", repeats - 1, "-i", piece, "-c", "copy", path)
    piece.unlink()
    return path


def ffmpeg(*arguments: object) -> None:
    """Run the ffmpeg that imageio-ffmpeg brings."""
    import imageio_ffmpeg

    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-v", "error", "-y", *map(str, arguments)]
    subprocess.run(command, check=True)


# Made-up features


def make_store(path: Path, name: str, backbone: Mapping[str, Any], *, videos: int, frames: int) -> Path:
    """Write a feature store of random rows, `frames` a video, of a backbone with these settings; return `path`."""
    import numpy as np

    from svb.data.feature_store_writer import FeatureStoreWriter
    from svb.data.shard import VideoRecord, VideoRows

    random, times = np.random.default_rng(0), np.arange(frames, dtype=np.float64)
    settings = {"backbones": {name: dict(backbone)}, "sampling": {"fps": 1.0}, "batch_size": BATCH_SIZE}
    settings["decoder"] = {"name": "pyav", "version": "none"}
    with FeatureStoreWriter(path, settings, {}) as writer:
        for number in range(videos):
            video_id = f"video{number:06}"
            features = random.standard_normal((frames, backbone["feature_size"]), np.float32).astype(np.float16)
            record = VideoRecord(
                *(video_id, f"/videos/{video_id}.mp4", 1, 1, f"{number:064x}", float(frames), 25.0),
                *(64, 48, 0, "h264", "pyav", "ok", ""),
            )
            writer.add(record, {name: VideoRows(features, times)})
    return path
