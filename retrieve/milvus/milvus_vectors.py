"""Searches through Milvus: vectors are on a server, all other data of videos and moments in the index's folder.

Rows of a collection that this generation of the index does not have are ignored, so a collection can be searched
while it is being filled. Segments that were committed but not sent yet are compared here.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svb.config import canonical_json
from svb.data.publish import published_file
from svb.errors import StoreError
from svb.retrieve.milvus.milvus_server import (
    MilvusServer,
    Target,
    connect,
    made_with,
    moment_ids,
    video_keys,
)
from svb.retrieve.searching.catalog import Catalog
from svb.retrieve.searching.vectors import Nearest, SegmentVectors, k_best
from svb.retrieve.stored.segment import open_segment, open_segments

# The most keys that a filter names: 200 kB of them.
MAX_KEYS = 10_000
# Rows to try first if a filter cannot name the videos that pass.
FIRST_ROWS = 16384


class MilvusVectors:
    """`Vectors` that a Milvus server searches; it connects with the first query. Threads may share it.

    Args:
        catalog: The index's videos and moments.
        keys: `(V,)`, as `video_keys` gives them.
        target: The server.
        made_with: The description that `made_with` gives.
        recall: Measured for an approximate collection; None if it is exact.
        cache: A folder for data that can be fetched again.
        fresh: Vectors of the segments that the collections do not have yet.
        fresh_videos: `(V,)`, True on the videos of `catalog` that are in these segments.

    Attributes:
        num_missing: Number of videos whose vectors are neither in the collections nor here.
    """

    def __init__(
        self,
        catalog: Catalog,
        keys: NDArray[np.int64],
        target: Target,
        made_with: Mapping[str, str],
        recall: float | None,
        cache: Path,
        fresh: SegmentVectors,
        fresh_videos: NDArray[np.bool_],
    ) -> None:
        self.catalog = catalog
        self._keys = keys
        self._target = target
        self._made_with = dict(made_with)
        self.recall = recall
        self.exact = recall is None
        self._cache = cache
        self._fresh, self._is_fresh = fresh, fresh_videos
        self.num_missing = 0
        self._lock = threading.Lock()
        self._server: MilvusServer | None = None
        self._backgrounds: dict[str, NDArray[np.float32]] = {}

    @classmethod
    def open(cls, folder: Path, manifest: Mapping[str, Any]) -> MilvusVectors:
        """Open the vectors of an index whose manifest places them in Milvus.

        Raises:
            StoreError: A file of the index is damaged.
        """
        segments = open_segments(folder, manifest, with_vectors=False)
        where = manifest["vectors"]
        sent = where.get("segments", [segment.key for segment in segments])
        entries = [entry for entry in manifest["segments"] if entry["key"] not in sent]
        fresh, num_missing = SegmentVectors([]), 0
        try:
            size = int(manifest["embedding_size"])
            fresh = SegmentVectors([open_segment(folder, entry, size) for entry in entries])
        except StoreError:  # the embeddings may not be here: these videos are found once they are sent
            num_missing = sum(entry["videos"] for entry in entries)
            sent = [segment.key for segment in segments]
        is_fresh = [np.full(segment.num_videos, segment.key not in sent) for segment in segments]
        opened = cls(
            Catalog(segments),
            video_keys(segments),
            Target.parse(where["uri"]),
            made_with(manifest),
            where["recall"],
            folder / "cache",
            fresh,
            np.concatenate([np.empty(0, np.bool_), *is_fresh]),
        )
        opened.num_missing = num_missing
        return opened

    def nearest(
        self, embedding: NDArray[np.float32], k: int, *, by: str, allowed: NDArray[np.bool_] | None
    ) -> Nearest:
        """As `Vectors.nearest`.

        A filter names the videos that pass, or those that do not, whichever are fewer. If both are many, the first
        rows of all are looked through; if that is not enough, it takes one search for every `MAX_KEYS` videos.
        """
        counted = self.catalog.counted(allowed)
        fresh = self._nearest_fresh(embedding, k, by, counted)
        return k_best([fresh, self._nearest_sent(embedding, k, by, counted & ~self._is_fresh)], k)

    def _nearest_fresh(
        self, embedding: NDArray[np.float32], k: int, by: str, passing: NDArray[np.bool_]
    ) -> Nearest:
        if not self._fresh.catalog.num_videos:
            return k_best([], k)
        scores, rows = self._fresh.nearest(embedding, k, by=by, allowed=passing[self._is_fresh])
        return scores, self._fresh_rows(by)[rows]

    def _fresh_rows(self, by: str) -> NDArray[np.int64]:
        """Return the place of each row of `fresh` among all."""
        is_fresh = self._is_fresh if by == "video" else np.repeat(self._is_fresh, self.catalog.moment_counts)
        return np.flatnonzero(is_fresh)

    def _nearest_sent(self, embedding: NDArray[np.float32], k: int, by: str, passing: NDArray[np.bool_]) -> Nearest:
        wanted, others = self._keys[passing], self._keys[self.catalog.alive & ~passing]
        if not len(wanted):
            return k_best([], k)
        field = "video" if by == "moment" else "id"
        if min(len(wanted), len(others)) > MAX_KEYS:
            hits = self._connected().search(by, embedding, max(k, FIRST_ROWS), "")
            found = self._passing(hits, by, passing)
            if len(found[0]) >= k:
                return k_best([found], k)
        if not len(others):
            filters = [""]
        elif len(others) <= MAX_KEYS < len(wanted):
            filters = [f"{field} not in {others.tolist()}"]
        else:
            portions = (wanted[begin : begin + MAX_KEYS] for begin in range(0, len(wanted), MAX_KEYS))
            filters = [f"{field} in {keys.tolist()}" for keys in portions]
        return k_best([self._search(by, embedding, k, passing, each) for each in filters], k)

    def embeddings(self, rows: NDArray[np.int64], *, by: str) -> NDArray[np.float32]:
        """As `Vectors.embeddings`.

        Raises:
            StoreError: The collection lacks some of them, or the server does not answer.
        """
        found, held = self._fetch(rows, by)
        if self._fresh.catalog.num_videos:
            fresh_rows = self._fresh_rows(by)
            places = np.searchsorted(fresh_rows, rows)
            is_fresh = fresh_rows[np.minimum(places, len(fresh_rows) - 1)] == rows
            found[is_fresh] = self._fresh.embeddings(places[is_fresh], by=by)
            held |= is_fresh
        if not held.all():
            raise StoreError(
                f"{self._target.name_of(by)} lacks {int((~held).sum())} of {len(rows)} vectors of this index - "
                f"fill it with `svb index --to {self._target.uri}`"
            )
        return found

    def background(self, by: str) -> NDArray[np.float32]:
        """As `Vectors.background`; fetched once, then kept in the index's cache."""
        with self._lock:
            if by in self._backgrounds:
                return self._backgrounds[by]
        rows = self.catalog.sample_rows(by)
        ids = hashlib.sha256(self._ids(rows, by).tobytes() + canonical_json(self._made_with).encode())
        path = self._cache / f"milvus-{by}s-{ids.hexdigest()[:16]}.npy"
        background = _read_background(path, (len(rows), self.catalog.embedding_size))
        if background is None:
            background, held = self._fetch(rows, by)
            background = background[held]
            if held.all():
                _keep_background(path, background, f"milvus-{by}s-*.npy")
        with self._lock:
            self._backgrounds[by] = background
        return background

    def _connected(self) -> MilvusServer:
        with self._lock:
            if self._server is None:
                server = connect(self._target)
                missing = server.missing()
                if missing:
                    raise StoreError(
                        f"no collection {' and no collection '.join(missing)} at {self._target.address} - fill "
                        f"it with `svb index --to {self._target.uri}`"
                    )
                server.require(self.catalog.embedding_size, self._made_with)
                self._server = server
            return self._server

    def _search(
        self, by: str, embedding: NDArray[np.float32], k: int, passing: NDArray[np.bool_], only: str
    ) -> Nearest:
        """Return the k nearest rows of videos that pass; the filter `only` must leave them all."""
        server, num_rows = self._connected(), k
        while True:
            hits = server.search(by, embedding, num_rows, only)
            found = self._passing(hits, by, passing)
            if len(found[0]) >= k or len(hits) < num_rows:
                return k_best([found], k)
            num_rows *= 4  # some belong to another generation or to deleted videos

    def _passing(self, hits: Sequence[Mapping[str, Any]], by: str, passing: NDArray[np.bool_]) -> Nearest:
        """Return the scores and rows of hits of videos that pass."""
        scores, rows = self._known(hits, by)
        kept = passing[self.catalog.videos_of(rows) if by == "moment" else rows]
        return scores[kept], rows[kept]

    def _known(self, hits: Sequence[Mapping[str, Any]], by: str) -> Nearest:
        """Return the scores and rows of hits that belong to this generation."""
        scores = np.array([hit["distance"] for hit in hits], np.float32)
        if by == "video":
            rows = self._rows_of(np.array([hit["id"] for hit in hits], np.int64))
            return scores[rows >= 0], rows[rows >= 0]
        videos = self._rows_of(np.array([hit["entity"]["video"] for hit in hits], np.int64))
        rows = self._begins[videos] + np.array([hit["entity"]["moment"] for hit in hits], np.int64)
        return scores[videos >= 0], rows[videos >= 0]

    def _rows_of(self, keys: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the live video of each key, -1 if there is none."""
        if not len(keys):
            return np.empty(0, np.int64)
        held, rows = self._by_key
        places = np.minimum(np.searchsorted(held, keys), len(held) - 1)
        return np.where(held[places] == keys, rows[places], -1)

    @cached_property
    def _by_key(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        live = np.flatnonzero(self.catalog.alive)
        order = np.argsort(self._keys[live])
        return self._keys[live][order], live[order]

    @cached_property
    def _begins(self) -> NDArray[np.int64]:
        return np.concatenate([[0], np.cumsum(self.catalog.moment_counts)]).astype(np.int64)

    def _ids(self, rows: NDArray[np.int64], by: str) -> NDArray[np.int64]:
        if by == "video":
            return self._keys[rows]
        videos = self.catalog.videos_of(rows)
        return moment_ids(self._keys[videos], rows - self._begins[videos])

    def _fetch(self, rows: NDArray[np.int64], by: str) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Return `(n, D)`, and which of them the collection has."""
        ids = self._ids(rows, by)
        vectors = self._connected().fetch(by, np.unique(ids).tolist(), self.catalog.embedding_size)
        found, held = np.zeros((len(rows), self.catalog.embedding_size), np.float32), np.zeros(len(rows), np.bool_)
        for place, of_row in enumerate(ids.tolist()):
            if of_row in vectors:
                found[place], held[place] = vectors[of_row], True
        return found, held


def _read_background(path: Path, shape: tuple[int, int]) -> NDArray[np.float32] | None:
    try:
        background: NDArray[np.float32] = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return background if background.shape == shape and background.dtype == np.float32 else None


def _keep_background(path: Path, background: NDArray[np.float32], others: str) -> None:
    with contextlib.suppress(OSError):  # an index on a read-only or full disk can still be searched
        for stale in path.parent.glob(others):
            stale.unlink(missing_ok=True)
        with published_file(path) as aside:
            np.save(aside, background)
