"""A file over HTTP with byte ranges (RFC 9110, sections 13 and 14): what lets a player jump."""

from __future__ import annotations

import asyncio
import os
import re
import stat
from email.utils import formatdate
from pathlib import Path

from fastapi import HTTPException
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

BLOCK_BYTES = 1 << 18

_RANGE = re.compile(r"bytes=\s*(\d*)\s*-\s*(\d*)\s*", re.ASCII | re.IGNORECASE)


class FileRange(Response):
    """A file or one range of it, read as it is sent; ends when the client hangs up.

    The file is opened once: what is told of it and what is sent are of the same one, whatever happens to its name.
    Several ranges in one request are answered with the whole file, as the RFC allows.

    Args:
        path: A regular file.
        media_type: Its content type.
        cache_control: How long a browser may keep it.

    Raises:
        HTTPException: 404 where it cannot be opened.
    """

    def __init__(self, path: Path, media_type: str, cache_control: str) -> None:
        self._path, self.status_code, self.background = path, 200, None
        self._descriptor = _open(path)
        self._stat = os.fstat(self._descriptor)
        self.etag = f'"{self._stat.st_mtime_ns:x}-{self._stat.st_size:x}"'
        self.last_modified = formatdate(self._stat.st_mtime, usegmt=True)
        self.media_type = media_type
        self.init_headers(
            {
                "accept-ranges": "bytes",
                "etag": self.etag,
                "last-modified": self.last_modified,
                "cache-control": cache_control,
                "content-length": str(self._stat.st_size),
            }
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a GET or HEAD."""
        try:
            begin, end = self._choose(Headers(scope=scope))
            start = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
            await send(start)
            if scope["method"] == "HEAD" or self.status_code in {304, 416}:
                await send({"type": "http.response.body", "body": b""})
            else:
                await self._send_until_hung_up(begin, end, receive, send)
        finally:
            os.close(self._descriptor)

    def _choose(self, asked: Headers) -> tuple[int, int]:
        """Set status and headers for what is asked, and return the half-open range to send."""
        size = self._stat.st_size
        if self.etag in re.split(r"\s*,\s*", asked.get("if-none-match", "")):
            self.status_code = 304
            del self.headers["content-length"]
            return 0, 0
        if asked.get("if-range", self.etag) not in {self.etag, self.last_modified}:
            return 0, size
        wanted = parse_range(asked.get("range", ""), size)
        if wanted is None:
            return 0, size
        begin, end = wanted
        self.status_code = 206 if begin < end else 416
        self.headers["content-range"] = f"bytes {begin}-{end - 1}/{size}" if begin < end else f"bytes */{size}"
        self.headers["content-length"] = str(end - begin)
        return begin, end

    async def _send_until_hung_up(self, begin: int, end: int, receive: Receive, send: Send) -> None:
        sending = asyncio.create_task(self._send(begin, end, send))
        hanging_up = asyncio.create_task(wait_for_hang_up(receive))
        try:
            await asyncio.wait({sending, hanging_up}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            hanging_up.cancel()
            sending.cancel()
            # A read may still run in its thread: the descriptor must not be closed under it.
            await asyncio.gather(sending, hanging_up, return_exceptions=True)

    async def _send(self, begin: int, end: int, send: Send) -> None:
        while begin < end:
            block = await _read(self._descriptor, min(BLOCK_BYTES, end - begin), begin)
            if not block:  # cut since: closing the connection is the one way left to say so
                raise ConnectionAbortedError(f"{self._path} became shorter while it was sent")
            begin += len(block)
            await send({"type": "http.response.body", "body": block, "more_body": begin < end})
        if begin == 0:
            await send({"type": "http.response.body", "body": b""})


def parse_range(header: str, size: int) -> tuple[int, int] | None:
    """Return the half-open range of bytes that a Range header asks for; an empty one where there is none such.

    None stands for the whole file: no header, another unit, several ranges, or no range at all in its words.
    """
    match = _RANGE.fullmatch(header.strip())
    if match is None or not (match[1] or match[2]):
        return None
    if not match[1]:
        begin, end = max(0, size - _int(match[2])), size
        return (begin, end) if begin < end else (0, 0)
    begin, last = _int(match[1]), _int(match[2]) if match[2] else size - 1
    if match[2] and last < begin:
        return None
    return (begin, min(last + 1, size)) if begin < size else (0, 0)


async def wait_for_hang_up(receive: Receive) -> None:
    """Return when the client has closed its connection; for after the request's body."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _int(digits: str) -> int:
    # Python refuses to read numbers of thousands of digits; more than any file has is enough.
    return int(digits) if len(digits) < 19 else 10**18


def _open(path: Path) -> int:
    # Without O_NONBLOCK opening a named pipe would wait for a writer.
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError):
        raise HTTPException(404, "the video's file cannot be opened any more") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise HTTPException(404, "the video's file is no regular file")
    return descriptor


async def _read(descriptor: int, num_bytes: int, offset: int) -> bytes:
    reading = asyncio.get_running_loop().run_in_executor(None, os.pread, descriptor, num_bytes, offset)
    try:
        return await asyncio.shield(reading)
    except asyncio.CancelledError:
        await asyncio.wait({reading})
        raise
