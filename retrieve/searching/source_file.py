"""Is a video's file still the one that was indexed? What is cut, shown or played would else be of another."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from svb.retrieve.answer import VideoResult


def problem_of(result: VideoResult) -> str | None:
    """Return why a result's file is not what was indexed, as far as size and time tell; None where it is."""
    try:
        stat = Path(result.source_path).stat()
    except (OSError, ValueError):
        return f"{result.source_path} is no longer there"
    changes = changes_of(stat, result.size_bytes, result.mtime_ns)
    if not changes:
        return None
    return f"{result.source_path} has changed since it was indexed ({changes})"


def changes_of(stat: os.stat_result, size_bytes: int, mtime_ns: int) -> str:
    """Return in what a file differs from what was indexed, of which 0 stands for what is not known, or nothing."""
    return ", ".join(_changes(stat, size_bytes, mtime_ns))


def _changes(stat: os.stat_result, size_bytes: int, mtime_ns: int) -> Iterator[str]:
    if size_bytes and size_bytes != stat.st_size:
        yield f"{stat.st_size:,} bytes, then {size_bytes:,}"
    if mtime_ns and mtime_ns != stat.st_mtime_ns:
        yield f"of {_clock(stat.st_mtime_ns)}, then of {_clock(mtime_ns)}"


def _clock(mtime_ns: int) -> str:
    try:
        return datetime.fromtimestamp(mtime_ns / 1e9).astimezone().isoformat(" ", "milliseconds")
    except (OverflowError, OSError, ValueError):  # a time that no calendar has
        return f"{mtime_ns} ns"
