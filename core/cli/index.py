"""`svb index`."""

from __future__ import annotations

from pathlib import Path

import click

from svb.cli.output import say
from svb.config import default_path, newest_run


@click.command()
@click.argument("source", required=False, type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), help="The index. [default: ./index]")
@click.option("--store", type=click.Path(path_type=Path), help="Feature store. [default: the run's own]")
@click.option(
    "--captions",
    type=click.Path(path_type=Path),
    help="Caption features: what a video query is answered with. [default: the run's own]",
)
@click.option("--backbone", help="Whose features, for a store that holds several.")
@click.option("--text-encoder", help="For a store: what queries are read with.")
@click.option("--checkpoint", type=click.Choice(["best", "last"]), help="Of a run. [default: best]")
@click.option("--moment-seconds", default=4.0, show_default=True, help="Length of a moment.")
@click.option("--moment-stride-seconds", type=float, help="From one moment to the next. [default: half a moment]")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda:0, ...")
def index(
    source: Path | None,
    out: Path | None,
    store: Path | None,
    captions: Path | None,
    backbone: str | None,
    text_encoder: str | None,
    checkpoint: str | None,
    moment_seconds: float,
    moment_stride_seconds: float | None,
    device: str,
) -> None:
    """Embed every video and moment of SOURCE for searching.

    SOURCE is a run [default: the newest in ./runs], or a feature store, which is searched zero-shot.

    \b
    svb index runs/cross -o index/
    svb index features/ -o index/
    """
    from svb.retrieve.index import index as build

    source, out = source or newest_run(), out or default_path("SVB_INDEX", "index")
    say(f"indexing {source} into {out}")
    build(
        source,
        out,
        store=store,
        captions=captions,
        backbone=backbone,
        text_encoder=text_encoder,
        checkpoint=checkpoint,
        moment_seconds=moment_seconds,
        moment_stride_seconds=moment_stride_seconds,
        device=device,
        on_message=say,
    )
    click.echo(out)
