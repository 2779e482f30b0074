"""`svb serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from svb.cli.options import config_options
from svb.config import default_path
from svb.retrieve.server.options import ServeOptions


@click.command()
@click.option("--index", "index_path", type=click.Path(path_type=Path), help="Index to serve.  [default: ./index]")
@config_options(ServeOptions)
def serve(index_path: Path | None, **options: Any) -> None:
    """Serve an index as a page and an HTTP API; `svb search` uses it too.

    \b
    svb serve
    svb serve --index index/ --port 9000
    svb serve --host 0.0.0.0 --token-file token.txt
    """
    import logging

    chosen = ServeOptions(**options)
    from svb.retrieve.serve import serve as run

    # uvicorn's own lines about its start repeat ours.
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    # Lines about what happens while it runs need a time.
    server_logger = logging.getLogger("svb.retrieve.server")
    parent, server_logger.parent = server_logger.parent, logging.getLogger()
    try:
        run(index_path or default_path("SVB_INDEX", "index"), chosen)
    finally:
        server_logger.parent = parent
