"""`svb ablate`: a config file -> a run a cell and seed -> tables and a plot with paired differences."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from svb.data.publish import lock_folder, published_file, remove_leftovers
from svb.errors import InputError, UsageError
from svb.retrieve.measure.ablation_config import Ablation, read_ablation
from svb.retrieve.measure.ablation_jobs import run_all
from svb.retrieve.measure.ablation_plan import PlannedRun, plan
from svb.retrieve.measure.ablation_plot import plot
from svb.retrieve.measure.ablation_report import Report, cells_csv, gather, markdown, runs_csv

logger = logging.getLogger(__name__)

TABLE, CELLS, RUNS, PLOT = "ablation.md", "cells.csv", "runs.csv", "ablation.png"


def ablate(
    config: Path | str,
    out: Path | str,
    *,
    jobs: int | None = None,
    device: str = "auto",
) -> Report:
    """Train and evaluate every cell of a config file with every seed, and compare them with the baseline.

    Finished runs are kept, killed ones go on, failed ones are tried again. Every run is a process of its own.

    Args:
        config: A TOML file; see `svb.retrieve.measure.ablation_config`.
        out: Folder for `runs/<cell>/seed-<seed>/`, the tables and the plot; made where there is none.
        jobs: Runs at a time, each with its share of the threads; as the config file says where not given.
        device: `auto`, `cpu`, `cuda:0`, ...

    Returns:
        What is written to `out`. Where some runs failed it is of the others.

    Raises:
        InputError: The config file or its inputs cannot be used, or no run finished.
        MismatchError: Cells would be asked different queries.
        StoreError: A file is damaged, or another process works in `out`.
    """
    out = Path(out)
    ablation = read_ablation(Path(config))
    jobs = ablation.jobs if jobs is None else jobs
    if jobs < 1:
        raise UsageError(f"jobs is {jobs} - expected at least 1")
    planned, queries = plan(ablation, out)
    out.mkdir(parents=True, exist_ok=True)
    lock = lock_folder(out)
    try:
        remove_leftovers(out)
        waiting = [run for run in planned if not run.is_finished]
        logger.info(
            f"{len(planned)} runs: {len(ablation.cells)} cells, {len(ablation.seeds)} seeds; "
            f"{len(planned) - len(waiting)} are finished already"
        )
        failed = run_all(waiting, ablation, out / "logs", jobs=jobs, device=device)
        finished = [run for run in planned if run.name not in failed]
        if not finished:
            raise InputError(f"all {len(planned)} runs failed, the first with: {next(iter(failed.values()))}")
        report = gather(ablation, queries, finished, failed, out)
        _write(report)
    finally:
        os.close(lock)
    return report


def dry_run(config: Path | str, out: Path | str) -> tuple[Ablation, list[PlannedRun]]:
    """Return what `ablate` would do; nothing is written. Errors as `ablate`."""
    ablation = read_ablation(Path(config))
    return ablation, plan(ablation, Path(out), quiet=True)[0]


def _write(report: Report) -> None:
    for name, text in (
        (TABLE, markdown(report)),
        (CELLS, cells_csv(report)),
        (RUNS, runs_csv(report)),
    ):
        with published_file(report.folder / name) as aside:
            aside.write_text(text, "utf-8")
    with published_file(report.folder / PLOT) as aside:
        plot(report, aside)
