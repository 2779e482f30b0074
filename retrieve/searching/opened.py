"""One generation of an index, opened for searching."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from svb.errors import StoreError
from svb.retrieve.model.query_embedder import QueryEmbedder
from svb.retrieve.searching.catalog import Catalog
from svb.retrieve.searching.ivf import open_ivf
from svb.retrieve.searching.vectors import CaptionPools, SegmentVectors, Vectors
from svb.retrieve.stored.metadata import Metadata
from svb.retrieve.stored.segment import open_segments


@dataclass(frozen=True)
class OpenedIndex:
    """One generation of an index: everything a search reads, mapped.

    Attributes:
        manifest: The manifest of this generation.
        vectors: All rows, or an approximate index over them.
        exact_vectors: All rows; equal to `vectors` if the embeddings do not lie here.
        note: What the user should know about the search; None if nothing.
    """

    manifest: dict[str, Any]
    vectors: Vectors
    exact_vectors: Vectors
    note: str | None
    pools: CaptionPools
    metadata: Metadata
    embedder: QueryEmbedder

    @property
    def catalog(self) -> Catalog:
        """Return what the index knows of its videos."""
        return self.vectors.catalog


class ServerVectors(Vectors, Protocol):
    """`Vectors` that a server searches; `num_missing` counts the videos that it lacks."""

    @property
    def num_missing(self) -> int: ...


def open_index(
    folder: Path,
    manifest: dict[str, Any],
    device: str,
    previous: QueryEmbedder | None = None,
    *,
    open_server: Callable[[Path, dict[str, Any]], ServerVectors],
) -> OpenedIndex:
    """Map what a manifest names; no vector is read.

    Args:
        folder: The index's.
        manifest: The manifest of a generation.
        device: Device that embeds images and videos.
        previous: Embedder of another generation on the same device; kept if the model is the same.
        open_server: Opens the vectors of an index whose manifest says that a server searches them.

    Raises:
        StoreError: A file is missing or damaged.
    """
    exact: Vectors
    approximate: Vectors | None = None
    note: str | None = None
    if manifest["vectors"] is not None:
        exact = remote = open_server(folder, manifest)
        if remote.num_missing:
            note = f"{remote.num_missing} videos are not on the server yet: `svb index` has not finished"
        if not remote.exact:
            approximate = remote
            with contextlib.suppress(StoreError):  # the embeddings may not be here
                exact = SegmentVectors(open_segments(folder, manifest))
    else:
        segments = open_segments(folder, manifest)
        exact = SegmentVectors(segments)
        approximate, note = open_ivf(folder, exact, segments)
    return OpenedIndex(
        manifest,
        approximate or exact,
        exact,
        note,
        CaptionPools(folder, manifest),
        Metadata.open(folder, manifest),
        previous if previous is not None and previous.fits(manifest) else QueryEmbedder(folder, manifest, device),
    )
