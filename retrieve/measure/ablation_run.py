"""One run of an ablation, in a process of its own: `python -m svb.retrieve.measure.ablation_run TASK`.

TASK is JSON, see `Task`. What happens goes to stdout as lines of JSON: `{"message": ...}`, `{"epoch": ...}`, and at
the end `{"metrics": ...}` or `{"error": ...}`. The process ends when its stdin does, that is, when whoever started
it is gone, by whatever.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svb.errors import SvbError
from svb.retrieve.evaluate import evaluate
from svb.train.config import TrainConfig
from svb.train.run import train

SECONDS_FILE = "cpu_seconds.jsonl"


@dataclass(frozen=True)
class Task:
    """What to run: arguments of `svb.train.run.train` and `svb.retrieve.evaluate.evaluate`.

    Attributes:
        is_trained: Only evaluate.
    """

    is_trained: bool
    store: str
    captions: str
    backbone: str | None
    out: str
    config: dict[str, Any]
    split: str
    checkpoint: str
    v2t_convention: str
    allow_missing: bool
    device: str

    def as_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))


def run_task(task: Task) -> dict[str, float]:
    """Train to the end, from wherever a run stopped, and evaluate; return the metrics.

    Raises:
        SvbError: As `train` and `evaluate`.
    """
    out = Path(task.out)
    if not task.is_trained:
        _train(task, out)
    return evaluate(
        out,
        store=task.store,
        captions=task.captions,
        split=task.split,
        checkpoint=task.checkpoint,
        v2t_convention=task.v2t_convention,
        allow_missing=task.allow_missing,
        device=task.device,
    ).metrics


def _train(task: Task, out: Path) -> None:
    clock = _Clock(out / SECONDS_FILE)

    def on_epoch(metrics: dict[str, float]) -> None:
        clock.stamp(int(metrics["epoch"]))
        _emit({"epoch": metrics["epoch"]})

    train(
        task.store,
        task.captions,
        out,
        TrainConfig(**task.config),
        backbone=task.backbone,
        device=task.device,
        on_epoch=on_epoch,
    )


class _Messages(logging.Handler):
    """Sends what the user should hear to the process that started this one."""

    def emit(self, record: logging.LogRecord) -> None:
        _emit({"message": record.getMessage()})


class _Clock:
    """Writes what every epoch cost; an epoch that is trained again has a newer line, which counts.

    The first epoch's share has the loading of features in it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._cpu, self._wall = time.process_time(), time.monotonic()

    def stamp(self, epoch: int) -> None:
        cpu, wall = time.process_time(), time.monotonic()
        line = {"epoch": epoch, "cpu_seconds": cpu - self._cpu, "wall_seconds": wall - self._wall}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._cpu, self._wall = cpu, wall


def cpu_seconds(run: Path, epochs: int) -> float | None:
    """Return the CPU-seconds that a run's epochs took, all threads together; None where not all are known."""
    seconds: dict[int, float] = {}
    path = run / SECONDS_FILE
    for line in path.read_text("utf-8").splitlines() if path.is_file() else []:
        try:
            held = json.loads(line)
            seconds[int(held["epoch"])] = float(held["cpu_seconds"])
        except (ValueError, KeyError, TypeError):  # a line that a kill cut short
            continue
    if not set(range(1, epochs + 1)) <= set(seconds):
        return None
    return sum(seconds[epoch] for epoch in range(1, epochs + 1))


def _emit(event: dict[str, Any]) -> None:
    os.write(sys.stdout.fileno(), (json.dumps(event) + "\n").encode())


def _end_with_stdin() -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    os._exit(1)


def _main() -> None:
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    try:
        _emit({"metrics": run_task(Task(**json.loads(sys.argv[1])))})
    except SvbError as error:
        _emit({"error": str(error)})
    except KeyboardInterrupt:
        _emit({"error": "interrupted"})


if __name__ == "__main__":
    logger = logging.getLogger("svb")
    logger.setLevel(logging.INFO)
    logger.addHandler(_Messages())
    _main()
