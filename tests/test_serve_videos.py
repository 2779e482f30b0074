"""The videos over HTTP: found by key, sent in ranges, shown as pictures and previews that a cache keeps."""

from __future__ import annotations

import io
import itertools
import json
import os
import threading
import time
from pathlib import Path
from unittest.mock import Mock

import av
import pytest
import serving as s
from clips import make_clip, make_late_clip
from PIL import Image
from serving import Serving, key_of

from svb.data.publish import ASIDE_PREFIX
from svb.retrieve.searching import pictures


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A video that browsers play, one in another container, others that must be encoded, and one that is gone."""
    folder = tmp_path_factory.mktemp("videos")
    (folder / "deep").mkdir()
    odd = {"seconds": 0.3, "codec": ("-c:v", "ffv1")}
    return {
        "plays": make_clip(folder / "plays.mp4", seconds=2),
        "deep/copy": make_clip(folder / "deep" / "copy.mkv", seconds=2),
        "deep/old": make_clip(folder / "deep" / "old.avi", seconds=2, codec=("-c:v", "mpeg4")),
        "uneven": make_clip(folder / "uneven.mkv", size="67x51", **odd),  # type: ignore[arg-type]
        "wide": make_clip(folder / "wide.mkv", size="2000x400", **odd),  # type: ignore[arg-type]
        "anamorphic": make_clip(folder / "anamorphic.mkv", filters="setsar=4/3", **odd),  # type: ignore[arg-type]
        "gone": folder / "gone.mp4",
    }


@pytest.fixture
def index(tmp_path: Path, videos: dict[str, Path]) -> Path:
    return s.make_index(tmp_path / "index", videos)


encoded = s.encoded  # a fixture


def cached(served: Serving, name: str) -> list[Path]:
    return sorted((served.folder / "cache" / name).iterdir())


def test_a_video_says_whether_it_can_be_played(served: Serving) -> None:
    told = {"plays": (True, True), "deep/copy": (True, False), "deep/old": (True, False), "gone": (False, False)}
    for video_id, expected in told.items():
        held = served.client.get(f"/api/videos/{key_of(video_id)}").json()
        assert (held["video_id"], held["metadata"]) == (video_id, {"place": "here"})
        assert (held["available"], held["playable"]) == expected, video_id


def test_a_file_that_moved_or_changed_is_said_to(index: Path, videos: dict[str, Path], tmp_path: Path) -> None:
    own, path = tmp_path / "own.mp4", f"/media/{key_of('own')}"
    own.write_bytes(videos["plays"].read_bytes())
    s.commit(index, 1, {"own": own})
    with s.serving(index) as served:

        def told(status: int) -> str:
            response = served.client.get(path)
            assert response.status_code == status
            return str(response.json()["error"])

        assert served.client.get(path).status_code == 200
        os.utime(own, ns=(1, 1))
        for changed in (path, f"{path}/preview", f"/poster/{key_of('own')}", f"/strip/{key_of('own')}"):
            response = served.client.get(changed)
            assert response.status_code == 409 and "has changed since" in response.json()["error"]
        assert served.client.get(f"/api/videos/{key_of('own')}").json()["available"] is False
        known = videos["plays"].stat()
        own.write_bytes(b"longer" + videos["plays"].read_bytes())
        s.commit(index, 2, {"own": own})
        own.write_bytes(videos["plays"].read_bytes())
        mtime_ns = int(json.loads((index / "manifest.json").read_text())["held"]["own"][2])
        os.utime(own, ns=(known.st_mtime_ns, mtime_ns))  # as a copy that keeps times
        assert f"({known.st_size:,} bytes, was {known.st_size + 6:,})" in told(409)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "stat", Mock(side_effect=PermissionError(13, "Permission denied")))
            assert "cannot be reached" in told(404)
        own.unlink()
        assert "was moved or removed since it was indexed" in told(404)
        own.mkdir()
        s.commit(index, 3, {"own": own})
        assert "not a regular file" in told(404)
        own.rmdir()
        os.mkfifo(own)
        s.commit(index, 4, {"own": own})
        assert "not a regular file" in told(404)
        assert served.client.get(f"/poster/{key_of('own')}").status_code == 415


RANGES = {
    "bytes=0-9": (206, 0, 10),
    "bytes=1990-": (206, 1990, 2000),
    "bytes=1990-9999": (206, 1990, 2000),
    "bytes=-10": (206, 1990, 2000),
    "bytes=-9999": (206, 0, 2000),
    "Bytes= 0 - 0": (206, 0, 1),
    "bytes=1999-1999": (206, 1999, 2000),
    "bytes=2000-": (416, 0, 0),
    "bytes=-0": (416, 0, 0),
    # A header that names no range that we serve is ignored.
    **dict.fromkeys(("bytes=10-9", "bytes=-", "bytes=a-b", "bytes=0-1,5-6", "", "lines=0-9"), (200, 0, 2000)),
    **dict.fromkeys(("bytes", "bytes=" + "9" * 5000 + "-", "bytes=1 2-3"), (200, 0, 2000)),
}


def test_a_file_is_served_in_ranges(index: Path, tmp_path: Path) -> None:
    file, content = tmp_path / "a.mp4", bytes(n % 251 for n in range(2000))
    file.write_bytes(content)
    s.commit(index, 1, {"a": file})
    with s.serving(index) as served:
        for (header, (status, begin, end)), method in itertools.product(RANGES.items(), ("GET", "HEAD")):
            answer = served.client.request(method, f"/media/{key_of('a')}", headers={"range": header})
            assert answer.status_code == status, (header, answer.text)
            assert answer.content == (content[begin:end] if method == "GET" else b"")
            assert answer.headers["content-length"] == str(end - begin)
            about = {206: f"bytes {begin}-{end - 1}/2000", 416: "bytes */2000", 200: None}
            assert answer.headers.get("content-range") == about[status]
            if status != 416:
                assert (answer.headers["content-type"], answer.headers["accept-ranges"]) == ("video/mp4", "bytes")


def test_a_range_is_of_the_file_that_the_client_knows(served: Serving) -> None:
    path, get = f"/media/{key_of('plays')}", served.client.get
    known = get(path).headers
    assert known["cache-control"] == "private, no-cache"
    for said, status in (
        *((known[name], 206) for name in ("etag", "last-modified")),
        *(('"another"', 200), (f"W/{known['etag']}", 200)),
    ):
        assert get(path, headers={"range": "bytes=0-1", "if-range": said}).status_code == status
    again = get(path, headers={"if-none-match": f'"x", {known["etag"]}', "range": "bytes=0-1"})
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", known["etag"])
    assert get(path, headers={"if-none-match": '"x"'}).status_code == 200


def test_posters_and_strips_are_made_once(worked: Path, served: Serving) -> None:
    key, get = key_of("plays"), served.client.get
    poster = get(f"/poster/{key}?t=1.02&h=40")
    assert poster.status_code == 200 and poster.headers["content-type"] == "image/jpeg"
    assert Image.open(io.BytesIO(poster.content)).size == (64, 48)
    strip = get(f"/strip/{key}?n=4&h=54")
    assert Image.open(io.BytesIO(strip.content)).size == (4 * 72, 54)
    assert get(f"/poster/{key}?t=1.04&h=54").content == poster.content
    assert get(f"/strip/{key}?n=4&h=54").content == strip.content
    # A client that asks for everything gets few pictures.
    for tenth in range(30):
        assert get(f"/poster/{key}?t=1.0{tenth}&h=4{tenth % 10}").status_code == 200
        assert get(f"/poster/{key}?t={1000 + tenth}").status_code == 200
    assert len(cached(served, "pictures")) <= 4
    assert worked.read_text().split().count("probe") == 1 and worked.read_text().split().count("strip") == 1


def test_a_copy_has_the_pictures_and_previews_of_its_original(
    worked: Path, encoded: Path, index: Path, videos: dict[str, Path], tmp_path: Path
) -> None:
    copy = tmp_path / "moved" / "copy.mkv"
    copy.parent.mkdir()
    copy.write_bytes(videos["deep/copy"].read_bytes())
    (tmp_path / "release").touch()
    s.commit(index, 1, {**videos, "moved": copy})
    with s.serving(index) as served:
        paths = ("/poster/{}?t=1", "/strip/{}?n=4", "/media/{}/preview")
        made = [served.client.get(path.format(key_of("deep/copy"))).content for path in paths]
        assert [served.client.get(path.format(key_of("moved"))).content for path in paths] == made
        assert sorted(worked.read_text().split()) == ["poster", "probe", "strip"]
        assert encoded.read_text().split() == ["run"] and len(cached(served, "previews")) == 1


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


def test_pictures_out_of_range_are_refused(served: Serving) -> None:
    key = key_of("plays")
    posters = [f"/poster/{key}?{query}" for query in ("t=-1", "t=nan", "t=inf", "t=x", "h=0", "h=721", "h=1e3")]
    strips = [f"/strip/{key}?{query}" for query in ("n=0", "n=25", "h=1000", "n=-1")]
    for path in (*posters, *strips):
        response = served.client.get(path)
        assert response.status_code == 400 and response.json()["error"], path


def test_a_preview_plays_where_the_video_does_not(index: Path, tmp_path: Path, videos: dict[str, Path]) -> None:
    """Its sides are even, its pixels square, and it is not wider than needed."""
    sizes = {"deep/copy": (64, 48), "deep/old": (64, 48), "uneven": (66, 50), "wide": (1280, 256)}
    with s.serving(index) as served:
        for video_id, size in {**sizes, "anamorphic": (84, 48)}.items():
            path = f"/media/{key_of(video_id)}/preview"
            whole = served.client.get(path)
            assert (whole.status_code, whole.headers["content-type"]) == (200, "video/mp4"), whole.text
            assert served.client.get(path, headers={"range": "bytes=0-9"}).content == whole.content[:10]
            assert whole.content.index(b"moov") < whole.content.index(b"mdat")  # it plays before it is all there
            (preview := tmp_path / f"{size}.mp4").write_bytes(whole.content)
            with av.open(str(preview)) as container, av.open(str(videos[video_id])) as source:
                frames = [sum(1 for _ in each.decode(video=0)) for each in (container, source)]
                assert frames[0] == frames[1]
                assert (container.streams.video[0].width, container.streams.video[0].height) == size
        s.commit(index, 2, {"preview": preview})
        assert served.client.get(f"/api/videos/{key_of('preview')}").json()["playable"] is True


def test_what_is_no_video_gives_no_preview_and_no_picture(index: Path, tmp_path: Path) -> None:
    secret = make_clip(tmp_path / "secret.ts", seconds=2)
    playlist = tmp_path / "list.m3u8"  # ffmpeg takes no other name for a playlist, and plays this one by its path
    playlist.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nfile://{secret}\n#EXT-X-ENDLIST\n")
    with av.open(str(playlist)) as container:
        assert container.format.name == "hls"
    (tmp_path / "noise.mp4").write_bytes(os.urandom(5000))
    s.commit(index, 1, {"list": playlist, "noise": tmp_path / "noise.mp4"})
    with s.serving(index) as served:
        for key in (key_of("list"), key_of("noise")):
            for path in (f"/media/{key}/preview", f"/poster/{key}", f"/strip/{key}"):
                response = served.client.get(path)
                assert response.status_code == 415 and response.json()["error"], path
        assert not [*cached(served, "pictures"), *cached(served, "previews")]


def test_a_preview_is_made_once_for_all_who_wait_and_few_are_made(
    index: Path, videos: dict[str, Path], tmp_path: Path, encoded: Path
) -> None:
    others = {f"other{n}": tmp_path / f"{n}.avi" for n in range(9)}
    for n, path in enumerate(others.values()):
        path.write_bytes(videos["deep/old"].read_bytes() + bytes([n]))
    s.commit(index, 1, {**videos, **others})
    answers: list[tuple[int, bytes]] = []
    with s.serving(index) as served:

        def ask(video_id: str) -> None:
            response = served.client.get(f"/media/{key_of(video_id)}/preview")
            answers.append((response.status_code, response.content))

        threads = [threading.Thread(target=ask, args=(name,)) for name in [*["deep/old"] * 4, *others]]
        for thread in threads:
            thread.start()
        # One of the ten is too many: it does not wait for the others.
        s.until(lambda: len(answers) in {1, 4})
        assert {status for status, _ in answers} == {503} and b"files are being made - try again" in answers[0][1]
        (tmp_path / "release").touch()
        for thread in threads:
            thread.join()
        made = [content for status, content in answers if status == 200]
        assert len(made) + len([status for status, _ in answers if status == 503]) == 13
        assert len(encoded.read_text().split()) == 9 == len(cached(served, "previews"))


def test_a_preview_takes_neither_for_ever_nor_the_whole_disk(index: Path, encoded: Path, tmp_path: Path) -> None:
    for limits, status, words in (
        ({"preview_seconds": 0.3}, 503, "longer than 0.3 s"),
        ({"preview_cache_bytes": 2000}, 415, "more than 2,000 bytes"),
    ):
        with s.serving(index, **limits) as served:
            response = served.client.get(f"/media/{key_of('deep/old')}/preview")
            assert (response.status_code, words in response.json()["error"]) == (status, True), response.text
            assert not cached(served, "previews")
        (tmp_path / "release").touch()


def test_the_cache_stays_below_its_limit_and_removes_only_its_own(
    worked: Path, index: Path, tmp_path: Path
) -> None:
    folder = index / "cache" / "pictures"
    folder.mkdir(parents=True)
    (folder / "holidays.jpg").write_bytes(b"x" * 50_000)
    (folder / f"{0:032}.jpg").symlink_to(folder / "holidays.jpg")
    for name, mtime_ns in (("killed", 1), ("under-way", time.time_ns())):
        (folder / f"{ASIDE_PREFIX}{name}.jpg").touch()
        os.utime(folder / f"{ASIDE_PREFIX}{name}.jpg", ns=(mtime_ns, mtime_ns))
    before = {path.name for path in folder.iterdir()}
    with s.serving(index, picture_cache_bytes=10_000) as served:
        assert {path.name for path in folder.iterdir()} == before - {f"{ASIDE_PREFIX}killed.jpg"}
        for tenth in range(20):
            for t in (0, tenth / 10):  # the first is used again and again
                assert served.client.get(f"/poster/{key_of('plays')}?t={t}&h=48").status_code == 200
            own = [path for path in folder.iterdir() if path.name not in before]
            assert sum(path.stat().st_size for path in own) <= 10_000
    assert worked.read_text().split().count("poster") == 20
    assert len(own) < 20
    assert (folder / "holidays.jpg").stat().st_size == 50_000 and (folder / f"{0:032}.jpg").is_symlink()


def test_a_timeline_is_made_of_keys_and_times_alone(served: Serving) -> None:
    moment = {"begin_seconds": 0.5, "end_seconds": 1.0, "best_seconds": 0.7, "score": 0.5}
    video = {"key": key_of("plays"), "rank": 1, "score": 0.5, "confidence": "fair", "moments": [moment]}
    asked = {"query": "../a <b>\nboat", "format": "otio", "handles_seconds": 0.25, "videos": [video]}
    for name in ("otio", "fcpxml"):
        made = served.client.post("/api/timeline", json={**asked, "format": name}).json()
        assert made["name"] == f"a-b-boat.{name}" and made["notes"] == [] and "plays" in made["content"]
    for changes, status, words in (
        ({"videos": [{**video, "key": "../../etc/passwd"}]}, 404, "the index has no such video"),
        ({"videos": [{**video, "source_path": "/etc/passwd", "key": key_of("gone")}]}, 400, "no longer there"),
        ({"videos": []}, 400, "no moment"),
        ({"videos": [{**video, "moments": [moment] * 1001}]}, 400, "up to 1000"),
        ({"videos": [{**video, "moments": [{**moment, "score": "high"}]}]}, 400, "score"),
        ({"format": "edl"}, 400, "10 frames a second, for which an EDL has no timecode"),
        ({"format": "../x"}, 400, "expected otio, edl or fcpxml"),
        ({"handles_seconds": -1}, 400, "0 or more"),
        ({"query": None}, 400, "query"),
    ):
        refused = served.client.post("/api/timeline", json={**asked, **changes})
        assert (refused.status_code, words in refused.json()["error"]) == (status, True), refused.text
