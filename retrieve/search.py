"""`svb search`: a text, an image or a video -> the nearest videos, their best moments, the best captions.

`Searcher` opens an index once for many requests; `search` opens it for one.
"""

from __future__ import annotations

from pathlib import Path

from svb.retrieve.answer import Answer, SearchRequest
from svb.retrieve.searching.searcher import Searcher

__all__ = ["Searcher", "search"]


def search(index: Path | str, request: SearchRequest, device: str = "auto") -> Answer:
    """Answer one request from an index; errors as in `Searcher` and `Searcher.search`."""
    return Searcher(index, device).search(request)
