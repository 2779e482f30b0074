"""Embeddings of texts asked before, on disk: a repeated query loads no model.

cache/queries/<hash>   SHA-256 of the rest and of the file's name (32 bytes), then the embedding, (D,) float32

The name is a hash of the model and the text, so no query can be read from the disk. A file that was cut short or
changed does not give its checksum and counts as none. Losing the folder costs time alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
import uuid
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from svb.data.publish import ASIDE_PREFIX

MAX_ENTRIES = 10_000
# Removed together where there are too many, so that not every new query has to look at all files.
REMOVED_AT_ONCE = 1_000
_CHECKSUM_BYTES = 32
# What was written aside and is still there after this was left by a kill.
_ASIDE_SECONDS = 3600.0


class QueryCache:
    """Embeddings of texts, of one model; processes and threads may share the folder.

    Args:
        folder: An index's `cache`.
        fingerprint: Of the model; what another has embedded is not found.
        max_entries: The oldest are removed beyond this many, those of all models together.
    """

    def __init__(self, folder: Path, fingerprint: str, max_entries: int = MAX_ENTRIES) -> None:
        self._folder = folder / "queries"
        self._fingerprint = fingerprint
        self._max_entries = max_entries

    def get(self, text: str) -> NDArray[np.float32] | None:
        """Return the `(D,)` embedding of a text, or None where it is not known."""
        path = self._path(text)
        try:
            content = path.read_bytes()
        except OSError:
            return None
        checksum, embedding = content[:_CHECKSUM_BYTES], content[_CHECKSUM_BYTES:]
        if not embedding or len(embedding) % 4 or _checksum(path.name, embedding) != checksum:
            return None
        return np.frombuffer(embedding, "<f4").astype(np.float32)

    def put(self, text: str, embedding: NDArray[np.float32]) -> None:
        """Keep a text's `(D,)` embedding; on a disk that is full or read-only it is done without."""
        path = self._path(text)
        aside = self._folder / f"{ASIDE_PREFIX}{uuid.uuid4().hex}"
        content = np.ascontiguousarray(embedding, "<f4").tobytes()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            # Not synced: what a power cut leaves of it does not give its checksum.
            aside.write_bytes(_checksum(path.name, content) + content)
            aside.replace(path)
            self._remove_oldest()
        except OSError:
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)

    def _path(self, text: str) -> Path:
        named = f"{self._fingerprint}\0{text}".encode("utf-8", "surrogatepass")
        return self._folder / hashlib.sha256(named).hexdigest()[:32]

    def _remove_oldest(self) -> None:
        with os.scandir(self._folder) as found:
            files = list(found)
        if len(files) <= self._max_entries:
            return
        ages = []
        for file in files:
            with contextlib.suppress(FileNotFoundError):  # another process removes them too
                ages.append((file.stat().st_mtime, file.name))
        now = time.time()
        kept = max(self._max_entries - min(REMOVED_AT_ONCE, self._max_entries // 10), 1)
        entries = sorted(of for of in ages if not of[1].startswith(ASIDE_PREFIX))
        left_over = [of for of in ages if of[1].startswith(ASIDE_PREFIX) and of[0] < now - _ASIDE_SECONDS]
        for _, name in [*entries[: max(len(entries) - kept, 0)], *left_over]:
            (self._folder / name).unlink(missing_ok=True)


def _checksum(name: str, content: bytes) -> bytes:
    return hashlib.sha256(name.encode() + content).digest()
