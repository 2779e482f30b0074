"""A browser to look at pages with, and what must not happen in one."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = Path("/usr/bin/chromium")
# No graphics, and nothing that a browser does for itself on the network.
CHROMIUM_OPTIONS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)
# An evil name is still a name.
EVIL = "<img src=x onerror=window.hacked=1>"


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    """Yield Debian's Chromium, without a window; skips where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
    if not CHROMIUM.exists():
        pytest.skip(f"no {CHROMIUM}: apt-get install chromium")
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=str(CHROMIUM), args=CHROMIUM_OPTIONS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as chromium:
        yield chromium


@contextlib.contextmanager
def opened(chromium: Any, url: str = "file:", *, expected: str = "404", **options: Any) -> Iterator[Any]:
    """Open a tab that may load only what is below an address; what goes wrong fails it, or is `expected`."""
    context = chromium.new_context(**{"base_url": url, "viewport": {"width": 1200, "height": 900}, **options})
    page = context.new_page()
    page.set_default_timeout(600_000)
    problems = watch(page, lambda sent: sent.startswith((url, "data:")))
    try:
        yield page
    finally:
        context.close()
    assert [problem for problem in problems if not re.search(expected, problem)] == []


def until(page: Any, expression: str, seconds: float = 600) -> None:
    """Wait until an expression is true in a page; Playwright's own way to do so is against the page's policy."""
    end = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < end, f"never true: {expression}"
        page.wait_for_timeout(50)


def watch(page: Any, allowed: Callable[[str], bool]) -> list[str]:
    """Return a list that grows with whatever goes wrong in a page: errors, and requests that are not allowed."""
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(f"error: {error}"))
    page.on("console", lambda said: said.type in {"error", "warning"} and problems.append(f"console: {said.text}"))
    page.on("request", lambda sent: allowed(sent.url) or problems.append(f"request: {sent.url}"))
    page.add_init_script(
        "window.seeks = []; document.addEventListener('seeked', e => seeks.push(e.target.currentTime), true);"
        "document.addEventListener('securitypolicyviolation', e => console.error('policy ' + e.violatedDirective));"
    )
    return problems
