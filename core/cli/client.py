"""A client of the server that keeps an index open, so that `svb search` imports nothing heavy.

It speaks HTTP over a plain socket: importing `http.client`, with the mail and encryption modules it imports, costs
as much as the rest of a search through a server.
"""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from svb.retrieve.answer import Answer, SearchRequest

CONNECT_SECONDS = 0.5
# A warm server answers a text within milliseconds; a long video is decoded and embedded first.
ANSWER_SECONDS = 30.0
FILE_ANSWER_SECONDS = 600.0
MAX_ANSWER_BYTES = 256 * 2**20
BLOCK_BYTES = 2**20
BOUNDARY = "svb-query-file-0c5d1f4e9b7a"


@dataclass(frozen=True)
class RunningServer:
    """A server on this machine that says it has an index open.

    Attributes:
        host: A loopback address.
        port: The port it listens on.
        token: The token it asks for, if any.
    """

    host: str
    port: int
    token: str | None

    @property
    def url(self) -> str:
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"

    def search(self, request: SearchRequest) -> Answer | None:
        """Return its answer, or None if it gives none: the caller can still search by itself."""
        file = request.image or request.video
        try:
            if file is None:
                body = json.dumps(request.as_json()).encode()
                held = self._post("/api/search", "application/json", len(body), iter([body]), ANSWER_SECONDS)
            else:
                held = self._post_file(Path(file), request)
            # The server knows the file by another path than the request here.
            return None if held is None else Answer.from_json({**json.loads(held), "request": request.as_json()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None  # it is gone, has another version, or is another program

    def _post_file(self, file: Path, request: SearchRequest) -> bytes | None:
        kind = "video" if request.image is None else "image"
        rest = {name: value for name, value in request.as_json().items() if name != kind}
        fields = {"kind": kind, "request": json.dumps(rest)}
        parts = [
            f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
            for name, value in fields.items()
        ]
        # The server only uses the ending of the name.
        named = f'name="file"; filename="query{re.sub("[^.A-Za-z0-9]", "", file.suffix)}"'
        parts.append(
            f"--{BOUNDARY}\r\nContent-Disposition: form-data; {named}\r\n"
            "Content-Type: application/octet-stream\r\n\r\n"
        )
        before, after = "".join(parts).encode(), f"\r\n--{BOUNDARY}--\r\n".encode()
        length = len(before) + file.stat().st_size + len(after)
        kind_of_body = f"multipart/form-data; boundary={BOUNDARY}"
        body = _body_of_file(before, file, after)
        return self._post("/api/search/file", kind_of_body, length, body, FILE_ANSWER_SECONDS)

    def _post(self, path: str, kind: str, length: int, body: Iterator[bytes], seconds: float) -> bytes | None:
        """Return the body of the answer, None if the server refuses."""
        head = [f"POST {path} HTTP/1.0", f"Host: {self.host}:{self.port}", f"Content-Type: {kind}"]
        head += [f"Content-Length: {length}", "Accept: application/json", "Connection: close"]
        if self.token:
            head.append(f"Authorization: Bearer {self.token}")
        with socket.create_connection((self.host, self.port), timeout=CONNECT_SECONDS) as connection:
            connection.settimeout(seconds)
            # Otherwise the body would wait until the server has acknowledged the header.
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.sendall("\r\n".join([*head, "", ""]).encode())
            for block in body:
                connection.sendall(block)
            return _body_of_answer(connection)


def running_server(index: Path) -> RunningServer | None:
    """Return the server that has an index open, if this user runs one on this machine.

    The index's `cache/server.json` names it. That file counts only while the server's process lives, in the folder
    where it was written, and with an address of this machine. So a copy of an index does not ask the server of the
    original, and an index from elsewhere cannot send queries anywhere.
    """
    cache = index / "cache"
    try:
        held = json.loads((cache / "server.json").read_text("utf-8"))
        match = re.fullmatch(r"http://\[?([0-9A-Za-z.:]+?)\]?:(\d{1,5})/?", held["url"])
        os.kill(_process(held["pid"]), 0)
        token = held.get("token")
        if held["folder"] != str(cache.resolve()):
            return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None
    if match is None or not (match[1] in ("localhost", "::1") or re.fullmatch(r"127(\.\d+){3}", match[1])):
        return None
    if token is not None and not (isinstance(token, str) and token.isascii() and token.isprintable()):
        return None
    return RunningServer(match[1], int(match[2]), token)


def _process(pid: object) -> int:
    # 0 and negative numbers name groups of processes.
    if not isinstance(pid, int) or pid < 1:
        raise ValueError(f"{pid!r} is not a process id")
    return pid


def _body_of_file(before: bytes, file: Path, after: bytes) -> Iterator[bytes]:
    yield before
    with file.open("rb") as held:
        while block := held.read(BLOCK_BYTES):
            yield block
    yield after


def _body_of_answer(connection: socket.socket) -> bytes | None:
    """Return the body of an answer, None unless its status is 200."""
    received = bytearray()
    while block := connection.recv(BLOCK_BYTES):
        received += block
        if len(received) > MAX_ANSWER_BYTES:
            return None
    head, _, body = bytes(received).partition(b"\r\n\r\n")
    return body if re.match(rb"HTTP/1\.[01] 200\b", head) else None
