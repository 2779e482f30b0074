"""The files of an approximate index, a cache: what was decided, and FAISS's inverted lists.

cache/ivf.json             the decision: search is exact, or by a file; what it covers, how it was tuned, its recall
cache/moments-<hash>.ivf   FAISS IndexIVFScalarQuantizer (QT_fp16, inner product), mapped and never written to

`svb.retrieve.indexing.tune_ivf` decides, `svb.retrieve.searching.ivf` searches.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svb.data.description import publish_description, read_description
from svb.data.publish import ASIDE_PREFIX, hash_file, published_file
from svb.errors import SvbError

if TYPE_CHECKING:
    import faiss

DECISION = "ivf.json"


def read_decision(folder: Path) -> dict[str, Any] | None:
    """Return the decision for an index; None before there is one.

    Raises:
        StoreError: The description is damaged, or of a newer format.
    """
    path = folder / "cache" / DECISION
    if not path.is_file():
        return None
    decision = read_description(path, kind="a cache", make="svb index")
    return {name: value for name, value in decision.items() if name != "format_version"}


def publish_decision(folder: Path, decision: Mapping[str, Any]) -> None:
    """Write what was decided, unless it is there already, and remove what is of no use any more.

    The cache holds other things too: only lists of before and what killed writers left are removed.
    """
    cache = folder / "cache"
    if not _is_written(folder, decision):
        publish_description(cache / DECISION, decision)
    for pattern in ("moments-*.ivf", "building.ivf", f"{ASIDE_PREFIX}*.ivf"):
        for path in cache.glob(pattern):
            if path.name != decision["file"]:
                path.unlink(missing_ok=True)


def write_ivf(cache: Path, index: faiss.IndexIVFScalarQuantizer) -> dict[str, Any]:
    """Write inverted lists, whole or not at all; returns the decision's fields that say which file they are."""
    import faiss

    building = cache / "building.ivf"
    with published_file(building) as aside:
        faiss.write_index(index, str(aside))
    digest, size = hash_file(building), building.stat().st_size
    name = f"moments-{digest[:16]}.ivf"
    building.replace(cache / name)
    # The lists' contents, a code and an int64 number each, are the end of the file.
    head_bytes = size - index.ntotal * (index.code_size + 8)
    return {
        "file": name,
        "hash": digest,
        "size": size,
        "head_bytes": head_bytes,
        "head_crc32": checksum_head(cache / name, head_bytes),
        "nlist": index.nlist,
    }


def read_ivf(cache: Path, decision: Mapping[str, Any]) -> faiss.IndexIVFScalarQuantizer:
    """Map the file that a decision names.

    Its head, up to the lists' contents, is compared with its checksum: nothing after it can lead out of the file.

    Raises:
        OSError, RuntimeError, ValueError: It is missing or damaged.
    """
    import faiss

    path = cache / decision["file"]
    size, head_bytes = path.stat().st_size, decision["head_bytes"]
    if size != decision["size"]:
        raise ValueError(f"{path.name} has {size} bytes, not {decision['size']}")
    if checksum_head(path, head_bytes) != decision["head_crc32"]:
        raise ValueError(f"the head of {path.name} has changed since it was written")
    index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
    rows = sum(entry["moments"] for entry in decision["segments"])
    if (index.ntotal, index.d, index.nlist) != (rows, decision["embedding_size"], decision["nlist"]):
        raise ValueError(f"{path.name} has {index.ntotal} rows of {index.d} in {index.nlist} lists")
    return index


def checksum_head(path: Path, size: int) -> int:
    """Return the CRC-32 of a file's first bytes: every search computes it, and SHA-256 takes four times as long."""
    with path.open("rb") as file:
        return zlib.crc32(file.read(size))


def verify_ivf(folder: Path) -> list[str]:
    """Return what is wrong with an index's approximate index, a line each; reads all of it."""
    try:
        decision = read_decision(folder)
        if decision is None or decision["file"] is None:
            return []
        path = folder / "cache" / decision["file"]
        return [] if hash_file(path) == decision["hash"] else [f"{path} has changed since it was written"]
    except (SvbError, OSError) as error:
        return [str(error)]


def _is_written(folder: Path, decision: Mapping[str, Any]) -> bool:
    try:
        written = read_decision(folder)
    except SvbError:
        return False
    return written is not None and {**written, **decision} == written
