"""What a search costs beside what it could cost: `python benchmarks/search.py --json search.json`.

- `first`: CPU-seconds of a whole process from a text to its top 10 over 100,000 moments of 512 numbers: a first
  query, a repeated one and one through a warm `svb serve`, against the same text through torch and open_clip
  with plain FAISS, and against numpy over all rows read from SQLite, as rclip does. ViT-B/32, randomly initialised;
  all of them in turn in each round, on the same rows.
- `growth`: 10,000 moments to 1 million, 10 million with `--moments`: opening, memory beside the vectors' size, and
  a query's time beside that of only reading the vectors, which no exact search can beat.
- `approximate`: what a lower latency budget than the exact scan's gives: time and recall of the approximate index,
  on made-up vectors that lie about topics, more and less closely.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
PARTS = ("first", "growth", "approximate")
ROWS, SIZE = 100_000, 512
ROWS_A_VIDEO = 20
TEXT = "a dog catches a frisbee on the beach"
PORT = 8799
BUDGET_SECONDS, NOISES, NUM_TOPICS = 0.01, (0.5, 1.0), 2_000


def main() -> None:
    options = parse_options()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        parts: dict[str, Callable[[Path, argparse.Namespace], tuple[Any, str]]] = {
            "first": first,
            "growth": growth,
            "approximate": approximate,
        }
        measured = {name: parts[name](Path(folder), options) for name in options.part.split(",")}
    print("Numbers are median (lowest to highest).", *(table for _, table in measured.values()), sep="\n\n")
    if options.json:
        held = {name: numbers for name, (numbers, _) in measured.items()}
        options.json.write_text(
            json.dumps({"options": vars(options), **held}, indent=2, default=str) + "\n", "utf-8"
        )


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", default=",".join(PARTS), help="which parts, joined by commas")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=ROWS, help="moments of the first part")
    parser.add_argument("--moments", default="10000,100000,1000000", help="of the growth part, joined by commas")
    parser.add_argument("--clustered", type=int, default=1_000_000, help="moments of the approximate part")
    parser.add_argument("--folder", type=Path, help="where to work; 1 million moments take 1 GB")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    return parser.parse_args()


def first(folder: Path, options: argparse.Namespace) -> tuple[dict[str, list[float]], str]:
    """Return CPU-seconds by way, and a table."""
    index, ways = make_first(folder, options.rows)
    search = [sys.executable, "-m", "svb", "search", TEXT, "--index", str(index), "--json"]
    queries = index / "cache" / "queries"

    def usual(way: str) -> Callable[[], float]:
        return lambda: cpu_of([sys.executable, str(HERE / "usual_ways.py"), way, str(ways), TEXT])

    def cold() -> float:
        shutil.rmtree(queries, ignore_errors=True)
        return cpu_of([*search, "--no-server"])

    methods: dict[str, Callable[[], float]] = {
        "svb, a first query": cold,
        "svb, a repeated query": lambda: cpu_of([*search, "--no-server"]),
        "torch and open_clip, plain FAISS": usual("torch"),
        "torch and open_clip, numpy over SQLite": usual("sqlite"),
        "plain FAISS, the vector given": usual("faiss"),
        "numpy over SQLite, the vector given": usual("numpy-sqlite"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for number in range(options.rounds + 1):  # the first warms the page cache and is not counted
        for name, run in methods.items():
            if (taken := run()) and number:
                seconds[name].append(taken)
    seconds |= through_a_server(index, search, options.rounds)
    slowest = median(seconds["torch and open_clip, plain FAISS"])
    lines = ["| | CPU-seconds | of torch and open_clip's |", "|---|---|---|"]
    lines += [f"| {name} | {spread(held)} | {median(held) / slowest:.3f} |" for name, held in seconds.items()]
    return seconds, "\n".join(lines)


def make_first(folder: Path, num_rows: int) -> tuple[Path, Path]:
    """Return an index of a store of made-up features of ViT-B/32, and what the usual ways read, the same rows."""
    import open_clip
    import torch
    from safetensors.torch import save_file
    from usual_ways import make_ways

    from svb.extract.backbones import load_backbone
    from svb.retrieve.index import index
    from svb.retrieve.indexing.index_config import IndexConfig
    from svb.retrieve.search import Searcher

    weights = folder / "ViT-B-32.safetensors"
    torch.manual_seed(0)
    save_file(open_clip.create_model("ViT-B-32", pretrained=None).state_dict(), weights)
    name = f"open_clip:ViT-B-32/{weights}"
    backbone = load_backbone(name, torch.device("cpu"), torch.float32)
    store = write_store(folder / "features", name, backbone.settings(), num_rows)
    built = index(store, folder / "index", IndexConfig(moment_seconds=1, moment_stride_seconds=1))
    searcher = Searcher(built)
    rows = searcher.vectors.embeddings(np.arange(searcher.catalog.num_moments), by="moment")
    make_ways(folder / "ways", rows, searcher.embed_text(TEXT), weights)
    return built, folder / "ways"


def write_store(path: Path, name: str, settings: dict[str, Any], num_rows: int) -> Path:
    from svb.data.feature_store_writer import FeatureStoreWriter
    from svb.data.rows import VideoRecord, VideoRows

    random = np.random.default_rng(0)
    times = np.arange(ROWS_A_VIDEO, dtype=np.float64)
    held = {
        "backbones": {name: settings},
        "sampling": {"fps": 1.0},
        "decoder": {"name": "pyav", "version": "none"},
        "batch_size": 32,
    }
    with FeatureStoreWriter(path, held, {}) as writer:
        for number in range(num_rows // ROWS_A_VIDEO):
            video_id = f"video{number:06}"
            features = random.standard_normal((ROWS_A_VIDEO, SIZE)).astype(np.float16)
            record = VideoRecord(
                *(video_id, f"/videos/{video_id}.mp4", 1, 1, f"{number:064x}", float(ROWS_A_VIDEO), 25.0),
                *(64, 48, 0, "h264", "synthetic", "ok", ""),
            )
            writer.add(record, {name: VideoRows(features, times)})
    return path


def through_a_server(index: Path, search: list[str], rounds: int) -> dict[str, list[float]]:
    """Return what a client takes, and what the server takes for it, in CPU-seconds."""
    client, server = [], []
    with serving(index) as process:
        for number in range(rounds + 1):
            before = cpu_of_process(process)
            taken = cpu_of(search)
            if number:
                client.append(taken)
                server.append(cpu_of_process(process) - before)
    return {"svb through a warm server, the client": client, "the server's part, scan included": server}


@contextmanager
def serving(index: Path) -> Iterator[int]:
    """Run `svb serve`, and yield its process id once it answers."""
    command = [sys.executable, "-m", "svb", "serve", "--index", str(index), "--port", str(PORT)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            while not (index / "cache" / "server.json").exists() and process.poll() is None:
                os.sched_yield()
            assert process.poll() is None, process.stderr.read()
            yield process.pid
        finally:
            process.send_signal(signal.SIGTERM)


def growth(folder: Path, options: argparse.Namespace) -> tuple[list[dict[str, float]], str]:
    """Return numbers by size of index, and a table."""
    rows = []
    for num_moments in map(int, options.moments.split(",")):
        index = write_index(folder / f"index{num_moments}", num_moments)
        child = [sys.executable, str(HERE / "search_growth.py"), str(index), str(options.rounds)]
        done = subprocess.run(child, capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout))
        shutil.rmtree(index)
    lines = [
        "| moments | vectors, MiB | opening, ms | memory after 10 queries, MiB | of the vectors' | a query, ms "
        "| only reading the vectors, ms | query / reading |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['moments']:,} | {row['vectors_mib']:.0f} | {spread(row['opening_ms'])} | {row['memory_mib']:.0f} "
        f"| {row['memory_mib'] / row['vectors_mib']:.2f} | {spread(row['query_ms'])} | {spread(row['reading_ms'])} "
        f"| {median(row['query_ms']) / median(row['reading_ms']):.2f} |"
        for row in rows
    ]
    return rows, "\n".join(lines)


def approximate(folder: Path, options: argparse.Namespace) -> tuple[list[dict[str, Any]], str]:
    """Return what `svb index --latency-budget` decides, by how closely vectors lie about their topics."""
    from svb.retrieve.indexing.tune_ivf import keep_within_budget
    from svb.retrieve.stored.manifest import read_manifest
    from svb.retrieve.stored.segment import open_segments

    rows = []
    for noise in NOISES:
        index = write_index(folder / f"clustered{noise}", options.clustered, noise)
        segments = open_segments(index, read_manifest(index))
        before = resource.getrusage(resource.RUSAGE_SELF)
        decision = keep_within_budget(index, segments, budget_seconds=BUDGET_SECONDS)
        after = resource.getrusage(resource.RUSAGE_SELF)
        cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        rows.append({"noise": noise, "cpu_seconds": cpu_seconds, **decision})
        shutil.rmtree(index)
    lines = [
        "| noise | exact, ms | approximate, ms | recall@10, moments | recall@10, videos | lists searched | built, "
        "CPU-s | why exact |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        found = ["", "", "", ""]
        if row["file"] is not None:
            lists = f"{row['nprobe']} of {row['nlist']}"
            found = [f"{1000 * row['seconds']:.3g}", f"{row['recall']:.4f}", f"{row['recall_videos']:.4f}", lists]
        cells = [f"{row['noise']:g}", f"{1000 * row['exact_seconds']:.3g}", *found, f"{row['cpu_seconds']:.0f}"]
        lines.append(f"| {' | '.join(cells)} | {row['reason']} |")
    return rows, "\n".join(lines)


def write_index(path: Path, num_moments: int, noise: float | None = None) -> Path:
    """Write an index of random unit vectors, in segments of at most a million moments.

    With `noise` they are those of topics, a video's moments of one, with so much noise as long as the topic's.
    """
    from svb.retrieve.stored.manifest import commit, publish_part
    from svb.retrieve.stored.segment import write_segment

    entries: list[dict[str, Any]] = []
    for first in range(0, num_moments, 1_000_000):
        segment = random_segment(first, min(1_000_000, num_moments - first), noise)
        entry = publish_part(path, "segments", lambda folder, made=segment: write_segment(folder, made))
        counts = {"videos": segment.num_videos, "moments": segment.num_moments, "deleted": None}
        entries.append({**entry, **counts})
    empty: dict[str, Any] = {part: [] for part in ("captions", "metadata", "heads", "text")}
    manifest = {
        **{"format": "svb index", "generation": 1, "model": {"kind": "random"}, "model_fingerprint": "0" * 16},
        **{"moments": {"seconds": 1.0, "stride_seconds": 1.0}, "embedding_size": SIZE, "store": ""},
        **{"videos": num_moments // ROWS_A_VIDEO, "moments_total": num_moments, "segments": entries},
        **{"vectors": None, **empty},
    }
    commit(path, manifest)
    return path


def random_segment(first: int, num_moments: int, noise: float | None) -> Any:
    from svb.retrieve.stored.columns import StringColumn
    from svb.retrieve.stored.segment import Segment

    random = np.random.default_rng(first)
    num_videos = num_moments // ROWS_A_VIDEO
    moments = np.empty((num_moments, SIZE), np.float16)
    topics = np.random.default_rng(0).standard_normal((NUM_TOPICS if noise else 1, SIZE), dtype=np.float32)
    for begin in range(0, num_moments, 10_000):
        rows = random.standard_normal((min(10_000, num_moments - begin), SIZE), dtype=np.float32)
        if noise:
            of_videos = topics[random.integers(NUM_TOPICS, size=len(rows) // ROWS_A_VIDEO)]
            rows = np.repeat(of_videos, ROWS_A_VIDEO, axis=0) + noise * rows
        moments[begin : begin + 10_000] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    names = [f"video{first // ROWS_A_VIDEO + number:08}" for number in range(num_videos)]
    begins = np.tile(np.arange(ROWS_A_VIDEO, dtype=np.float64), num_videos)
    return Segment(
        key="",
        video_embeddings=moments[::ROWS_A_VIDEO],
        moment_embeddings=moments,
        moment_offsets=np.arange(num_videos + 1, dtype=np.int64) * ROWS_A_VIDEO,
        moment_seconds=np.stack([begins, begins + 1], axis=1),
        duration_seconds=np.full(num_videos, float(ROWS_A_VIDEO)),
        size_bytes=np.ones(num_videos, np.int64),
        mtime_ns=np.ones(num_videos, np.int64),
        video_ids=StringColumn.of(names),
        source_paths=StringColumn.of([f"/videos/{name}.mp4" for name in names]),
        content_hashes=StringColumn.of([f"{first + number:064x}" for number in range(num_videos)]),
        deleted=np.empty(0, np.int64),
    )


def cpu_of(command: list[str]) -> float:
    """Run a process and return its CPU-seconds, user and system."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def cpu_of_process(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text("ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def spread(values: list[float]) -> str:
    return f"{median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


if __name__ == "__main__":
    main()
