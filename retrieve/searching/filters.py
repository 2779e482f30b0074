"""The filters of a request: they choose videos before anything is scored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from svb.data.text import plain_name
from svb.errors import UsageError
from svb.retrieve.answer import SearchRequest
from svb.retrieve.searching.catalog import Catalog


class Conditions(Protocol):
    """The part of `svb.retrieve.stored.metadata.Metadata` that filters use."""

    def matches(self, where: Sequence[str], video_ids: Sequence[str]) -> NDArray[np.bool_]:
        """Return `(V,)`, which videos match all conditions."""
        ...


def allowed_videos(
    catalog: Catalog, request: SearchRequest, metadata: Conditions
) -> tuple[NDArray[np.bool_] | None, str | None]:
    """Return which videos pass a request's filters, and which filter left none.

    Returns:
        `(V,)`, without deleted videos, or None if there is no filter; and a sentence for the user if the filters
        leave no video.

    Raises:
        UsageError: The value of a filter is not valid.
        InputError: A condition names a column that the index does not have.
    """
    allowed = None
    for name, passing in _filters(catalog, request, metadata):
        before = catalog.alive if allowed is None else allowed
        allowed = before & passing
        if before.any() and not allowed.any():
            rest = "videos" if before is catalog.alive else "videos that the others leave"
            return allowed, f"{name} leaves nothing: none of the {np.count_nonzero(before):,} {rest} passes"
    return allowed, None


def _filters(
    catalog: Catalog, request: SearchRequest, metadata: Conditions
) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """Yield each filter of a request, in the user's words, and which videos pass it."""
    if request.folders:
        yield f"the folder {' or '.join(map(repr, request.folders))}", _below(catalog, request.folders)
    if (least := request.min_duration_seconds) is not None:
        yield f"the duration of at least {least:g} s", catalog.durations >= least  # False if unknown
    if (most := request.max_duration_seconds) is not None:
        yield f"the duration of at most {most:g} s", catalog.durations <= most
    if request.after is not None:
        yield f"the date after {request.after}", catalog.mtime_ns >= _nanoseconds("after", request.after)
    if request.before is not None:
        yield f"the date before {request.before}", catalog.mtime_ns < _nanoseconds("before", request.before)
    for condition in request.where:
        yield f"the condition {condition!r}", metadata.matches([condition], catalog.video_ids)


def _below(catalog: Catalog, folders: Sequence[str]) -> NDArray[np.bool_]:
    """Return which videos are in a folder, or are the file it names; `a/bc` is not in `a/b`."""
    for folder in folders:
        if not folder.strip():
            raise UsageError("a folder is empty - name one, or leave the filter out")
    below = tuple(plain_name(_as_prefix(folder)) for folder in folders)
    pairs = zip(catalog.video_ids, catalog.source_paths, strict=True)
    return np.fromiter(
        (
            plain_name(f"{video_id}/").startswith(below) or plain_name(f"{path}/").startswith(below)
            for video_id, path in pairs
        ),
        np.bool_,
        catalog.num_videos,
    )


def _as_prefix(folder: str) -> str:
    parts = [part for part in folder.split("/") if part not in ("", ".")]
    root = "/" if folder.startswith("/") else ""
    return root + "".join(f"{part}/" for part in parts)


def _nanoseconds(name: str, date: str) -> int:
    """Return an ISO date as nanoseconds since 1970; a date without a time zone is local."""
    try:
        return int(datetime.fromisoformat(date).timestamp() * 1e9)
    except (ValueError, OverflowError, OSError) as error:
        raise UsageError(f"{name} is {date!r} - expected a date such as 2026-11-25 or 2026-11-25T18:30") from error
