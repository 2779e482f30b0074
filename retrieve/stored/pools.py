"""Caption pools: what an image or a video is answered with.

A pool's files lie in `captions/<key>/` of an index, for C captions:

caption, video_id          columns of C strings, see `columns`; the video_id is empty where not known
seconds.npy                (C, 2) float64, when it is said, half-open; NaN where not known
caption_embeddings.npy     (C, D) float16, L2-normalised before rounding

and in a pool of sidecars, S of them one after the other:

sidecar_path               column of S strings
sidecar_state.npy          (S, 2) int64, size in bytes and mtime_ns of each when it was read
sidecar_offsets.npy        (S + 1,) int64, sidecar s holds captions offsets[s]:offsets[s + 1]
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svb.errors import StoreError
from svb.retrieve.answer import CaptionResult
from svb.retrieve.stored.columns import StringColumn, open_array
from svb.retrieve.stored.manifest import part_folder, publish_part
from svb.retrieve.stored.scan import Piece, cut_into_pieces, scan
from svb.retrieve.stored.segment import require_sizes

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
        name: What it is called in answers.
        kind: One of `KINDS`.
        source: A hash of what it was made of; another pool of the same kind, source and model is the same.
        sidecars: Of a pool of sidecars.
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

    def result(self, row: int, rank: int, score: float) -> CaptionResult:
        """Return a caption as it is answered with."""
        begin, end = (None if np.isnan(edge) else float(edge) for edge in self.seconds[row])
        return CaptionResult(rank, score, self.captions[row], self.name, self.video_ids[row], begin, end)


def publish_pool(out: Path, pool: Pool) -> dict[str, Any]:
    """Write a pool's files into an index and return its entry for the manifest, under `captions`.

    Raises:
        StoreError: An embedding is not finite.
    """
    bad = np.flatnonzero(~np.isfinite(pool.embeddings).all(axis=1))
    if bad.size:
        raise StoreError(
            f"caption {pool.captions[int(bad[0])]!r} of {pool.name} has an embedding that is not finite - no "
            "search could rank it: leave it out, or look into the run that was trained"
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


class CaptionPools:
    """All pools of an index; opened with the first question. Threads may share it.

    Args:
        folder: The index's.
        manifest: As `svb.retrieve.stored.manifest.read_manifest` gives it.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self._folder = folder
        self._entries: Sequence[Mapping[str, Any]] = manifest["captions"]
        self._lock = threading.Lock()
        self._opened: list[tuple[Pool, list[Piece]]] | None = None

    def __len__(self) -> int:
        """Return the number of captions."""
        return sum(int(entry["captions"]) for entry in self._entries)

    def nearest(self, embedding: NDArray[np.float32], k: int) -> list[CaptionResult]:
        """Return the k captions with the highest cosine similarity, best first; fewer where there are fewer.

        Captions of the same words, whatever their case and spaces, come once.

        Args:
            embedding: `(D,)`, L2-normalised.
            k: How many.

        Raises:
            StoreError: A pool is damaged.
        """
        opened, wanted = self._open(), k
        pieces = [piece for _, of_pool in opened for piece in of_pool]
        while k > 0 and pieces:
            scores, rows = scan(pieces, embedding, wanted, None)
            distinct: dict[str, CaptionResult] = {}
            for score, row in zip(scores.tolist(), rows.tolist(), strict=True):
                pool, begin = _pool_of(opened, row)
                caption = " ".join(pool.captions[row - begin].casefold().split())
                if caption not in distinct:
                    distinct[caption] = pool.result(row - begin, len(distinct) + 1, score)
            if len(distinct) >= k or len(rows) < wanted:
                return list(distinct.values())[:k]
            wanted *= 4  # most of them said the same
        return []

    def _open(self) -> list[tuple[Pool, list[Piece]]]:
        with self._lock:
            if self._opened is None:
                pools = [open_pool(self._folder, entry) for entry in self._entries]
                begins = np.cumsum([0, *map(len, pools)]).tolist()
                pieces = [
                    cut_into_pieces(pool.embeddings, begin) for pool, begin in zip(pools, begins, strict=False)
                ]
                self._opened = list(zip(pools, pieces, strict=True))
            return self._opened


def _pool_of(opened: Sequence[tuple[Pool, list[Piece]]], row: int) -> tuple[Pool, int]:
    """Return the pool that a row lies in, and the row that is its first."""
    return next(
        (pool, of_pool[0].begin) for pool, of_pool in reversed(opened) if of_pool and of_pool[0].begin <= row
    )


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
        raise ValueError(f"files of {sorted(lengths)} captions, not of {num_captions}")
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
            raise ValueError("its sidecars do not lead through its captions")
