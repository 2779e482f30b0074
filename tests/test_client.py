"""The client of a server that has the index open: whom it believes, what it sends, and when it does without."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request

from svb.cli.client import RunningServer, running_server
from svb.retrieve.answer import Answer, CaptionResult, Moment, SearchRequest, VideoResult

HEAVY = {
    *("torch", "numpy", "h5py", "faiss", "pandas", "av", "PIL", "onnxruntime", "tokenizers", "http.client", "ssl")
}


def make_answer() -> dict[str, Any]:
    moments = (Moment(0.0, 4.0, 2.0, 0.4),)
    results = tuple(
        VideoResult(n, 0.4, "fair", f"v{n}", "0" * 16, f"/videos/v{n}.mp4", 9.5, moments) for n in (1, 2)
    )
    captions = (CaptionResult(1, 0.5, "a dog", "training"),)
    asked = SearchRequest(text="what the server thinks it was")
    return Answer(asked, results, captions, "fair", 2, 4, True, None, 3, {"total": 0.01}).as_json()


@dataclass
class Stub:
    """A server that answers every request alike, and keeps what it was sent."""

    port: int = 0
    status: int = 200
    body: bytes = b""
    seen: list[tuple[str, Message, bytes]] = field(default_factory=list)


@pytest.fixture
def stub() -> Iterator[Stub]:
    stub = Stub(body=json.dumps(make_answer()).encode())

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            stub.seen.append((self.path, self.headers, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(stub.status)
            self.send_header("Content-Length", str(len(stub.body)))
            self.end_headers()
            self.wfile.write(stub.body)

        def log_message(self, *arguments: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        stub.port = server.server_port
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield stub
        server.shutdown()


def announce(index: Path, port: int, **changes: object) -> Path:
    """Write what a server leaves in the cache of its index; returns the index."""
    (index / "cache").mkdir(parents=True, exist_ok=True)
    folder = str((index / "cache").resolve())
    held = {"url": f"http://127.0.0.1:{port}", "pid": os.getpid(), "token": None, "folder": folder, **changes}
    (index / "cache" / "server.json").write_text(json.dumps(held))
    return index


def ask(index: Path, request: SearchRequest | None = None) -> Answer | None:
    """Ask the server that an index announces."""
    server = running_server(index)
    assert server is not None
    return server.search(request or SearchRequest(text="a"))


def test_a_text_is_posted_and_answered(stub: Stub, tmp_path: Path) -> None:
    request = SearchRequest(text="a dög", plus=("x",), k=3)
    answer = ask(announce(tmp_path, stub.port, token="secret-1"), request)
    assert answer is not None and answer.request == request
    assert [result.video_id for result in answer.results] == ["v1", "v2"] and answer.generation == 3
    ((path, headers, body),) = stub.seen
    assert (path, json.loads(body)) == ("/api/search", {"text": "a dög", "plus": ["x"], "k": 3})
    assert headers["Authorization"] == "Bearer secret-1" and headers["Content-Type"] == "application/json"


@pytest.mark.parametrize("kind", ["image", "video"])
def test_a_file_is_uploaded_as_a_form(stub: Stub, tmp_path: Path, kind: str) -> None:
    content = os.urandom(3 * 2**20) + b"\r\n--\r\n"
    file = tmp_path / 'od"d\nname.MP4'
    file.write_bytes(content)
    request = SearchRequest(**{kind: str(file)}, k=4, span_seconds=(1.0, 2.5) if kind == "video" else None)
    answer = ask(announce(tmp_path, stub.port), request)
    assert answer is not None and answer.request == request
    ((path, headers, body),) = stub.seen
    assert path == "/api/search/file" and headers["Authorization"] is None

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body}

    async def read() -> None:
        """Read it as the server does."""
        sent = [(b"content-type", headers["Content-Type"].encode())]
        async with Request({"type": "http", "headers": sent}, receive).form() as form:
            span = {"span_seconds": [1.0, 2.5]} if kind == "video" else {}
            assert json.loads(form["request"]) == {**span, "k": 4} and form["kind"] == kind
            assert set(form) == {"kind", "request", "file"}
            assert (form["file"].filename, await form["file"].read()) == ("query.MP4", content)

    asyncio.run(read())


def test_a_refusal_or_an_answer_that_makes_no_sense_is_done_without(stub: Stub, tmp_path: Path) -> None:
    announce(tmp_path, stub.port)
    bodies = (b"", b"{", b"[]", b"null", b'"x"', b"{}", b'{"results": 3}', b"\xff", b'{"results": [{"rank": 1}]}')
    refused = [(status, b'{"error": "no"}') for status in (400, 401, 404, 413, 415, 429, 500, 503)]
    for stub.status, stub.body in [*refused, *((200, body) for body in bodies)]:
        assert ask(tmp_path) is None
    assert len(stub.seen) == 17


def test_nobody_there_or_what_speaks_otherwise_is_done_without(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        announce(tmp_path, listening.getsockname()[1])
        for says in (b"", b"SSH-2.0-OpenSSH_9.6\r\n", b"HTTP/1.1 200 OK\r\n\r\n"):

            def answer(says: bytes = says) -> None:
                with listening.accept()[0] as connection:
                    connection.sendall(says)

            threading.Thread(target=answer, daemon=True).start()
            assert ask(tmp_path) is None
    assert ask(tmp_path) is None
    assert ask(tmp_path, SearchRequest(image=str(tmp_path / "none.png"))) is None


def test_what_cannot_be_this_users_server_is_not_believed(tmp_path: Path) -> None:
    assert running_server(tmp_path) is None
    for changes in (
        *({"pid": pid} for pid in (2**22 + 5, 0, -1, "1", 10**30)),  # the first is past the largest of Linux
        *({"url": f"http://{host}:80"} for host in ("example.org", "127.0.0.1.example.org", "10.0.0.1")),
        *({"url": url} for url in ("https://127.0.0.1:80", "http://127.0.0.1", "http://127.0.0.1:80@example.org")),
        {"url": None},
        *({"token": token} for token in (3, "a\r\nHost: b", "ü")),
    ):
        assert running_server(announce(tmp_path, 80, **changes)) is None, changes
    for damaged in (b"", b"{", b"[]", b"3", b"\xff", b'{"url": "http://127.0.0.1:80"}'):
        (tmp_path / "cache" / "server.json").write_bytes(damaged)
        assert running_server(tmp_path) is None, damaged


def test_a_copy_of_an_index_is_not_answered_for_by_the_server_of_the_original(tmp_path: Path) -> None:
    original = announce(tmp_path / "original", 80)
    assert running_server(original) is not None
    assert running_server(Path(shutil.copytree(original, tmp_path / "copy"))) is None
    (tmp_path / "link").symlink_to(original)
    assert running_server(tmp_path / "link") is not None


def test_another_loopback_address_is_this_machine(tmp_path: Path) -> None:
    assert running_server(announce(tmp_path, 0, url="http://[::1]:81/")) == RunningServer("::1", 81, None)
    assert running_server(announce(tmp_path, 0, url="http://localhost:81")) == RunningServer("localhost", 81, None)
    assert RunningServer("::1", 81, None).url == "http://[::1]:81"


def test_a_search_through_a_server_imports_nothing_heavy(stub: Stub, tmp_path: Path) -> None:
    announce(tmp_path, stub.port)
    commands = [["search", "a dog", *how, "--index", str(tmp_path)] for how in ([], ["--json"], ["--paths"])]
    code = f"import sys; from svb.cli import run; assert not any(map(run, {commands!r}))"
    code += "; print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.count("/videos/v1.mp4") >= 2 and done.stderr.count("by the server at") == 3
    loaded = set(done.stderr.splitlines()[-1].split())
    assert "svb.cli.client" in loaded and not loaded & HEAVY
