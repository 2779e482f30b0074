"""`server.json` in an index's cache: where the server of this index answers, for `svb search` on this machine."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from svb.data.publish import ASIDE_PREFIX

NAME = "server.json"


@contextlib.contextmanager
def announced(cache: Path, url: str, token: str | None) -> Iterator[None]:
    """Say for the time of the `with` that a server of the index answers at a URL.

    The file can be read by this user alone, for it holds the token. It names the folder that it lies in: the server
    knows nothing of a copy of its index. What a killed server left is replaced; what a later server has written is
    left to it.
    """
    path = cache / NAME
    _write(path, {"url": url, "pid": os.getpid(), "token": token, "folder": str(cache.resolve())})
    try:
        yield
    finally:
        with contextlib.suppress(OSError, ValueError):
            if json.loads(path.read_text("utf-8"))["pid"] == os.getpid():
                path.unlink()


def _write(path: Path, held: dict[str, object]) -> None:
    # mkstemp's files are the user's alone from the start.
    descriptor, aside = tempfile.mkstemp(prefix=ASIDE_PREFIX, dir=path.parent)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(held, file)
    Path(aside).replace(path)
