"""`svb ablate`: a config file -> a run per cell and seed -> tables and a plot with paired differences."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from svb.data.publish import lock_folder, published_file, remove_leftovers
from svb.errors import InputError, UsageError
from svb.retrieve.measure.ablation_config import Ablation, read_ablation
from svb.retrieve.measure.ablation_plan import PlannedRun, plan_runs
from svb.retrieve.measure.ablation_report import AblationReport, cells_csv, draw, gather_report, markdown, runs_csv
from svb.retrieve.measure.query_ranks import RANKS_FILE, read_ranks
from svb.train.retrieval_metrics import ranks_metrics

logger = logging.getLogger(__name__)

TABLE, CELLS, RUNS, PLOT = "ablation.md", "cells.csv", "runs.csv", "ablation.png"
# A process gets this long to save its state when it is asked to end.
END_SECONDS = 30.0
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
# Runs commands of svb until one fails, as `a && b` does, but imports PyTorch only once. The process ends when its
# stdin does too, that is, when ablate is gone.
_SVB = """
import os, shlex, sys, threading
def end_with_stdin():
    while os.read(0, 1):
        pass
    os._exit(1)
threading.Thread(target=end_with_stdin, daemon=True).start()
from svb.cli import main
for command in sys.argv[1:]:
    sys.argv = shlex.split(command)
    try:
        main()
    except SystemExit as ended:
        if ended.code:
            raise
"""


def ablate(
    config: Path | str,
    out: Path | str,
    *,
    jobs: int | None = None,
    device: str = "auto",
) -> AblationReport:
    """Train and evaluate every cell of a config file with every seed, and compare the cells with the baseline.

    Finished runs are kept, killed ones continue, failed ones are tried again. Every run is made by the commands
    that the tables print, in a process of its own.

    Args:
        config: A TOML file; see `svb.retrieve.measure.ablation_config`.
        out: Folder for `runs/<cell>/seed-<seed>/`, logs, tables and plot; created if it does not exist.
        jobs: Number of runs at a time, which share the threads; by default as in the config file.
        device: `auto`, `cpu`, `cuda:0`, ...

    Returns:
        The content of the tables. If some runs failed, it covers the others.

    Raises:
        InputError: The config file or its inputs cannot be used, or no run finished.
        MismatchError: The cells would answer different queries.
        StoreError: A file is damaged, or another process works in `out`.
    """
    out = Path(out)
    ablation = read_ablation(Path(config))
    jobs = ablation.jobs if jobs is None else jobs
    if jobs < 1:
        raise UsageError(f"jobs is {jobs} - expected at least 1")
    planned, queries = plan_runs(ablation, out, device)
    out.mkdir(parents=True, exist_ok=True)
    lock = lock_folder(out)
    try:
        remove_leftovers(out)
        waiting = [run for run in planned if not run.is_finished]
        logger.info(
            f"{len(planned)} runs: {len(ablation.cells)} cells, {len(ablation.seeds)} seeds; "
            f"{len(planned) - len(waiting)} are finished already"
        )
        failed = _run_all(waiting, out / "logs", jobs)
        finished = [run for run in planned if run.name not in failed]
        if not finished:
            raise InputError(f"all {len(planned)} runs failed, the first with: {next(iter(failed.values()))}")
        report = gather_report(ablation, queries, finished, failed, out)
        _write(report)
    finally:
        os.close(lock)
    return report


def dry_run(config: Path | str, out: Path | str, *, device: str = "auto") -> tuple[Ablation, list[PlannedRun]]:
    """Return what `ablate` would do, and write nothing; errors as `ablate`."""
    ablation = read_ablation(Path(config))
    return ablation, plan_runs(ablation, Path(out), device, quiet=True)[0]


def _write(report: AblationReport) -> None:
    for name, text in ((TABLE, markdown(report)), (CELLS, cells_csv(report)), (RUNS, runs_csv(report))):
        with published_file(report.folder / name) as aside:
            aside.write_text(text, "utf-8")
    with published_file(report.folder / PLOT) as aside:
        draw(report, aside)


def _run_all(runs: Sequence[PlannedRun], logs: Path, jobs: int) -> dict[str, str]:
    """Make runs in this order, `jobs` at a time; return the errors of those that failed, by name."""
    logs.mkdir(parents=True, exist_ok=True)
    processes = _Processes(logs, max(1, _num_threads() // jobs))
    failed: dict[str, str] = {}
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(processes.make, run): run for run in runs}
        try:
            for number, future in enumerate(as_completed(futures), start=1):
                run, error = futures[future], future.result()
                if error:
                    failed[run.name] = error
                    result = f"FAILED: {error}"
                else:
                    ranks = read_ranks(run.folder / RANKS_FILE)
                    result = f"t2v R@1 {ranks_metrics(ranks.t2v, ranks.v2t)['t2v/R@1']:.1f}"
                logger.info(f"{run.name}: {result} ({number} of {len(runs)} done)")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            processes.end()
            raise
    return failed


def _num_threads() -> int:
    """Return the number of threads to share: OMP_NUM_THREADS, or one for each core that this process may use."""
    with contextlib.suppress(KeyError, ValueError):
        return max(1, int(os.environ["OMP_NUM_THREADS"]))
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Processes:
    """The commands that are running now.

    Args:
        logs: Folder for the output of the commands, one file per run.
        num_threads: Number of threads for each command.
    """

    def __init__(self, logs: Path, num_threads: int) -> None:
        self._logs, self._environment = logs, {**os.environ, **dict.fromkeys(THREAD_VARIABLES, str(num_threads))}
        self._lock, self._is_ended = threading.Lock(), False
        self._running: set[subprocess.Popen[bytes]] = set()

    def make(self, run: PlannedRun) -> str:
        """Run the commands of a run; return the error of the first that fails, or an empty string."""
        log = self._logs / f"{run.folder.parent.name},{run.folder.name}.log"
        commands = [run.evaluate_command] if run.is_trained else [run.train_command, run.evaluate_command]
        lines = [shlex.join(command) for command in commands]
        with log.open("ab") as output, self._lock:
            if self._is_ended:
                return "interrupted"
            output.write(f"$ {' && '.join(lines)}\n".encode())
            output.flush()
            process = subprocess.Popen(
                [sys.executable, "-c", _SVB, *lines],
                stdin=subprocess.PIPE,  # nothing is written to it: its end tells the process that ablate is gone
                stdout=output,
                stderr=output,
                env=self._environment,
                start_new_session=True,  # Ctrl-C reaches only this process, which then ends the others
            )
            self._running.add(process)
        with process:
            status = process.wait()
        with self._lock:
            self._running.discard(process)
        return _error_of(status, log) if status else ""

    def end(self) -> None:
        """Ask all processes to end, and kill those that take too long."""
        with self._lock:
            self._is_ended = True
            running = list(self._running)
        for process in running:
            process.terminate()
        for process in running:
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


def _error_of(status: int, log: Path) -> str:
    """Return the error in which a command ended, or how its process died."""
    last = log.read_text("utf-8", "replace").strip().splitlines()[-1]
    if status > 0 and last.startswith("svb: "):
        return last.removeprefix("svb: ")
    said = "" if last.startswith("$ ") else f" and last said {last!r}"
    how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
    do_next = "if memory ran out, give fewer --jobs" if status == -signal.SIGKILL else "try its last command alone"
    return f"its process {how}{said}, see {log} - {do_next}"
