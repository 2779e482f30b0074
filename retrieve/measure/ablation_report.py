"""The tables and the plot of an ablation: means, spreads, differences to the baseline, and all commands."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from svb.data.relevance import relevance_name
from svb.retrieve.measure.ablation_config import Ablation, Cell
from svb.retrieve.measure.ablation_plan import PlannedRun
from svb.retrieve.measure.paired import Difference, Interval, difference_texts, is_chance, paired_differences
from svb.retrieve.measure.query_ranks import RANKS_FILE, Queries, Ranks, read_ranks, require_same_queries
from svb.train.config import selection_note
from svb.train.epoch_log import read_cpu_seconds
from svb.train.retrieval_metrics import ranks_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLOTTED = "t2v/R@1"
VIDEOS_COLOUR, SEEDS_COLOUR = "#1f5fa8", "#c8641e"
COLUMNS = ("t2v/R@1", "t2v/R@5", "t2v/R@10", "t2v/MedR", "v2t/R@1", "v2t/R@10")
# These measures are shown for each relevance that the config file names.
GRADED_COLUMNS = ("t2v/nDCG@10 of others", "t2v/mAP@R of others", "t2v/R-Precision of others")


@dataclass(frozen=True)
class Row:
    """A cell's results over its finished runs.

    Attributes:
        cell: The cell.
        runs: The finished runs of the cell, by seed.
        metrics: A dict per run, see `svb.train.retrieval_metrics.summarise`.
        seconds: CPU-seconds of each run's training, if known.
        num_at_chance: Number of runs that are no better than guessing.
        differences: Differences to the baseline, over the seeds that both have finished; empty for the baseline.
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
        """Return the standard deviation over seeds; None for a single seed."""
        values = [metrics[metric] for metrics in self.metrics]
        return float(np.std(values, ddof=1)) if len(values) > 1 else None


@dataclass(frozen=True)
class AblationReport:
    """The result of an ablation.

    Attributes:
        ablation: The content of the config file.
        queries: The queries that every run answered.
        rows: One row per cell with a finished run, the baseline first if it has one.
        failed: Errors by the names of the runs.
        folder: The folder of the tables and the plot.
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


def gather_report(
    ablation: Ablation, queries: Queries, finished: Sequence[PlannedRun], failed: Mapping[str, str], folder: Path
) -> AblationReport:
    """Read the ranks of finished runs and compare every cell with the baseline.

    Raises:
        MismatchError: A run answered other queries.
    """
    ranks: dict[str, dict[int, Ranks]] = {}
    runs: dict[str, dict[int, PlannedRun]] = {}
    for run in finished:
        held = _only_relevances(read_ranks(run.folder / RANKS_FILE), ablation)
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
        seconds = [read_cpu_seconds(run.folder, run.config.epochs) for run in runs[cell.name].values()]
        rows.append(
            Row(
                cell,
                runs[cell.name],
                [{**ranks_metrics(held.t2v, held.v2t), **held.graded_means()} for held in own.values()],
                [value for value in seconds if value is not None],
                sum(map(is_chance, own.values())),
                differences,
            )
        )
    return AblationReport(ablation, queries, rows, dict(failed), folder)


def _only_relevances(ranks: Ranks, ablation: Ablation) -> Ranks:
    """Return ranks without the measures by relevances that the config file does not name."""
    names = {relevance_name(option) for option in ablation.relevance}
    return dataclasses.replace(
        ranks,
        graded={key: values for key, values in ranks.graded.items() if key.partition(" by ")[2] in names},
        relevances={name: key for name, key in ranks.relevances.items() if name in names},
    )


def _columns(report: AblationReport) -> list[str]:
    """Return the measures of the first table; of the graded ones those that every run has."""
    wanted = [
        f"{column} by {relevance_name(name)}" for name in report.ablation.relevance for column in GRADED_COLUMNS
    ]
    runs = [metrics for row in report.rows for metrics in row.metrics]
    return [*COLUMNS, *(name for name in wanted if all(name in metrics for metrics in runs))]


def markdown(report: AblationReport) -> str:
    """Return both tables, their meaning and the commands, as Markdown."""
    ablation, baseline = report.ablation, report.ablation.baseline.name
    columns = _columns(report)
    lines = [
        f"{len(report.queries.caption_ids)} captions of the {report.queries.split} split against "
        f"{len(report.queries.video_ids)} videos, {ablation.checkpoint} checkpoint. Mean ± standard deviation over "
        "seeds; recalls in percent; the cost is the CPU-seconds of one training.",
        "",
        _line(["cell", "seeds", *(name.replace("/", " ") for name in columns), "CPU-seconds"]),
        _rule(len(columns) + 3),
    ]
    for row in report.rows:
        spread = [_mean_and_deviation(row, metric) for metric in columns]
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
        "Over videos: would other videos show the difference? Over seeds: would other trainings? See "
        "docs/experiments.md.",
    ]
    num_compared = sum(bool(row.differences) for row in report.rows)
    if num_compared > 1:
        lines.append(
            f"{num_compared} cells are compared: even if none differs, one comparison in 20 has a p below 0.05."
        )
    lines += ["", "These commands make and measure each run:", ""]
    lines += [f"- `{run.command}`" for row in report.rows for run in row.runs.values()]
    return "\n".join(lines) + "\n"


def cells_csv(report: AblationReport) -> str:
    """Return one line per cell."""
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


def runs_csv(report: AblationReport) -> str:
    """Return one line per run, with the commands that make it."""
    table = []
    for row in report.rows:
        for metrics, (seed, run) in zip(row.metrics, row.runs.items(), strict=True):
            seconds = read_cpu_seconds(run.folder, run.config.epochs)
            line = {"cell": row.cell.name, "seed": seed, **metrics, "cpu_seconds": seconds}
            table.append({**line, "command": run.command})
    return _csv(table)


def as_json(report: AblationReport) -> dict[str, Any]:
    """Return everything for machines."""
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
                "commands": [run.command for run in row.runs.values()],
                "runs_at_chance": row.num_at_chance,
                "metrics": {name: {"mean": row.mean(name), "sd": row.deviation(name)} for name in row.metrics[0]},
                "cpu_seconds": float(np.mean(row.seconds)) if row.seconds else None,
                "differences": [dataclasses.asdict(difference) for difference in row.differences],
            }
            for row in report.rows
        ],
        "failed": report.failed,
    }


def draw(report: AblationReport, path: Path) -> None:
    """Write a PNG of every cell's t2v R@1 and its difference to the baseline."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [row.cell.name + "†" * bool(row.num_at_chance) for row in report.rows]
    figure = Figure(figsize=(11, 1.6 + 0.45 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    values, differences = figure.subplots(1, 2, sharey=True)
    _draw_values(values, report)
    _draw_differences(differences, report)
    values.set_yticks(range(len(names)), names)
    values.set_ylim(len(names) - 0.5, -0.5)
    for axes in (values, differences):
        axes.grid(axis="x", alpha=0.3)
        axes.tick_params(axis="y", length=0)
    figure.savefig(path, dpi=150, format="png")


def _draw_values(axes: Axes, report: AblationReport) -> None:
    for y, row in enumerate(report.rows):
        seeds = [metrics[PLOTTED] for metrics in row.metrics]
        axes.plot(seeds, [y] * len(seeds), "o", color="0.6", markersize=4)
        axes.errorbar(row.mean(PLOTTED), y, xerr=row.deviation(PLOTTED) or 0.0, fmt="ks", capsize=4, markersize=5)
    axes.set_xlabel(f"{PLOTTED.replace('/', ' ')} in percent: runs, mean, ± standard deviation")


def _draw_differences(axes: Axes, report: AblationReport) -> None:
    axes.axvline(0.0, color="0.4", linewidth=1)
    colours = {"over videos": VIDEOS_COLOUR, "over seeds": SEEDS_COLOUR}
    for y, row in enumerate(report.rows):
        for difference in row.differences:
            if difference.metric != PLOTTED:
                continue
            intervals = (difference.over_videos, -0.1, "over videos"), (difference.over_seeds, 0.1, "over seeds")
            for interval, shift, kind in intervals:
                if interval is not None:
                    axes.plot([interval.low, interval.high], [y + shift] * 2, color=colours[kind], linewidth=2.5)
            axes.plot(difference.difference, y, "ks", markersize=5)
    for label, colour in colours.items():
        axes.plot([], [], color=colour, linewidth=2.5, label=f"95 % {label}")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.0 + 0.4 / len(report.rows)), ncols=2, frameon=False)
    axes.set_xlabel(f"difference to {report.ablation.baseline.name}, percentage points")


def _notes(report: AblationReport) -> list[str]:
    lines = []
    for row in report.rows:
        if row.num_at_chance:
            lines.append(
                f"† {row.num_at_chance} of {len(row.runs)} runs of {_cell_text(row.cell.name)} cannot be told from "
                "guessing: they collapsed or learned nothing."
            )
    lines += [f"{_cell_text(name)} FAILED: {_cell_text(error)}" for name, error in report.failed.items()]
    selected_on = {row.cell.config.select_on for row in report.rows}
    if report.ablation.checkpoint == "best" and report.queries.split in selected_on:
        lines.append("This very split chose the best checkpoint, so the numbers are too good.")
    lines += [note for split in sorted(selected_on) if (note := selection_note(split))]
    return [part for line in lines for part in (line, "")]


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
