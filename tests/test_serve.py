"""The server over HTTP: searching, an index that changes, who may ask, uploads, and what it tells of itself."""

from __future__ import annotations

import os
import re
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import serving as s
from messages import heard
from serving import FakeSearcher, Serving, key_of

from svb.errors import InputError
from svb.retrieve.server import uploads
from svb.retrieve.server.access import choose_token, is_loopback
from svb.retrieve.server.options import PublicUrl

TOKEN = "0123456789abcdef-token"
JSON = {"content-type": "application/json"}


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    path = tmp_path / "plays.mp4"
    path.write_bytes(b"nobody looks at the picture")
    return path


@pytest.fixture
def index(tmp_path: Path, clip: Path) -> Path:
    videos = {"plays": clip, "deep/copy": clip, "deep/old": clip, "gone": clip.with_name("gone.mp4")}
    return s.make_index(tmp_path / "index", videos)


def ask(served: Serving, **request: Any) -> Any:
    return served.client.post("/api/search", json={"text": "a dog", **request})


# Searching


def test_a_text_is_answered_and_the_index_described(served: Serving) -> None:
    response = ask(served, k=2)
    assert response.status_code == 200
    answer = response.json()
    assert [result["video_id"] for result in answer["results"]] == ["deep/copy", "deep/old"]
    assert (answer["request"], answer["generation"]) == ({"text": "a dog", "k": 2}, 1)
    held = served.client.get("/api/index").json()
    assert (held["generation"], held["num_videos"], held["num_moments"]) == (1, 4, 8)
    assert (held["folders"], held["columns"], held["has_captions"]) == (["deep"], {"place": "text"}, False)
    assert held["index"] == str(served.folder.absolute())


WRONG = (
    (b"{", 400, "not valid JSON"),
    (b"[1]", 400, "list"),
    (b"[" * 100_000, 400, "not valid JSON"),
    (b"{}", 400, "exactly one"),
    (b'{"text": "a", "k": 0}', 400, "k is 0"),
    (b'{"text": "a", "k": "ten"}', 400, "k is 'ten'"),
    (b'{"text": "a", "colour": "red"}', 400, "unknown fields colour"),
    (b'{"text": "a", "min_duration_seconds": NaN}', 400, "min_duration_seconds"),
    (b'{"image": "/etc/passwd"}', 400, "/api/search/file"),
    (b'{"video": "/etc/passwd", "span_seconds": [0, 1]}', 400, "/api/search/file"),
    (b'{"text": "' + b"a" * (1 << 18) + b'"}', 413, "larger than"),
)


def test_a_wrong_request_is_told_why(served: Serving) -> None:
    for body, status, words in WRONG:
        response = served.client.post("/api/search", content=body, headers=JSON)
        assert (response.status_code, words in response.json()["error"]) == (status, True), body[:99]
    plain = served.client.post("/api/search", content=b"{}", headers={"content-type": "text/plain"})
    assert plain.status_code == 415


def test_an_internal_error_is_logged_and_answered(index: Path) -> None:
    messages = heard()
    with s.serving(index) as served:
        response = ask(served, text="broken")
    assert (response.status_code, response.json()) == (500, {"error": "internal error; see the server's log"})
    assert sum("ZeroDivisionError" in message for message in messages) == 1


def test_beyond_the_queue_there_is_a_clear_refusal(index: Path) -> None:
    with s.serving(index, threads=1, max_searches=2) as served:
        waiting = [threading.Thread(target=ask, args=(served,), kwargs={"text": "slow"}) for _ in range(2)]
        for thread in waiting:
            thread.start()
        s.until(lambda: "svb_searches_in_flight 2" in served.client.get("/metrics").text)
        response = ask(served)
        assert (response.status_code, response.headers["retry-after"]) == (503, "1")
        FakeSearcher.release.set()
        for thread in waiting:
            thread.join()
        assert ask(served).status_code == 200


# The index changes


def test_the_next_request_sees_a_new_generation(index: Path, clip: Path) -> None:
    opened_after: list[int | None] = []

    def open_searcher(previous: FakeSearcher | None) -> FakeSearcher:
        opened_after.append(previous and previous.generation)
        return FakeSearcher(index)

    with s.serving(index, open_searcher=open_searcher) as served:
        assert ask(served).json()["num_videos"] == 4
        s.commit(index, 2, {"plays": clip})
        answer = ask(served).json()
        assert (answer["generation"], answer["num_videos"]) == (2, 1)
        assert served.client.get("/api/index").json()["num_videos"] == 1
        assert served.client.get(f"/api/videos/{key_of('deep/old')}").status_code == 404
        # An approximate index comes after its commit.
        (index / "cache" / "ivf.json").write_text("{}")
        for _ in range(3):
            ask(served)
    assert opened_after == [None, 1, 2]


def test_a_search_under_way_keeps_its_snapshot(served: Serving, clip: Path) -> None:
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(ask(served, text="slow").json()))
    thread.start()
    assert FakeSearcher.started.acquire(timeout=600)
    s.commit(served.folder, 2, {"plays": clip})
    assert ask(served).json()["generation"] == 2
    FakeSearcher.release.set()
    thread.join()
    assert (answers[0]["generation"], answers[0]["num_videos"]) == (1, 4)


def test_the_last_whole_generation_is_still_served(served: Serving, clip: Path) -> None:
    manifest = served.folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"fake"', '"fakE"'))
    assert ask(served).json()["generation"] == 1
    health = served.client.get("/healthz").json()
    assert health["status"] == "degraded" and "checksum" in health["problem"]
    assert "svb_index_degraded 1" in served.client.get("/metrics").text
    s.commit(served.folder, 2, {"plays": clip})
    assert ask(served).json()["generation"] == 2
    assert served.client.get("/healthz").json()["status"] == "ok"


def test_what_went_with_a_commit_is_searched_in_the_next_generation(index: Path, clip: Path) -> None:
    class Vanishing(FakeSearcher):
        def search(self, request: Any) -> Any:
            if self.generation == 1:
                s.commit(index, 2, {"plays": clip})
                raise FileNotFoundError("segments/0")
            return super().search(request)

    with s.serving(index, open_searcher=lambda previous: Vanishing(index)) as served:
        assert ask(served).json()["generation"] == 2


# Who may ask


def test_only_this_machine_s_names_are_answered(served: Serving) -> None:
    own = ("localhost:8765", "127.0.0.1:8765", "127.9.0.1:8765", "[::1]:8765", "localhost:9000", "LocalHost")
    others = ("evil.example:8765", "localhost.evil.example", "127.0.0.1.evil.example:1", "")
    for host, status in (*((name, 200) for name in own), *((name, 403) for name in others)):
        for path in ("/", "/api/index", "/healthz"):
            assert served.client.get(path, headers={"host": host}).status_code == status, (host, path)


def test_another_site_s_page_is_refused(served: Serving) -> None:
    for headers, status in (
        ({"origin": f"http://127.0.0.1:{served.port}"}, 200),
        ({"origin": "http://localhost:3000"}, 403),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}, 403),
        ({"sec-fetch-site": "same-origin", "sec-fetch-mode": "cors"}, 200),
    ):
        response = served.client.post("/api/search", json={"text": "a"}, headers=headers)
        assert response.status_code == status, headers


def test_a_token_is_asked_for_everywhere_but_at_the_door(index: Path) -> None:
    with s.serving(index, token=TOKEN, is_loopback=False) as served:
        get, media = served.client.get, f"/media/{key_of('plays')}"
        for path in ("/api/index", "/metrics", "/openapi.json", media, "/nothing", "/poster/x"):
            response = get(path)
            assert (response.status_code, response.headers["www-authenticate"]) == (401, "Bearer"), path
            assert get(path, headers={"authorization": "Bearer wrong"}).status_code == 401
            assert get(f"{path}?token={TOKEN}").status_code == 401
        assert ask(served).status_code == 401
        assert get("/api/index", headers={"authorization": f"bearer {TOKEN}"}).status_code == 200
        assert get("/healthz").json() == {"status": "ok"}
        assert get("/healthz", headers={"authorization": f"Bearer {TOKEN}"}).json()["generation"] == 1
        form = get("/?q=dogs%22%3E")
        assert form.status_code == 401
        assert "<form" in form.text and "dogs%22%3E" in form.text and '">"' not in form.text


def test_the_form_gives_a_session_that_is_not_the_token(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with s.serving(index, token=TOKEN, is_loopback=False) as served:
        get, post = served.client.get, served.client.post
        wrong = post("/login", data={"token": "wrong"})
        assert wrong.status_code == 401 and "set-cookie" not in wrong.headers
        right = post("/login", data={"token": TOKEN, "query": "q=a\r\nSet-Cookie:x"})
        assert (right.status_code, right.headers["location"]) == (303, "./?q=aSet-Cookie:x")
        cookie = right.headers["set-cookie"]
        assert "HttpOnly" in cookie and "samesite=strict" in cookie.lower() and TOKEN not in cookie
        name, value = cookie.split(";")[0].split("=", 1)
        served.client.cookies.clear()
        forged = {value[:-1] + "0", "99999999999." + value.split(".")[1], "", ".", "x", "é"} - {value}
        for shown, status in ((value, 200), *((each, 401) for each in forged)):
            assert get("/api/index", headers={"cookie": f"{name}={shown}".encode()}).status_code == status, shown
        monkeypatch.setattr("svb.retrieve.server.access.SESSION_SECONDS", -1)
        old = post("/login", data={"token": TOKEN}).headers["set-cookie"].split(";")[0]
        served.client.cookies.clear()
        assert get("/api/index", headers={"cookie": old}).status_code == 401


def test_tokens_come_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SVB_TOKEN", raising=False)
    assert choose_token("127.0.0.1", None) == (None, False)
    others = [choose_token("0.0.0.0", None), choose_token("127.0.0.1", None, PublicUrl.of("https://a.example"))]
    (made, is_new), (behind_a_proxy, is_new_too) = others
    assert is_new and is_new_too and made and behind_a_proxy and len(made) >= 32 and made != behind_a_proxy
    monkeypatch.setenv("SVB_TOKEN", TOKEN)
    assert choose_token("127.0.0.1", None) == (TOKEN, False)
    (tmp_path / "token").write_text("of-a-file-0123456789\n")
    assert choose_token("127.0.0.1", tmp_path / "token") == ("of-a-file-0123456789", False)
    (tmp_path / "token").write_text("short")
    for name, words in (("token", "at least 16"), ("none", "token file")):
        with pytest.raises(InputError, match=words):
            choose_token("127.0.0.1", tmp_path / name)
    hosts = {"localhost": True, "::1": True, "127.8.0.1": True, "0.0.0.0": False, "lab": False}
    assert {host: is_loopback(host) for host in hosts} == hosts


def test_every_answer_is_protected(served: Serving) -> None:
    key = key_of("plays")
    for path in ("/", "/api/index", "/nothing", f"/media/{key}", f"/poster/{key}", "/login"):
        headers = served.client.get(path).headers
        assert "default-src 'none'" in headers["content-security-policy"], path
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "same-origin"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert "cache-control" in headers and "server" not in headers
    pages = [served.client.get("/") for _ in range(2)]
    policies = [page.headers["content-security-policy"] for page in pages]
    nonces = [re.findall(r"script-src 'nonce-([^']+)'", policy)[0] for policy in policies]
    assert nonces[0] != nonces[1]  # a new one each time
    for page, nonce in zip(pages, nonces, strict=True):
        assert (page.status_code, page.headers["cache-control"]) == (200, "no-store")
        assert f'<script nonce="{nonce}"' in page.text and f'<style nonce="{nonce}"' in page.text


# Uploads


def post_file(served: Serving, content: bytes = b"pixels", **fields: str) -> Any:
    data = {"kind": "image", "request": "{}", **fields}
    return served.client.post("/api/search/file", data=data, files={"file": ("../../a b.PNG", content)})


def test_a_file_is_searched_with_and_removed(worked: Path, served: Serving) -> None:
    response = post_file(served, b"pixels", request='{"k": 1}')
    assert response.status_code == 200, response.text
    assert response.json()["request"] == {"image": "a b.PNG", "k": 1}
    assert response.json()["elapsed_seconds"] == {"embed": 3.0, "load": 2.0, "total": 3.0}
    assert post_file(served, kind="video", request='{"span_seconds": [1, 2.5]}').status_code == 200
    first, second = [line for line in worked.read_text().splitlines() if line.startswith("embedded")]
    _, path, content, _ = first.split(maxsplit=3)
    assert content == "pixels" and path.endswith("/upload.png") and not Path(path).exists()
    assert "'span_seconds': [1, 2.5]" in second or "'span_seconds': [1.0, 2.5]" in second


REFUSED_FILES: tuple[tuple[bytes, dict[str, str], int, str], ...] = (
    (b"x", {"kind": "sound"}, 400, "kind is 'sound'"),
    (b"x", {"request": "{"}, 400, "not valid JSON"),
    (b"x", {"request": '{"image": "/etc/passwd"}'}, 400, "image cannot go with a file"),
    (b"x", {"request": '{"text": "a"}'}, 400, "text cannot go with a file"),
    (b"x", {"request": '{"span_seconds": [0, 1]}'}, 400, "needs a video"),
    (b"noise", {}, 400, "a b.PNG is no picture"),
    (b"die", {}, 400, "the process that decoded this file died"),
    (b"another", {}, 503, "another model"),
)
FORM = "multipart/form-data; boundary=b"
NO_FORMS: tuple[tuple[dict[str, Any], int, str], ...] = (
    ({"json": {}}, 415, "expected multipart/form-data"),
    ({"files": {"kind": (None, "image")}}, 400, "has no file"),
    ({"content": b"--", "headers": {"content-type": "multipart/form-data"}}, 400, "boundary"),
    (
        {
            "content": b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\nx\r\n--b--\r\n',
            "headers": {"content-type": f"{FORM}; charset=undefined"},
        },
        *(400, "UTF-8"),
    ),
)


def test_an_upload_that_cannot_be_used_is_told_why(
    index: Path, worked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "FORM_BYTES", 4096)
    with s.serving(index, max_upload_bytes=100_000) as served:
        for content, fields, status, words in REFUSED_FILES:
            response = post_file(served, content, **fields)
            assert (response.status_code, words in response.json()["error"]) == (status, True), response.text
            assert "svb-upload" not in response.text
            assert post_file(served, b"x" * 90_000).status_code == 200
        for sent, status, words in NO_FORMS:
            response = served.client.post("/api/search/file", **sent)
            assert (response.status_code, words in response.json()["error"]) == (status, True), response.text


def test_a_file_that_is_too_large_is_refused_at_once(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it comes, if the client says its length, and otherwise while it comes."""
    monkeypatch.setattr(uploads, "FORM_BYTES", 0)
    part = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'.ljust(100_001, b"x")
    head = f"POST /api/search/file HTTP/1.1\r\nHost: localhost\r\nContent-Type: {FORM}\r\n"
    with s.serving(index, max_upload_bytes=100_000) as served:
        for rest in (b"Content-Length: 100001\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n186a1\r\n" + part):
            answer = s.raw(served.port, head.encode() + rest)
            assert answer.startswith(b"HTTP/1.1 413") and b"0.1 MB" in answer


def test_few_files_are_embedded_at_once(index: Path, worked: Path) -> None:
    with s.serving(index, uploads_at_once=1) as served:
        first = threading.Thread(target=post_file, args=(served, b"hold"))
        first.start()
        s.until(lambda: "embed" in worked.read_text())
        refused = post_file(served)
        assert refused.status_code == 429 and refused.headers["retry-after"]
        worked.write_text("release\n")
        first.join()
        assert post_file(served).status_code == 200


def test_an_embedding_that_takes_too_long_is_ended(index: Path, worked: Path) -> None:
    with s.serving(index, upload_seconds=2) as served:
        response = post_file(served, b"hang")
        assert response.status_code == 503 and "longer than 2 s and was ended" in response.json()["error"]


def test_uploads_that_a_killed_server_left_are_removed(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name, age_seconds in (("svb-upload-old", 2 * 86400), ("svb-upload-new", 60), ("other", 2 * 86400)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "upload.mp4").write_bytes(b"x")
        then = time.time() - age_seconds
        os.utime(tmp_path / name, (then, then))
    with s.serving(index):
        assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"svb-upload-new", "other", "index"}


# What it tells of itself


def test_requests_are_counted_by_route(served: Serving) -> None:
    ask(served)
    ask(served, k=0)
    served.client.get("/nothing/at/all")
    served.client.get(f"/api/videos/{key_of('gone')}")
    text = served.client.get("/metrics").text
    assert 'svb_requests_total{method="POST",route="/api/search",status="200"} 1' in text
    assert 'svb_requests_total{method="POST",route="/api/search",status="400"} 1' in text
    assert 'svb_requests_total{method="GET",route="other",status="404"} 1' in text
    assert 'route="/api/videos/{key}"' in text
    assert 'svb_request_seconds_bucket{route="/api/search",le="+Inf"} 2' in text
    assert "svb_index_generation 1\n" in text and "svb_index_videos 4\n" in text


def test_openapi_describes_every_route(served: Serving) -> None:
    held = served.client.get("/openapi.json").json()
    assert {
        *("/api/search", "/api/search/file", "/api/index", "/api/videos/{key}", "/media/{key}"),
        *("/media/{key}/preview", "/poster/{key}", "/strip/{key}", "/api/timeline", "/healthz", "/metrics"),
    } == set(held["paths"])
    body = held["paths"]["/api/search"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"text", "like", "without", "k"} <= set(body["properties"])
    assert not {"image", "video", "span_seconds"} & set(body["properties"])
    assert {"Answer", "VideoResult", "Moment"} <= set(held["components"]["schemas"])
    assert served.client.get("/docs").status_code == 404
