"""What does the first answer cost? `python benchmarks/search_first.py`.

CPU-seconds of a whole process from a text to its top 10 over 100,000 windows of 512 numbers: a first query, a
repeated one and one through a warm `svb serve`, against the same text through torch and open_clip with plain FAISS,
and against numpy over all rows read from SQLite, as rclip does. ViT-B/32, randomly initialised; all of them in turn
in each round, on the same rows.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import shared

ROWS_A_VIDEO = 20
TEXT = "a dog catches a frisbee on the beach"
PORT = 8799
RIVAL = "torch and open_clip, plain FAISS"


def measure(folder: Path, options: argparse.Namespace) -> tuple[dict[str, list[float]], str]:
    """Return CPU-seconds by way, and a table."""
    index = make_index_and_rivals(folder, options.rows)
    search = [sys.executable, "-m", "svb", "search", TEXT, "--index", str(index), "--json"]

    def usual(way: str) -> Callable[[], float]:
        program = Path(__file__).with_name("usual_ways.py")
        return lambda: cpu_of([sys.executable, str(program), way, str(folder), TEXT])

    def cold() -> float:
        shutil.rmtree(index / "cache" / "queries", ignore_errors=True)
        return cpu_of([*search, "--no-server"])

    methods: dict[str, Callable[[], float]] = {
        "svb, a first query": cold,
        "svb, a repeated query": lambda: cpu_of([*search, "--no-server"]),
        RIVAL: usual("torch"),
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
    rival = median(seconds[RIVAL])
    rows = [[name, shared.spread(held), f"{median(held) / rival:.3f}"] for name, held in seconds.items()]
    return seconds, shared.table(["", "CPU-seconds", "of torch and open_clip's"], rows)


def make_index_and_rivals(folder: Path, num_rows: int) -> Path:
    """Return an index of made-up features of ViT-B/32, and write the same rows where `usual_ways.py` reads them."""
    import faiss
    import numpy as np
    import open_clip
    import torch
    from safetensors.torch import save_file

    from svb.extract.backbones import load_backbone
    from svb.retrieve.index import IndexConfig, index
    from svb.retrieve.search import Searcher

    weights = folder / "ViT-B-32.safetensors"
    torch.manual_seed(0)
    save_file(open_clip.create_model("ViT-B-32", pretrained=None).state_dict(), weights)
    (folder / "weights.txt").write_text(str(weights), "utf-8")
    name = f"open_clip:ViT-B-32/{weights}"
    settings = load_backbone(name, torch.device("cpu"), torch.float32).settings()
    videos = num_rows // ROWS_A_VIDEO
    store = shared.make_store(folder / "features", name, settings, videos=videos, frames=ROWS_A_VIDEO)
    built = index(store, folder / "index", IndexConfig(moment_seconds=1, moment_stride_seconds=1))
    searcher = Searcher(built)
    rows = searcher.vectors.embeddings(np.arange(searcher.catalog.num_moments), by="moment")
    np.save(folder / "query.npy", searcher.embed_text(TEXT))
    plain = faiss.IndexFlatIP(rows.shape[1])
    plain.add(rows)
    faiss.write_index(plain, str(folder / "rows.faiss"))
    with sqlite3.connect(folder / "rows.sqlite") as database:
        database.execute("CREATE TABLE images (id INTEGER PRIMARY KEY, filepath TEXT UNIQUE, vector BLOB)")
        named = ((f"/videos/{number}.mp4", row.tobytes()) for number, row in enumerate(rows))
        database.executemany("INSERT INTO images (filepath, vector) VALUES (?, ?)", named)
    database.close()
    return built


def through_a_server(index: Path, search: list[str], rounds: int) -> dict[str, list[float]]:
    """Return what a client takes, and what the server takes for it, in CPU-seconds."""
    client, server = [], []
    with serving(index) as process:
        for number in range(rounds + 1):
            before = shared.cpu_seconds_of_process(process)
            taken = cpu_of(search)
            if number:
                client.append(taken)
                server.append(shared.cpu_seconds_of_process(process) - before)
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


def cpu_of(command: list[str]) -> float:
    """Run a process and return its CPU-seconds, user and system."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    shared.run_benchmark(__doc__, measure, rounds=(5, "rounds"), rows=(100_000, "windows of the index"))
