"""What a server does not let clients do to it: keep its threads, its workers or its end waiting."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import serving as s
from clips import make_clip
from messages import heard
from serving import FakeSearcher, Serving, key_of
from starlette.types import Message

from svb.retrieve.serve import listening, make_server


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clip(tmp_path_factory.mktemp("clips") / "hang.mp4", seconds=2)


@pytest.fixture
def index(tmp_path: Path, clip: Path) -> Path:
    return s.make_index(tmp_path / "index", {"hang": clip})


@pytest.mark.parametrize(
    ("field", "most", "more"),
    [
        *((name, ["a=1"] * 32, ["a=1"] * 33) for name in ("plus", "without", "folders", "where")),
        *((name, 1000, 1001) for name in ("k", "num_moments", "num_captions")),
    ],
)
def test_a_question_asks_for_a_limited_amount(served: Serving, field: str, most: Any, more: Any) -> None:
    for asked, status in ((most, 200), (more, 400)):
        response = served.client.post("/api/search", json={"text": "a", field: asked})
        assert response.status_code == status, response.text
    assert response.json()["error"].startswith(f"{field} ")
    form = {"kind": "image", "request": f'{{"{field}": {str(more).replace(chr(39), chr(34))}}}'}
    refused = served.client.post("/api/search/file", data=form, files={"file": ("a.png", b"x")})
    assert refused.status_code == 400 and refused.json()["error"].startswith(f"{field} ")


@contextlib.contextmanager
def running(app: Any) -> Iterator[Callable[[], socket.socket]]:
    """Serve an application as `svb serve` does, on a thread; yields what connects to it."""
    with listening("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP  # asyncio looks at it before it sets TCP_NODELAY
        server = make_server(app)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
        thread.start()
        try:
            yield lambda: socket.create_connection(listener.getsockname(), timeout=600)
        finally:
            server.should_exit = True
            thread.join(600)
            assert not thread.is_alive()


def test_a_head_must_come_in_time_and_a_slow_answer_may_not(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, release = threading.Event(), threading.Event()

    async def slow_app(scope: Any, receive: Any, send: Any) -> None:
        begun.set()
        await asyncio.to_thread(release.wait)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    head = b"GET / HTTP/1.1\r\nHost: localhost\r\n"
    with running(slow_app) as connect, connect() as whole:
        with connect() as endless, contextlib.suppress(ConnectionError):
            endless.sendall(head + b"X: " + b"a" * 200_000)
            assert endless.recv(1000).startswith(b"HTTP/1.1 400")
        whole.sendall(head + b"\r\n")
        assert begun.wait(600)
        monkeypatch.setattr("svb.retrieve.server.http.RECEIVE_SECONDS", 0.2)
        with connect() as silent, connect() as trickling:
            with contextlib.suppress(ConnectionError):  # the server ends it in the middle
                trickling.sendall(head + b"X: ")
                while True:
                    trickling.sendall(b"a")
                    time.sleep(0.02)
            assert silent.recv(100) == b""
        release.set()  # the answer took longer than a head may
        answer = b""
        while not answer.endswith(b"ok"):
            answer += (part := whole.recv(1000))
            assert part, answer
        with contextlib.suppress(ConnectionError):  # it may have ended before
            whole.sendall(head)  # a second one on the same connection, and then no more of it
            assert whole.recv(1000) == b""


def test_a_file_cut_while_it_is_sent_ends_the_connection(index: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.mp4"
    with file.open("wb") as out:
        out.truncate(60_000_000)
    s.commit(index, 1, {"a": file})
    with s.serving(index) as served, running(served.app) as connect, connect() as client:
        client.sendall(f"GET /media/{key_of('a')} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        assert client.recv(100).startswith(b"HTTP/1.1 200")
        os.truncate(file, 1000)
        received = 100
        with contextlib.suppress(ConnectionError):
            while part := client.recv(1 << 20):
                received += len(part)
        assert received < 60_000_000


def post(
    served: Serving, path: str, *parts: Message, then: Callable[[], object], kind: str = "application/json"
) -> list[Message]:
    """Post a request in parts, hang up when `then` returns, and return what the server sent."""
    sent: list[Message] = []
    waiting = [*parts]

    async def receive() -> Message:
        if waiting:
            return waiting.pop(0)
        await asyncio.to_thread(then)
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {
        **{"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "root_path": ""},
        **{"query_string": b"", "scheme": "http", "client": ("127.0.0.1", 1), "server": ("localhost", 8765)},
        "headers": [(b"host", b"localhost"), (b"content-type", kind.encode())],
    }
    assert served.client.portal is not None
    served.client.portal.call(served.app, scope, receive, send)
    return sent


def body(content: bytes, *, more: bool = False) -> Message:
    return {"type": "http.request", "body": content, "more_body": more}


def test_a_body_must_come_in_time(served: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("svb.retrieve.server.http.RECEIVE_SECONDS", 0.2)
    enough = threading.Event()
    sent = post(served, "/api/search", body(b"{", more=True), then=lambda: enough.wait(600))
    enough.set()
    assert sent[0]["status"] == 408 and (b"connection", b"close") in sent[0]["headers"]
    assert b"did not arrive within 0.2 s" in sent[1]["body"]


def test_a_client_that_hangs_up_is_no_error_of_ours(served: Serving) -> None:
    messages = heard()
    post(served, "/api/search", body(b'{"text": "slow"}'), then=lambda: FakeSearcher.started.acquire(timeout=600))
    post(served, "/api/search", then=lambda: None)
    counts = [line for line in served.client.get("/metrics").text.splitlines() if '"/api/search",status=' in line]
    assert counts == ['svb_requests_total{method="POST",route="/api/search",status="499"} 2']
    assert not messages


def test_work_that_nobody_waits_for_does_not_keep_its_worker(
    served: Serving, worked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("svb.retrieve.server.child_processes.GRACE_SECONDS", 0.1)
    form = b'--b\r\nContent-Disposition: form-data; name="kind"\r\n\r\nimage\r\n--b\r\n'
    form += b'Content-Disposition: form-data; name="file"; filename="a.png"\r\n\r\nhang\r\n--b--\r\n'
    kind = "multipart/form-data; boundary=b"
    post(served, "/api/search/file", body(form), then=lambda: s.until(worked.read_text), kind=kind)
    # There is one worker that embeds: it must have been replaced.
    files = {"file": ("a.png", b"pixels")}
    response = served.client.post("/api/search/file", data={"kind": "image"}, files=files)
    assert response.status_code == 200, response.text


def test_the_end_waits_for_no_queue(index: Path, worked: Path) -> None:
    statuses: list[int] = []
    with s.serving(index) as served:

        def ask_for_poster(tenth: int) -> None:
            statuses.append(served.client.get(f"/poster/{key_of('hang')}?t={tenth / 10}").status_code)

        threads = [threading.Thread(target=ask_for_poster, args=(tenth,)) for tenth in range(20)]
        for thread in threads:
            thread.start()
        s.until(lambda: worked.read_text().count("poster") == 2)
        assert served.client.portal is not None
        served.client.portal.call(served.state.close)
        for thread in threads:
            thread.join(600)
    assert statuses == [503] * 20
    assert worked.read_text().count("poster") == 2
    assert not list((index / "cache" / "pictures").iterdir())


def test_folders_are_told_without_looking_at_millions_of_videos(index: Path) -> None:
    video_ids = ["a", "/root", *(f"deep/{n % 40}/day {n % 97}/{n}" for n in range(300_000)), "few/b"]
    looked_at: list[int] = []

    class Large(FakeSearcher):
        def __init__(self, path: Path) -> None:
            super().__init__(path)
            self.catalog = SimpleNamespace(num_videos=len(video_ids), video_id=self.tell)

        def tell(self, row: int) -> str:
            looked_at.append(row)
            return video_ids[row]

    with s.serving(index, open_searcher=lambda previous: Large(index)) as served:
        folders = [served.client.get("/api/index").json()["folders"] for _ in range(2)]
    assert folders[0] == folders[1] and len(folders[0]) == 200
    assert folders[0][:2] == ["deep", "deep/0"] and "few" not in folders[0]
    assert len(looked_at) == 200_000
