"""`svb export`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("store", type=click.Path(path_type=Path))
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="File or folder to write.")
@click.option(
    "--format",
    "layout",
    default="h5",
    type=click.Choice(["h5", "h5-per-video", "npz", "parquet"]),
    show_default=True,
    help="Layout to write. h5: svb's own, in one file. h5-per-video: one dataset per video. npz: a folder with one "
    "file per video. parquet: one row per feature row.",
)
@click.option("--backbone", help="Backbone to write, e.g. a, or a+b fused. Not with h5, which holds all.")
def export(store: Path, out: Path, layout: str, backbone: str | None) -> None:
    """Write STORE as one HDF5 file, which every command takes like the folder, or for other tools.

    \b
    svb export features/ -o features.h5
    svb export features/ -o features.parquet --format parquet
    """
    from svb.data.export import export as export_features
    from svb.data.feature_store import FeatureStore

    click.echo(export_features(FeatureStore(store), out, layout=layout, backbone=backbone))
