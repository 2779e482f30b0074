"""`svb index`."""

from __future__ import annotations

import re
from pathlib import Path

import click

from svb.cli.output import Meter, say
from svb.config import default_path, newest_run
from svb.errors import UsageError

DEFAULT_WATCH_SECONDS = 10.0


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
@click.option("--moment-seconds", type=float, help="Length of a moment. [default: the index's own, or 4]")
@click.option("--moment-stride-seconds", type=float, help="From one moment to the next. [default: half a moment]")
@click.option(
    "--pool",
    "pools",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Captions of your own that answer a video or an image: a line each, subtitles, or a table with `caption`. "
    "Repeat it for several. [default: those of the run before]",
)
@click.option("--no-pools", is_flag=True, help="Take the pools of --pool out again.")
@click.option(
    "--sidecars/--no-sidecars",
    default=None,
    help="Whether .srt, .vtt and .txt files beside the videos are a pool of captions. [default: as before, or yes]",
)
@click.option(
    "--metadata",
    type=click.Path(path_type=Path),
    help="A table with `video_id` and columns to filter by. [default: that of the run before]",
)
@click.option("--no-metadata", is_flag=True, help="Take the columns of --metadata out again.")
@click.option(
    "--text-precision",
    type=click.Choice(["auto", "float32", "int8"]),
    help="Of the text tower; auto takes int8 where it ranks val as well. [default: as before, or auto]",
)
@click.option(
    "--latency-budget",
    metavar="TIME",
    help="What the scan for a query may take, such as 100ms or 0.1s, before an approximate index is made. "
    "[default: as before, or 100ms]",
)
@click.option(
    "--to",
    metavar="URI",
    help="milvus://HOST:PORT/COLLECTION, a server that holds the vectors too and searches them; local does without "
    "again. [default: as before, or local]",
)
@click.option("--prune", is_flag=True, help="Take videos out that the store does not have any more.")
@click.option("--rebuild", is_flag=True, help="Make all of it again; the index is replaced at the end.")
@click.option(
    "--watch",
    is_flag=True,
    help="Then wait for changes of the store or the sidecars, and go on, until told to stop.",
)
@click.option("--watch-seconds", type=float, help="How long between two looks, with --watch. [default: 10]")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda:0, ...")
def index(
    source: Path | None,
    out: Path | None,
    store: Path | None,
    captions: Path | None,
    backbone: str | None,
    text_encoder: str | None,
    checkpoint: str | None,
    moment_seconds: float | None,
    moment_stride_seconds: float | None,
    pools: tuple[Path, ...],
    no_pools: bool,
    sidecars: bool | None,
    metadata: Path | None,
    no_metadata: bool,
    text_precision: str | None,
    latency_budget: str | None,
    to: str | None,
    prune: bool,
    rebuild: bool,
    watch: bool,
    watch_seconds: float | None,
    device: str,
) -> None:
    """Embed every video and moment of SOURCE for searching.

    SOURCE is a run [default: the newest in ./runs], or a feature store, which is searched zero-shot. Run it again
    to bring the index to where the store is: what it has already is not embedded again. Videos that have gone from
    the store stay until --prune. Another model or other moments need another folder, or --rebuild.

    \b
    svb index runs/cross -o index/
    svb index features/ -o index/ --watch
    svb index runs/cross -o index/ --pool titles.csv --metadata table.csv --prune
    """
    from svb.retrieve.index import index as build

    if no_pools and pools:
        raise UsageError("got --pool and --no-pools - give one of them")
    if no_metadata and metadata:
        raise UsageError("got --metadata and --no-metadata - give one of them")
    if watch_seconds is not None and not watch:
        raise UsageError(f"got --watch-seconds {watch_seconds:g} without --watch - give both, or neither")
    if watch and watch_seconds is None:
        watch_seconds = DEFAULT_WATCH_SECONDS
    source, out = source or newest_run(), out or default_path("SVB_INDEX", "index")
    budget_seconds = None if latency_budget is None else _seconds(latency_budget)
    say(f"indexing {source} into {out}")
    meter = Meter("videos")
    try:
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
            pools=() if no_pools else pools or None,
            sidecars=sidecars,
            metadata=False if no_metadata else metadata,
            text_precision=text_precision,
            latency_budget_seconds=budget_seconds,
            to=to,
            prune=prune,
            rebuild=rebuild,
            watch_seconds=watch_seconds,
            device=device,
            on_progress=meter.update,
        )
    finally:
        meter.close()
    click.echo(out)


def _seconds(text: str) -> float:
    found = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*(ms|s)", text.strip().lower())
    if found is None:
        raise UsageError(f"--latency-budget got {text!r} - expected a time with its unit, such as 100ms or 0.1s")
    seconds = float(found[1]) / (1000 if found[2] == "ms" else 1)
    if not seconds:
        raise UsageError(f"--latency-budget got {text!r} - expected more than nothing")
    return seconds
