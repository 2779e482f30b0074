"""The plot of an ablation: every cell's t2v R@1, and its difference to the baseline with both intervals."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from svb.retrieve.measure.ablation_report import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

METRIC = "t2v/R@1"
VIDEOS_COLOUR, SEEDS_COLOUR = "#1f5fa8", "#c8641e"


def plot(report: Report, path: Path) -> None:
    """Write a PNG with a line a cell, the first on top."""
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


def _draw_values(axes: Axes, report: Report) -> None:
    for y, row in enumerate(report.rows):
        seeds = [metrics[METRIC] for metrics in row.metrics]
        axes.plot(seeds, [y] * len(seeds), "o", color="0.6", markersize=4)
        axes.errorbar(row.mean(METRIC), y, xerr=row.deviation(METRIC) or 0.0, fmt="ks", capsize=4, markersize=5)
    axes.set_xlabel(f"{METRIC.replace('/', ' ')} in percent: runs, mean, ± standard deviation")


def _draw_differences(axes: Axes, report: Report) -> None:
    axes.axvline(0.0, color="0.4", linewidth=1)
    labels = {"over videos": VIDEOS_COLOUR, "over seeds": SEEDS_COLOUR}
    for y, row in enumerate(report.rows):
        for difference in row.differences:
            if difference.metric != METRIC:
                continue
            intervals = (difference.over_videos, -0.1, "over videos"), (difference.over_seeds, 0.1, "over seeds")
            for interval, shift, kind in intervals:
                if interval is not None:
                    axes.plot([interval.low, interval.high], [y + shift] * 2, color=labels[kind], linewidth=2.5)
            axes.plot(difference.difference, y, "ks", markersize=5)
    for label, colour in labels.items():
        axes.plot([], [], color=colour, linewidth=2.5, label=f"95 % {label}")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.0 + 0.4 / len(report.rows)), ncols=2, frameon=False)
    axes.set_xlabel(f"difference to {report.ablation.baseline.name}, percentage points")
