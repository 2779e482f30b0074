"""cpu_seconds.jsonl in a run: what each epoch cost, one line per epoch."""

from __future__ import annotations

import json
import time
from pathlib import Path

FILE = "cpu_seconds.jsonl"


class EpochClock:
    """Appends the cost of every epoch. An epoch that is trained again gets a newer line, which counts.

    The first epoch's line includes what came before it, such as loading the features.
    """

    def __init__(self, run: Path) -> None:
        self._path = run / FILE
        self._cpu, self._wall = time.process_time(), time.monotonic()

    def stamp(self, epoch: int) -> None:
        """Write the line of an epoch that ends now."""
        cpu, wall = time.process_time(), time.monotonic()
        line = {"epoch": epoch, "cpu_seconds": cpu - self._cpu, "wall_seconds": wall - self._wall}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._cpu, self._wall = cpu, wall


def read_cpu_seconds(run: Path, epochs: int) -> float | None:
    """Return the CPU-seconds that a run's epochs took, all threads together; None if an epoch is unknown."""
    seconds: dict[int, float] = {}
    path = run / FILE
    for line in path.read_text("utf-8").splitlines() if path.is_file() else []:
        try:
            held = json.loads(line)
            seconds[int(held["epoch"])] = float(held["cpu_seconds"])
        except (ValueError, KeyError, TypeError):  # a kill cut this line short
            continue
    if not set(range(1, epochs + 1)) <= set(seconds):
        return None
    return sum(seconds[epoch] for epoch in range(1, epochs + 1))
