"""A Milvus server, or Milvus Lite in a file: where it is, a connection to it, and the two collections of an index.

<name>_moments    id, vector, video (the video's key), moment (its number in the video), begin_seconds, end_seconds
<name>_videos     id (the video's key), vector, video_id, content_hash

Both carry the model's fingerprint, in the collection's properties and in its description. Rows shift as segments
are merged, so a collection knows videos by keys: a hash of the video_id, its content and how many moments it has. A
video that changes gets another key.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
from numpy.typing import NDArray

from svb.config import canonical_json
from svb.errors import MismatchError, ModelUnavailableError, StoreError, UsageError
from svb.retrieve.stored.segment import Segment

if TYPE_CHECKING:
    from pymilvus import MilvusClient

TOKEN = "SVB_MILVUS_TOKEN"
CONNECT_SECONDS, CALL_SECONDS = 10.0, 30.0
# The most rows and bytes that a server takes or gives in one call.
MAX_ROWS = 16384
BYTES_A_CALL = 8 << 20
# The largest key of a video is below this.
LAST_KEY = 2**63 - 1
LONGEST_TEXT = 65535
SCHEMES = {"milvus": "http", "milvus+tls": "https"}
EXAMPLE = "milvus://host:19530/collection or milvus:///path/file.db"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,200}")
_PROPERTY = "svb.index"


@dataclass(frozen=True)
class Target:
    """The address of an index's vectors.

    Attributes:
        uri: The address as the user wrote it.
        address: The same for the client: `http://host:port`, `https://host:port` or the path of a file.
        collection: The prefix of both collections' names.
        index_type: Milvus's index type for new collections; empty for exact search.
    """

    uri: str
    address: str
    collection: str
    index_type: str

    @classmethod
    def parse(cls, uri: str) -> Target:
        """Read `milvus://host:port/collection`, `milvus+tls://...` or `milvus:///path/file.db`.

        `?index=HNSW` or another of Milvus's index types makes new collections approximate; in a file the collection
        is called `svb`, or as `?collection=` says.

        Raises:
            UsageError: It is not such an address, or holds a secret.
        """
        parts = urlsplit(uri)
        options = {name: values[-1] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
        if (
            "@" in parts.netloc
            or (parts.scheme not in SCHEMES and "@" in uri)
            or {*options} & {"token", "password"}
        ):
            raise UsageError(f"the address of Milvus holds a secret - put `user:password` or a token into {TOKEN}")
        if parts.scheme not in SCHEMES or {*options} - {"index", "collection"}:
            raise UsageError(f"{uri!r} is not an address of Milvus - expected {EXAMPLE}")
        if parts.netloc:
            address, name = f"{SCHEMES[parts.scheme]}://{parts.netloc}", parts.path.strip("/")
        else:
            address, name = parts.path, options.get("collection", "svb")
            if not address.endswith(".db"):
                raise UsageError(f"{uri!r} does not name a file that ends in .db - expected {EXAMPLE}")
        if not _NAME.fullmatch(name):
            raise UsageError(
                f"{uri!r} lacks the name of a collection (letters, digits and underscores) - expected {EXAMPLE}"
            )
        return cls(uri, address, name, options.get("index", "").upper())

    @property
    def is_file(self) -> bool:
        """Tell whether it is Milvus Lite's file, rather than a server."""
        return self.address.startswith("/")

    def name_of(self, by: str) -> str:
        """Return the collection that holds a kind of vectors, `moment` or `video`."""
        return f"{self.collection}_{by}s"


@dataclass(frozen=True)
class MilvusServer:
    """A connection; threads may share it. Its methods raise StoreError if the server fails."""

    target: Target
    client: MilvusClient

    @contextlib.contextmanager
    def calling(self) -> Iterator[MilvusClient]:
        """Yield the client.

        Raises:
            StoreError: A call fails.
        """
        import grpc
        from pymilvus import MilvusException

        try:
            yield self.client
        except (MilvusException, grpc.RpcError) as error:
            raise StoreError(
                f"Milvus at {self.target.address} failed ({error}) - check its log, then run the same command again"
            ) from error

    def missing(self) -> list[str]:
        """Return the names of missing collections."""
        with self.calling() as client:
            names = [self.target.name_of(by) for by in ("moment", "video")]
            return [name for name in names if not client.has_collection(name, timeout=CALL_SECONDS)]

    def create(self, by: str, embedding_size: int, made_with: dict[str, str]) -> None:
        """Create the collection of a kind of vectors."""
        from pymilvus import DataType, MilvusClient

        schema = MilvusClient.create_schema(description=json.dumps(made_with), enable_dynamic_field=False)
        schema.add_field("id", DataType.INT64, is_primary=True)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=embedding_size)
        index = MilvusClient.prepare_index_params()
        index.add_index("vector", index_type=self.target.index_type or "FLAT", metric_type="IP", params={})
        if by == "moment":
            schema.add_field("video", DataType.INT64)
            schema.add_field("moment", DataType.INT32)
            schema.add_field("begin_seconds", DataType.DOUBLE)
            schema.add_field("end_seconds", DataType.DOUBLE)
            index.add_index("video", index_type="INVERTED")
        else:
            schema.add_field("video_id", DataType.VARCHAR, max_length=LONGEST_TEXT)
            schema.add_field("content_hash", DataType.VARCHAR, max_length=LONGEST_TEXT)
        with self.calling() as client:
            client.create_collection(
                self.target.name_of(by),
                schema=schema,
                index_params=index,
                properties={_PROPERTY: json.dumps(made_with)},
                consistency_level="Strong",
                timeout=CALL_SECONDS,
            )

    def require(self, embedding_size: int, made_with: dict[str, str]) -> str:
        """Check that both collections belong to such an index, load them, and return their index type.

        Raises:
            MismatchError: They have another model or size, or svb did not make them.
        """
        for by in ("moment", "video"):
            name = self.target.name_of(by)
            with self.calling() as client:
                described = client.describe_collection(name, timeout=CALL_SECONDS)
                index = client.describe_index(name, "vector", timeout=CALL_SECONDS) or {}
            sizes = [field["params"].get("dim") for field in described["fields"] if field["name"] == "vector"]
            held = _made_with(described)
            if held != made_with or [int(size) for size in sizes] != [embedding_size]:
                raise MismatchError(
                    f"{name} at {self.target.address} was made with {held or 'another program'} and vectors of "
                    f"size {sizes}, not with {made_with} and {embedding_size} - name another collection, or drop "
                    f"both of {self.target.collection}"
                )
            with self.calling() as client:
                client.load_collection(name, timeout=CALL_SECONDS)
        return str(index.get("index_type", "unknown"))

    def search(self, by: str, embedding: NDArray[np.float32], k: int, only: str) -> list[dict[str, Any]]:
        """Return the k nearest rows that pass a filter, best first, even if k exceeds what a server gives at once.

        Then it splits the videos' keys into ranges of about as many rows, and each range that needs more rows into
        two, until no row is missing among the k nearest.

        Args:
            by: `moment` or `video`.
            embedding: `(D,)`.
            k: How many; fewer if there are fewer.
            only: The filter in Milvus's syntax; empty for none.
        """
        if k <= MAX_ROWS:
            return self._search_once(by, embedding, k, only)
        edges = [LAST_KEY * number // (2 * -(-k // MAX_ROWS)) for number in range(2 * -(-k // MAX_ROWS) + 1)]
        ranges, found = list(pairwise(edges)), dict[tuple[int, int], list[dict[str, Any]]]()
        while ranges:
            for low, high in ranges:
                field = "video" if by == "moment" else "id"
                within = f"{field} >= {low} and {field} < {high}"
                clause = f"({only}) and {within}" if only else within
                found[low, high] = self._search_once(by, embedding, MAX_ROWS, clause)
            scores = sorted((hit["distance"] for hits in found.values() for hit in hits), reverse=True)
            bound = scores[k - 1] if len(scores) >= k else -math.inf
            cut = [each for each, hits in found.items() if len(hits) == MAX_ROWS and hits[-1]["distance"] > bound]
            cut = [(low, high) for low, high in cut if high - low > 1]
            for each in cut:
                del found[each]
            ranges = [half for low, high in cut for half in ((low, (low + high) // 2), ((low + high) // 2, high))]
        hits = [hit for part in found.values() for hit in part]
        return sorted(hits, key=lambda hit: -float(hit["distance"]))[:k]

    def _search_once(self, by: str, embedding: NDArray[np.float32], limit: int, only: str) -> list[dict[str, Any]]:
        with self.calling() as client:
            hits: list[dict[str, Any]] = client.search(
                self.target.name_of(by),
                data=[embedding],
                filter=only,
                limit=limit,
                output_fields=["video", "moment"] if by == "moment" else [],
                timeout=CALL_SECONDS,
            )[0]
        return hits

    def fetch(self, by: str, ids: Sequence[int], embedding_size: int) -> dict[int, list[float]]:
        """Return the vectors that a collection has of those asked for, by id."""
        found: dict[int, list[float]] = {}
        portion = max(1, min(MAX_ROWS, BYTES_A_CALL // (4 * embedding_size)))
        for begin in range(0, len(ids), portion):
            with self.calling() as client:
                entities = client.query(
                    self.target.name_of(by),
                    ids=ids[begin : begin + portion],
                    output_fields=["vector"],
                    timeout=CALL_SECONDS,
                )
            found |= {entity["id"]: entity["vector"] for entity in entities}
        return found


def connect(target: Target, *, create: bool = False) -> MilvusServer:
    """Connect to a server, or open a file.

    Args:
        target: The server's address.
        create: Make the file if there is none.

    Raises:
        ModelUnavailableError: The client is not installed.
        StoreError: The server cannot be reached, there is no file, or another process has it open.
    """
    try:
        from pymilvus import MilvusClient, MilvusException
    except ImportError as error:
        raise ModelUnavailableError(
            f"{target.uri} needs the client of Milvus ({error}) - run `pip install '.[milvus]'` in svb's folder"
        ) from error
    for name in ("pymilvus", "milvus_lite", "grpc._server"):  # they also log what they raise
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if target.is_file:
        if not create and not Path(target.address).exists():
            raise StoreError(
                f"no file at {target.address} - restore it, or fill it with `svb index --to {target.uri}`"
            )
        Path(target.address).parent.mkdir(parents=True, exist_ok=True)
    # A file's server is a thread of this process that takes the client's pings for an attack: never ping.
    options = {"grpc_options": {"grpc.keepalive_time_ms": 2**31 - 1}} if target.is_file else {}
    token = os.environ.get(TOKEN, "")
    try:
        return MilvusServer(target, MilvusClient(target.address, token=token, timeout=CONNECT_SECONDS, **options))
    except MilvusException as error:
        reason = (
            "another process has it open, or it is damaged: wait for that process to end, or name another file"
            if target.is_file
            else f"is it running, and is {TOKEN} right?"
        )
        raise StoreError(f"cannot open Milvus at {target.address} ({error.message}) - {reason}") from error


def _made_with(described: dict[str, Any]) -> dict[str, str]:
    """Return the settings of a collection; empty if svb did not make it. Not every server keeps both copies."""
    for text in (described.get("properties", {}).get(_PROPERTY, ""), described.get("description", "")):
        with contextlib.suppress(ValueError):
            held = json.loads(text)
            if isinstance(held, dict):
                return held
    return {}


def video_keys(segments: Sequence[Segment]) -> NDArray[np.int64]:
    """Return `(V,)`, the key of each video in a collection: it depends on the video's content."""
    keys = [
        _key(f"{video_id}\0{content_hash or (size, mtime)}\0{count}")
        for segment in segments
        for video_id, content_hash, size, mtime, count in zip(
            segment.video_ids,
            segment.content_hashes,
            segment.size_bytes.tolist(),
            segment.mtime_ns.tolist(),
            np.diff(segment.moment_offsets).tolist(),
            strict=True,
        )
    ]
    return np.array(keys, np.int64)


def moment_ids(keys: NDArray[np.int64], numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the ids of moments in a collection, from their videos' keys and their numbers in the videos.

    They have 63 bits (splitmix64): among 100 million moments two share an id in one of 2,000 indexes.
    """
    mixed = keys.astype(np.uint64) + (numbers.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    ids: NDArray[np.int64] = ((mixed ^ (mixed >> np.uint64(31))) >> np.uint64(1)).astype(np.int64)
    return ids


def made_with(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Return the settings of an index that its collections must share."""
    return {"model": manifest["model_fingerprint"], "moments": canonical_json(manifest["moments"])}


def _key(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
