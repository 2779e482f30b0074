"""The tables of an ablation: means and spreads, differences to the baseline, and the command behind every row."""

from __future__ import annotations

import csv
import dataclasses
import io
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from svb.retrieve.measure.ablation_config import FIELDS, Ablation, Cell
from svb.retrieve.measure.ablation_plan import PlannedRun
from svb.retrieve.measure.ablation_run import cpu_seconds
from svb.retrieve.measure.paired import Difference, Interval, is_chance, paired_differences
from svb.retrieve.measure.ranks import FILE, Queries, Ranks, read_ranks, require_same_queries
from svb.train.config import selection_note
from svb.train.metrics import ranks_metrics

COLUMNS = ("t2v/R@1", "t2v/R@5", "t2v/R@10", "t2v/MedR", "v2t/R@1", "v2t/R@10")


@dataclass(frozen=True)
class Row:
    """A cell's results over its finished runs.

    Attributes:
        cell: Which.
        runs: By seed; those that are finished.
        metrics: A dict a run, see `svb.train.metrics.summarise`.
        seconds: CPU-seconds of each run's training, where known.
        num_at_chance: Runs that are no better than guessing.
        differences: To the baseline, over the seeds that both have finished; empty for the baseline itself.
    """

    cell: Cell
    runs: dict[int, PlannedRun]
    metrics: list[dict[str, float]]
    seconds: list[float]
    num_at_chance: int
    differences: list[Difference]

    def mean(self, metric: str) -> float:
        return float(np.mean([metrics[metric] for metrics in self.metrics]))

    def deviation(self, metric: str) -> float | None:
        """Return the standard deviation over seeds; None of a single one."""
        values = [metrics[metric] for metrics in self.metrics]
        return float(np.std(values, ddof=1)) if len(values) > 1 else None


@dataclass(frozen=True)
class Report:
    """What an ablation came to.

    Attributes:
        ablation: What was asked.
        queries: What every run was asked.
        rows: Of cells with a finished run, the baseline first among them where it has one.
        failed: Errors by the runs' names.
        folder: Where the tables and the plot lie.
    """

    ablation: Ablation
    queries: Queries
    rows: list[Row]
    failed: dict[str, str]
    folder: Path

    @property
    def is_collapsed(self) -> bool:
        """Whether no run learned anything."""
        return bool(self.rows) and all(row.num_at_chance == len(row.runs) for row in self.rows)


def gather(
    ablation: Ablation, queries: Queries, finished: Sequence[PlannedRun], failed: Mapping[str, str], folder: Path
) -> Report:
    """Read the ranks of finished runs and compare every cell with the baseline.

    Raises:
        MismatchError: A run was asked other queries.
    """
    ranks: dict[str, dict[int, Ranks]] = {}
    runs: dict[str, dict[int, PlannedRun]] = {}
    for run in finished:
        held = read_ranks(run.folder / FILE)
        require_same_queries(held.queries, queries, str(held.path), "what was planned")
        ranks.setdefault(run.cell.name, {})[run.seed] = held
        runs.setdefault(run.cell.name, {})[run.seed] = run
    base = ranks.get(ablation.baseline.name, {})
    rows = []
    for cell in sorted(ablation.cells, key=lambda cell: cell != ablation.baseline):
        own = ranks.get(cell.name)
        if not own:
            continue
        shared = [seed for seed in own if seed in base] if cell != ablation.baseline else []
        differences = paired_differences([base[s] for s in shared], [own[s] for s in shared]) if shared else []
        seconds = [cpu_seconds(run.folder, run.config.epochs) for run in runs[cell.name].values()]
        rows.append(
            Row(
                cell,
                runs[cell.name],
                [ranks_metrics(held.t2v, held.v2t) for held in own.values()],
                [value for value in seconds if value is not None],
                sum(map(is_chance, own.values())),
                differences,
            )
        )
    return Report(ablation, queries, rows, dict(failed), folder)


def markdown(report: Report) -> str:
    """Return both tables, what they mean, and the commands, as Markdown."""
    ablation, baseline = report.ablation, report.ablation.baseline.name
    lines = [
        f"{len(report.queries.caption_ids)} captions of the {report.queries.split} split against "
        f"{len(report.queries.video_ids)} videos, {ablation.checkpoint} checkpoint. Mean ± standard deviation over "
        "seeds; recalls in percent; the cost is CPU-seconds of one training.",
        "",
        _line(["cell", "seeds", *(name.replace("/", " ") for name in COLUMNS), "CPU-seconds"]),
        _rule(len(COLUMNS) + 3),
    ]
    for row in report.rows:
        spread = [_mean_and_deviation(row, metric) for metric in COLUMNS]
        name = f"**{_cell_text(row.cell.name)}**" if row.cell.name == baseline else _cell_text(row.cell.name)
        seconds = f"{np.mean(row.seconds):.0f}" if row.seconds else "unknown"
        lines.append(_line([name + "†" * bool(row.num_at_chance), str(len(row.runs)), *spread, seconds]))
    lines += [
        "",
        *_notes(report),
        f"Differences to the baseline, **{_cell_text(baseline)}**, in percentage points:",
        "",
    ]
    lines += [_line(["cell", "metric", "difference", "95 % over videos", "p", "95 % over seeds", "p"]), _rule(7)]
    for row in report.rows:
        for difference in row.differences:
            name = _cell_text(row.cell.name)
            lines.append(_line([name, difference.metric.replace("/", " "), *difference_texts(difference)]))
    lines += [
        "",
        "Over videos: would other videos show it; over seeds: would other trainings. See docs/experiments.md.",
    ]
    num_compared = sum(bool(row.differences) for row in report.rows)
    if num_compared > 1:
        lines.append(
            f"{num_compared} cells are compared: where none differs, a p below 0.05 still comes up in one of "
            "20 comparisons."
        )
    lines += ["", "Each run is made by", ""]
    lines += [f"- `{command_of(run)}`" for row in report.rows for run in row.runs.values()]
    lines += ["", f"and measured by `svb evaluate RUN {shlex.join(_evaluate_options(ablation))}`."]
    return "\n".join(lines) + "\n"


def cells_csv(report: Report) -> str:
    """Return a line a cell."""
    table: list[dict[str, Any]] = []
    for row in report.rows:
        line: dict[str, Any] = {"cell": row.cell.name, "baseline": row.cell == report.ablation.baseline}
        line |= {"runs": len(row.runs), "runs_at_chance": row.num_at_chance}
        for metric in row.metrics[0]:
            line[f"{metric} mean"], line[f"{metric} sd"] = row.mean(metric), row.deviation(metric)
        for difference in row.differences:
            name = difference.metric
            line[f"{name} difference"], line[f"{name} pairs"] = difference.difference, difference.num_pairs
            for kind, interval in (("videos", difference.over_videos), ("seeds", difference.over_seeds)):
                for field in dataclasses.fields(Interval):
                    line[f"{name} {field.name} over {kind}"] = getattr(interval, field.name) if interval else None
        line["cpu_seconds mean"] = float(np.mean(row.seconds)) if row.seconds else None
        table.append(line)
    return _csv(table)


def runs_csv(report: Report) -> str:
    """Return a line a run, with the command that makes it."""
    table = []
    for row in report.rows:
        for metrics, (seed, run) in zip(row.metrics, row.runs.items(), strict=True):
            seconds = cpu_seconds(run.folder, run.config.epochs)
            line = {"cell": row.cell.name, "seed": seed, **metrics, "cpu_seconds": seconds}
            table.append({**line, "command": command_of(run)})
    return _csv(table)


def as_json(report: Report) -> dict[str, Any]:
    """Return all of it for machines."""
    return {
        "folder": str(report.folder),
        "baseline": report.ablation.baseline.name,
        "split": report.ablation.split,
        "checkpoint": report.ablation.checkpoint,
        "num_captions": len(report.queries.caption_ids),
        "num_videos": len(report.queries.video_ids),
        "cells": [
            {
                "name": row.cell.name,
                "seeds": list(row.runs),
                "runs": {str(seed): str(run.folder) for seed, run in row.runs.items()},
                "commands": [command_of(run) for run in row.runs.values()],
                "runs_at_chance": row.num_at_chance,
                "metrics": {name: {"mean": row.mean(name), "sd": row.deviation(name)} for name in row.metrics[0]},
                "cpu_seconds": float(np.mean(row.seconds)) if row.seconds else None,
                "differences": [dataclasses.asdict(difference) for difference in row.differences],
            }
            for row in report.rows
        ],
        "failed": report.failed,
    }


def command_of(run: PlannedRun) -> str:
    """Return the `svb train` command that makes a run; options at their defaults are left out."""
    words = ["svb", "train", str(run.cell.store), str(run.cell.captions), "-o", str(run.folder)]
    if run.cell.backbone is not None:
        words += ["--backbone", run.cell.backbone]
    for name, default in FIELDS.items():
        value, option = getattr(run.config, name), name.replace("_", "-")
        if value != default:
            words += (
                [f"--{'' if value else 'no-'}{option}"] if isinstance(value, bool) else [f"--{option}", str(value)]
            )
    return shlex.join([*words, "--seed", str(run.seed)])


def difference_texts(difference: Difference) -> list[str]:
    """Return difference, interval and p over videos, interval and p over seeds, as tables show them."""
    return [
        f"{difference.difference:+.2f}",
        *_interval_texts(difference.over_videos),
        *_interval_texts(difference.over_seeds),
    ]


def _interval_texts(interval: Interval | None) -> list[str]:
    if interval is None:
        return ["cannot be told", ""]
    p = f"{interval.p:.3f}" if interval.p >= 0.001 else "<0.001"
    return [f"{interval.low:+.2f} to {interval.high:+.2f}", p]


def _notes(report: Report) -> list[str]:
    lines = []
    for row in report.rows:
        if row.num_at_chance:
            lines.append(
                f"† {row.num_at_chance} of {len(row.runs)} runs of {_cell_text(row.cell.name)} cannot be told from "
                "guessing: they have collapsed or learned nothing."
            )
    lines += [f"{_cell_text(name)} FAILED: {_cell_text(error)}" for name, error in report.failed.items()]
    selected_on = {row.cell.config.select_on for row in report.rows}
    if report.ablation.checkpoint == "best" and report.queries.split in selected_on:
        lines.append("The best checkpoint was chosen on this very split, so the numbers flatter.")
    lines += [note for split in sorted(selected_on) if (note := selection_note(split))]
    return [part for line in lines for part in (line, "")]


def _evaluate_options(ablation: Ablation) -> list[str]:
    options = ["--split", ablation.split, "--checkpoint", ablation.checkpoint, "--v2t", ablation.v2t_convention]
    return [*options, *(["--allow-missing"] if ablation.allow_missing else [])]


def _mean_and_deviation(row: Row, metric: str) -> str:
    deviation = row.deviation(metric)
    return f"{row.mean(metric):.1f}" + (f" ± {deviation:.1f}" if deviation is not None else "")


def _cell_text(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _rule(num_columns: int) -> str:
    return "|" + "---|" * num_columns


def _csv(table: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for line in table for name in line))
    written = io.StringIO()
    writer = csv.DictWriter(written, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return written.getvalue()
