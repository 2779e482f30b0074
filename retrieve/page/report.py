"""The page of `svb serve`, and the same page as one file that needs no server: `svb search --html`."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from svb.data.publish import published_file
from svb.errors import InputError, UsageError
from svb.retrieve.answer import Answer, VideoResult
from svb.retrieve.page.page import page_with_data
from svb.retrieve.searching.source_file import problem_of

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
