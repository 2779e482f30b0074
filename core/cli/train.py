"""`svb train`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from svb.cli.options import config_options
from svb.cli.output import say
from svb.config import default_path
from svb.train.config import TrainConfig


@click.command()
@click.argument("store", required=False, type=click.Path(path_type=Path))
@click.argument("captions", required=False, type=click.Path(path_type=Path))
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), help="Folder for the run. [default: the next ./runs/NNN]"
)
@click.option("--backbone", help="Backbone to train on, if the store holds several; A+B fuses A and B.")
@click.option("--device", default="auto", show_default=True, help="Device to train on: auto, cpu, cuda:0, ...")
@config_options(TrainConfig)
def train(
    store: Path | None, captions: Path | None, out: Path | None, backbone: str | None, device: str, **options: Any
) -> None:
    """Train heads on the features in STORE and CAPTIONS.

    STORE is a feature store [default: ./features], CAPTIONS a caption features file [default: ./captions.h5].
    To continue where it stopped, repeat the command with the same options and -o.

    \b
    svb train features/ captions.h5 -o runs/cross
    """
    from svb.train import run

    # Only one of the processes that torchrun starts writes messages.
    is_first = os.environ.get("RANK", "0") == "0"
    store = store or default_path("SVB_FEATURES", "features")
    captions = captions or default_path("SVB_CAPTIONS", "captions.h5")
    chosen, out = out is None, out or _next_run()
    if is_first and chosen:
        say(f"to continue this run after an interruption, repeat the same options with -o {out}")
    if is_first:
        say(f"training {out} on {store} and {captions}")

    def show(metrics: dict[str, float]) -> None:
        line = f"epoch {metrics['epoch']:>3}  loss {metrics['loss']:.3f}"
        split = options["select_on"]
        if f"{split}/t2v/R@1" in metrics:
            line += f"  {split} " + "  ".join(
                f"{k} {metrics[f'{split}/{k}']:.1f}" for k in ("t2v/R@1", "t2v/R@10", "v2t/R@1")
            )
        say(line)

    run.train(store, captions, out, TrainConfig(**options), backbone=backbone, device=device, on_epoch=show)
    if is_first:
        click.echo(out)


def _next_run() -> Path:
    taken = [int(path.name) for path in Path("runs").glob("*") if path.name.isdigit()]
    return Path("runs") / f"{max(taken, default=0) + 1:03}"
