"""Files that clients send: counted as they arrive, few at once, and removed after their search."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from fastapi import HTTPException, Request
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile
from starlette.types import Message, Receive

# The space for the form's other fields and the boundaries.
FORM_BYTES = 1 << 18
# A client that sends a byte a second would keep its place for years.
RECEIVE_SECONDS = 600.0
PREFIX = "svb-upload-"
# Older folders were left by a killed server: no upload takes this long.
LEFTOVER_SECONDS = 24 * 3600.0


@dataclass(frozen=True)
class Upload:
    """A file that a client sent.

    Attributes:
        path: Its temporary place, under a name that the server chose.
        name: The client's name for it, without folders; for messages only.
        kind: `image` or `video`.
        request: The form's field `request`, which holds JSON.
    """

    path: Path
    name: str
    kind: str
    request: str


class Uploads:
    """Receives uploads.

    Args:
        max_bytes: The largest file accepted.
        at_once: How many may be received or searched with at once.
    """

    def __init__(self, max_bytes: int, at_once: int) -> None:
        _remove_leftovers()
        self._max_bytes, self._free = max_bytes, at_once
        self._at_once = at_once

    @contextlib.asynccontextmanager
    async def receive(self, request: Request) -> AsyncIterator[Upload]:
        """Yield the file of a multipart form; it is removed at the end.

        Raises:
            HTTPException: 413, the file is too large; 415, the request is not such a form; 429, there are too many
                uploads; 400, a field is missing.
        """
        if not self._free:
            raise HTTPException(
                429,
                f"{self._at_once} uploads are being searched with - try again in a moment",
                {"Retry-After": "2"},
            )
        self._free -= 1
        try:
            async with self._form(request) as form:
                with tempfile.TemporaryDirectory(prefix=PREFIX) as folder:
                    yield await _save(form, Path(folder))
        finally:
            self._free += 1

    @contextlib.asynccontextmanager
    async def _form(self, request: Request) -> AsyncIterator[FormData]:
        if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
            raise HTTPException(415, "expected multipart/form-data with the fields file, kind and request")
        self._require_size(int(request.headers.get("content-length") or 0))
        counted = Request(request.scope, self._counting(request))
        parsing = counted.form(max_files=1, max_fields=4, max_part_size=FORM_BYTES // 2)
        try:
            form = await asyncio.wait_for(parsing, RECEIVE_SECONDS)
        except asyncio.TimeoutError:
            raise HTTPException(408, f"the file did not arrive within {RECEIVE_SECONDS:.0f} s") from None
        except UnicodeError as error:  # the client names a character set of its own
            raise HTTPException(400, f"the form's fields cannot be read ({error}) - send them in UTF-8") from None
        try:
            yield form
        finally:
            await form.close()

    def _counting(self, request: Request) -> Receive:
        received = 0

        async def receive() -> Message:
            nonlocal received
            message = await request.receive()
            received += len(message.get("body", b""))
            self._require_size(received)
            return message

        return receive

    def _require_size(self, num_bytes: int) -> None:
        if num_bytes > self._max_bytes + FORM_BYTES:
            limit = self._max_bytes / 1e6
            raise HTTPException(
                413,
                f"the file is larger than {limit:.3g} MB - send a shorter clip, or restart the server with "
                "a larger --max-upload",
                {"Connection": "close"},
            )


def _remove_leftovers() -> None:
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            stat = folder.lstat()
            if stat.st_uid == os.getuid() and stat.st_mtime < time.time() - LEFTOVER_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


async def _save(form: FormData, folder: Path) -> Upload:
    file, kind, request = form.get("file"), form.get("kind"), form.get("request", "{}")
    if not isinstance(file, UploadFile) or not isinstance(request, str):
        raise HTTPException(400, "the form has no file - expected the fields file, kind and request")
    if kind not in {"image", "video"}:
        raise HTTPException(400, f"kind is {kind!r} - expected image or video")
    name = re.split(r"[/\\]", file.filename or "")[-1] or "file"
    suffix = re.search(r"\.[A-Za-z0-9]{1,8}$", name)
    path = folder / f"upload{suffix[0].lower() if suffix else ''}"

    def copy() -> None:
        with path.open("wb") as out:
            shutil.copyfileobj(file.file, out, 1 << 20)

    await run_in_threadpool(copy)
    return Upload(path, name, str(kind), request)
