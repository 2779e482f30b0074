"""The curves of a training: in TensorBoard while it runs, and in the run's curves.png."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from svb.data.publish import published_file

# One panel per line: its title, and the metrics of an epoch that it shows.
PANELS = {
    "losses": ("loss", "contrastive", "cross_captioning"),
    "t2v, %": ("val/t2v/R@1", "val/t2v/R@5", "val/t2v/R@10", "test/t2v/R@1", "test/t2v/R@5", "test/t2v/R@10"),
    "v2t, %": ("val/v2t/R@1", "val/v2t/R@5", "val/v2t/R@10", "test/v2t/R@1", "test/v2t/R@5", "test/v2t/R@10"),
    "logit_scale": ("logit_scale",),
    "entropy of the support weights, nats": ("support_entropy",),
    "norm of the gradient": ("gradient_norm",),
}


class TensorBoard:
    """Writes every epoch's metrics as scalars under `tensorboard/` in the run.

    Args:
        run: The run's folder.
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
    if not (run / "metrics.jsonl").exists():
        return path
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
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
