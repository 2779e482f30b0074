"""`svb export`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("store", type=click.Path(path_type=Path))
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="The HDF5 file to write.")
def export(store: Path, out: Path) -> None:
    """Write STORE as one HDF5 file of the same layout, which every command takes in the folder's place.

    \b
    svb export features/ -o features.h5
    """
    from svb.data.feature_store import FeatureStore
    from svb.data.feature_store_writer import export_store

    click.echo(export_store(FeatureStore(store), out))
