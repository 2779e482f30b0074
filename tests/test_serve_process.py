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
import pytest
import serving
import shown
from clips import make_clip
from conftest import RunSvb
from serving import Server, connect, key_of, raw, running, until
from shown import Shown

from svb.retrieve.answer import SearchRequest
from svb.retrieve.index import index
from svb.retrieve.search import Searcher

STARS = {"camera": "X100", "stars": "5"}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of `clip` and of 40 videos that are gone. Only to be read."""
    folder = tmp_path_factory.mktemp("built")
    clip = make_clip(folder / "clip.avi", seconds=4, size="640x480", fps=25, codec=("-c:v", "mpeg4", "-q:v", "1"))
    return shown.make_index(folder / "index", {"clip": Shown(clip, 4, {"boat": (2.0, 0.8)}, STARS)})


@pytest.fixture
def copied(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "index"))


def post(server: Server, *, token: str | None = None) -> Any:
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {token}"} if token else {})
    body = json.dumps({"like": "clip"}).encode()
    with urllib.request.urlopen(urllib.request.Request(f"{server.url}/api/search", body, headers)) as answer:
        return json.load(answer)


def test_a_server_answers_and_ends_when_it_is_told_to(copied: Path) -> None:
    announcement = copied / "cache" / "server.json"
    for number, is_replaced in ((signal.SIGTERM, False), (signal.SIGINT, True)):
        with running(copied) as server:
            until(announcement.exists)
            held = json.loads(announcement.read_text())
            folder = str(announcement.parent.resolve())
            assert held == {"url": server.url, "pid": server.process.pid, "token": None, "folder": folder}
            assert [result["rank"] for result in post(server)["results"]] == list(range(1, 11))
            if is_replaced:
                announcement.write_text('{"pid": 1}')  # a later server's
            assert server.stop(number) == (0, "")
        assert announcement.exists() == is_replaced


def test_the_server_says_what_the_library_says_without_torch(served: Server, built: Path) -> None:
    expected = json.loads(json.dumps(Searcher(built).search(SearchRequest(like="clip")).as_json()))
    assert {**post(served), "elapsed_seconds": {}} == {**expected, "elapsed_seconds": {}}
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
    assert ran.exit_code == exit_code and words in ran.stderr and "Traceback" not in ran.stderr


def test_a_damaged_index_is_not_served(run_svb: RunSvb, copied: Path) -> None:
    manifest = copied / "manifest.json"
    whole = manifest.read_text()
    for old, new in (('"moments"', '"momentS"'), ("}", "")):
        manifest.write_text(whole.replace(old, new))
        ran = run_svb("serve", "--index", copied, "--port", "0")
        assert ran.exit_code == 1 and "damaged" in ran.stderr and "Traceback" not in ran.stderr
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
            post(server)
        assert refused.value.code == 401
        assert post(server, token=token)["results"]
        assert server.stop() == (0, "")


KEYS = (
    *("..", "%2e%2e", "..%2fmanifest.json", "../../../../etc/passwd", "..%2f..%2fetc%2fpasswd", "//etc/passwd"),
    *("%00", "..\\..", "x" * 30_000, "clip", "clip.avi", "*", "0" * 16, "%ff%fe", "deep%2Fold"),
)
ROUTES = ("/media/{}", "/media/{}/preview", "/poster/{}", "/strip/{}", "/api/videos/{}", "/{}")


def test_only_keys_of_the_index_find_anything(served: Server) -> None:
    for path in (route.format(key) for key in KEYS for route in ROUTES):
        answer = raw(served.port, f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        assert answer.split()[1] in {b"404", b"400", b"307"}, (path, answer[:200])
        assert b"root:" not in answer


@pytest.fixture(scope="module")
def served(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("served") / "index"
    with running(Path(shutil.copytree(built, folder))) as server:
        yield server
        assert server.stop() == (0, "")  # nothing of what the tests did was worth a line in the log


HANG_UPS = {
    "in a question": "POST /api/search HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    "Content-Length: 99\r\n\r\n{",
    "in a file": "POST /api/search/file HTTP/1.1\r\nHost: localhost\r\n"
    "Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 9999\r\n\r\n"
    '--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nxx',
    "in a video": f"GET /media/{key_of('clip')} HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "in a preview": f"GET /media/{key_of('clip')}/preview HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "in a head": "GET / HTTP/1.1\r\nHos",
}


@pytest.mark.parametrize("hang_up", HANG_UPS)
def test_a_client_that_hangs_up_leaves_no_trace(served: Server, hang_up: str) -> None:
    for _ in range(5):
        with connect(served.port) as connection:
            connection.sendall(HANG_UPS[hang_up].encode())
            until(lambda: not served.num_unread(connection))
            # A reset, not a goodbye.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    assert post(served)["results"]
    if hang_up in {"in a question", "in a file"}:
        route = HANG_UPS[hang_up].split()[1]
        until(
            lambda: (
                f'route="{route}",status="499"}} 5'
                in urllib.request.urlopen(f"{served.url}/metrics").read().decode()
            )
        )


encoded = serving.encoded  # a fixture


def test_a_preview_that_nobody_waits_for_ends_and_can_be_asked_for_again(copied: Path, encoded: Path) -> None:
    path = f"/media/{key_of('clip')}/preview"
    with running(copied) as server:
        with connect(server.port) as connection:
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            until(encoded.read_text)
            (ffmpeg,) = [pid for pid in server.children() if "ffmpeg" in Path(f"/proc/{pid}/cmdline").read_text()]
        # A player often drops its first request and sends another.
        encoded.with_name("release").touch()
        with urllib.request.urlopen(f"{server.url}{path}") as answer:
            assert b"moov" in answer.read()
        assert not _is_running(ffmpeg)


def test_a_server_that_is_busy_ends_when_it_is_told_to(copied: Path, encoded: Path) -> None:
    with running(copied) as server, connect(server.port) as connection:
        connection.sendall(f"GET /media/{key_of('clip')}/preview HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        until(encoded.read_text)
        children = server.children()
        exit_code, said = server.stop()
        assert exit_code == 0 and "Traceback" not in said
        assert not any(_is_running(pid) for pid in children)
    assert not list((copied / "cache" / "previews").iterdir())


def test_a_killed_server_blocks_nothing(copied: Path) -> None:
    with running(copied) as first:
        assert not first.children()  # workers start when they are needed
        urllib.request.urlopen(f"{first.url}/poster/{key_of('clip')}").read()
        helpers = first.children()
        assert helpers
        first.process.kill()
        first.process.wait()
        until(lambda: not any(_is_running(pid) for pid in helpers))
        (announcement := copied / "cache" / "server.json").chmod(0o644)
        with running(copied, "--port", str(first.port)) as second:
            until(lambda: json.loads(announcement.read_text())["pid"] == second.process.pid)
            assert announcement.stat().st_mode & 0o777 == 0o600  # it may hold a token
            assert post(second)["results"]
            assert second.stop() == (0, "")
    assert not announcement.exists()


def test_an_index_that_cannot_be_written_is_served(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    shutil.rmtree(copied / "cache", ignore_errors=True)
    (copied / "cache").write_text("in the way")
    with running(copied) as server:
        with urllib.request.urlopen(f"{server.url}/poster/{key_of('clip')}?t=1") as answer:
            assert answer.read().startswith(b"\xff\xd8")
        assert [path.name[:10] for path in (tmp_path / "tmp").iterdir()] == ["svb-cache-"]
        assert server.stop() == (0, "")
    assert not list((tmp_path / "tmp").iterdir())


@pytest.mark.slow
def test_pictures_and_clips_are_embedded_by_a_helper(
    extracted_store: Path, clips_folder: Path, tmp_path: Path
) -> None:
    """A span of a clip is like that clip, a frame scores as the library has it; the server loads no torch."""
    out = index(extracted_store, tmp_path / "index")
    library = Searcher(out)
    frame, noise = tmp_path / "frame.jpg", tmp_path / "noise.png"
    noise.write_bytes(b"no picture")
    long = make_clip(tmp_path / "long.mp4", seconds=30)
    with (
        running(out, "--max-upload-seconds", "20") as server,
        httpx2.Client(base_url=server.url, timeout=300) as client,
    ):

        def answer_to(file: Path, **fields: str) -> Any:
            files = {"file": (file.name, file.read_bytes())}
            answer = client.post("/api/search/file", data=fields, files=files).json()
            scores = {result["video_id"]: result["score"] for result in answer.get("results", [])}
            return answer, scores

        for clip in (clips_folder / "a.mp4", clips_folder / "deep" / "d.avi"):
            video_id = str(clip.relative_to(clips_folder).with_suffix(""))
            answer, scores = answer_to(clip, kind="video", request='{"span_seconds": [0, 1], "fold": false}')
            assert answer["request"] == {"video": clip.name, "span_seconds": [0, 1], "fold": False}
            assert scores[video_id] > 0.9
            frame.write_bytes(client.get(f"/poster/{key_of(video_id)}?t=0&h=720").content)
            expected = library.search(SearchRequest(image=str(frame), fold=False))
            _, scores = answer_to(frame, kind="image", request='{"fold": false}')
            assert scores == pytest.approx({each.video_id: each.score for each in expected.results}, abs=1e-2)
        for file, kind, words in ((noise, "image", "noise.png"), (long, "video", "up to 20 s")):
            error = answer_to(file, kind=kind)[0]["error"]
            assert words in error and "svb-upload" not in error
        assert "/torch/" not in server.memory_maps()
        # The helper has an engine: torch, or ONNX Runtime where the cache holds the graph already.
        loaded = [Path(f"/proc/{pid}/maps").read_text() for pid in server.children()]
        assert any("/torch/" in maps or "/onnxruntime/" in maps for maps in loaded)
        assert server.stop() == (0, "")


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
