"""Files that can be made again, kept in a folder that does not grow beyond a size."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
import time
from pathlib import Path

from svb.data.publish import ASIDE_PREFIX

# Named for a content, and what of it is shown. Whatever else lies in the folder is somebody's own.
NAME = re.compile(r"[0-9a-f]{32}(-n?[0-9]+)*\.(jpg|mp4)")
# What is written aside and has not grown for so long was left by a kill; until then another server may write it.
_ASIDE_SECONDS = 3600.0


class KeptFiles:
    """A folder of files that can be made again; those used longest ago are removed when they grow too many.

    Args:
        folder: Is created. Only files whose names are as `NAME` says are ever removed.
        max_bytes: How much the files may take together.

    Attributes:
        folder, max_bytes: As given.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        folder.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        self._total_bytes = sum(size for _, size, _ in self._files())

    def find(self, name: str) -> Path | None:
        """Return a kept file, which counts as used now; None where there is none."""
        path = self.folder / name
        try:
            os.utime(path)
        except OSError:
            return None
        return path

    def keep(self, aside: Path, name: str) -> Path:
        """Give a finished file of the folder its name, and make room for it; returns its path.

        It is not synced: what a power cut takes is made again, and what it empties is found by its size.
        """
        path = self.folder / name
        aside.replace(path)
        self._total_bytes += path.stat().st_size
        if self._total_bytes > self.max_bytes:
            self._make_room(path)
        return path

    def new_aside(self, suffix: str) -> Path:
        """Return a new name in the folder to write to; what a kill leaves there a later start removes."""
        descriptor, name = tempfile.mkstemp(prefix=ASIDE_PREFIX, suffix=suffix, dir=self.folder)
        os.close(descriptor)
        return Path(name)

    def _make_room(self, newest: Path) -> None:
        """Remove files down to nine tenths of what they may take, or every next file would look at all of them."""
        files = sorted(self._files())
        self._total_bytes = sum(size for _, size, _ in files)
        for _, size, path in files:
            if self._total_bytes <= 0.9 * self.max_bytes:
                return
            if path != newest:
                path.unlink(missing_ok=True)
                self._total_bytes -= size

    def _files(self) -> list[tuple[int, int, Path]]:
        """Return `(mtime_ns, size_bytes, path)` of every kept file."""
        with os.scandir(self.folder) as entries:
            kept = [
                entry for entry in entries if NAME.fullmatch(entry.name) and entry.is_file(follow_symlinks=False)
            ]
        stats = []
        for entry in kept:
            with contextlib.suppress(FileNotFoundError):  # another server of the index makes room too
                stats.append((entry.stat(), Path(entry.path)))
        return [(stat.st_mtime_ns, stat.st_size, path) for stat, path in stats]


class CacheFolder:
    """Where an index's remade files lie: its `cache/`, or a temporary folder where that cannot be written.

    Attributes:
        path: The folder.
    """

    def __init__(self, index: Path) -> None:
        self.path = index / "cache"
        self._is_temporary = not _is_writable(self.path)
        if self._is_temporary:
            self.path = Path(tempfile.mkdtemp(prefix="svb-cache-"))

    def close(self) -> None:
        """Remove the folder where it was temporary."""
        if self._is_temporary:
            shutil.rmtree(self.path, ignore_errors=True)


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _remove_leftovers(folder: Path) -> None:
    for leftover in folder.glob(f"{ASIDE_PREFIX}*"):
        with contextlib.suppress(OSError):
            if leftover.stat().st_mtime < time.time() - _ASIDE_SECONDS:
                leftover.unlink()
