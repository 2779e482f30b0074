"""Is a video's file still the one that was indexed? If it is not, svb must not cut, show or play it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from svb.data.text import mtime_ns_of
from svb.retrieve.answer import VideoResult


def problem_of(result: VideoResult) -> str | None:
    """Return how a result's file differs from the indexed one in size and time; None if it does not."""
    try:
        stat = Path(result.source_path).stat()
    except (OSError, ValueError):
        return f"{result.source_path} is no longer there"
    changes = changes_of(stat, result.size_bytes, result.mtime_ns)
    if not changes:
        return None
    return f"{result.source_path} has changed since it was indexed ({changes})"


def changes_of(stat: os.stat_result, size_bytes: int, mtime_ns: int) -> str:
    """Return how a file differs from the indexed size and time, of which 0 means unknown; empty if it does not."""
    return ", ".join(_changes(stat, size_bytes, mtime_ns))


def _changes(stat: os.stat_result, size_bytes: int, mtime_ns: int) -> Iterator[str]:
    if size_bytes and size_bytes != stat.st_size:
        yield f"{stat.st_size:,} bytes, was {size_bytes:,}"
    if mtime_ns and mtime_ns != mtime_ns_of(stat):
        yield f"from {_clock(mtime_ns_of(stat))}, was from {_clock(mtime_ns)}"


def _clock(mtime_ns: int) -> str:
    try:
        return datetime.fromtimestamp(mtime_ns / 1e9).astimezone().isoformat(" ", "milliseconds")
    except (OverflowError, OSError, ValueError):  # the calendar does not reach this time
        return f"{mtime_ns} ns"
