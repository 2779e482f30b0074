"""The process that decodes for the server: a line of JSON in, a line of JSON out, until the server closes the pipe.

It is started by `svb.retrieve.server.crew`, and killed where it takes too long. Torch is imported with the first
upload, and by none of the other tasks.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svb.errors import InputError, SvbError, UsageError

if TYPE_CHECKING:
    from svb.retrieve.model.query_embedder import QueryEmbedder


def poster(source: str, seconds: float, height: int, out: str) -> None:
    """Write the frame shown at a time as a JPEG."""
    from svb.retrieve.searching.pictures import as_jpeg, frame_at

    Path(out).write_bytes(as_jpeg(frame_at(Path(source), seconds, height)))


def strip(source: str, times_seconds: list[float], height: int, out: str) -> None:
    """Write frames side by side as one JPEG."""
    from svb.retrieve.searching import pictures

    Path(out).write_bytes(pictures.strip(Path(source), times_seconds, height))


def probe(source: str) -> dict[str, Any]:
    """Return what a file is made of: what tells whether browsers can play it, and when it begins."""
    from svb.retrieve.server.playable import streams_of

    return streams_of(Path(source))


def embed(index: str, request: dict[str, Any], device: str, max_seconds: float) -> dict[str, Any]:
    """Return the `(D,)` embedding of a request's image or video, and the fingerprint of the model that made it."""
    from svb.retrieve.answer import SearchRequest
    from svb.retrieve.stored.manifest import read_manifest

    wanted = SearchRequest.from_json(request)
    if wanted.video is not None:
        _require_short(Path(wanted.video), wanted.span_seconds, max_seconds)
    fingerprint = read_manifest(Path(index))["model_fingerprint"]
    embedding = _embedder(index, fingerprint, device).embed_media(wanted)
    return {"embedding": [float(number) for number in embedding], "model_fingerprint": fingerprint}


TASKS: dict[str, Callable[..., Any]] = {"poster": poster, "strip": strip, "probe": probe, "embed": embed}


@functools.lru_cache(maxsize=1)
def _embedder(index: str, fingerprint: str, device: str) -> QueryEmbedder:
    """Return what embeds files; it is kept as long as the index is of the same model."""
    from svb.retrieve.model.query_embedder import QueryEmbedder
    from svb.retrieve.stored.manifest import read_manifest

    return QueryEmbedder(Path(index), read_manifest(Path(index)), device)


def _require_short(video: Path, span_seconds: tuple[float, float] | None, max_seconds: float) -> None:
    from svb.retrieve.searching.pictures import duration_seconds

    seconds = span_seconds[1] - span_seconds[0] if span_seconds else duration_seconds(video) or 0.0
    if seconds > max_seconds:
        raise InputError(
            f"{video} asks for {seconds:.0f} s - this server looks at up to {max_seconds:.0f} s: send a span of it"
        )


def answer(line: str) -> dict[str, Any]:
    """Do what a line asks; errors are an answer too."""
    message = json.loads(line)
    try:
        return {"result": TASKS[message.pop("task")](**message)}
    except SvbError as error:
        return {"error": str(error), "kind": kind_of(error)}
    except (MemoryError, OSError, RuntimeError, ValueError) as error:  # a strange file must not cost the helper
        return {"error": f"this file cannot be used ({type(error).__name__}: {error})", "kind": "input"}


def kind_of(error: SvbError) -> str:
    """Return whose fault an error is, as `svb.retrieve.server.crew` raises it again."""
    kinds = {"usage": UsageError, "input": InputError}
    return next((kind for kind, cause in kinds.items() if isinstance(error, cause)), "other")


def main() -> None:
    """Answer until the pipe is closed."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no answer
    for line in sys.stdin:
        answers.write(json.dumps(answer(line)) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
