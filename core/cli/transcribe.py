"""`svb transcribe`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from svb.cli.options import config_options
from svb.cli.output import Meter, say
from svb.config import default_path
from svb.retrieve.transcribe import TranscribeConfig


@click.command()
@click.argument("sources", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), help="Folder of transcripts. [default: ./transcripts]"
)
@config_options(TranscribeConfig)
def transcribe(sources: tuple[Path, ...], out: Path | None, **options: Any) -> None:
    """Write what is said in the videos of SOURCES as subtitles.

    SOURCES is a feature store, or folders, files or lists of videos. Each video gets one .vtt file in the folder
    of transcripts, never beside the video. Run the same command again to go on after an interrupt. Needs the extra
    `speech`.

    \b
    svb transcribe features/ -o transcripts/ --model small
    svb index features/ -o index/ --transcripts transcripts/
    """
    from svb.retrieve.transcribe import transcribe as write

    out = out or default_path("SVB_TRANSCRIPTS", "transcripts")
    say(f"writing transcripts into {out}")
    meter = Meter("videos")
    try:
        write(sources, out, TranscribeConfig(**options), on_progress=meter.update)
    finally:
        meter.close()
    click.echo(out)
