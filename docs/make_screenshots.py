"""Make the pictures of the page in docs/img/: `python docs/make_screenshots.py demo`, after `svb demo`.

Each of the demo's clips shows one thing. This joins a few of them to longer videos, so that there are moments to
find. The demo's run was trained on single clips, and some of these are among them.
"""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus
from urllib.request import urlopen

import imageio_ffmpeg
from playwright.sync_api import Page, sync_playwright

OUT = Path(__file__).parent / "img"
URL = "http://127.0.0.1:8795/"
DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday")
TAKES = ("first take", "second take", "titles", "rehearsal", "outtakes", "the lot")
BACKBONE = "offline:efficientnet-lite0"
SVB = (sys.executable, "-m", "svb")
CHROMIUM_OPTIONS = ("--no-sandbox", "--disable-gpu", "--hide-scrollbars")
QUERY, SPOKEN_QUERY = "a red heart", "a red heart for the annual budget"
SAID = {
    ("monday/first take", "en"): (
        "Good morning, and welcome to the annual budget of our club.",
        "We spent less than planned, and nobody knows why.",
        "The red heart on our posters cost more than the hall.",
    ),
    ("tuesday/titles", "en"): (
        "Next week we meet again.",
        "The budget for next year follows.",
        "Bring your own tea.",
    ),
    ("friday/rehearsal", "de"): ("Guten Morgen.", "Das annual budget, also der Haushalt, ist beschlossen."),
}


def main(demo: Path) -> None:
    reels = make_reels(demo)
    if not (demo / "reels_index").exists():
        run("extract", reels, "-o", demo / "reels_features", "--backbone", BACKBONE, "--fps", "2")
        moments = ("--moment-seconds", "2", "--moment-stride-seconds", "1")
        run("index", demo / "run", "--store", demo / "reels_features", "-o", demo / "reels_index", *moments)
    if not (demo / "spoken_index").exists():
        spoken = ("--store", demo / "reels_features", "--transcripts", make_transcripts(demo))
        run("index", demo / "run", *spoken, "-o", demo / "spoken_index", "--moment-seconds", "2")
    report = demo / "report.html"
    queries = demo / "queries.txt"
    queries.write_text("a red heart\na yellow star\nsomething purple\n")
    run("search", "--queries", queries, "--html", report, "--index", demo / "reels_index")
    OUT.mkdir(exist_ok=True)
    with served(demo / "reels_index"):
        shoot(report)
    with served(demo / "spoken_index"):
        shoot_speech()


def make_reels(demo: Path) -> Path:
    """Join a few of the demo's clips to one video, a different handful for each name."""
    clips = sorted((demo / "videos").rglob("*.mp4"))
    choice = random.Random(5)
    for day, take in itertools.product(DAYS, TAKES):
        path = demo / "reels" / day / f"{take}.mp4"
        chosen = choice.sample(clips, choice.randint(6, 12))
        if path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        listed = path.with_suffix(".txt")
        listed.write_text("".join(f"file '{clip.resolve()}'\n" for clip in chosen))
        scale = ("-vf", "scale=480:360:flags=lanczos", "-r", "10", "-g", "20", "-pix_fmt", "yuv420p")
        ffmpeg = (imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-f", "concat", "-safe", "0", "-i", listed)
        subprocess.run([*ffmpeg, *scale, "-movflags", "+faststart", path], check=True)
        listed.unlink()  # a .txt beside a video is its captions
    return demo / "reels"


def make_transcripts(demo: Path) -> Path:
    """Let a few reels say something, three seconds a line."""
    folder = demo / "transcripts"
    for (name, language), lines in SAID.items():
        path = folder / f"{name}.vtt"
        path.parent.mkdir(parents=True, exist_ok=True)
        cues = [f"00:{3 * n:02}.000 --> 00:{3 * n + 3:02}.000\n{line}\n" for n, line in enumerate(lines, start=1)]
        path.write_text("\n".join([f"WEBVTT\nLanguage: {language}\n", *cues]), "utf-8")
    return folder


def run(*arguments: object) -> None:
    subprocess.run([*SVB, *map(str, arguments)], check=True)


@contextmanager
def served(index: Path) -> Iterator[None]:
    server = subprocess.Popen([*SVB, "serve", "--index", str(index), "--port", URL.split(":")[2].strip("/")])
    try:
        while server.poll() is None and not answers():
            time.sleep(0.5)
        yield
    finally:
        server.terminate()
        server.wait()


def answers() -> bool:
    try:
        return bool(urlopen(f"{URL}healthz").status == 200)
    except OSError:
        return False


Shot = Callable[..., None]


@contextmanager
def camera() -> Iterator[Shot]:
    """Yield what takes a picture of a page: its name, the address, what to do there, its size and colours."""
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=CHROMIUM_OPTIONS)

        def shot(
            name: str, address: str, act: Any = None, width: int = 920, height: int = 500, **options: Any
        ) -> None:
            page = chromium.new_page(viewport={"width": width, "height": height}, **options)
            page.goto(address)
            settle(page)
            if act is not None:
                act(page)
                settle(page)
            page.screenshot(path=OUT / f"{name}.png")
            page.close()

        yield shot
        chromium.close()


def shoot(report: Path) -> None:
    asked = f"{URL}?q={quote_plus(QUERY)}"
    with camera() as shot:
        shot("page", asked)
        shot("page-dark", asked, color_scheme="dark")
        shot("page-player", asked, play, height=760)
        shot("page-weak", f"{URL}?q={quote_plus('a committee discusses the budget')}")
        shot(
            "page-filters",
            f"{asked}&plus=something+that+moves&folder=tuesday",
            lambda page: page.keyboard.press("f"),
        )
        shot("page-help", URL, lambda page: (page.locator("body").click(), page.keyboard.press("?")), height=640)
        shot("page-phone", asked, width=360, height=740, is_mobile=True, has_touch=True)
        shot("report", report.resolve().as_uri())


def shoot_speech() -> None:
    asked = f"{URL}?q={quote_plus(SPOKEN_QUERY)}"
    with camera() as shot:
        shot("page-speech", asked, height=560)
        shot("page-speech-phone", asked, width=360, height=740, is_mobile=True, has_touch=True)


def play(page: Page) -> None:
    page.locator(".peak.best").first.click()
    page.mouse.move(0, 0)
    page.evaluate("""async () => {
        const {video, seconds} = opened;
        const is_there = () => video.readyState > 2 && video.currentTime > seconds + 0.2;
        while (!is_there()) await new Promise(done => setTimeout(done, 20));
        video.pause();
    }""")


def settle(page: Page) -> None:
    page.wait_for_timeout(2500)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
