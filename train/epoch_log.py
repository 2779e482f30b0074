"""What a run records of every epoch: its metrics, its curves and its cost.

metrics.jsonl       one line per epoch
tensorboard/        the same, for TensorBoard while it runs
curves.png          the same, drawn when the training ends
cpu_seconds.jsonl   what each epoch cost; an epoch that is trained again gets a newer line, which counts
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path

from svb.data.publish import published_file

METRICS, CPU_SECONDS = "metrics.jsonl", "cpu_seconds.jsonl"
# One panel per line: its title, and the metrics of an epoch that it shows.
PANELS = {
    "losses": ("loss", "contrastive", "cross_captioning"),
    "t2v, %": ("val/t2v/R@1", "val/t2v/R@5", "val/t2v/R@10", "test/t2v/R@1", "test/t2v/R@5", "test/t2v/R@10"),
    "v2t, %": ("val/v2t/R@1", "val/v2t/R@5", "val/v2t/R@10", "test/v2t/R@1", "test/v2t/R@5", "test/v2t/R@10"),
    "logit_scale": ("logit_scale",),
    "entropy of the support weights, nats": ("support_entropy",),
    "norm of the gradient": ("gradient_norm",),
}


def add_metrics(run: Path, metrics: Mapping[str, float]) -> None:
    """Add an epoch's line to a run's metrics.jsonl."""
    _append(run / METRICS, metrics)


def drop_metrics_after(run: Path, epoch: int) -> None:
    """Keep only the lines of a run's metrics.jsonl up to an epoch: those after it are written again."""
    path = run / METRICS
    if not path.exists():
        return
    kept = []
    for line in path.read_text("utf-8").splitlines():
        try:
            if json.loads(line)["epoch"] <= epoch:
                kept.append(line + "\n")
        except ValueError:  # a kill cut this line short
            continue
    with published_file(path) as aside:
        aside.write_text("".join(kept), "utf-8")


class TensorBoard:
    """Writes every epoch's metrics as scalars under `tensorboard/` in the run.

    Args:
        epoch: The number of finished epochs; what a killed training wrote after them is hidden.
    """

    def __init__(self, run: Path, epoch: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=epoch + 1)

    def add(self, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            if name != "epoch":
                self._writer.add_scalar(name, value, int(metrics["epoch"]))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def draw_curves(run: Path) -> Path:
    """Draw a run's metrics.jsonl and return its `curves.png`; before the end of the first epoch, draw nothing."""
    path = run / "curves.png"
    if not (run / METRICS).exists():
        return path
    lines = [json.loads(line) for line in (run / METRICS).read_text("utf-8").splitlines()]
    if not lines:
        return path
    # Matplotlib's object interface touches no global state and needs no screen.
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(12, 6.5), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(2, 3).flat, PANELS.items(), strict=True):
        for name in names:
            points = [(line["epoch"], line[name]) for line in lines if name in line]
            if points:
                axes.plot(*zip(*points, strict=True), marker=".", label=name)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("epoch", fontsize=8)
        axes.set_xlim(0.5, lines[-1]["epoch"] + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if len(axes.lines) > 1:
            axes.legend(fontsize=8)
    with published_file(path) as aside:
        figure.savefig(aside, dpi=100)
    return path


class EpochClock:
    """Appends the cost of every epoch.

    The first epoch's line includes what came before it, such as loading the features.
    """

    def __init__(self, run: Path) -> None:
        self._path = run / CPU_SECONDS
        self._cpu, self._wall = time.process_time(), time.monotonic()

    def stamp(self, epoch: int) -> None:
        """Write the line of an epoch that ends now."""
        cpu, wall = time.process_time(), time.monotonic()
        _append(self._path, {"epoch": epoch, "cpu_seconds": cpu - self._cpu, "wall_seconds": wall - self._wall})
        self._cpu, self._wall = cpu, wall


def read_cpu_seconds(run: Path, epochs: int) -> float | None:
    """Return the CPU-seconds that a run's epochs took, all threads together; None if an epoch is unknown."""
    seconds: dict[int, float] = {}
    path = run / CPU_SECONDS
    for line in path.read_text("utf-8").splitlines() if path.is_file() else []:
        try:
            held = json.loads(line)
            seconds[int(held["epoch"])] = float(held["cpu_seconds"])
        except (ValueError, KeyError, TypeError):  # a kill cut this line short
            continue
    if not set(range(1, epochs + 1)) <= set(seconds):
        return None
    return sum(seconds[epoch] for epoch in range(1, epochs + 1))


def _append(path: Path, line: Mapping[str, float]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
