from __future__ import annotations

import re
import shlex
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shown
import watching as w
from clips import make_clip
from conftest import RunSvb
from PIL import Image
from shown import Shown
from watching import EVIL

from svb.retrieve.searching.pictures import frames_at
from svb.retrieve.searching.results import video_key

SLOW = threading.Event()
BOAT = "a red boat"
BOAT_KEY = video_key("harbour/boat")


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    return shown.make_index(folder / "index", shown.make_shown(folder / "videos"))


@pytest.fixture(scope="module")
def url(index: Path) -> Iterator[str]:
    with shown.made_up_model(SLOW), shown.served(index) as url:
        yield url


chromium = w.chromium  # a fixture


@pytest.fixture
def page(chromium: Any, url: str) -> Iterator[Any]:
    """An empty tab; whatever goes wrong in it fails the test."""
    with w.opened(chromium, url) as page:
        yield page


GIVE = """([kind, names, text]) => {
    const held = new DataTransfer();
    for (const name of names) {
        held.items.add(new File(["bytes"], name, {type: name.endsWith("png") ? "image/png" : ""}));
    }
    if (text) held.setData("text/plain", text);
    const how = {bubbles: true, cancelable: true, clipboardData: held, dataTransfer: held};
    if (kind === "drop") document.body.dispatchEvent(new DragEvent(kind, how));
    else document.querySelector("[name=text]").dispatchEvent(new ClipboardEvent(kind, how));
}"""


def show(page: Any, address: str) -> None:
    """Open an address that asks something, and wait for its answer."""
    page.goto(address)
    page.wait_for_selector(".card")


def ask(page: Any, text: str) -> None:
    page.get_by_label("What to look for").fill(text)
    page.keyboard.press("Enter")
    page.wait_for_selector("body:not(.busy) .card")


def names(page: Any) -> list[str]:
    return [str(name) for name in page.locator(".card h3").all_inner_texts()]


def wait_for_seek(page: Any, seconds: float) -> None:
    """Wait until the player shows a time, with the picture there."""
    w.until(
        page,
        f"seeks.length && Math.abs(seeks.at(-1) - {seconds}) < 0.5"
        " && document.querySelector('video')?.readyState >= 2",
    )


def test_a_search_is_answered_and_a_peak_is_played(page: Any) -> None:
    page.goto("")
    w.until(page, "document.querySelector('#holdings').textContent.includes('45 videos')")
    ask(page, BOAT)
    assert names(page)[:4] == ["harbour/boat", EVIL, "gone", "tall"]
    assert page.evaluate("[window.hacked, document.querySelector('main img[src=x]')]") == [None, None]
    assert re.match(r"10 of 45 videos.*windows.*exact.*ms.*generation 1", page.inner_text("#summary"), re.S)
    card = page.locator(".card").first
    assert card.locator(".badge").inner_text() == "strong"
    assert card.locator(".badge").get_attribute("title") == "strong: how sure this result is"
    w.until(page, "document.querySelector('.card .poster img').naturalWidth > 0")
    card.locator(".strip svg").first.wait_for()
    card.locator(".peak.best").click()
    wait_for_seek(page, 13.5)
    assert page.url.endswith(f"?q=a+red+boat#v={BOAT_KEY}&t=13.50")
    # Anywhere on the curve: a quarter of the way.
    box = card.locator(".time").bounding_box()
    page.mouse.click(box["x"] + box["width"] / 4, box["y"] + 20)
    wait_for_seek(page, 5)
    w.until(page, "!document.querySelector('video').paused && document.querySelector('video').currentTime > 5.2")
    assert page.locator(".card .problem:not(:empty)").all_inner_texts()[0].endswith("index its folder again")
    page.locator(".card").nth(2).locator(".poster").click()
    page.locator(".player p", has_text="gone.mp4 is gone").wait_for()


def test_a_link_restores_the_question_and_the_moment(page: Any) -> None:
    page.goto(f"?q=boat&not=gull&k=3&min=9&where=stars%3E%3D1&fold=0&token=secret#v={BOAT_KEY}&t=4.00")
    wait_for_seek(page, 4)
    assert "secret" not in page.url
    assert page.locator(".chip").all_inner_texts() == ["not gull", "stars>=1"]
    assert page.get_by_label("What to look for").input_value() == "boat"
    assert page.locator("#filters-count").inner_text() == "Filters (3)"
    assert names(page) == ["harbour/boat", EVIL]
    page.get_by_role("button", name="Remove gull").click()
    page.wait_for_url("**/?q=boat&k=3&min=9&where=stars%3E%3D1&fold=0")
    page.go_back()
    page.wait_for_selector(".chip.not")
    page.wait_for_selector(".player")


@pytest.mark.slow
def test_keys_find_play_and_close(page: Any) -> None:
    page.goto("")
    page.keyboard.press("?")  # though the box has the focus
    page.locator("#help").wait_for()
    page.keyboard.press("Escape")
    page.keyboard.press("/")
    page.keyboard.type("boat / gull?")
    assert page.get_by_label("What to look for").input_value() == "boat / gull?"
    show(page, "?q=boat")
    for key in ("j", "j", "k", "Enter"):
        page.keyboard.press(key)
    wait_for_seek(page, 13.5)
    assert page.locator(".card").first.locator(".player").count() == 1
    page.keyboard.press("Escape")
    assert page.locator(".player").count() == 0 and "#" not in page.url
    page.keyboard.press("d")
    page.locator(".more dl").wait_for()
    assert "X100" in page.locator(".more dl").inner_text()
    page.locator(".track").first.focus()
    for key in ("ArrowRight", "ArrowRight", "Enter"):
        page.keyboard.press(key)
    wait_for_seek(page, 14.5)
    page.keyboard.press("?")
    assert page.locator("#help").is_visible()
    page.keyboard.press("Escape")
    assert not page.locator("#help").is_visible() and page.locator(".player").count() == 1
    # Keys of the browser stay its own.
    page.locator(".track").first.focus()
    taken = """keys => keys.map(([key, altKey]) => !document.activeElement.dispatchEvent(
        new KeyboardEvent("keydown", {key, altKey, bubbles: true, cancelable: true})))"""
    assert page.evaluate(taken, [["ArrowLeft", True], ["ArrowLeft", False]]) == [False, True]
    page.keyboard.press("/")
    page.keyboard.type("onion")
    page.keyboard.press("Enter")
    page.wait_for_url("**/?q=onion")


def test_what_was_not_found_and_what_went_wrong_is_said(chromium: Any, url: str) -> None:
    with w.opened(chromium, url, expected="status of 40[04]") as page:
        show(page, "?q=nothing of the kind")
        assert page.locator(".notice").inner_text() == "No confident match; nearest:"
        show(page, "?q=nothing of the kind&confidence=strong")
        assert page.locator(".notice").inner_text() == "No confident match; nearest:" and len(names(page)) == 1
        assert page.locator("#summary").inner_text().startswith("45 videos compared")
        page.goto("?q=boat&folder=nowhere")
        page.wait_for_selector(".notice")
        assert page.locator(".notice h2").inner_text() == "Nothing found" and names(page) == []
        assert page.locator(".notice p").inner_text()
        page.goto("?q=boat&where=colour%3Dred")
        page.wait_for_selector("[role=alert]")
        assert "no column 'colour' - expected one of camera, stars" in page.locator("[role=alert]").inner_text()


def ask_slowly(page: Any) -> None:
    """Ask for what is not answered before `SLOW` is set."""
    SLOW.clear()
    page.get_by_label("What to look for").fill("slow onion")
    page.keyboard.press("Enter")
    page.wait_for_selector("body.busy")


def answer_slowly(page: Any) -> None:
    """Give the slow answer, and wait until it can no longer come to the page."""
    SLOW.set()
    while "svb_searches_in_flight 0" not in page.request.get("metrics").text():
        page.wait_for_timeout(10)
    page.evaluate("fetch('api/index').then(answer => answer.json())")  # what was sent before this has come


@pytest.mark.slow
def test_an_answer_that_comes_late_overwrites_nothing(page: Any) -> None:
    page.goto(f"?q=boat#v={BOAT_KEY}&t=4.00")
    wait_for_seek(page, 4)
    ask_slowly(page)
    page.evaluate("window.seeks = []")
    page.go_back()  # before the answer
    wait_for_seek(page, 4)
    answer_slowly(page)
    assert names(page)[0] == "harbour/boat" and page.locator(".player").count() == 1
    assert page.url.endswith(f"?q=boat#v={BOAT_KEY}&t=4.00")
    assert page.locator("body.busy").count() == 0
    assert "of 45 videos" in page.inner_text("#summary")
    ask_slowly(page)
    ask(page, "film")  # a newer question
    answer_slowly(page)
    assert names(page)[0] == "old"
    # A moment that is opened while a question waits closes with its answer.
    show(page, "?q=boat")
    ask_slowly(page)
    page.locator(".peak.best").first.click()
    wait_for_seek(page, 13.5)
    page.evaluate("window.player = document.querySelector('video')")
    SLOW.set()
    w.until(page, "document.querySelector('.card h3').textContent === 'tall'")
    assert page.locator("video").count() == 0
    assert page.evaluate("[player.paused, player.hasAttribute('src')]") == [True, False]
    assert page.url.endswith("?q=slow+onion")
    page.locator(".peak.best").first.click()
    page.wait_for_selector(".player")


def lengthen(route: Any) -> None:
    """Let an answer have long names."""
    response = route.fetch()
    found = response.json()
    for caption in found["captions"]:
        caption["pool"] = "p" * 60
    for result in found["results"]:
        result["metadata"] = {"average_temperature_in_degrees_celsius_at_the_site": "7", "file": "mine"}
    route.fulfill(response=response, json=found)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone(chromium: Any, url: str, scheme: str, tmp_path: Path) -> None:
    Image.new("RGB", (3000, 30), "red").save(tmp_path / "red.png")
    phone = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
    with w.opened(chromium, url, **phone, color_scheme=scheme) as page:
        page.route(re.compile("api/search"), lengthen)
        show(page, f"?q=boat&not=gull&where=camera!%3D{'long' * 30}")
        for act in ("#filters-button", ".card [data-do=details]", ".card .moments button", "#filters-button"):
            assert page.evaluate("document.documentElement.scrollWidth") == 360, act
            page.locator(act).first.click()
        page.wait_for_selector(".player")
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        background, colour = page.evaluate("(s => [s.backgroundColor, s.color])(getComputedStyle(document.body))")
        is_dark = sum(map(int, re.findall(r"\d+", background))) < sum(map(int, re.findall(r"\d+", colour)))
        assert is_dark == (scheme == "dark")
        page.goto("")
        page.set_input_files("#file", tmp_path / "red.png")
        page.wait_for_selector("body:not(.busy) .notice .says")
        page.locator(".chip canvas").wait_for()
        page.locator("[data-do=details]").first.click()
        page.locator(".more dl").wait_for()
        assert page.locator(".more dd", has_text=re.compile("^mine$")).count() == 1
        assert page.locator(".more dd").nth(1).inner_text().endswith("boat.mp4")
        assert page.evaluate("document.documentElement.scrollWidth") == 360


@pytest.mark.slow
def test_an_image_is_answered_with_captions_and_back_leads_back(page: Any, tmp_path: Path) -> None:
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    show(page, "?q=onion&not=gull")
    page.set_input_files("#file", tmp_path / "red.png")
    page.wait_for_selector("body:not(.busy) .notice .says")
    assert page.evaluate("[answer.request.image, answer.request.without]") == ["red.png", ["gull"]]
    assert page.locator(".chip canvas").count() == 1
    assert page.locator(".notice .says").first.inner_text() == "a boat leaves the harbour"
    assert names(page)[0] == "harbour/boat"
    page.go_back()
    w.until(page, "document.querySelector('.card h3').textContent === 'tall'")
    page.go_forward()
    page.wait_for_selector(".chip canvas")
    page.locator(".notice .says").first.click()
    page.wait_for_url("**/?q=a+boat+leaves+the+harbour")


@pytest.mark.slow
def test_a_part_of_a_clip_is_searched_with_and_other_files_take_nothing_away(page: Any) -> None:
    show(page, "?q=boat")
    assert not page.locator("#toast").is_visible()
    page.evaluate(GIVE, ["drop", ["notes.txt"], ""])
    assert "notes.txt is neither" in page.inner_text("#toast")
    page.evaluate(GIVE, ["paste", ["image.png"], "a cell"])
    assert names(page)[0] == "harbour/boat" and page.evaluate("[subject, asking]") == [None, None]
    page.evaluate(GIVE, ["drop", ["my clip.M2TS"], ""])  # not a video, but nobody looks
    w.until(page, "answer?.request.video === 'my clip.M2TS'")
    page.get_by_label("Use the clip from").fill("0:02")
    page.get_by_label("Use the clip to").fill("4.5")
    page.keyboard.press("Tab")
    w.until(page, "String(answer?.request.span_seconds) === '2,4.5'")
    command = page.evaluate("toCommand(question)")
    assert command.startswith("svb search --video 'my clip.M2TS@2-4.5' --index ")
    page.reload()
    page.wait_for_selector("[role=alert]")
    assert "drop it here again" in page.locator("[role=alert]").inner_text()


@pytest.mark.slow
def test_similar_videos_captions_and_more_videos(page: Any) -> None:
    show(page, "?q=boat")
    page.locator("[data-do=captions]").first.click()
    page.locator(".more .captions li").first.wait_for()
    assert EVIL in page.locator(".more .captions").inner_text()
    page.get_by_role("button", name="More videos").click()
    page.wait_for_url("**/?q=boat&k=30")
    w.until(page, "document.querySelectorAll('.card').length === 30")
    page.locator("[data-do=similar]").nth(1).click()
    w.until(page, "document.querySelector('.chip')?.textContent.startsWith('like ')")
    page.wait_for_selector("body:not(.busy) .card")
    assert EVIL not in names(page)
    assert page.evaluate("new URLSearchParams(location.search).get('like')") == EVIL
    # More videos of the question that was answered, not of the one that is typed.
    show(page, f"?like={EVIL}")
    page.get_by_role("button", name=f"Remove {EVIL}").click()
    page.get_by_label("What to look for").fill("something else")
    page.get_by_role("button", name="More videos").click()
    w.until(page, "document.querySelectorAll('.card').length === 30")
    assert page.evaluate("[answer.request.like, answer.request.text, form.elements.text.value]") == [EVIL, None, ""]


COMMANDS = [
    ("?q=it's+-+%22a%22+$HOME&not=-x&plus=two+words", ['it\'s - "a" $HOME', "--plus", "two words", "--not", "-x"]),
    ("?q=--help&k=3&exact=1", ["-k", "3", "--exact", "--", "--help"]),
    (
        "?q=boat&by=video&folder=harbour&min=1.5&max=90&after=2020-01-01&before=2030-01-01&where=stars%3E1"
        "&confidence=fair&fold=0",
        shlex.split(
            "boat --by video --folder harbour --min-duration 1.5 --max-duration 90 --after 2020-01-01 "
            "--before 2030-01-01 --where 'stars>1' --min-confidence fair --no-fold"
        ),
    ),
    (f"?like={EVIL}", ["--like", EVIL]),
]


@pytest.mark.slow
def test_the_command_is_one_that_a_shell_and_svb_take(page: Any, index: Path, run_svb: RunSvb) -> None:
    for address, expected in COMMANDS:
        page.goto(address)
        page.wait_for_selector(".card, .notice")
        w.until(page, "info.index")
        command = shlex.split(page.evaluate("toCommand(question)"))
        place = expected.index("--") if "--" in expected else len(expected)
        assert command == ["svb", "search", *expected[:place], "--index", str(index), *expected[place:]]
        command[command.index(str(index))] = "/nowhere"
        ran = run_svb(*command[1:])
        assert ran.exit_code == 1 and "/nowhere is not an index" in ran.stderr


@pytest.mark.usefixtures("url")  # it makes up the model
def test_a_video_that_begins_late_plays_what_its_curve_says(chromium: Any, tmp_path: Path) -> None:
    late = {"seconds": 9, "size": "160x120", "filters": "setpts=PTS+4.7/TB", "extra": ("-copyts", "-g", "10")}
    video = make_clip(tmp_path / "late.ts", **late)  # type: ignore[arg-type]
    about = {"camera": "X100", "stars": "5"}
    index = shown.make_index(tmp_path / "index", {"late": Shown(video, 9, {"gull": (5.5, 0.8)}, about, begin=6.1)})
    with shown.served(index) as url, w.opened(chromium, url) as page:
        page.goto("?q=gull")
        card = page.locator(".card").first
        card.locator(".strip svg").first.wait_for()
        w.until(page, "Math.abs(document.querySelector('.card').begin - 6.1) < 0.01")
        best = page.evaluate("document.querySelector('.card').result.moments[0].best_seconds")
        assert best == pytest.approx(6.1 + 5.5)
        # The peak stands where the moment lies in the video.
        left = page.evaluate("parseFloat(document.querySelector('.peak.best').style.left)")
        assert left == pytest.approx(100 * 5.5 / 9, abs=0.5)
        card.locator(".peak.best").click()
        assert_shows(page, video, best)
        assert page.url.endswith(f"&t={best:.2f}")
        box = card.locator(".time").bounding_box()
        page.mouse.click(box["x"] + box["width"] * 8 / 9, box["y"] + 20)
        played = assert_shows(page, video, 6.1 + 8)
        left = 100 * min(8 + played, 9) / 9
        w.until(page, f"Math.abs(parseFloat(document.querySelector('.needle.play').style.left) - {left}) < 4")


PIXELS = """() => {
    const canvas = document.createElement("canvas"), context = canvas.getContext("2d");
    [canvas.width, canvas.height] = [160, 120];
    context.drawImage(document.querySelector("video"), 0, 0, 160, 120);
    return [...context.getImageData(0, 0, 160, 120).data];
}"""


def assert_shows(page: Any, path: Path, seconds: float) -> float:
    """Stop the player, and look whether its picture is one from where it began, a time of the file's own clock, on.

    Returns the seconds for which it has played on before it was stopped.
    """
    w.until(page, "seeks.length && document.querySelector('video').readyState >= 2")
    stop = "v => { v.pause(); const played = v.currentTime - seeks.at(-1); seeks.length = 0; return played; }"
    played = float(page.evaluate(f"({stop})(document.querySelector('video'))"))
    # The first picture takes a moment to get from the decoder to where a canvas finds it.
    w.until(page, f"({PIXELS})().some((value, place) => place % 4 < 3 && value)")
    pixels = page.evaluate(PIXELS)
    picture = np.array(pixels, np.float64).reshape(120, 160, 4)[..., :3]
    times = [seconds + tenths / 10 for tenths in range(-30, 31 + int(10 * played))]
    frames = frames_at(path, times, 120)
    away = [np.abs(np.asarray(frame, np.float64) - picture).mean() for frame in frames]
    assert -0.15 <= times[int(np.argmin(away))] - seconds <= played + 0.15
    return played


def test_how_to_rank_is_left_to_the_question_until_it_is_chosen(chromium: Any, url: str) -> None:
    with w.opened(chromium, url, expected="40[04]") as page:
        show(page, "?q=boat")
        assert page.evaluate("answer.request.by") is None
        page.locator("#filters-button").click()
        ranked = page.get_by_label("Rank by")
        assert ranked.input_value() == ""
        ranked.select_option("moment")
        page.wait_for_url("**/?q=boat&by=moment")
        w.until(page, "answer?.request.by === 'moment'")
        assert page.evaluate("toCommand(question)").startswith("svb search boat --by moment --index ")
        ranked.select_option("")
        page.wait_for_url("**/?q=boat")
        w.until(page, "answer && !answer.request.by")
        show(page, "?q=boat&by=video")
        assert page.evaluate("[answer.request.by, form.elements.by.value]") == ["video", "video"]
        # A filter counts from the first question on, before its answer and after a refusal.
        page.goto("")
        ask_slowly(page)
        page.locator("#filters-button").click()
        page.get_by_label("Rank by").select_option("video")
        SLOW.set()
        w.until(page, "answer?.request.by === 'video'")
        page.goto("?q=boat&k=5000")
        page.wait_for_selector("[role=alert]")
        page.locator("#filters-button").click()
        page.get_by_label("How many videos").fill("2")
        page.keyboard.press("Tab")
        w.until(page, "document.querySelectorAll('.card').length === 2")


@pytest.mark.slow
@pytest.mark.usefixtures("url")  # it makes up the model
def test_a_token_stays_out_of_the_address_and_keeps_the_moment_of_a_link(chromium: Any, index: Path) -> None:
    with (
        shown.served(index, token="0123456789abcdef") as guarded,
        w.opened(chromium, guarded, expected="status of 40[14]") as page,
    ):
        page.goto(f"?q=boat#v={BOAT_KEY}&t=4.00")
        page.get_by_label("This server needs its token").fill("0123456789abcdef")
        page.keyboard.press("Enter")
        page.wait_for_selector(".player")
        wait_for_seek(page, 4)
        assert page.url == f"{guarded}?q=boat#v={BOAT_KEY}&t=4.00"
        page.context.clear_cookies()
        page.get_by_label("What to look for").fill("onion")
        page.keyboard.press("Enter")
        page.get_by_label("This server needs its token").wait_for()
        assert page.url == f"{guarded}?q=onion"


@pytest.mark.slow
def test_the_moments_are_saved_as_a_timeline(page: Any) -> None:
    show(page, "?q=boat&min_confidence=strong")
    with page.expect_download() as waiting:
        page.locator("#timelines").get_by_role("button", name=".fcpxml").click()
    assert waiting.value.suggested_filename == "boat.fcpxml"
    saved = waiting.value.path().read_text("utf-8")
    assert "harbour/boat" in saved and "<asset-clip" in saved
    assert "gone.mp4 is no longer there" in page.inner_text("#toast")
    page.locator("#home").click()
    page.wait_for_selector("#hero")
    assert page.locator("#timelines").is_hidden()


@pytest.mark.slow
def test_each_step_back_leads_somewhere_else(page: Any) -> None:
    asked: list[str] = []
    page.on("request", lambda sent: asked.append(sent.url) if sent.url.endswith("api/search") else None)
    page.goto("")
    ask(page, "onion")
    ask(page, "boat")
    ask(page, "boat")
    for _ in range(3):
        page.locator(".poster:not([hidden])").first.click()
        page.locator(".player").wait_for()
        page.keyboard.press("Escape")
    page.locator("#filters-button").click()
    before = len(asked)
    page.get_by_label("File changed on or after").focus()
    page.keyboard.type("02/03/2001")
    w.until(page, "answer.request.after === '2001-02-03'")
    assert len(asked) == before + 1
    page.go_back()
    w.until(page, "location.search === '?q=boat' && !answer?.request.after")
    page.go_back()  # the entry of the moments that were opened
    page.go_back()
    w.until(page, "location.search === '?q=onion'")


@pytest.mark.slow
def test_going_back_from_a_moment_closes_it_and_keeps_what_is_typed(page: Any) -> None:
    page.goto(f"?q=boat#v={BOAT_KEY}&t=4.00")
    page.locator(".player").wait_for()
    page.locator(".peak.best").first.click()
    page.get_by_label("What to look for").fill("half a qu")
    page.keyboard.press("Escape")
    assert page.locator(".player").count() == 0
    page.locator(".poster:not([hidden])").nth(1).click()
    page.locator(".player").wait_for()
    page.go_back()
    w.until(page, "!document.querySelector('.player')")
    assert page.get_by_label("What to look for").input_value() == "half a qu"
    assert page.url.endswith("?q=boat") and names(page)[0] == "harbour/boat"


@pytest.mark.slow
@pytest.mark.parametrize("busy", ["**/api/videos/*", "**/media/*", "**/preview"])
def test_a_player_that_was_refused_is_tried_again(chromium: Any, url: str, busy: str) -> None:
    previews: list[str] = []
    with w.opened(chromium, url, expected="404|503") as page:
        page.on("request", lambda sent: previews.append(sent.url) if sent.url.endswith("/preview") else None)
        refused = {"status": 503, "content_type": "application/json", "body": '{"error": "too busy"}'}
        page.goto("?q=film" if busy == "**/preview" else "?q=boat")
        card = page.locator(".card").first
        card.locator(".strip svg").first.wait_for()
        page.evaluate("document.querySelector('.card').details = null")
        page.route(busy, lambda route: route.fulfill(**refused))
        card.locator(".peak.best").click()
        page.locator(".player p", has_text="too busy").wait_for()
        page.unroute(busy)
        card.locator(".peak.best").click()
        w.until(page, "seeks.length && document.querySelector('video').readyState >= 2")
        assert not page.locator(".player p").is_visible()
        assert bool(previews) == (busy == "**/preview")


@pytest.mark.slow
def test_a_long_question_hides_no_card_and_a_long_film_has_a_curve(page: Any) -> None:
    page.set_viewport_size({"width": 1000, "height": 700})
    show(page, "?q=boat" + "".join(f"&not={number}{' some words' * 8}" for number in range(8)))
    # Where a card that the keys go to comes to lie: below the question.
    margin = "parseFloat(getComputedStyle(document.querySelector('.card')).scrollMarginTop)"
    w.until(page, f"{margin} === document.querySelector('header').offsetHeight + 12")
    assert page.evaluate(margin) > 200
    # Nor does a film of many hours make its curve fail.
    scale = "scaleOf([{curve: {scores: Array(500000).fill(0.1)}, moments: [{score: 0.5}]}])"
    assert page.evaluate(f"[{scale}(0.5), {scale}(0.1)]") == [10, 94]
