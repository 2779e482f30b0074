"""The page as one file: what it holds, what it shows in a browser, and what it says of files that are gone."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import watching as w
from clips import make_clip
from watching import EVIL

from svb.errors import UsageError
from svb.retrieve.answer import Answer, CaptionResult, Curve, Moment, SearchRequest, VideoResult
from svb.retrieve.page.page import page_with_nonce, write_report
from svb.retrieve.searching.pictures import strip

HOSTILE = "</script><script>window.hacked=1</script><!-- \u2028 & @embedded@ @nonce@"


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("a folder, 100% #1?")
    return make_clip(folder / "clip.mp4", seconds=8, size="96x72", extra=("-g", "10"))


chromium = w.chromium  # a fixture


def result_of(path: Path, rank: int = 1, video_id: str = "clip") -> VideoResult:
    moments = (Moment(4.2, 6.0, 5.5, 0.31), Moment(0.0, 2.0, 1.0, 0.22))
    curve = Curve((1.0, 3.0, 5.5, 7.0), (0.22, 0.1, 0.31, 0.12))
    key = f"{rank:016}"
    return VideoResult(rank, 0.31, "fair", video_id, key, str(path), 8.0, moments, ("copy of it",), {"a": 1}, curve)


def answer_of(request: SearchRequest, *results: VideoResult, **more: Any) -> Answer:
    held: dict[str, Any] = {"num_videos": 9, "num_windows": 70, "exact": True, "recall": None}
    held |= {"confidence": "fair", "generation": 3, "elapsed_seconds": {"total": 0.021}, "captions": (), **more}
    return Answer(request, results, **held)


def embedded_of(page: str) -> Any:
    (held,) = re.findall(r'<script type="application/json" id="embedded">(.*?)</script>', page, re.DOTALL)
    return json.loads(held)


def test_a_name_that_is_no_unicode_can_be_written(tmp_path: Path) -> None:
    name = "caf\udce9.png"  # as the command line gives a byte that is no UTF-8
    out = write_report([answer_of(SearchRequest(image=name))], tmp_path / "out.html", tmp_path)
    assert embedded_of(out.read_text("utf-8"))["answers"][0]["request"] == {"image": name}


def test_a_server_gets_the_page_with_its_nonce() -> None:
    page = page_with_nonce("n0nce-_")
    assert page.count('nonce="n0nce-_"') == 2 and not re.search("@(nonce|policy|embedded)@", page)
    assert embedded_of(page) is None
    # Nothing comes from elsewhere, and nothing in the markup acts by itself.
    assert {*re.findall(r"https?://[^'\" )]+", page)} == {"http://www.w3.org/2000/svg"}
    markup = page.split("<body>")[1].split('<script nonce="n0nce-_">')[0]
    assert not re.search(r"\s(style|on\w+)=", markup)


def test_a_report_holds_all_that_it_shows(clip: Path, tmp_path: Path) -> None:
    answer = answer_of(SearchRequest(text=HOSTILE), result_of(clip))
    seen: list[tuple[int, int]] = []
    out = write_report([answer], tmp_path / "new" / "report.html", Path("index"), lambda *done: seen.append(done))
    page = out.read_text("utf-8")
    held = embedded_of(page)
    assert out == tmp_path / "new" / "report.html" and [*out.parent.iterdir()] == [out] and seen == [(1, 1)]
    assert Answer.from_json(held["answers"][0]) == answer and held["index"] == "index"
    ((seconds, poster),) = held["pictures"]["0000000000000001"]["posters"]
    assert seconds == 5.5 and base64.b64decode(poster.removeprefix("data:image/jpeg;base64,")).startswith(
        b"\xff\xd8"
    )
    assert held["files"]["0000000000000001"] == {"available": True, "uri": clip.as_uri(), "begin_seconds": 0.0}
    assert "\u2028" not in page and page.count("</script>") == 2 and "nonce-" not in page
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]+)"', page)
    for name in ("style", "script"):
        ((content,),) = [re.findall(rf'<{name} nonce="">(.*?)</{name}>', page, re.DOTALL)]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in policy


def test_a_file_that_begins_late_is_shown_and_played_from_its_beginning(chromium: Any, tmp_path: Path) -> None:
    late = make_clip(
        tmp_path / "late.mp4", seconds=8, filters="setpts=PTS+4.7/TB", extra=("-copyts", "-g", "10", "-bf", "0")
    )
    result = replace(
        result_of(late), moments=(Moment(10.5, 11.5, 11.0, 0.3),), curve=Curve((6.0, 11.0), (0.1, 0.3))
    )
    answer = replace(answer_of(SearchRequest(like="clip"), result), exact=False, recall=0.994)
    out = write_report([answer], tmp_path / "r.html", Path("i"))
    held = embedded_of(out.read_text("utf-8"))
    assert held["files"][result.key]["begin_seconds"] == pytest.approx(4.7)
    cells = strip(late, [4.7 + (cell + 0.5) / 12 * 8 for cell in range(12)], 72)
    assert held["pictures"][result.key]["strip"].endswith(base64.b64encode(cells).decode())
    with w.opened(chromium) as page:
        page.goto(out.as_uri())
        assert page.locator("#queries *").count() == 0 and page.inner_text("#asked") == "like clip"
        assert "approximate, recall@10 0.994" in page.inner_text("#summary")
        left = page.evaluate("parseFloat(document.querySelector('.peak.best').style.left)")
        assert left == pytest.approx(100 * (11 - 4.7) / 8, abs=0.5)
        page.locator(".peak.best").click()
        # Beyond the length, which is counted from the late beginning.
        w.until(page, "Math.abs(seeks.at(-1) - 11) < 0.1 && document.querySelector('video').currentTime > 11")


def test_videos_that_are_gone_broken_or_changed_keep_their_cards(clip: Path, tmp_path: Path) -> None:
    """One that has changed is not shown for the one that was found."""
    (tmp_path / "broken.mp4").write_bytes(clip.read_bytes()[:300])
    results = (
        result_of(tmp_path / "gone.mp4"),
        result_of(tmp_path / "broken.mp4", rank=2),
        replace(result_of(clip, rank=3), size_bytes=clip.stat().st_size, mtime_ns=1),
    )
    out = write_report([answer_of(SearchRequest(text="a"), *results)], tmp_path / "r.html", Path("i"))
    held = embedded_of(out.read_text())
    assert [held["files"][result.key]["available"] for result in results] == [False, True, False]
    assert [held["pictures"][result.key] for result in results] == [{"posters": []}] * 3
    problem = held["files"][results[2].key]["problem"]
    assert f"{clip} has changed since it was indexed (from " in problem
    with pytest.raises(UsageError, match="there are no answers to write - expected at least one"):
        write_report([], tmp_path / "empty.html", Path("index"))
    assert not (tmp_path / "empty.html").exists()


def test_a_report_and_pictures_need_no_torch(clip: Path, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(answer_of(SearchRequest(text="a"), result_of(clip)).as_json()))
    script = (
        "import json, sys; from pathlib import Path; from svb.retrieve.answer import Answer;"
        "from svb.retrieve.page.page import write_report;"
        "from svb.retrieve.searching import cut; from svb.retrieve.model import query_media;"
        "write_report([Answer.from_json(json.load(open('a.json')))], Path('a.html'), Path('index'));"
        "sys.exit(str([m for m in ('torch', 'h5py', 'pandas', 'scipy', 'faiss') if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "[]"


def test_a_report_opens_from_a_file_and_plays(chromium: Any, clip: Path, tmp_path: Path) -> None:
    caption = CaptionResult(1, 0.4, EVIL, "training")
    answers = [
        answer_of(SearchRequest(text=HOSTILE, without=("rain",)), result_of(clip, video_id=EVIL)),
        answer_of(SearchRequest(text="a moon"), result_of(tmp_path / "gone.mp4", rank=2), confidence="weak"),
        answer_of(
            SearchRequest(video="my clip.mp4", span_seconds=(2.0, 5.5)), captions=(caption,), notes=("a note",)
        ),
    ]
    out = write_report(answers, tmp_path / "report.html", Path("index"))
    with w.opened(chromium, viewport={"width": 360, "height": 800}) as page:
        page.goto(out.as_uri())
        assert page.locator("#asked").text_content() == HOSTILE
        assert page.locator(".card h3").inner_text() == EVIL and page.locator(".chip").inner_text() == "not rain"
        w.until(page, "document.querySelector('.card .poster img').naturalWidth === 96")
        page.locator(".peak.best").click()
        w.until(page, "seeks.length && Math.abs(seeks.at(-1) - 5.5) < 0.5")
        assert page.url.endswith("#a=0&v=0000000000000001&t=5.50")
        page.locator("#queries button").nth(1).click()
        page.wait_for_selector(".card.gone")
        assert page.inner_text(".notice") == "No confident match; nearest:"
        assert page.inner_text(".problem") == "The file is no longer there."
        page.locator("#queries button").nth(2).click()
        page.wait_for_selector(".captions .says")
        assert page.inner_text("#asked") == "clip my clip.mp4 2 to 5.5 s"
        assert page.inner_text(".captions .says") == EVIL
        command = f"svb search --video 'my clip.mp4@2-5.5' --index {shlex.quote(str(Path('index').absolute()))}"
        assert page.evaluate("toCommand(question)") == command
        page.go_back()
        page.wait_for_selector(".card.gone")
        assert page.evaluate("[window.hacked, document.documentElement.scrollWidth]") == [None, 360]


@pytest.mark.slow
def test_many_questions_leave_room_for_their_answers(chromium: Any, clip: Path, tmp_path: Path) -> None:
    answers = [answer_of(SearchRequest(text=f"question {n}"), result_of(clip)) for n in range(60)]
    out = write_report(answers, tmp_path / "report.html", tmp_path / ("a" * 70))
    for width in (360, 1200):
        with w.opened(chromium, viewport={"width": width, "height": 900}) as page:
            page.goto(out.as_uri())
            page.locator(".card h3").wait_for()
            assert page.evaluate("document.querySelector('.card').getBoundingClientRect().top") < 700
            page.locator(".card").scroll_into_view_if_needed()
            page.locator(".peak.best").click()  # which fails where something lies over it
            page.locator("#queries button").nth(1).focus()
            page.keyboard.press("Enter")
            w.until(page, "document.activeElement.textContent.startsWith('question 1')")
            assert page.evaluate("document.documentElement.scrollWidth") == width
