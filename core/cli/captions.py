"""`svb captions`."""

from __future__ import annotations

from pathlib import Path

import click

from svb.cli.output import Meter, say
from svb.config import default_path
from svb.data.caption_table import SPLITS
from svb.data.datasets import DATASETS
from svb.extract.text_encoders import DEFAULT_TEXT_ENCODER

_PROTOCOLS = "; ".join(f"{name} {', '.join(dataset.protocols)}" for name, dataset in DATASETS.items())


@click.command()
@click.argument("table", type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), help="File to write. [default: ./captions.h5]")
@click.option(
    "--text-encoder", help=f"Network to run, as family:model[/weights]. [default: {DEFAULT_TEXT_ENCODER}]"
)
@click.option("--device", default="auto", show_default=True, help="Where to run it: auto, cpu, cuda:0, ...")
@click.option("--drop-empty", is_flag=True, help="Skip rows with an empty caption instead of refusing the table.")
@click.option(
    "--dataset",
    type=click.Choice(list(DATASETS)),
    help="Read this data set; TABLE is the folder of its annotation files.",
)
@click.option("--protocol", help=f"How to divide the data set: {_PROTOCOLS}. [default: its first]")
@click.option(
    "--split",
    "splits",
    multiple=True,
    type=click.Choice(SPLITS),
    help="Split of the data set to encode. Repeatable. [default: all of the protocol]",
)
@click.option(
    "--store",
    type=click.Path(path_type=Path),
    help="Feature store whose names for the videos of the data set to use.",
)
def captions(
    table: Path,
    out: Path | None,
    text_encoder: str | None,
    device: str,
    drop_empty: bool,
    dataset: str | None,
    protocol: str | None,
    splits: tuple[str, ...],
    store: Path | None,
) -> None:
    """Encode the captions of TABLE with a frozen text encoder.

    TABLE is a CSV, TSV, JSON or Parquet file with the columns video_id, caption and optionally caption_id, split
    and group, which names videos that mean the same. With --dataset it is the folder of a data set's official
    annotation files, which docs/datasets.md lists.

    \b
    svb captions captions.csv -o captions.h5 --text-encoder offline:minilm-l6
    svb captions annotations/ --dataset msrvtt --protocol 1k-A -o captions.h5
    """
    from svb.extract import captions as stage

    out, chosen = out or default_path("SVB_CAPTIONS", "captions.h5"), text_encoder or DEFAULT_TEXT_ENCODER
    say(f"encoding {table} into {out} with {chosen}")
    meter = Meter("captions")
    try:
        stage.captions(
            table,
            out,
            text_encoder=chosen,
            device=device,
            drop_empty=drop_empty,
            dataset=dataset,
            protocol=protocol,
            splits=splits,
            store=store,
            on_progress=meter.update,
        )
    finally:
        meter.close()
    click.echo(out)
