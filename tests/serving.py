"""What tests of the server share: an index that answers without a model, and the server around it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import httpx2
import imageio_ffmpeg
import pytest

from svb.data.description import publish_description
from svb.retrieve import serve
from svb.retrieve.answer import Answer, Moment, SearchRequest, VideoResult
from svb.retrieve.searching.results import VideoInfo
from svb.retrieve.server import child_processes
from svb.retrieve.server.access import Access
from svb.retrieve.server.app import make_app
from svb.retrieve.server.options import ServeOptions
from svb.retrieve.server.state import ServerState
from svb.retrieve.stored.manifest import FORMAT_VERSION, read_manifest


def key_of(video_id: str) -> str:
    return hashlib.sha256(video_id.encode()).hexdigest()[:16]


def commit(folder: Path, generation: int, videos: dict[str, Path]) -> None:
    """Write a manifest for a fake index; it holds the videos, where a real one names segments."""
    manifest = {
        "format": "svb index",
        "generation": generation,
        "model": {"kind": "fake"},
        "model_fingerprint": "fake",
        "videos": len(videos),
        "moments_total": 2 * len(videos),
        "metadata": [{"columns": {"place": "text"}}],
        "captions": [],
        "held": {video_id: [str(path), *_state(path)] for video_id, path in videos.items()},
    }
    publish_description(folder / "manifest.json", manifest, format_version=FORMAT_VERSION)


def _state(path: Path) -> tuple[int, int, str]:
    """Return size, time and hash as a store holds them; only a regular file is read."""
    if not path.exists():
        return 1, 1, ""
    content_hash = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
    return path.stat().st_size, path.stat().st_mtime_ns, content_hash


def make_index(folder: Path, videos: dict[str, Path]) -> Path:
    """Make a fake index of the videos, at its first generation."""
    folder.mkdir()
    commit(folder, 1, videos)
    FakeSearcher.release.clear()
    FakeSearcher.started = threading.Semaphore(0)
    return folder


def until(condition: Callable[[], object]) -> None:
    """Wait for what has to come; a test that waits for ten minutes has failed."""
    end = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)


def use_odd_workers(patch: pytest.MonkeyPatch, folder: Path) -> Path:
    """Let `odd_worker` do the work of the servers in this process; returns its log."""
    log = folder / "worker.log"
    log.touch()
    patch.setenv("ODD_WORKER_LOG", str(log))
    patch.setattr(child_processes, "WORKER", (str(Path(__file__).with_name("odd_worker.py")),))
    return log


@pytest.fixture
def encoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the log of an ffmpeg, found by its name, that logs each run and waits for a file `release`."""
    log, ffmpeg = tmp_path / "ffmpeg.log", tmp_path / "bin" / "slow-ffmpeg"
    ffmpeg.parent.mkdir()
    wait = f"while [ ! -e {tmp_path}/release ]; do sleep 0.05; done"
    ffmpeg.write_text(f'#!/bin/sh\necho run >> {log}\n{wait}\nexec {imageio_ffmpeg.get_ffmpeg_exe()} "$@"\n')
    ffmpeg.chmod(0o755)
    log.touch()
    monkeypatch.setenv("PATH", f"{ffmpeg.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", ffmpeg.name)
    return log


class FakeSearcher:
    """Answers with all videos of its manifest, in the order of their names.

    A search for `slow` releases `started`, and then waits for `release`.
    """

    release, started = threading.Event(), threading.Semaphore(0)

    def __init__(self, path: Path) -> None:
        self.path, self.manifest = path, read_manifest(path)
        self.generation = self.manifest["generation"]
        self._held = self.manifest["held"]
        self._ids = sorted(self._held)
        self.catalog = SimpleNamespace(num_videos=len(self._ids), video_id=self._ids.__getitem__)

    def video(self, key: str) -> VideoInfo | None:
        for video_id, (path, *state) in self._held.items():
            if key_of(video_id) == key:
                return VideoInfo(key, video_id, path, 2.0, {"place": "here"}, *state)
        return None

    def search(self, request: SearchRequest) -> Answer:
        if request.text == "slow":
            FakeSearcher.started.release()
            assert FakeSearcher.release.wait(600)
        if request.text == "broken":
            raise ZeroDivisionError("a bug")
        moments = (Moment(0.0, 1.0, 0.5, 0.5),)
        results = [
            VideoResult(rank, 0.5, "fair", video_id, key_of(video_id), self._held[video_id][0], 2.0, moments)
            for rank, video_id in enumerate(self._ids[: request.k], start=1)
        ]
        held = {"num_videos": len(self._ids), "num_windows": 2 * len(self._ids), "generation": self.generation}
        return Answer(request, tuple(results), (), "fair", exact=True, recall=None, elapsed_seconds={}, **held)

    def search_embedding(self, embedding: Any, request: SearchRequest) -> Answer:
        return self.search(request)


class Serving(NamedTuple):
    """A server on a thread, and a client of it."""

    folder: Path
    port: int
    client: httpx2.Client


@contextlib.contextmanager
def serving(
    folder: Path,
    *,
    token: str | None = None,
    is_loopback: bool = True,
    open_searcher: Callable[[Any], Any] | None = None,
    **options: Any,
) -> Iterator[Serving]:
    """Serve an index, a fake one unless `open_searcher` opens another."""
    cache = folder / "cache"
    cache.mkdir(exist_ok=True)
    state = ServerState(
        folder, cache, open_searcher or (lambda previous: FakeSearcher(folder)), ServeOptions(**options)
    )

    def app_at(port: int) -> Any:
        return make_app(state, Access(token, is_loopback=is_loopback, port=port, public_url=state.options.public))

    with pytest.MonkeyPatch.context() as patch, on_a_thread(app_at, state.close) as port:
        # A busy machine may take longer to open a generation than a server's clients are asked to wait.
        patch.setattr("svb.retrieve.server.state.PATIENCE_SECONDS", 600)
        try:
            with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=600) as client:
                yield Serving(folder, port, client)
        finally:
            FakeSearcher.release.set()


@contextlib.contextmanager
def on_a_thread(app_at: Callable[[int], Any], close: Callable[[], Any] | None = None) -> Iterator[int]:
    """Serve the application of a port as `svb serve` does, on a thread; yields the port."""
    with serve.listening("127.0.0.1", 0) as listener, pytest.MonkeyPatch.context() as patch:
        assert listener.proto == socket.IPPROTO_TCP  # asyncio looks at it before it sets TCP_NODELAY
        patch.setattr(serve, "LAST_SECONDS", 1)
        port = listener.getsockname()[1]
        server = serve.make_server(app_at(port))

        async def run() -> None:
            try:
                await server.serve(sockets=[listener])
            finally:
                if close is not None:
                    await close()

        thread = threading.Thread(target=lambda: asyncio.run(run()))
        thread.start()
        try:
            yield port
        finally:
            server.should_exit = True
            thread.join(600)
            assert not thread.is_alive()


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=600)


def raw(port: int, request: bytes) -> bytes:
    """Send bytes as they are and return what comes until the server closes."""
    with connect(port) as connection:
        connection.sendall(request)
        return b"".join(iter(lambda: connection.recv(1 << 16), b""))


class Server:
    """A real `svb serve` in a process of its own."""

    def __init__(self, index: Path, *arguments: str, svb: tuple[str, ...] = (sys.executable, "-m", "svb")) -> None:
        command = [*svb, "serve", "--index", str(index), "--port", "0", *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        self.greeting = self.process.stderr.readline()
        match = re.search(r"http://\S+:(\d+)", self.greeting)
        assert match is not None, self.greeting + self.process.stderr.read()
        self.url, self.port = match[0], int(match[1])

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Send a signal; return the exit status and what was said on stderr after the first line."""
        self.process.send_signal(number)
        stdout, stderr = self.process.communicate(timeout=600)
        assert not stdout
        return self.process.returncode, stderr

    def children(self) -> list[int]:
        """Return the processes that it started."""
        tasks = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        return [int(pid) for task in tasks for pid in task.read_text().split()]

    def memory_maps(self) -> str:
        return Path(f"/proc/{self.process.pid}/maps").read_text()

    def num_unread(self, client: socket.socket) -> int:
        """Return how many bytes of a client the server has not read yet."""
        ends = f"0100007F:{self.port:04X} 0100007F:{client.getsockname()[1]:04X}"
        (queue,) = re.findall(rf"{ends} \S+ \S+:(\S+)", Path("/proc/net/tcp").read_text())
        return int(queue, 16)


@contextlib.contextmanager
def running(index: Path, *arguments: str, **how: Any) -> Iterator[Server]:
    server = Server(index, *arguments, **how)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.communicate()
