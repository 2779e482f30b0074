"""Several runs at a time, each in a process of its own with its share of the threads."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from svb.retrieve.measure.ablation_config import Ablation
from svb.retrieve.measure.ablation_plan import PlannedRun
from svb.retrieve.measure.ablation_run import Task

logger = logging.getLogger(__name__)

# How long a process may take to save what it has, when it is asked to end.
END_SECONDS = 30.0
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def run_all(
    runs: Sequence[PlannedRun],
    ablation: Ablation,
    logs: Path,
    *,
    jobs: int,
    device: str,
) -> dict[str, str]:
    """Train and evaluate runs, `jobs` at a time; one that fails does not keep the others from running.

    Args:
        runs: In this order.
        ablation: What is measured.
        logs: Folder for what the processes of failed runs wrote to stderr.
        jobs: Runs at a time.
        device: `auto`, `cpu`, `cuda:0`, ...

    Returns:
        Errors of the runs that failed, by their name.
    """
    processes = _Processes()
    failed: dict[str, str] = {}
    with ThreadPoolExecutor(jobs) as pool:
        futures = {
            pool.submit(processes.run, run, _task(run, ablation, device), logs, max(1, threads() // jobs)): run
            for run in runs
        }
        try:
            for number, future in enumerate(as_completed(futures), start=1):
                run, (metrics, error) = futures[future], future.result()
                done = f"({number} of {len(runs)} done)"
                if metrics is None:
                    failed[run.name] = error
                    logger.info(f"{run.name}: FAILED: {error} {done}")
                else:
                    logger.info(f"{run.name}: t2v R@1 {metrics['t2v/R@1']:.1f} {done}")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            processes.end()
            raise
    return failed


def threads() -> int:
    """Return how many threads this process may use: as OMP_NUM_THREADS says, or one a core that it may run on."""
    with contextlib.suppress(KeyError, ValueError):
        return max(1, int(os.environ["OMP_NUM_THREADS"]))
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _task(run: PlannedRun, ablation: Ablation, device: str) -> Task:
    return Task(
        run.is_trained,
        str(run.cell.store),
        str(run.cell.captions),
        run.cell.backbone,
        str(run.folder),
        dataclasses.asdict(run.config),
        ablation.split,
        ablation.checkpoint,
        ablation.v2t_convention,
        ablation.allow_missing,
        device,
    )


class _Processes:
    """The processes that run now."""

    def __init__(self) -> None:
        self._lock, self._ended = threading.Lock(), False
        self._running: set[subprocess.Popen[bytes]] = set()

    def run(self, run: PlannedRun, task: Task, logs: Path, num_threads: int) -> tuple[dict[str, float] | None, str]:
        """Return a run's metrics, or None and why there are none."""
        logs.mkdir(parents=True, exist_ok=True)
        log = logs / f"{run.folder.parent.name},{run.folder.name}.log"
        environment = {**os.environ, **dict.fromkeys(THREAD_VARIABLES, str(num_threads))}
        with log.open("wb") as stderr, self._lock:
            if self._ended:
                return None, "interrupted"
            process = subprocess.Popen(
                [sys.executable, "-m", "svb.retrieve.measure.ablation_run", task.as_json()],
                stdin=subprocess.PIPE,  # never written to: its end tells the process that this one is gone
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=environment,
                start_new_session=True,  # Ctrl-C comes to this process alone, which then ends the others
            )
            self._running.add(process)
        last: dict[str, Any] = {}
        with process:
            assert process.stdout is not None
            for line in process.stdout:
                event = _event(line)
                last = event or last
                if event and "message" in event:
                    logger.info(f"{run.name}: {event['message']}")
        with self._lock:
            self._running.discard(process)
        if "metrics" in last:
            log.unlink()
            return last["metrics"], ""
        if "error" in last:
            log.unlink()
            return None, last["error"]
        return None, _how_it_died(process.returncode, log)

    def end(self) -> None:
        """Ask all processes to end, and see to it that they do."""
        with self._lock:
            self._ended = True
            running = list(self._running)
        for process in running:
            process.terminate()
        for process in running:
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


def _event(line: bytes) -> dict[str, Any] | None:
    with contextlib.suppress(ValueError):
        event = json.loads(line)
        return event if isinstance(event, dict) else None
    return None


def _how_it_died(status: int, log: Path) -> str:
    words = log.read_text("utf-8", "replace").strip().splitlines()
    if not words:
        log.unlink()
    said = f", last words {words[-1]!r}, all of them in {log}" if words else ""
    how = f"was ended by signal {-status}" if status < 0 else f"ended with {status}"
    do_next = "where memory ran out, give fewer --jobs" if status == -signal.SIGKILL else "try this run alone"
    return f"its process {how}{said} - {do_next}"
