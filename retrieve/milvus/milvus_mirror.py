"""`svb index --to milvus://...`: the vectors of an index -> two collections of a Milvus server.

The collections are compared with the index video by video, so the next run goes on where a killed one stopped. A
video's own vector is written after its moments and removed before them: if it is there, so are all of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svb.errors import MismatchError
from svb.retrieve.milvus.milvus_server import (
    BYTES_A_CALL,
    CALL_SECONDS,
    MAX_ROWS,
    MilvusServer,
    Target,
    connect,
    made_with,
    moment_ids,
    video_keys,
)
from svb.retrieve.milvus.milvus_vectors import MilvusVectors
from svb.retrieve.searching.catalog import Catalog
from svb.retrieve.searching.recall import draw_queries, find_truth, measure_recall
from svb.retrieve.searching.vectors import SegmentVectors
from svb.retrieve.stored.pools import open_pool
from svb.retrieve.stored.segment import Segment, open_segments

logger = logging.getLogger(__name__)


# Deleted in one call.
MAX_DELETED = 5000
# A server may take long to sort many vectors.
FLUSH_SECONDS = 600.0
# Each query is sent twice; so few take seconds.
NUM_QUERIES = 100


def mirror(
    folder: Path,
    manifest: Mapping[str, Any],
    uri: str,
    *,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Send a server the vectors of an index that it lacks, and return their entry in the manifest.

    Called before the manifest is committed, so readers of the manifest find all vectors on the server.

    Args:
        folder: The index's, which holds the embeddings.
        manifest: The next manifest; its parts are published.
        uri: See `Target.parse`.
        on_progress: Called with the number of videos sent, and of all to send.

    Returns:
        `vectors` of the manifest: kind, uri, index (Milvus's type), segments (the keys of those sent) and recall,
        measured if it is approximate.

    Raises:
        UsageError: The uri is not valid.
        MismatchError: Another model or program made the collections, or they have another index type.
        StoreError: The server cannot be reached or refuses, or the index is damaged.
    """
    target, size, expected = Target.parse(uri), int(manifest["embedding_size"]), made_with(manifest)
    server = connect(target, create=True)
    for by in ("moment", "video"):
        if target.name_of(by) in server.missing():
            server.create(by, size, expected)
    index_type = server.require(size, expected)
    if target.index_type not in ("", index_type):
        raise MismatchError(
            f"{target.uri}: the collections exist and are searched by {index_type}, not "
            f"{target.index_type} - name another collection, or drop both of {target.collection}"
        )
    segments = open_segments(folder, manifest)
    vectors, keys = SegmentVectors(segments), video_keys(segments)
    new = np.flatnonzero(vectors.catalog.alive & ~np.isin(keys, _held(server, "video", "id >= 0", "id")))
    hashes = [content_hash for segment in segments for content_hash in segment.content_hashes]
    done = 0
    for rows in _batches(new, vectors.catalog.moment_counts, max(1, BYTES_A_CALL // (4 * size))):
        on_progress(done, len(new))
        _send_moments(server, vectors, keys, rows)
        _send_videos(server, vectors, keys, rows, hashes)
        done += len(rows)
    if len(new):
        on_progress(done, len(new))
        _flush(server)
    logger.info(
        f"{target.uri}: +{len(new):,} ={vectors.catalog.alive.sum() - len(new):,} videos, searched by {index_type}"
    )
    where: dict[str, Any] = {"kind": "milvus", "uri": target.uri, "index": index_type, "recall": None}
    where["segments"] = sorted(segment.key for segment in segments)
    if index_type != "FLAT":
        before = manifest["vectors"] or {}
        if not len(new) and {**before, "recall": None} == where:
            return dict(before)  # measured on the same rows
        where["recall"] = _recall(folder, {**manifest, "vectors": where}, vectors, segments)
        logger.info(f"{target.uri}: recall@10 {where['recall']:.3f} against exact search")
    return where


def remove_gone(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Remove from a server what an index does not hold any more.

    Called after the manifest is committed: readers of the old one open the index again.

    Args:
        folder: The index's.
        manifest: The committed manifest, with `vectors`.

    Raises:
        MismatchError, StoreError: As `mirror`.
    """
    server = connect(target := Target.parse(manifest["vectors"]["uri"]))
    server.require(int(manifest["embedding_size"]), made_with(manifest))
    segments = open_segments(folder, manifest, with_vectors=False)
    wanted = video_keys(segments)[Catalog(segments).alive]
    videos = np.setdiff1d(_held(server, "video", "id >= 0", "id"), wanted)
    _delete(server, "video", "id", videos)
    # Every video with moments there has a first one, even after a kill.
    _delete(server, "moment", "video", np.setdiff1d(_held(server, "moment", "moment == 0", "video"), wanted))
    if len(videos):
        logger.info(f"{target.uri}: -{len(videos):,} videos")


def _batches(
    rows: NDArray[np.int64], moment_counts: NDArray[np.int64], num_moments: int
) -> Iterator[NDArray[np.int64]]:
    """Yield groups of videos with about this many moments together."""
    ends = np.cumsum(moment_counts[rows])
    edges = np.flatnonzero(np.diff(ends // num_moments, prepend=0))
    yield from (batch for batch in np.split(rows, edges) if len(batch))


def _send_moments(
    server: MilvusServer, vectors: SegmentVectors, keys: NDArray[np.int64], videos: NDArray[np.int64]
) -> None:
    ranges = [np.arange(*vectors.catalog.moment_range(video)) for video in videos.tolist()]
    rows, numbers = np.concatenate(ranges), np.concatenate([each - each[:1] for each in ranges])
    of_video = np.repeat(keys[videos], vectors.catalog.moment_counts[videos])
    columns = (moment_ids(of_video, numbers), of_video, numbers, *vectors.catalog.moment_seconds(rows).T)
    names = ("id", "video", "moment", "begin_seconds", "end_seconds")
    portion = max(1, BYTES_A_CALL // (4 * vectors.catalog.embedding_size))
    for begin in range(0, len(rows), portion):
        part = slice(begin, begin + portion)
        values = zip(*(column[part].tolist() for column in columns), strict=True)
        embeddings = vectors.embeddings(rows[part], by="moment")
        _upsert(server, "moment", [dict(zip(names, value, strict=True)) for value in values], embeddings)


def _send_videos(
    server: MilvusServer,
    vectors: SegmentVectors,
    keys: NDArray[np.int64],
    rows: NDArray[np.int64],
    hashes: Sequence[str],
) -> None:
    entities = [
        {"id": int(keys[row]), "video_id": vectors.catalog.video_id(row), "content_hash": hashes[row]}
        for row in rows.tolist()
    ]
    _upsert(server, "video", entities, vectors.embeddings(rows, by="video"))


def _upsert(server: MilvusServer, by: str, entities: list[dict[str, Any]], embeddings: NDArray[np.float32]) -> None:
    for entity, embedding in zip(entities, embeddings, strict=True):
        entity["vector"] = embedding
    with server.calling() as client:
        client.upsert(server.target.name_of(by), entities, timeout=CALL_SECONDS)


def _delete(server: MilvusServer, by: str, field: str, keys: NDArray[np.int64]) -> None:
    for begin in range(0, len(keys), MAX_DELETED):
        some = keys[begin : begin + MAX_DELETED].tolist()
        with server.calling() as client:
            client.delete(server.target.name_of(by), filter=f"{field} in {some}", timeout=CALL_SECONDS)


def _flush(server: MilvusServer) -> None:
    """Have a server arrange new vectors for fast search."""
    for by in ("moment", "video"):
        with server.calling() as client:
            client.flush(server.target.name_of(by), timeout=FLUSH_SECONDS)


def _held(server: MilvusServer, by: str, only: str, field: str) -> NDArray[np.int64]:
    """Return a field of all entities that pass a filter."""
    found: list[int] = []
    with server.calling() as client:
        name, timeout = server.target.name_of(by), CALL_SECONDS
        pages = client.query_iterator(name, MAX_ROWS, filter=only, output_fields=[field], timeout=timeout)
        while page := pages.next():
            found += [entity[field] for entity in page]
        pages.close()
    return np.array(found, np.int64)


def _recall(folder: Path, manifest: Mapping[str, Any], exact: SegmentVectors, segments: Sequence[Segment]) -> float:
    """Return the share of the ten nearest moments that the server finds, measured with captions or moments."""
    captions = [
        open_pool(folder, entry).embeddings for entry in manifest["captions"] if entry["kind"] == "training"
    ]
    _, queries = draw_queries(exact, captions[0] if captions else None)
    truth = find_truth(exact, segments, queries[:NUM_QUERIES])
    of_moments, _ = measure_recall(MilvusVectors.open(folder, manifest), truth)
    return of_moments
