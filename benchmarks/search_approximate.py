"""What does a latency budget give? `python benchmarks/search_approximate.py`.

What `svb index --latency-budget 10ms` decides for 1 million made-up vectors that lie about topics, more and less
closely: time and recall of the approximate index, or why the index stays exact.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import shared
from search_growth import write_index

BUDGET_SECONDS, NOISES = 0.01, (0.5, 1.0)


def measure(folder: Path, options: argparse.Namespace) -> tuple[list[dict[str, Any]], str]:
    """Return what was decided, by how closely vectors lie about their topics, and a table."""
    from svb.retrieve.indexing.tune_ivf import keep_within_budget
    from svb.retrieve.stored.manifest import read_manifest
    from svb.retrieve.stored.segment import open_segments

    rows, lines = [], []
    for noise in NOISES:
        index = write_index(folder / f"noise{noise}", options.windows, noise, options.topics)
        segments = open_segments(index, read_manifest(index))
        before = shared.cpu_seconds()
        decision = keep_within_budget(index, segments, budget_seconds=BUDGET_SECONDS)
        rows.append({"noise": noise, "cpu_seconds": shared.cpu_seconds() - before, **decision})
        shutil.rmtree(index)
    for row in rows:
        found = ["", "", "", ""]
        if row["file"] is not None:
            found = [f"{1000 * row['seconds']:.3g}", f"{row['recall']:.4f}", f"{row['recall_videos']:.4f}"]
            found.append(f"{row['nprobe']} of {row['nlist']}")
        lines.append([f"{row['noise']:g}", f"{1000 * row['exact_seconds']:.3g}", *found])
        lines[-1] += [f"{row['cpu_seconds']:.0f}", row["reason"]]
    titles = ["noise", "exact, ms", "approximate, ms", "recall@10, windows", "recall@10, videos", "lists searched"]
    return rows, shared.table([*titles, "built, CPU-s", "why exact"], lines)


if __name__ == "__main__":
    shared.run_benchmark(__doc__, measure, windows=(1_000_000, "how many"), topics=(2_000, "how many"))
