"""Joins page.html, page.css and page.js into one file, for a server or for a report that holds its own data."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path
from typing import Any

from svb.data.publish import published_file
from svb.errors import InputError, UsageError
from svb.retrieve.answer import Answer, VideoResult
from svb.retrieve.searching.source_file import problem_of

# The text of a script element must not hold these: they could end the element.
_ESCAPES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}


def page_with_nonce(nonce: str) -> str:
    """Return the page that a server sends.

    Args:
        nonce: Marks its style and its script, as in the content security policy sent with it; letters, digits, `-`
            and `_`.
    """
    return _joined(nonce=nonce, policy="", embedded="null")


def page_with_data(data: Mapping[str, Any]) -> str:
    """Return the page of a report, with its data in it.

    Its content security policy allows its own style and script by their hashes: a nonce in a file is no secret.
    """
    style, script = (_hash_of(_read(name)) for name in ("page.css", "page.js"))
    policy = (
        f"default-src 'none'; style-src '{style}'; script-src '{script}'; img-src data:; media-src file:; "
        "base-uri 'none'; form-action 'none'"
    )
    meta = f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
    # The data is in ASCII, because the names of files may not be valid Unicode.
    embedded = re.sub("[<>&]", lambda match: _ESCAPES[match[0]], json.dumps(data, allow_nan=False))
    return _joined(nonce="", policy=meta, embedded=embedded)


def _joined(**parts: str) -> str:
    """Return the template with all its marks replaced at once, so that no mark in an inserted text is replaced."""
    parts |= {"style": _read("page.css"), "script": _read("page.js")}
    marks = f"@({'|'.join(parts)})@"
    return re.sub(marks, lambda match: parts[match[1]], _read("page.html"))


def _read(name: str) -> str:
    return resources.files("svb.retrieve.page").joinpath(name).read_text("utf-8")


def _hash_of(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


# --- a report: `svb search --html`

POSTER_HEIGHT_PX = 240
STRIP_FRAMES = 12
STRIP_HEIGHT_PX = 72


def write_report(
    answers: Sequence[Answer],
    out: Path,
    index: Path,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Write answers as one page that contains their pictures and plays the videos from their own paths.

    Args:
        answers: At least one; the reader can choose between several.
        out: The file; an older one is replaced.
        index: The index that was searched; the page names it.
        on_progress: Called with the number of videos that have their pictures, and the number of all.

    Returns:
        `out`.

    Raises:
        UsageError: There is no answer.
    """
    if not answers:
        raise UsageError("there are no answers to write - expected at least one")
    found: dict[str, list[VideoResult]] = {}
    for answer in answers:
        for result in answer.results:
            found.setdefault(result.key, []).append(result)
    pictures, files = {}, {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        shown = pool.map(_pictures_of, found.values())
        for done, (key, (picture, file)) in enumerate(zip(found, shown, strict=True), 1):
            pictures[key], files[key] = picture, file
            on_progress(done, len(found))
    held = {
        "answers": [answer.as_json() for answer in answers],
        "index": str(index),
        "index_path": str(index.absolute()),
        "pictures": pictures,
        "files": files,
    }
    with published_file(out) as aside:
        aside.write_text(page_with_data(held), "utf-8")
    return out


def _pictures_of(results: Sequence[VideoResult]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a video's pictures, and what the page must know about its file.

    If the file is gone, has changed or cannot be decoded, its card says so and still shows the curve.
    """
    from svb.retrieve.searching.pictures import as_jpeg, begin_seconds, duration_seconds, frames_at, strip

    path = Path(results[0].source_path).absolute()
    problem = problem_of(results[0])
    file: dict[str, Any] = {"available": problem is None, "uri": path.as_uri()}
    if problem is not None:
        return {"posters": []}, {**file, "problem": problem} if path.exists() else file
    times = sorted({result.moments[0].best_seconds for result in results})
    try:
        posters = [as_jpeg(frame) for frame in frames_at(path, times, POSTER_HEIGHT_PX)]
        begin = file["begin_seconds"] = begin_seconds(path)
        duration = results[0].duration_seconds or duration_seconds(path) or max(times) - begin
        middles = [begin + (cell + 0.5) / STRIP_FRAMES * duration for cell in range(STRIP_FRAMES)]
        cells = strip(path, middles, STRIP_HEIGHT_PX)
    except InputError:
        return {"posters": []}, file
    return {
        "posters": [[seconds, _as_uri(poster)] for seconds, poster in zip(times, posters, strict=True)],
        "strip": _as_uri(cells),
        "frames": STRIP_FRAMES,
    }, file


def _as_uri(jpeg: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"
