from __future__ import annotations

import asyncio
import io
import json
import os
import re
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import pytest
import serving as s
from clips import make_clip, make_late_clip
from messages import heard
from PIL import Image
from serving import FakeSearcher, Serving, key_of

from svb.errors import InputError, SvbError, UsageError
from svb.retrieve.searching import pictures
from svb.retrieve.searching.results import VideoInfo
from svb.retrieve.server import uploads
from svb.retrieve.server.access import Access, choose_token, is_loopback
from svb.retrieve.server.announcement import announced
from svb.retrieve.server.byte_ranges import parse_range
from svb.retrieve.server.crew import Crew
from svb.retrieve.server.http import response_to
from svb.retrieve.server.kept_files import CacheFolder, KeptFiles
from svb.retrieve.server.media import Probes, VideoFile
from svb.retrieve.server.playable import is_playable, streams_of
from svb.retrieve.server.previews import Previews
from svb.retrieve.server.refusals import BusyError, TookTooLongError

TOKEN = "0123456789abcdef-token"


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One that browsers play, one that only the container keeps them from, one that needs everything; one gone."""
    folder = tmp_path_factory.mktemp("videos")
    (folder / "deep").mkdir()
    return {
        "plays": make_clip(folder / "plays.mp4", seconds=2),
        "deep/copy": make_clip(folder / "deep" / "copy.mkv", seconds=2),
        "deep/old": make_clip(folder / "deep" / "old.avi", seconds=2, codec=("-c:v", "mpeg4")),
        "gone": folder / "gone.mp4",
    }


@pytest.fixture
def index(tmp_path: Path, videos: dict[str, Path]) -> Path:
    folder = tmp_path / "index"
    folder.mkdir()
    s.commit(folder, 1, videos)
    FakeSearcher.release.clear()
    FakeSearcher.started = threading.Semaphore(0)
    return folder


@pytest.fixture
def served(index: Path) -> Iterator[Serving]:
    with s.serving(index) as serving:
        yield serving


def ask(served: Serving, **request: Any) -> Any:
    return served.client.post("/api/search", json={"text": "a dog", **request})


# Searching


def test_a_text_is_answered(served: Serving) -> None:
    response = ask(served, k=2)
    assert response.status_code == 200
    answer = response.json()
    assert [result["video_id"] for result in answer["results"]] == ["deep/copy", "deep/old"]
    assert answer["request"] == {"text": "a dog", "k": 2}
    assert answer["generation"] == 1


def test_the_index_is_described(served: Serving) -> None:
    held = served.client.get("/api/index").json()
    assert (held["generation"], held["num_videos"], held["num_moments"]) == (1, 4, 8)
    assert held["folders"] == ["deep"]
    assert held["columns"] == {"place": "text"}
    assert held["has_captions"] is False
    assert held["index"] == str(served.folder.absolute())


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"{", "no JSON"),
        (b"[1]", "list"),
        (b"[" * 100_000, "no JSON"),
        (b"{}", "exactly one"),
        (b'{"text": "a", "k": 0}', "k is 0"),
        (b'{"text": "a", "k": "ten"}', "k is 'ten'"),
        (b'{"text": "a", "colour": "red"}', "unknown fields colour"),
        (b'{"text": "a", "min_duration_seconds": NaN}', "min_duration_seconds"),
        (b'{"image": "/etc/passwd"}', "/api/search/file"),
        (b'{"video": "/etc/passwd", "span_seconds": [0, 1]}', "/api/search/file"),
    ],
)
def test_a_request_that_means_nothing_is_told_why(served: Serving, body: bytes, words: str) -> None:
    response = served.client.post("/api/search", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert words in response.json()["error"]


def test_a_request_must_be_json_and_not_endless(served: Serving) -> None:
    post = served.client.post
    assert post("/api/search", content=b"{}", headers={"content-type": "text/plain"}).status_code == 415
    huge = b'{"text": "' + b"a" * (1 << 18) + b'"}'
    assert post("/api/search", content=huge, headers={"content-type": "application/json"}).status_code == 413


def test_a_mistake_of_ours_is_logged_and_answered(served: Serving) -> None:
    messages = heard()
    response = ask(served, text="broken")
    assert response.status_code == 500
    assert "log" in response.json()["error"]
    assert sum("ZeroDivisionError" in message for message in messages) == 1


def test_beyond_the_queue_there_is_a_clear_refusal(index: Path) -> None:
    with s.serving(index, threads=1, max_searches=2) as served:
        waiting = [threading.Thread(target=ask, args=(served,), kwargs={"text": "slow"}) for _ in range(2)]
        for thread in waiting:
            thread.start()
        assert FakeSearcher.started.acquire(timeout=5)
        while served.service.searches.in_flight < 2:
            pass
        response = ask(served)
        assert response.status_code == 503
        assert response.headers["retry-after"] == "1"
        assert "svb_searches_in_flight 2" in served.client.get("/metrics").text
        FakeSearcher.release.set()
        for thread in waiting:
            thread.join()
        assert ask(served).status_code == 200


# The index changes


def test_the_next_request_sees_a_new_generation(served: Serving, videos: dict[str, Path]) -> None:
    assert ask(served).json()["num_videos"] == 4
    s.commit(served.folder, 2, {"plays": videos["plays"]})
    answer = ask(served).json()
    assert (answer["generation"], answer["num_videos"]) == (2, 1)
    assert served.client.get("/api/index").json()["num_videos"] == 1
    assert served.client.get(f"/api/videos/{key_of('deep/old')}").status_code == 404


def test_an_approximate_index_that_comes_after_its_commit_is_served(index: Path) -> None:
    opened: list[FakeSearcher] = []

    def open_searcher(previous: FakeSearcher | None) -> FakeSearcher:
        opened.append(FakeSearcher(index))
        return opened[-1]

    with s.serving(index, open_searcher=open_searcher) as served:
        ask(served)
        assert len(opened) == 1
        (index / "cache" / "ivf.json").write_text("{}")
        for _ in range(3):
            ask(served)
        assert len(opened) == 2 and served.service.snapshots.current is opened[1]


def test_a_snapshot_is_opened_with_the_one_before(index: Path, videos: dict[str, Path]) -> None:
    generations = []

    def opened(previous: FakeSearcher | None) -> FakeSearcher:
        generations.append(previous and previous.generation)
        return FakeSearcher(index)

    with s.serving(index, open_searcher=opened) as served:
        for generation in (2, 3):
            s.commit(index, generation, videos)
            assert ask(served).json()["generation"] == generation
    assert generations == [None, 1, 2]


def test_a_search_under_way_keeps_its_snapshot(served: Serving, videos: dict[str, Path]) -> None:
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(ask(served, text="slow").json()))
    thread.start()
    assert FakeSearcher.started.acquire(timeout=5)
    s.commit(served.folder, 2, {"plays": videos["plays"]})
    assert ask(served).json()["generation"] == 2
    FakeSearcher.release.set()
    thread.join()
    assert (answers[0]["generation"], answers[0]["num_videos"]) == (1, 4)


def test_the_last_whole_generation_is_served_on(served: Serving, videos: dict[str, Path]) -> None:
    manifest = served.folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"fake"', '"fakE"'))
    assert ask(served).json()["generation"] == 1
    health = served.client.get("/healthz").json()
    assert health["status"] == "degraded"
    assert "checksum" in health["problem"]
    assert "svb_index_degraded 1" in served.client.get("/metrics").text
    s.commit(served.folder, 2, videos)
    assert ask(served).json()["generation"] == 2
    assert served.client.get("/healthz").json()["status"] == "ok"


def test_what_went_with_a_commit_is_searched_in_the_next_generation(index: Path, videos: dict[str, Path]) -> None:
    class Vanishing(FakeSearcher):
        def search(self, request: Any) -> Any:
            if self.generation == 1:
                s.commit(index, 2, videos)
                raise FileNotFoundError("segments/0")
            return super().search(request)

    with s.serving(index, open_searcher=lambda previous: Vanishing(index)) as served:
        assert ask(served).json()["generation"] == 2


# Who may ask


@pytest.mark.parametrize(
    "host", ["localhost:8765", "127.0.0.1:8765", "127.9.0.1:8765", "[::1]:8765", "localhost:9000", "LocalHost"]
)
def test_this_machine_s_names_are_answered(served: Serving, host: str) -> None:
    assert served.client.get("/healthz", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example:8765", "localhost.evil.example", "127.0.0.1.evil.example:8765", ""])
def test_another_name_for_this_machine_is_refused(served: Serving, host: str) -> None:
    for path in ("/", "/api/index", "/healthz"):
        assert served.client.get(path, headers={"host": host}).status_code == 403


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"origin": s.BASE_URL}, 200),
        ({"origin": "http://localhost:3000"}, 403),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}, 403),
        ({"sec-fetch-site": "same-origin", "sec-fetch-mode": "cors"}, 200),
    ],
)
def test_another_site_s_page_is_refused(served: Serving, headers: dict[str, str], status: int) -> None:
    assert served.client.post("/api/search", json={"text": "a"}, headers=headers).status_code == status


def test_a_token_is_asked_for_everywhere_but_at_the_door(index: Path) -> None:
    with s.serving(index, token=TOKEN, is_loopback=False) as served:
        get = served.client.get
        for path in (
            "/api/index",
            "/metrics",
            "/openapi.json",
            f"/media/{key_of('plays')}",
            "/nothing",
            "/poster/x",
        ):
            response = get(path)
            assert response.status_code == 401, path
            assert response.headers["www-authenticate"] == "Bearer"
            assert get(path, headers={"authorization": "Bearer wrong"}).status_code == 401
            assert get(f"{path}?token={TOKEN}").status_code == 401
        assert ask(served).status_code == 401
        assert get("/api/index", headers={"authorization": f"bearer {TOKEN}"}).status_code == 200
        assert get("/healthz").json() == {"status": "ok"}
        assert get("/healthz", headers={"authorization": f"Bearer {TOKEN}"}).json()["generation"] == 1
        form = get("/?q=dogs%22%3E")
        assert form.status_code == 401
        assert "<form" in form.text and "dogs%22%3E" in form.text and '">"' not in form.text


def test_the_form_gives_a_session_that_is_not_the_token(index: Path) -> None:
    with s.serving(index, token=TOKEN, is_loopback=False) as served:
        wrong = served.client.post("/login", data={"token": "wrong"})
        assert wrong.status_code == 401 and "set-cookie" not in wrong.headers
        right = served.client.post("/login", data={"token": TOKEN, "query": "q=a\r\nSet-Cookie:x"})
        assert right.status_code == 303
        assert right.headers["location"] == "/?q=aSet-Cookie:x"
        cookie = right.headers["set-cookie"]
        assert "HttpOnly" in cookie and "samesite=strict" in cookie.lower() and TOKEN not in cookie
        assert served.client.get("/api/index").status_code == 200  # the client keeps the cookie
        name, value = cookie.split(";")[0].split("=", 1)
        served.client.cookies.clear()
        for forged in (value[:-1] + "0", "99999999999." + value.split(".")[1], "", ".", "x", "é"):
            if forged != value:
                held = {"cookie": f"{name}={forged}".encode()}
                assert served.client.get("/api/index", headers=held).status_code == 401, forged


def test_an_old_session_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    from starlette.datastructures import Headers

    access = Access(TOKEN, is_loopback=True, port=1)
    session = {access.cookie: access.new_session()}
    assert access.is_known(Headers(), session)
    monkeypatch.setattr("time.time", lambda: 1e12)
    assert not access.is_known(Headers(), session)


def test_tokens_come_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SVB_TOKEN", raising=False)
    assert choose_token("127.0.0.1", None) == (None, False)
    made_up, is_new = choose_token("0.0.0.0", None)
    assert is_new and made_up is not None and len(made_up) >= 32
    assert choose_token("0.0.0.0", None)[0] != made_up
    monkeypatch.setenv("SVB_TOKEN", TOKEN)
    assert choose_token("127.0.0.1", None) == (TOKEN, False)
    (tmp_path / "token").write_text("of-a-file-0123456789\n")
    assert choose_token("127.0.0.1", tmp_path / "token") == ("of-a-file-0123456789", False)
    (tmp_path / "token").write_text("short")
    with pytest.raises(InputError, match="at least 16"):
        choose_token("127.0.0.1", tmp_path / "token")
    with pytest.raises(InputError, match="token file"):
        choose_token("127.0.0.1", tmp_path / "none")


@pytest.mark.parametrize(
    ("host", "expected"), [("localhost", 1), ("::1", 1), ("127.8.0.1", 1), ("0.0.0.0", 0), ("lab", 0)]
)
def test_what_is_this_machine_alone(host: str, expected: int) -> None:
    assert is_loopback(host) == bool(expected)


def test_every_answer_is_protected(served: Serving) -> None:
    for path in (
        "/",
        "/api/index",
        "/nothing",
        f"/media/{key_of('plays')}",
        f"/poster/{key_of('plays')}",
        "/login",
    ):
        headers = served.client.get(path).headers
        assert "default-src 'none'" in headers["content-security-policy"], path
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "same-origin"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert "cache-control" in headers
        assert "server" not in headers


def test_the_page_names_no_other_host_and_has_a_new_nonce_each_time(served: Serving) -> None:
    pages = [served.client.get("/") for _ in range(2)]
    nonces = [
        re.search(r"script-src 'nonce-([^']+)'", page.headers["content-security-policy"])[1] for page in pages
    ]  # type: ignore[index]
    assert nonces[0] != nonces[1]
    for page, nonce in zip(pages, nonces, strict=True):
        assert page.status_code == 200
        assert f'<script nonce="{nonce}"' in page.text
        assert f'<style nonce="{nonce}"' in page.text
        assert page.headers["cache-control"] == "no-store"


# Videos


@pytest.mark.parametrize(
    ("video_id", "available", "playable"),
    [("plays", True, True), ("deep/copy", True, False), ("deep/old", True, False), ("gone", False, False)],
)
def test_a_video_says_whether_it_can_be_played(
    served: Serving, video_id: str, available: bool, playable: bool
) -> None:
    held = served.client.get(f"/api/videos/{key_of(video_id)}").json()
    assert (held["video_id"], held["available"], held["playable"]) == (video_id, available, playable)
    assert held["metadata"] == {"place": "here"}


@pytest.mark.parametrize(
    "key",
    [
        *("%2e%2e", "..%2f..%2fetc%2fpasswd", "%2e%2e%2f%2e%2e%2fetc%2fpasswd", "../../etc/passwd"),
        *("%00", "plays", "plays.mp4", "*", "0" * 16, "0" * 5000, "%ff%fe", "deep%2Fold", "//etc/passwd"),
    ],
)
def test_only_keys_of_the_index_find_anything(served: Serving, key: str) -> None:
    for path in (f"/media/{key}", f"/media/{key}/preview", f"/poster/{key}", f"/strip/{key}", f"/api/videos/{key}"):
        response = served.client.get(path)
        assert response.status_code == 404, path
        assert "passwd" not in response.text or "error" in response.json()


def served_mtime_ns(index: Path) -> int:
    return int(json.loads((index / "manifest.json").read_text())["held"]["own"][2])


def refuse(path: Path) -> Any:
    raise PermissionError(13, "Permission denied")


def test_a_file_that_moved_or_changed_is_said_to(index: Path, videos: dict[str, Path], tmp_path: Path) -> None:
    own = tmp_path / "own.mp4"
    own.write_bytes(videos["plays"].read_bytes())
    s.commit(index, 1, {"own": own})
    with s.serving(index) as served:
        path = f"/media/{key_of('own')}"
        assert served.client.get(path).status_code == 200
        os.utime(own, ns=(1, 1))
        for changed in (path, f"{path}/preview", f"/poster/{key_of('own')}", f"/strip/{key_of('own')}"):
            response = served.client.get(changed)
            assert response.status_code == 409
            assert "has changed since" in response.json()["error"]
        assert served.client.get(f"/api/videos/{key_of('own')}").json()["available"] is False
        known = videos["plays"].stat()
        own.write_bytes(b"longer" + videos["plays"].read_bytes())
        s.commit(index, 2, {"own": own})
        own.write_bytes(videos["plays"].read_bytes())
        os.utime(own, ns=(known.st_mtime_ns, served_mtime_ns(index)))  # as a copy that keeps times
        told = served.client.get(path)
        assert told.status_code == 409
        assert f"({known.st_size:,} bytes, was {known.st_size + 6:,})" in told.json()["error"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "stat", refuse)
            told = served.client.get(path)
        assert told.status_code == 404 and "cannot be reached" in told.json()["error"]
        own.unlink()
        told = served.client.get(path)
        assert told.status_code == 404 and "was moved or removed since it was indexed" in told.json()["error"]
        own.mkdir()
        os.utime(own, ns=(1, 1))
        assert served.client.get(path).status_code in {404, 409}
        s.commit(index, 3, {"own": own})
        assert served.client.get(path).status_code == 404
        own.rmdir()
        os.mkfifo(own)
        s.commit(index, 4, {"own": own})
        assert served.client.get(path).status_code == 404
        assert served.client.get(f"/poster/{key_of('own')}").status_code == 415


# Byte ranges


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("bytes=0-9", (0, 10)),
        ("bytes=90-", (90, 100)),
        ("bytes=90-1000", (90, 100)),
        ("bytes=-10", (90, 100)),
        ("bytes=-1000", (0, 100)),
        ("Bytes = 0-0", None),
        ("bytes=99-99", (99, 100)),
        ("bytes=100-", (0, 0)),
        ("bytes=-0", (0, 0)),
        ("bytes=" + "9" * 5000 + "-", (0, 0)),
        ("bytes=10-9", None),
        ("bytes=-", None),
        ("bytes=a-b", None),
        ("bytes=0-1,5-6", None),
        ("lines=0-9", None),
        ("", None),
    ],
)
def test_ranges_are_read_as_the_rfc_has_them(header: str, expected: tuple[int, int] | None) -> None:
    assert parse_range(header, 100) == expected


def test_a_file_is_served_in_ranges(served: Serving, videos: dict[str, Path]) -> None:
    path, content = f"/media/{key_of('plays')}", videos["plays"].read_bytes()
    size, get = len(content), served.client.get
    whole = get(path)
    assert (whole.status_code, whole.content) == (200, content)
    assert whole.headers["content-type"] == "video/mp4"
    assert whole.headers["accept-ranges"] == "bytes"
    assert whole.headers["content-length"] == str(size)
    part = get(path, headers={"range": "bytes=10-19"})
    assert (part.status_code, part.content) == (206, content[10:20])
    assert part.headers["content-range"] == f"bytes 10-19/{size}"
    assert get(path, headers={"range": "bytes=-5"}).content == content[-5:]
    beyond = get(path, headers={"range": f"bytes={size}-"})
    assert (beyond.status_code, beyond.headers["content-range"], beyond.content) == (416, f"bytes */{size}", b"")
    for many in ("bytes=0-1,5-6", "bytes=9-1", "lines=1-2"):
        assert get(path, headers={"range": many}).status_code == 200
    head = served.client.head(path, headers={"range": "bytes=10-19"})
    assert (head.status_code, head.headers["content-length"], head.content) == (206, "10", b"")
    assert served.client.head(path).headers["content-length"] == str(size)


def test_a_range_is_of_the_file_that_the_client_knows(served: Serving) -> None:
    path, get = f"/media/{key_of('plays')}", served.client.get
    known = get(path).headers
    asked = {"range": "bytes=0-1"}
    assert get(path, headers={**asked, "if-range": known["etag"]}).status_code == 206
    assert get(path, headers={**asked, "if-range": known["last-modified"]}).status_code == 206
    assert get(path, headers={**asked, "if-range": '"another"'}).status_code == 200
    assert get(path, headers={**asked, "if-range": f"W/{known['etag']}"}).status_code == 200
    again = get(path, headers={"if-none-match": f'"x", {known["etag"]}'})
    assert (again.status_code, again.content) == (304, b"")


# Pictures and previews


def test_posters_and_strips_are_made_once(served: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    key, asked, do = key_of("plays"), [], Crew.do

    def count(self: Crew, task: str, **arguments: Any) -> Any:
        asked.append(task)
        return do(self, task, **arguments)

    monkeypatch.setattr(Crew, "do", count)
    poster = served.client.get(f"/poster/{key}?t=1.02&h=40")
    assert poster.status_code == 200 and poster.headers["content-type"] == "image/jpeg"
    assert Image.open(io.BytesIO(poster.content)).size == (64, 48)
    strip = served.client.get(f"/strip/{key}?n=4&h=54")
    width, height = Image.open(io.BytesIO(strip.content)).size
    assert (width, height) == (4 * 72, 54)
    assert served.client.get(f"/poster/{key}?t=1.04&h=54").content == poster.content
    assert served.client.get(f"/strip/{key}?n=4&h=54").content == strip.content
    assert asked == ["probe", "poster", "strip"]


def test_a_copy_has_the_pictures_and_previews_of_its_original(
    index: Path, videos: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "moved" / "copy.mkv"
    copy.parent.mkdir()
    copy.write_bytes(videos["deep/copy"].read_bytes())
    s.commit(index, 1, {**videos, "moved": copy})
    with s.serving(index) as served:
        paths = ("/poster/{}?t=1", "/strip/{}?n=4", "/media/{}/preview")
        made = [served.client.get(path.format(key_of("deep/copy"))).content for path in paths]
        monkeypatch.setattr(Crew, "do", None)
        monkeypatch.setattr(Previews, "_make", None)
        assert [served.client.get(path.format(key_of("moved"))).content for path in paths] == made
    assert len(list((index / "cache" / "previews").iterdir())) == 1


def test_pictures_of_a_file_that_begins_late_are_on_its_own_clock(index: Path, tmp_path: Path) -> None:
    late = make_late_clip(tmp_path / "late.ts")
    s.commit(index, 1, {"late": late})
    key = key_of("late")
    with s.serving(index) as served:
        held = served.client.get(f"/api/videos/{key}").json()
        assert held["begin_seconds"] == held["preview_begin_seconds"] == pytest.approx(6.1)
        poster = served.client.get(f"/poster/{key}?t=7.5&h=54").content
        sprite = served.client.get(f"/strip/{key}?n=4&h=54").content
        preview = served.client.get(f"/media/{key}/preview").content
    assert poster == pictures.as_jpeg(pictures.frame_at(late, 7.5, 54))
    assert sprite == pictures.strip(late, [6.35, 6.85, 7.35, 7.85], 54)
    (tmp_path / "preview.mp4").write_bytes(preview)
    # The picture is copied: what it shows after 1.4 s is what the file shows 1.4 s after it begins.
    shown = pictures.frame_at(tmp_path / "preview.mp4", 1.4, 54)
    assert shown.tobytes() == pictures.frame_at(late, held["preview_begin_seconds"] + 1.4, 54).tobytes()


@pytest.mark.parametrize("query", ["t=-1", "t=nan", "t=inf", "t=x", "h=0", "h=721", "h=1e3"])
def test_pictures_that_mean_nothing_are_refused(served: Serving, query: str) -> None:
    response = served.client.get(f"/poster/{key_of('plays')}?{query}")
    assert response.status_code == 400
    assert response.json()["error"]


@pytest.mark.parametrize("query", ["n=0", "n=25", "h=1000", "n=-1"])
def test_strips_that_mean_nothing_are_refused(served: Serving, query: str) -> None:
    assert served.client.get(f"/strip/{key_of('plays')}?{query}").status_code == 400


def test_a_client_cannot_fill_the_disk(served: Serving) -> None:
    key = key_of("plays")
    for tenth in range(30):
        assert served.client.get(f"/poster/{key}?t=1.0{tenth}&h=4{tenth % 10}").status_code == 200
        assert served.client.get(f"/poster/{key}?t={1000 + tenth}").status_code == 200
    assert len(list((served.folder / "cache" / "pictures").iterdir())) <= 4


@pytest.mark.parametrize("video_id", ["deep/copy", "deep/old"])
def test_a_preview_plays_where_the_video_does_not(served: Serving, tmp_path: Path, video_id: str) -> None:
    path = f"/media/{key_of(video_id)}/preview"
    whole = served.client.get(path)
    assert whole.status_code == 200, whole.text
    assert whole.headers["content-type"] == "video/mp4"
    assert served.client.get(path, headers={"range": "bytes=0-9"}).content == whole.content[:10]
    assert whole.content.index(b"moov") < whole.content.index(b"mdat")  # it plays before it is all there
    (tmp_path / "preview.mp4").write_bytes(whole.content)
    assert is_playable(streams_of(tmp_path / "preview.mp4"), tmp_path / "preview.mp4")
    with av.open(str(tmp_path / "preview.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == 20
        assert (container.streams.video[0].width, container.streams.video[0].height) == (64, 48)


@pytest.mark.parametrize(
    ("size", "filters", "expected"),
    [("67x51", "null", (66, 50)), ("2000x400", "null", (1280, 256)), ("64x48", "setsar=4/3", (84, 48))],
)
def test_previews_have_even_sides_square_pixels_and_a_limit(
    tmp_path: Path, size: str, filters: str, expected: tuple[int, int]
) -> None:
    source = make_clip(tmp_path / "a.mkv", seconds=0.3, size=size, filters=filters, codec=("-c:v", "ffv1"))

    async def make() -> Path:
        return await Previews(KeptFiles(tmp_path / "kept", 10**9), 1, 30).get(source, "0a")

    with av.open(str(asyncio.run(make()))) as container:
        assert (container.streams.video[0].width, container.streams.video[0].height) == expected


def test_what_is_no_video_gives_no_preview_and_no_picture(index: Path, tmp_path: Path) -> None:
    secret = make_clip(tmp_path / "secret.ts", seconds=2)
    playlist = tmp_path / "list.m3u8"  # ffmpeg takes no other name for a playlist, and plays this one by its path
    playlist.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nfile://{secret}\n#EXT-X-ENDLIST\n")
    with av.open(str(playlist)) as container:
        assert container.format.name == "hls"
    (tmp_path / "noise.mp4").write_bytes(os.urandom(5000))
    s.commit(index, 1, {"list": playlist, "noise": tmp_path / "noise.mp4"})
    with s.serving(index) as served:
        for video_id in ("list", "noise"):
            for path in (
                f"/media/{key_of(video_id)}/preview",
                f"/poster/{key_of(video_id)}",
                f"/strip/{key_of(video_id)}",
            ):
                response = served.client.get(path)
                assert response.status_code == 415, path
                assert response.json()["error"]
        cache = served.folder / "cache"
        assert not [*(cache / "pictures").iterdir(), *(cache / "previews").iterdir()]


def test_a_preview_is_made_once_for_all_who_wait(
    tmp_path: Path, videos: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, run = [], Previews._run_ffmpeg

    async def count(self: Previews, *arguments: Any) -> None:
        made.append(arguments)
        await run(self, *arguments)

    monkeypatch.setattr(Previews, "_run_ffmpeg", count)

    async def wait_together() -> None:
        previews = Previews(KeptFiles(tmp_path, 10**9), 1, 30)
        first = asyncio.create_task(previews.get(videos["deep/old"], "0a"))
        others = [asyncio.create_task(previews.get(videos["deep/old"], "0a")) for _ in range(5)]
        await asyncio.sleep(0)
        first.cancel()  # it goes on for the others
        assert len({await other for other in others}) == 1
        await previews.get(videos["deep/old"], "0a")

    asyncio.run(wait_together())
    assert len(made) == 1


def test_a_preview_can_be_asked_for_again_at_once(tmp_path: Path, videos: dict[str, Path]) -> None:
    """A player often drops its first request and sends another."""

    async def ask_again() -> Path:
        previews = Previews(KeptFiles(tmp_path, 10**9), 1, 30)
        first = asyncio.create_task(previews.get(videos["deep/old"], "0a"))
        await asyncio.sleep(0.05)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        return await previews.get(videos["deep/old"], "0a")

    assert asyncio.run(ask_again()).exists()


def test_a_preview_that_nobody_waits_for_ends(tmp_path: Path) -> None:
    endless = make_clip(tmp_path / "long.avi", seconds=120, size="640x480", fps=25, codec=("-c:v", "mpeg4"))

    async def leave() -> None:
        previews = Previews(KeptFiles(tmp_path / "kept", 10**9), 1, 60)
        waiting = asyncio.create_task(previews.get(endless, "0a"))
        await asyncio.sleep(0.5)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await previews.close()
        assert not list((tmp_path / "kept").iterdir())
        hurried = Previews(KeptFiles(tmp_path / "kept", 10**9), 1, 0.3)
        with pytest.raises(TookTooLongError, match=r"0\.3 s"):
            await hurried.get(endless, "0a")
        assert not list((tmp_path / "kept").iterdir())

    asyncio.run(leave())


def test_a_preview_does_not_fill_the_disk(tmp_path: Path) -> None:
    endless = make_clip(tmp_path / "long.avi", seconds=120, size="640x480", fps=25, codec=("-c:v", "mpeg4"))

    async def make() -> None:
        previews = Previews(KeptFiles(tmp_path / "kept", 20_000), 1, 60)
        with pytest.raises(InputError, match="more than the 20,000 bytes"):
            await previews.get(endless, "0a")
        assert not list((tmp_path / "kept").iterdir())

    asyncio.run(make())


def test_kept_files_stay_below_their_limit(tmp_path: Path) -> None:
    kept = KeptFiles(tmp_path, 1000)
    for number in range(30):
        aside = kept.new_aside(".jpg")
        aside.write_bytes(b"x" * 100)
        kept.keep(aside, f"{number:032}.jpg")
        os.utime(tmp_path / f"{number:032}.jpg", (number, number))
        if number > 5:
            kept.find(f"{0:032}.jpg")  # used again and again
            assert (tmp_path / f"{0:032}.jpg").exists()
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 1000
    assert (tmp_path / f"{29:032}.jpg").exists() and not (tmp_path / f"{1:032}.jpg").exists()
    assert kept.find(f"{1:032}.jpg") is None


def test_only_what_is_kept_is_ever_removed(tmp_path: Path) -> None:
    (tmp_path / "holidays.mp4").write_bytes(b"x" * 5000)
    (tmp_path / f"{0:032}.mp4").symlink_to(tmp_path / "holidays.mp4")
    killed, under_way = KeptFiles(tmp_path, 1000).new_aside(".mp4"), KeptFiles(tmp_path, 1000).new_aside(".mp4")
    os.utime(killed, (1, 1))
    kept = KeptFiles(tmp_path, 1000)  # of a second server
    assert not killed.exists() and under_way.exists()
    for number in range(1, 30):
        aside = kept.new_aside(".mp4")
        aside.write_bytes(b"x" * 100)
        kept.keep(aside, f"{number:032}.mp4")
    assert not (tmp_path / f"{1:032}.mp4").exists() and (tmp_path / f"{28:032}.mp4").exists()
    assert (tmp_path / "holidays.mp4").exists() and (tmp_path / f"{0:032}.mp4").is_symlink()


def test_a_cache_that_cannot_be_written_lies_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    cache = CacheFolder(tmp_path)
    assert cache.path.is_dir() and tmp_path not in cache.path.parents
    cache.close()
    assert not cache.path.exists()


# Helpers


def test_a_helper_that_hangs_or_dies_is_replaced(tmp_path: Path, videos: dict[str, Path]) -> None:
    os.mkfifo(tmp_path / "out")  # writing to it waits for ever

    async def work() -> None:
        crew = Crew(1, 2, 30)
        source, out = str(videos["plays"]), str(tmp_path / "out")
        try:
            assert (await crew.do("probe", source=source))["video"] == "h264"
            (process,) = crew._started
            crew._time_limit_seconds = 1
            with pytest.raises(TookTooLongError, match="ended"):
                await crew.do("poster", source=source, seconds=0, height=48, out=out)
            crew._time_limit_seconds = 30
            assert process.returncode is not None
            assert (await crew.do("probe", source=source))["video"] == "h264"
            (process,) = crew._started
            process.kill()
            await process.wait()
            assert (await crew.do("probe", source=source))["video"] == "h264"
            hanging = asyncio.create_task(crew.do("poster", source=source, seconds=0, height=48, out=out))
            await asyncio.sleep(0.5)
            (process,) = crew._started
            process.kill()
            with pytest.raises(InputError, match="ended the process"):
                await hanging
            asked = [asyncio.create_task(crew.do("probe", source=source)) for _ in range(4)]
            done = await asyncio.gather(*asked, return_exceptions=True)
            assert [type(one) for one in done] == [dict, dict, dict, BusyError]
        finally:
            await crew.close()
        assert not crew._started

    asyncio.run(work())


def test_whose_fault_an_error_is_comes_through(tmp_path: Path) -> None:
    async def work() -> None:
        crew = Crew(1, 1, 60)
        options = {"device": "cpu", "max_seconds": 1.0}
        try:
            with pytest.raises(InputError, match="does not exist"):
                await crew.do("probe", source=str(tmp_path / "gone.mp4"))
            with pytest.raises(UsageError, match="text"):
                await crew.do("embed", index=str(tmp_path), request={}, **options)
            damaged = tmp_path / "damaged"
            damaged.mkdir()
            (damaged / "manifest.json").write_text("{")
            with pytest.raises(SvbError, match="damaged") as caught:
                await crew.do("embed", index=str(damaged), request={"image": "a.png"}, **options)
            assert response_to(caught.value).status_code == 503
        finally:
            await crew.close()

    asyncio.run(work())


def test_a_file_is_opened_once_for_all_who_ask(tmp_path: Path, videos: dict[str, Path]) -> None:
    path, asked = videos["plays"], list[str]()
    file = VideoFile(path, "0a", VideoInfo("", "", str(path), 2.0, {}, 0, 0, ""))

    class OneAtATime:
        async def do(self, task: str, **arguments: Any) -> Any:
            asked.append(task)
            await asyncio.sleep(0.01)
            if len(asked) == 1:
                raise BusyError("try again")
            return {"begin_seconds": 1.5}

    async def ask() -> None:
        probes = Probes(OneAtATime())  # type: ignore[arg-type]
        failed = await asyncio.gather(*(probes.begin_seconds(file) for _ in range(3)), return_exceptions=True)
        assert [type(one) for one in failed] == [BusyError] * 3
        leaving = asyncio.create_task(probes.begin_seconds(file))
        others = [asyncio.create_task(probes.begin_seconds(file)) for _ in range(3)]
        await asyncio.sleep(0)
        leaving.cancel()
        assert await asyncio.gather(*others) == [1.5] * 3
        assert await probes.begin_seconds(file) == 1.5

    asyncio.run(ask())
    assert asked == ["probe", "probe"]


# Uploads


def post_file(served: Serving, content: bytes = b"x", **fields: str) -> Any:
    data = {"kind": "image", "request": "{}", **fields}
    return served.client.post("/api/search/file", data=data, files={"file": ("../../a b.PNG", content)})


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Have uploads embedded by nobody, and collect what is asked."""
    asked: list[dict[str, Any]] = []

    async def do(self: Crew, task: str, **arguments: Any) -> Any:
        path = Path(arguments["request"].get("image") or arguments["request"]["video"])
        asked.append({**arguments, "content": path.read_bytes(), "path": path})
        return {"embedding": [1.0, 0.0], "model_fingerprint": "fake"}

    monkeypatch.setattr(Crew, "do", do)
    return asked


def test_a_file_is_searched_with_and_removed(served: Serving, embedded: list[dict[str, Any]]) -> None:
    response = post_file(served, b"pixels", request='{"k": 1}')
    assert response.status_code == 200, response.text
    assert response.json()["request"] == {"image": "a b.PNG", "k": 1}
    (asked,) = embedded
    assert asked["content"] == b"pixels"
    assert asked["path"].name == "upload.png" and not asked["path"].exists()
    response = post_file(served, kind="video", request='{"span_seconds": [1, 2.5]}')
    assert response.status_code == 200, response.text
    assert embedded[1]["request"]["span_seconds"] == (1, 2.5)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"kind": "sound"}, "kind is 'sound'"),
        ({"request": "{"}, "no JSON"),
        ({"request": '{"image": "/etc/passwd"}'}, "image cannot go with a file"),
        ({"request": '{"text": "a"}'}, "text cannot go with a file"),
        ({"request": '{"span_seconds": [0, 1]}'}, "goes with a video"),
    ],
)
def test_a_form_that_means_nothing_is_told_why(
    served: Serving, embedded: list[dict[str, Any]], fields: dict[str, str], words: str
) -> None:
    response = post_file(served, **fields)
    assert response.status_code == 400
    assert words in response.json()["error"]
    assert not embedded


def test_a_form_without_a_file_is_refused(served: Serving) -> None:
    post = served.client.post
    assert post("/api/search/file", json={}).status_code == 415
    assert post("/api/search/file", files={"kind": (None, "image")}).status_code == 400
    broken = post("/api/search/file", content=b"--", headers={"content-type": "multipart/form-data"})
    assert broken.status_code == 400


def test_a_file_that_is_too_large_is_refused_while_it_comes(
    index: Path, embedded: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "FORM_BYTES", 4096)
    with s.serving(index, max_upload_bytes=100_000) as served:
        assert post_file(served, b"x" * 90_000).status_code == 200
        sent = 0

        def endless() -> Iterator[bytes]:
            nonlocal sent
            yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
            while sent < 10**7:
                sent += 10_000
                yield b"x" * 10_000

        headers = {"content-type": "multipart/form-data; boundary=b"}
        response = served.client.post("/api/search/file", content=endless(), headers=headers)
        assert response.status_code == 413
        assert "0.1 MB" in response.json()["error"]
        assert post_file(served, b"x" * 200_000).status_code == 413
        assert len(embedded) == 1


def test_what_a_killed_server_left_of_uploads_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name, age_seconds in (("svb-upload-old", 2 * 86400), ("svb-upload-new", 60), ("other", 2 * 86400)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "upload.mp4").write_bytes(b"x")
        then = time.time() - age_seconds
        os.utime(tmp_path / name, (then, then))
    uploads.Uploads(1, 1)
    assert {path.name for path in tmp_path.iterdir()} == {"svb-upload-new", "other"}


def test_few_files_are_looked_at_at_once(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entered, release = threading.Semaphore(0), threading.Event()

    async def do(self: Crew, task: str, **arguments: Any) -> Any:
        entered.release()
        while not release.is_set():
            await asyncio.sleep(0.01)
        return {"embedding": [1.0, 0.0], "model_fingerprint": "fake"}

    monkeypatch.setattr(Crew, "do", do)
    with s.serving(index, uploads_at_once=1) as served:
        first = threading.Thread(target=post_file, args=(served,))
        first.start()
        assert entered.acquire(timeout=5)
        refused = post_file(served)
        assert refused.status_code == 429 and refused.headers["retry-after"]
        release.set()
        first.join()
        assert post_file(served).status_code == 200


def test_a_model_that_changed_meanwhile_is_not_mixed(served: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    async def do(self: Crew, task: str, **arguments: Any) -> Any:
        return {"embedding": [1.0, 0.0], "model_fingerprint": "another"}

    monkeypatch.setattr(Crew, "do", do)
    response = post_file(served)
    assert response.status_code == 503
    assert "another model" in response.json()["error"]


def test_a_file_that_cannot_be_used_is_named_as_the_client_does(
    served: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def do(self: Crew, task: str, **arguments: Any) -> Any:
        raise InputError(f"{arguments['request']['image']} is no picture")

    monkeypatch.setattr(Crew, "do", do)
    response = post_file(served)
    assert response.status_code == 400
    assert response.json()["error"] == "a b.PNG is no picture"


# Around it


def test_metrics_count_by_route(served: Serving) -> None:
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
        *("/media/{key}/preview", "/poster/{key}", "/strip/{key}", "/healthz", "/metrics"),
    } == set(held["paths"])
    body = held["paths"]["/api/search"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"text", "like", "without", "k"} <= set(body["properties"])
    assert not {"image", "video", "span_seconds"} & set(body["properties"])
    assert {"Answer", "VideoResult", "Moment"} <= set(held["components"]["schemas"])
    assert served.client.get("/docs").status_code == 404


def test_a_server_announces_itself_to_this_user_alone(tmp_path: Path) -> None:
    path = tmp_path / "server.json"
    path.write_text('{"url": "of a server that was killed", "pid": 1}')
    path.chmod(0o644)
    with announced(tmp_path, "http://127.0.0.1:1", TOKEN):
        held = {"url": "http://127.0.0.1:1", "pid": os.getpid(), "token": TOKEN, "folder": str(tmp_path.resolve())}
        assert json.loads(path.read_text()) == held
        assert path.stat().st_mode & 0o777 == 0o600
    assert not path.exists()
    with announced(tmp_path, "http://127.0.0.1:1", None):
        path.write_text('{"pid": 1}')  # a later server's
    assert path.exists()
