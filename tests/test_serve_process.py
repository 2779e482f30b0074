"""`svb serve` as a process: how it starts, ends, and what it leaves behind."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import imageio_ffmpeg
import pytest
import synthetic
from clips import make_clip
from conftest import RunSvb
from serving import Server, key_of, running, until

from svb.retrieve.answer import SearchRequest
from svb.retrieve.index import index
from svb.retrieve.search import Searcher
from svb.train.config import TrainConfig
from svb.train.run import train

QUERIES = ("a dog", "a boat", "a guitar and a child")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An index of 20 videos that holds the embeddings of `QUERIES`; `clip000` has a file. Only to be read."""
    folder = tmp_path_factory.mktemp("built")
    config = TrainConfig(embedding_size=16, variant="none", batch_size=16, epochs=1, learning_rate=2e-3)
    with pytest.MonkeyPatch.context() as patch:
        encoder = synthetic.make_text_encoder()
        patch.setattr("svb.retrieve.model.embedder.load_matching_text_encoder", lambda settings, device: encoder)
        real, clip = (
            synthetic.make_record,
            make_clip(folder / "clip000.mp4", seconds=4, size="640x480", fps=25, extra=("-qp", "1")),
        )

        def record(video_id: str, **options: Any) -> Any:
            held = real(video_id, **options)
            if video_id != "clip000":
                return held
            stat = clip.stat()
            changes = {"source_path": str(clip), "size_bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
            return type(held)(**{**held.__dict__, **changes})

        patch.setattr(synthetic, "make_record", record)
        task = synthetic.make_task(folder, num_train=14, num_val=6)
        out = index(train(*task, folder / "run", config), folder / "index")
        for query in QUERIES:
            Searcher(out).embed_text(query)
    yield out


@pytest.fixture
def copied(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "index"))


def post(server: Server, text: str, *, token: str | None = None) -> Any:
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {token}"} if token else {})
    body = json.dumps({"text": text}).encode()
    with urllib.request.urlopen(urllib.request.Request(f"{server.url}/api/search", body, headers)) as answer:
        return json.load(answer)


def test_a_server_answers_and_ends_when_it_is_told_to(copied: Path) -> None:
    announcement = copied / "cache" / "server.json"
    for number in (signal.SIGTERM, signal.SIGINT):
        with running(copied) as server:
            until(announcement.exists)
            held = json.loads(announcement.read_text())
            folder = str(announcement.parent.resolve())
            assert held == {"url": server.url, "pid": server.process.pid, "token": None, "folder": folder}
            assert [result["rank"] for result in post(server, "a dog")["results"]] == list(range(1, 11))
            assert server.stop(number) == (0, "")
        assert not announcement.exists()


def test_the_server_says_what_the_library_says_without_torch(served: Server, built: Path) -> None:
    for query in QUERIES:
        expected = json.loads(json.dumps(Searcher(built).search(SearchRequest(text=query)).as_json()))
        answer = post(served, query)
        assert {**answer, "elapsed_seconds": {}} == {**expected, "elapsed_seconds": {}}
    assert "faiss" in served.memory_maps()
    for heavy in ("/torch/", "/h5py/", "/pandas/", "/scipy/"):
        assert heavy not in served.memory_maps(), heavy


def test_a_port_in_use_is_said_before_anything_else(run_svb: RunSvb, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ran = run_svb("serve", "--index", tmp_path / "none", "--port", port)
    assert ran.exit_code == 1
    assert ran.stderr.startswith(f"svb: port {port} of 127.0.0.1 is in use - ")
    assert "--port" in ran.stderr and not ran.stdout


@pytest.mark.parametrize(
    ("arguments", "exit_code", "words"),
    [
        (("--index", "nowhere"), 1, "svb index"),
        (("--port", "70000"), 2, "70000"),
        (("--host", "192.0.2.1"), 1, "192.0.2.1"),
        (("--host", "no such host"), 1, "no such host"),
        (("--max-upload", "much"), 2, "200MB"),
        (("--max-upload", "9" * 400), 2, "200MB"),
        (("--max-searches", "0"), 2, "max_searches"),
        *((("--max-upload-seconds", seconds), 2, "max_upload_seconds") for seconds in ("0", "-1", "nan")),
        (("--token-file", "nowhere"), 1, "token file"),
    ],
)
def test_what_cannot_be_served_is_told_why(
    run_svb: RunSvb, arguments: tuple[str, ...], exit_code: int, words: str
) -> None:
    ran = run_svb("serve", "--port", "0", *arguments)
    assert ran.exit_code == exit_code
    assert words in ran.stderr
    assert "Traceback" not in ran.stderr


def test_a_damaged_index_is_not_served(run_svb: RunSvb, copied: Path) -> None:
    manifest = copied / "manifest.json"
    whole = manifest.read_text()
    for old, new in (('"moments"', '"momentS"'), ("}", "")):
        manifest.write_text(whole.replace(old, new))
        ran = run_svb("serve", "--index", copied, "--port", "0")
        assert ran.exit_code == 1
        assert "damaged" in ran.stderr and "Traceback" not in ran.stderr
        assert not (copied / "cache" / "server.json").exists()


def test_beyond_this_machine_a_token_is_made_up_and_shown_once(copied: Path) -> None:
    with running(copied, "--host", "0.0.0.0") as server:
        assert server.process.stderr is not None
        token = server.process.stderr.readline().split()[-1]
        assert socket.gethostname() in server.process.stderr.readline()
        assert "ssh tunnel" in server.process.stderr.readline()
        until((copied / "cache" / "server.json").exists)
        held = json.loads((copied / "cache" / "server.json").read_text())
        assert held["token"] == token and held["url"] == f"http://127.0.0.1:{server.port}"
        with pytest.raises(urllib.error.HTTPError) as refused:
            post(server, "a dog")
        assert refused.value.code == 401
        assert post(server, "a dog", token=token)["results"]
        assert server.stop() == (0, "")


@pytest.mark.parametrize(
    "key",
    [
        *("..", "%2e%2e", "..%2fmanifest.json", "../../../../etc/passwd", "..%2f..%2fetc%2fpasswd", "//etc/passwd"),
        *("%00", "..\\..", "x" * 30_000, "clip000", "clip000.mp4", "*", "0" * 16, "%ff%fe", "deep%2Fold"),
    ],
)
def test_only_keys_of_the_index_find_anything(served: Server, key: str) -> None:
    routes = ("/media/{}", "/media/{}/preview", "/poster/{}", "/strip/{}", "/api/videos/{}", "/{}")
    for path in (route.format(key) for route in routes):
        answer = served.raw(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        assert answer.split()[1] in {b"404", b"400", b"307"}, answer[:200]
        assert b"root:" not in answer


@pytest.fixture(scope="module")
def served(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("served") / "index"
    with running(Path(shutil.copytree(built, folder))) as server:
        yield server
        assert server.stop() == (0, "")  # nothing of what the tests did was worth a line in the log


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"POST /api/search HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: 99\r\n\r\n{",
        b"POST /api/search/file HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=b\r\n"
        b'Content-Length: 9999\r\n\r\n--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nxx',
        f"GET /media/{key_of('clip000')} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode(),
        f"GET /media/{key_of('clip000')}/preview HTTP/1.1\r\nHost: localhost\r\n\r\n".encode(),
        b"GET / HTTP/1.1\r\nHos",
    ],
    ids=["in a question", "in a file", "in a video", "in a preview", "in a head"],
)
def test_a_client_that_hangs_up_leaves_no_trace(served: Server, request_bytes: bytes) -> None:
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", served.port)) as connection:
            connection.sendall(request_bytes)
            until(lambda: not served.num_unread(connection))
            # A reset, not a goodbye.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    assert post(served, "a dog")["results"]


@pytest.fixture
def ffmpeg_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let a server's ffmpeg take for ever at its first run; returns the file that gets a line for each run."""
    runs, script = tmp_path / "runs", tmp_path / "ffmpeg"
    real = imageio_ffmpeg.get_ffmpeg_exe()
    script.write_text(f'#!/bin/sh\n[ -e {runs} ] || {{ echo run > {runs}; sleep 1000; }}\nexec {real} "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(script))
    return runs


def test_a_preview_that_nobody_waits_for_ends_and_can_be_asked_for_again(copied: Path, ffmpeg_runs: Path) -> None:
    path = f"/media/{key_of('clip000')}/preview"
    with running(copied) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            until(ffmpeg_runs.exists)
            (ffmpeg,) = [pid for pid in server.children() if "ffmpeg" in _command(pid)]
        # A player often drops its first request and sends another.
        with urllib.request.urlopen(f"{server.url}{path}") as answer:
            assert b"moov" in answer.read()
        assert not _is_running(ffmpeg)


def test_a_server_that_is_busy_ends_when_it_is_told_to(copied: Path, ffmpeg_runs: Path) -> None:
    with running(copied) as server, socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(f"GET /media/{key_of('clip000')}/preview HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        until(ffmpeg_runs.exists)
        children = server.children()
        exit_code, said = server.stop()
        assert exit_code == 0 and "Traceback" not in said
        assert not any(_is_running(pid) for pid in children)
    assert not list((copied / "cache" / "previews").iterdir())


def test_a_killed_server_blocks_nothing(copied: Path) -> None:
    with running(copied) as first:
        assert not first.children()  # workers start when they are needed
        urllib.request.urlopen(f"{first.url}/poster/{key_of('clip000')}").read()
        helpers = first.children()
        assert helpers
        first.process.kill()
        first.process.wait()
        until(lambda: not any(_is_running(pid) for pid in helpers))
        assert (copied / "cache" / "server.json").exists()
        with running(copied, "--port", str(first.port)) as second:
            until(lambda: json.loads((copied / "cache" / "server.json").read_text())["pid"] == second.process.pid)
            assert post(second, "a dog")["results"]
            assert second.stop() == (0, "")
    assert not (copied / "cache" / "server.json").exists()


def test_an_index_that_cannot_be_written_is_served(copied: Path) -> None:
    shutil.rmtree(copied / "cache")
    (copied / "cache").write_text("in the way")
    with running(copied) as server:
        with urllib.request.urlopen(f"{server.url}/poster/{key_of('clip000')}?t=1") as answer:
            assert answer.read().startswith(b"\xff\xd8")
        assert server.stop() == (0, "")


@pytest.mark.slow
def test_pictures_and_clips_are_embedded_by_a_helper(
    extracted_store: Path, clips_folder: Path, tmp_path: Path
) -> None:
    """A span of a clip is like that clip, a frame scores as the library has it; the server loads no torch."""
    out = index(extracted_store, tmp_path / "index")
    library = Searcher(out)
    (tmp_path / "noise.png").write_bytes(b"no picture")
    make_clip(tmp_path / "long.mp4", seconds=30)
    with (
        running(out, "--max-upload-seconds", "20") as server,
        httpx2.Client(base_url=server.url, timeout=300) as client,
    ):
        for clip in (clips_folder / "a.mp4", clips_folder / "deep" / "d.avi"):
            video_id = str(clip.relative_to(clips_folder).with_suffix(""))
            request = '{"span_seconds": [0, 1], "fold": false}'
            answer = _post_file(client, clip, kind="video", request=request).json()
            assert answer["request"] == {"video": clip.name, "span_seconds": [0, 1], "fold": False}
            assert _score_of(video_id, answer) > 0.9
            (tmp_path / "frame.jpg").write_bytes(client.get(f"/poster/{key_of(video_id)}?t=0&h=720").content)
            answer = _post_file(client, tmp_path / "frame.jpg", kind="image", request='{"fold": false}').json()
            expected = library.search(SearchRequest(image=str(tmp_path / "frame.jpg"), fold=False))
            for result in expected.results:
                assert _score_of(result.video_id, answer) == pytest.approx(result.score, abs=1e-2)
        for file, kind, words in (("noise.png", "image", "noise.png"), ("long.mp4", "video", "up to 20 s")):
            refused = _post_file(client, tmp_path / file, kind=kind)
            assert refused.status_code == 400
            assert words in refused.json()["error"] and "svb-upload" not in refused.json()["error"]
        assert "/torch/" not in server.memory_maps()
        # The helper has an engine: torch, or ONNX Runtime where the cache holds the graph already.
        loaded = [Path(f"/proc/{pid}/maps").read_text() for pid in server.children()]
        assert any("/torch/" in maps or "/onnxruntime/" in maps for maps in loaded)
        assert server.stop() == (0, "")


def _score_of(video_id: str, answer: Any) -> float:
    return {result["video_id"]: result["score"] for result in answer["results"]}[video_id]


def _post_file(client: httpx2.Client, file: Path, **fields: str) -> httpx2.Response:
    return client.post("/api/search/file", data=fields, files={"file": (file.name, file.read_bytes())})


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
