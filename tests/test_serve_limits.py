"""What a server does not let clients do to it: keep its threads, its workers or its end waiting."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import serving as s
from clips import make_clip
from serving import FakeSearcher, Serving, key_of


@pytest.fixture
def index(tmp_path: Path) -> Path:
    return s.make_index(tmp_path / "index", {"hang": make_clip(tmp_path / "hang.mp4", seconds=2)})


def test_a_question_asks_for_a_limited_amount(served: Serving) -> None:
    most: dict[str, tuple[Any, Any]] = dict.fromkeys(("k", "num_moments", "num_captions"), (1000, 1001))
    most |= dict.fromkeys(("plus", "without", "folders", "where"), (["a=1"] * 32, ["a=1"] * 33))
    for field, (enough, more) in most.items():
        allowed = served.client.post("/api/search", json={"text": "a", field: enough})
        assert allowed.status_code == 200, allowed.text
        form = {"kind": "image", "request": json.dumps({field: more})}
        for refused in (
            served.client.post("/api/search", json={"text": "a", field: more}),
            served.client.post("/api/search/file", data=form, files={"file": ("a.png", b"x")}),
        ):
            assert refused.status_code == 400 and refused.json()["error"].startswith(f"{field} ")


def test_a_head_must_come_in_time_and_a_slow_answer_may_not(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, release = threading.Event(), threading.Event()

    async def slow_app(scope: Any, receive: Any, send: Any) -> None:
        begun.set()
        await asyncio.to_thread(release.wait)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    head = b"GET / HTTP/1.1\r\nHost: localhost\r\n"
    with s.on_a_thread(lambda port: slow_app) as port, s.connect(port) as whole:
        with s.connect(port) as endless, contextlib.suppress(ConnectionError):
            endless.sendall(head + b"X: " + b"a" * 200_000)
            assert endless.recv(1000).startswith(b"HTTP/1.1 400")
        whole.sendall(head + b"\r\n")
        assert begun.wait(600)
        monkeypatch.setattr("svb.retrieve.server.http.RECEIVE_SECONDS", 0.2)
        with s.connect(port) as silent, s.connect(port) as trickling:
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
    with s.serving(index) as served, s.connect(served.port) as client:
        client.sendall(f"GET /media/{key_of('a')} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        assert client.recv(100).startswith(b"HTTP/1.1 200")
        os.truncate(file, 1000)
        received = 100
        with contextlib.suppress(ConnectionError):
            while part := client.recv(1 << 20):
                received += len(part)
        assert received < 60_000_000


def request(path: str, kind: str, num_bytes: int, body: bytes) -> bytes:
    """Return a request that announces so many bytes; its body may have fewer."""
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: {num_bytes}\r\n\r\n"
    return head.encode() + body


def test_a_body_must_come_in_time(served: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("svb.retrieve.server.http.RECEIVE_SECONDS", 0.2)
    answer = s.raw(served.port, request("/api/search", "application/json", 99, b"{"))
    assert answer.startswith(b"HTTP/1.1 408") and b"connection: close" in answer.lower()
    assert b"did not arrive within 0.2 s" in answer


def test_work_that_nobody_waits_for_does_not_keep_its_worker(
    served: Serving, worked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("svb.retrieve.server.child_processes.GRACE_SECONDS", 0.1)
    form = b'--b\r\nContent-Disposition: form-data; name="kind"\r\n\r\nimage\r\n--b\r\n'
    form += b'Content-Disposition: form-data; name="file"; filename="a.png"\r\n\r\nhang\r\n--b--\r\n'
    with s.connect(served.port) as client:
        client.sendall(request("/api/search/file", "multipart/form-data; boundary=b", len(form), form))
        s.until(worked.read_text)
    # There is one worker that embeds: it must have been replaced.
    files = {"file": ("a.png", b"pixels")}
    response = served.client.post("/api/search/file", data={"kind": "image"}, files=files)
    assert response.status_code == 200, response.text


def test_the_end_waits_for_no_queue(index: Path, worked: Path) -> None:
    head = "GET /poster/{}?t={} HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with contextlib.ExitStack() as clients:
        with s.serving(index) as served:
            waiting = [clients.enter_context(s.connect(served.port)) for _ in range(20)]
            for tenth, client in enumerate(waiting):
                client.sendall(head.format(key_of("hang"), tenth / 10).encode())
            s.until(lambda: worked.read_text().count("poster") == 2)
        assert {client.recv(100).split()[1] for client in waiting} == {b"503"}
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
