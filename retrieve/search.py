"""`svb search`: a text, an image or a video -> the nearest videos, their best moments, the best captions.

`open_searcher` opens an index once for many requests; `search` opens it for one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from svb.retrieve.answer import Answer, SearchRequest
from svb.retrieve.searching.searcher import Searcher, ServerVectors

__all__ = ["Searcher", "open_searcher", "search"]


def search(index: Path | str, request: SearchRequest, device: str = "auto") -> Answer:
    """Answer one request from an index; errors as in `Searcher` and `Searcher.search`."""
    return open_searcher(index, device).search(request)


def open_searcher(index: Path | str, device: str = "auto", *, previous: Searcher | None = None) -> Searcher:
    """Open an index, whether its vectors are in files or in Milvus; see `Searcher`."""
    return Searcher(index, device, previous=previous, open_server=_open_milvus)


def _open_milvus(folder: Path, manifest: Mapping[str, Any]) -> ServerVectors:
    from svb.retrieve.milvus.milvus_vectors import MilvusVectors

    return MilvusVectors.open(folder, manifest)
