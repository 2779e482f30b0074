"""`svb serve`."""

from __future__ import annotations

import re
from pathlib import Path

import click

from svb.config import default_path
from svb.errors import UsageError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}


@click.command()
@click.option("--index", "index_path", type=click.Path(path_type=Path), help="The index. [default: ./index]")
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Another than this machine's own needs a token."
)
@click.option("--port", default=8765, show_default=True, help="0 takes a free one.")
@click.option(
    "--token-file",
    type=click.Path(path_type=Path),
    help="What clients must show. [default: SVB_TOKEN; made up and printed for another --host]",
)
@click.option("--max-upload", default="200MB", show_default=True, help="Of an image or a video to search with.")
@click.option("--max-upload-seconds", default=3600.0, show_default=True, help="Of such a video.")
@click.option("--max-searches", default=512, show_default=True, help="How many may run or wait at once.")
@click.option("--device", default="auto", show_default=True, help="Where images and videos are embedded.")
def serve(
    index_path: Path | None,
    host: str,
    port: int,
    token_file: Path | None,
    max_upload: str,
    max_upload_seconds: float,
    max_searches: int,
    device: str,
) -> None:
    """Serve the page and the HTTP API of an index; `svb search` then uses it too.

    \b
    svb serve
    svb serve --index index/ --port 9000
    svb serve --host 0.0.0.0 --token-file token.txt
    """
    import logging

    max_upload_bytes = _num_bytes(max_upload)
    from svb.retrieve.server.options import ServeOptions
    from svb.retrieve.server.serve import serve as run

    # uvicorn's lines about its own start say nothing that ours do not.
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("svb.server").parent = logging.getLogger()  # what happens while it runs has a time
    options = ServeOptions(
        host=host,
        port=port,
        token_file=token_file,
        device=device,
        max_upload_bytes=max_upload_bytes,
        max_upload_seconds=max_upload_seconds,
        max_searches=max_searches,
    )
    run(index_path or default_path("SVB_INDEX", "index"), options)


def _num_bytes(text: str) -> int:
    match = re.fullmatch(r"(\d{1,15}(?:\.\d+)?)\s*([kmg]?)b?", text.strip().lower())
    if match is None:
        raise UsageError(f"--max-upload is {text!r} - expected a size such as 200MB")
    return int(float(match[1]) * _UNITS[match[2]])
