"""`svb import`."""

from __future__ import annotations

from pathlib import Path

import click

from svb.cli.output import Meter
from svb.config import default_path


@click.command("import")
@click.argument("source", type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Feature store to write. [default: ./features]")
@click.option("--backbone", required=True, help="Name of the network that made the features.")
@click.option(
    "--format",
    "layout",
    type=click.Choice(["npy", "video-features", "npz", "h5-per-video", "h5-groups", "parquet", "torch"]),
    help="Layout of SOURCE. [default: told from SOURCE]",
)
@click.option(
    "--array", help="Array that holds the features, if a video has several. [default: features, or the only one]"
)
@click.option("--fps", type=float, help="Rows a second, if SOURCE holds no times. [default: 1]")
def import_(
    source: Path, out: Path | None, backbone: str, layout: str | None, array: str | None, fps: float | None
) -> None:
    """Make a feature store of features that another tool made.

    SOURCE is a folder with one .npy or .npz file per video, or one HDF5, Parquet or PyTorch file. Run the command
    again to add what is new. Such a store must be trained on before it can be searched.

    \b
    svb import s3d/ -o features/ --backbone s3d:howto100m --fps 1.5
    """
    from svb.data.importing.import_features import import_features

    meter = Meter("videos")
    try:
        stored = import_features(
            source,
            out or default_path("SVB_FEATURES", "features"),
            backbone=backbone,
            layout=layout,
            array=array,
            fps=fps,
            on_progress=meter.update,
        )
    finally:
        meter.close()
    click.echo(stored)
