"""Caption pools: captions that answer an image or a video.

A pool's files lie in `captions/<key>/` of an index, for C captions:

caption, video_id          columns of C strings, see `StringColumn`; the video_id is empty if not known
seconds.npy                (C, 2) float64, when each is said, half-open; NaN if not known
caption_embeddings.npy     (C, D) float16, L2-normalised before rounding

and in the pool of S sidecars, one after the other:

sidecar_path               column of S strings
sidecar_state.npy          (S, 2) int64, size in bytes and mtime_ns of each when it was read
sidecar_offsets.npy        (S + 1,) int64, sidecar s holds captions offsets[s]:offsets[s + 1]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svb.errors import StoreError
from svb.retrieve.stored.manifest import part_folder, publish_part
from svb.retrieve.stored.segment import StringColumn, open_array, require_sizes

KINDS = ("training", "file", "sidecar")


@dataclass(frozen=True)
class SidecarRows:
    """Which captions of a pool come from which sidecar; see the layout above."""

    paths: StringColumn
    state: NDArray[np.int64]
    offsets: NDArray[np.int64]


@dataclass(frozen=True)
class Pool:
    """Captions and their embeddings, in memory or mapped from their files; see the layout above.

    Attributes:
        name: The name that answers show.
        kind: One of `KINDS`.
        source: Hash of what it was made from; pools of equal kind, source and model are equal.
        sidecars: Which captions come from which sidecar; only in a pool of sidecars.
    """

    name: str
    kind: str
    source: str
    captions: StringColumn
    video_ids: StringColumn
    seconds: NDArray[np.float64]
    embeddings: NDArray[np.float16]
    sidecars: SidecarRows | None = None

    def __len__(self) -> int:
        return len(self.captions)


def publish_pool(out: Path, pool: Pool) -> dict[str, Any]:
    """Write a pool's files into an index and return its entry for the manifest, under `captions`.

    Raises:
        StoreError: An embedding is not finite.
    """
    bad = np.flatnonzero(~np.isfinite(pool.embeddings).all(axis=1))
    if bad.size:
        raise StoreError(
            f"caption {pool.captions[int(bad[0])]!r} of {pool.name} has an embedding that is not finite, "
            "which no search could rank - remove the caption, or train the run again"
        )
    entry = publish_part(out, "captions", lambda folder: _write(folder, pool))
    return {**entry, "name": pool.name, "kind": pool.kind, "source": pool.source, "captions": len(pool)}


def open_pool(folder: Path, entry: Mapping[str, Any]) -> Pool:
    """Map a pool's files; no vector is read.

    Args:
        folder: The index's.
        entry: The pool's in the manifest.

    Raises:
        StoreError: A file is missing, or is not what was written as far as its size and header tell.
    """
    path = part_folder(folder, "captions", entry)
    try:
        require_sizes(path, entry["sizes"])
        pool = Pool(
            entry["name"],
            entry["kind"],
            entry["source"],
            StringColumn.open(path, "caption"),
            StringColumn.open(path, "video_id"),
            open_array(path / "seconds.npy"),
            open_array(path / "caption_embeddings.npy"),
            _open_sidecars(path) if entry["kind"] == "sidecar" else None,
        )
        _require_fitting(pool, int(entry["captions"]))
    except (OSError, ValueError, EOFError) as error:
        raise StoreError(
            f"{path} is damaged ({error}) - restore it, or make the index again with `svb index --rebuild`"
        ) from error
    return pool


def _write(folder: Path, pool: Pool) -> None:
    pool.captions.write(folder, "caption")
    pool.video_ids.write(folder, "video_id")
    np.save(folder / "seconds.npy", np.asarray(pool.seconds, np.float64))
    np.save(folder / "caption_embeddings.npy", np.asarray(pool.embeddings, np.float16))
    if pool.sidecars is not None:
        pool.sidecars.paths.write(folder, "sidecar_path")
        np.save(folder / "sidecar_state.npy", pool.sidecars.state)
        np.save(folder / "sidecar_offsets.npy", pool.sidecars.offsets)


def _open_sidecars(path: Path) -> SidecarRows:
    arrays = (np.load(path / f"sidecar_{name}.npy", allow_pickle=False) for name in ("state", "offsets"))
    return SidecarRows(StringColumn.open(path, "sidecar_path"), *arrays)


def _require_fitting(pool: Pool, num_captions: int) -> None:
    lengths = {len(pool.captions), len(pool.video_ids), len(pool.embeddings), len(pool.seconds)}
    if lengths != {num_captions} or pool.seconds.shape[1:] != (2,):
        raise ValueError(f"files of {sorted(lengths)} captions, expected {num_captions}")
    if pool.embeddings.ndim != 2 or pool.embeddings.dtype != np.float16:
        raise ValueError(f"embeddings of {pool.embeddings.shape} {pool.embeddings.dtype}")
    held = pool.sidecars
    if held is not None:
        fits = held.state.shape == (len(held.paths), 2) and held.offsets.shape == (len(held.paths) + 1,)
        if (
            not fits
            or held.offsets[0] != 0
            or held.offsets[-1] != num_captions
            or (np.diff(held.offsets) < 0).any()
        ):
            raise ValueError("its sidecars do not cover its captions")
