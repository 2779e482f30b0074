"""`svb mcp`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from svb.cli.options import config_options
from svb.config import default_path
from svb.errors import InputError
from svb.retrieve.server.options import McpOptions


@click.command()
@click.option("--index", "index_path", type=click.Path(path_type=Path), help="Index to open.  [default: ./index]")
@config_options(McpOptions)
def mcp(index_path: Path | None, **options: Any) -> None:
    """Open an index to agents, by the Model Context Protocol.

    An agent can search, list videos, look at moments and read subtitles. It names videos by their ids, never by
    paths, and writes nothing but clips, into the folder named with --clips. Needs `pip install 'svb-video[mcp]'`.

    \b
    svb mcp --index index/
    svb mcp --index index/ --clips clips/ --queries pictures/
    svb mcp --index index/ --http --host 0.0.0.0 --token-file token.txt
    """
    chosen = McpOptions(**options)
    try:
        from svb.retrieve.mcp import mcp as run
    except ImportError as error:
        raise InputError(
            f"svb mcp needs the package mcp, 2.3 or later ({error}) - pip install 'svb-video[mcp]'"
        ) from error
    run(index_path or default_path("SVB_INDEX", "index"), chosen)
