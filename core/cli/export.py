"""`svb export`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("store", type=click.Path(path_type=Path))
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="The file or folder to make.")
@click.option(
    "--format",
    "layout",
    default="h5",
    type=click.Choice(["h5", "h5-per-video", "npz", "parquet"]),
    show_default=True,
    help="h5: svb's own layout in one file. h5-per-video: a dataset a video. npz: a folder of one file a video. "
    "parquet: a row a feature row.",
)
@click.option("--backbone", help="Of a store that holds several; a+b for fused ones. Not with h5, which holds all.")
def export(store: Path, out: Path, layout: str, backbone: str | None) -> None:
    """Write STORE as one HDF5 file that every command takes in the folder's place, or for other tools.

    \b
    svb export features/ -o features.h5
    svb export features/ -o features.parquet --format parquet
    """
    from svb.data.export import export as export_features
    from svb.data.feature_store import FeatureStore

    click.echo(export_features(FeatureStore(store), out, layout=layout, backbone=backbone))
