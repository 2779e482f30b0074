"""What a server does not let clients do to it: keep its threads, its helpers or its end waiting."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import serving as s
import uvicorn
from clips import make_clip
from messages import heard
from serving import FakeSearcher, Serving
from starlette.types import Message

from svb.errors import UsageError
from svb.retrieve.searching.results import VideoInfo
from svb.retrieve.server import crew as crew_module
from svb.retrieve.server import search_routes
from svb.retrieve.server import serve as serve_module
from svb.retrieve.server.app import make_app
from svb.retrieve.server.crew import Crew
from svb.retrieve.server.kept_files import KeptFiles
from svb.retrieve.server.media import VideoFile
from svb.retrieve.server.options import ServeOptions
from svb.retrieve.server.picture_cache import PictureCache
from svb.retrieve.server.refusals import BusyError
from svb.retrieve.server.tied import start_tied


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clip(tmp_path_factory.mktemp("clips") / "a.mp4", seconds=2)


@pytest.fixture
def served(tmp_path: Path, clip: Path) -> Iterator[Serving]:
    folder = tmp_path / "index"
    folder.mkdir()
    s.commit(folder, 1, {"a": clip})
    FakeSearcher.release.clear()
    FakeSearcher.started = threading.Semaphore(0)
    with s.serving(folder) as serving:
        yield serving


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


def test_a_form_of_no_character_set_is_told_so(served: Serving) -> None:
    body = b'--b\r\nContent-Disposition: form-data; name="kind"\r\n\r\nimage\r\n--b--\r\n'
    headers = {"content-type": "multipart/form-data; boundary=b; charset=undefined"}
    response = served.client.post("/api/search/file", content=body, headers=headers)
    assert response.status_code == 400 and "UTF-8" in response.json()["error"]


@contextlib.contextmanager
def listening(app: Any) -> Iterator[int]:
    """Serve an application as `svb serve` does, on a thread; yields the port."""
    with serve_module._listening("127.0.0.1", 0) as listener:
        server = uvicorn.Server(serve_module._config(app))
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
        thread.start()
        try:
            until = time.monotonic() + 20
            while not server.started and time.monotonic() < until:
                time.sleep(0.01)
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


async def slow_app(scope: Any, receive: Any, send: Any) -> None:
    await asyncio.sleep(0.6)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


def test_a_head_must_come_in_time_and_a_slow_answer_may_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("svb.retrieve.server.http.RECEIVE_SECONDS", 0.3)
    head = b"GET / HTTP/1.1\r\nHost: localhost\r\n"
    with listening(slow_app) as port:

        def connect() -> socket.socket:
            return socket.create_connection(("127.0.0.1", port), timeout=10)

        with connect() as silent, connect() as trickling, connect() as whole:
            whole.sendall(head + b"\r\n")
            with pytest.raises(ConnectionError):  # the server ends it in the middle
                for byte in head + b"X: " + b"a" * 500:
                    trickling.sendall(bytes([byte]))
                    time.sleep(0.02)
            assert silent.recv(100) == b""
            answer = b""
            while not answer.endswith(b"ok"):
                answer += (part := whole.recv(1000))
                assert part, answer
            whole.sendall(head)  # a second one on the same connection, and then no more of it
            assert whole.recv(1000) == b""
        with connect() as endless, contextlib.suppress(ConnectionError):
            endless.sendall(head + b"X: " + b"a" * 200_000)
            assert endless.recv(1000).startswith(b"HTTP/1.1 400")


def test_a_body_must_come_in_time(served: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("svb.retrieve.server.http.RECEIVE_SECONDS", 0.2)
    app = make_app(served.service, served.access)
    sent: list[Message] = []
    parts = [{"type": "http.request", "body": b"{", "more_body": True}]

    async def receive() -> Message:
        if not parts:
            await asyncio.sleep(60)
        return parts.pop()

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {
        **{"type": "http", "method": "POST", "path": "/api/search", "raw_path": b"/api/search", "root_path": ""},
        **{"query_string": b"", "scheme": "http", "client": ("127.0.0.1", 1), "server": ("localhost", 8765)},
        "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
    }
    asyncio.run(asyncio.wait_for(app(scope, receive, send), 10))
    assert sent[0]["status"] == 408 and (b"connection", b"close") in sent[0]["headers"]
    assert b"was not there after 0.2 s" in sent[1]["body"]


def test_a_client_that_hangs_up_is_no_mistake_of_ours(served: Serving) -> None:
    messages = heard()
    app = make_app(served.service, served.access)
    body = b'{"text": "slow"}'

    async def hang_up(parts: list[Message]) -> None:
        async def receive() -> Message:
            if not parts:
                await asyncio.to_thread(FakeSearcher.started.acquire, timeout=5)
                return {"type": "http.disconnect"}
            return parts.pop(0)

        async def send(message: Message) -> None: ...

        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/api/search", "query_string": b"", "headers": headers}
        await app(
            {**scope, "scheme": "http", "server": ("localhost", 1), "client": ("127.0.0.1", 1)}, receive, send
        )

    assert served.client.portal is not None
    for parts in ([{"type": "http.request", "body": body}], [{"type": "http.disconnect"}]):
        served.client.portal.call(hang_up, parts)
    counts = [line for line in served.client.get("/metrics").text.splitlines() if '"/api/search",status=' in line]
    assert counts == ['svb_requests_total{method="POST",route="/api/search",status="499"} 2']
    assert not messages


def test_work_that_nobody_waits_for_does_not_keep_its_helper(
    tmp_path: Path, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crew_module, "GRACE_SECONDS", 0.3)
    os.mkfifo(tmp_path / "out")  # writing to it waits for ever

    async def leave() -> float:
        crew = Crew(1, 2, 60)
        hang = {"source": str(clip), "seconds": 0, "height": 48, "out": str(tmp_path / "out")}
        try:
            hanging = asyncio.create_task(crew.do("poster", **hang))
            await asyncio.sleep(0.5)
            hanging.cancel()
            began = time.monotonic()
            await asyncio.wait_for(crew.do("probe", source=str(clip)), 20)
            return time.monotonic() - began
        finally:
            await crew.close()

    assert asyncio.run(leave()) < 15


def test_the_end_waits_for_no_queue(tmp_path: Path, clip: Path) -> None:
    info = VideoInfo("0" * 16, "a", str(clip), 2.0, {}, 0, 0, "")

    async def end() -> tuple[list[Any], int, int]:
        crew = Crew(1, 100, 30)
        cache = PictureCache(KeptFiles(tmp_path, 10**9), crew)
        file = VideoFile(clip, "0" * 32, info)
        asked = [asyncio.create_task(cache.poster(file, tenth / 10, 48, 0.0)) for tenth in range(20)]
        while not crew._exchanges:
            await asyncio.sleep(0.01)
        await crew.close()
        await cache.close()
        answers = await asyncio.gather(*asked, return_exceptions=True)
        return answers, len(crew._started), sum(isinstance(answer, BusyError) for answer in answers)

    answers, helpers, refused = asyncio.run(end())
    assert not [answer for answer in answers if isinstance(answer, Path)]
    assert helpers == 0 and refused == 19
    assert not list(tmp_path.iterdir())


def test_folders_are_told_without_holding_up_searches() -> None:
    video_ids = ["a", "/root", *(f"deep/{n % 40}/day {n % 97}/{n}" for n in range(100_000)), "few/b"]
    catalog = SimpleNamespace(num_videos=len(video_ids), video_id=video_ids.__getitem__)
    began = time.thread_time()
    folders = search_routes._folders(SimpleNamespace(catalog=catalog))  # type: ignore[arg-type]
    assert time.thread_time() - began < 0.4
    assert len(folders) == 200 and folders[:2] == ["deep", "deep/0"] and "few" not in folders


def test_a_program_is_found_by_its_name() -> None:
    async def run() -> int:
        null = asyncio.subprocess.DEVNULL
        return await (await start_tied("true", stdin=null, stdout=null, stderr=null)).wait()

    assert asyncio.run(run()) == 0


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan")])
def test_a_limit_that_limits_nothing_is_refused(seconds: float) -> None:
    with pytest.raises(UsageError, match="max_upload_seconds"):
        ServeOptions(max_upload_seconds=seconds)
