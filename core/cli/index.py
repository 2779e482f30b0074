"""`svb index`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from svb.cli.options import config_options
from svb.cli.output import Meter, say
from svb.config import default_path, newest_run
from svb.retrieve.indexing.index_config import IndexConfig


@click.command()
@click.argument("source", required=False, type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Folder of the index. [default: ./index]")
@config_options(IndexConfig)
def index(source: Path | None, out: Path | None, **options: Any) -> None:
    """Embed every video and moment of SOURCE for searching.

    SOURCE is a run [default: the newest in ./runs], or a feature store, which is searched zero-shot. Run the same
    command again to update the index: videos that it already has are not embedded again. Videos that are no longer
    in the store stay until --prune. Another model or other moments need another folder, or --rebuild.

    \b
    svb index runs/cross -o index/
    svb index features/ -o index/ --watch
    svb index runs/cross -o index/ --pool titles.csv --metadata table.csv --prune
    """
    from svb.retrieve.index import index as build

    config = IndexConfig(**options)
    source, out = source or newest_run(), out or default_path("SVB_INDEX", "index")
    say(f"indexing {source} into {out}")
    meter = Meter("videos")
    try:
        build(source, out, config, on_progress=meter.update)
    finally:
        meter.close()
    click.echo(out)
