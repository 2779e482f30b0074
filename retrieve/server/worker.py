"""The process that decodes for the server: it answers each line of JSON with one, until the server closes the pipe.

`svb.retrieve.server.child_processes` starts it, and kills it when it takes too long. It imports torch only where
the user's cache lacks the graphs of an index.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
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
    """Return the streams of a file, without decoding any.

    Returns:
        `container`, `video`, `pixels` and `audio`, as ffmpeg names them, and two times on the file's own clock. The
        duration counts from `begin_seconds`. The first of the streams begins at `preview_begin_seconds`, which
        becomes 0 in a preview that ffmpeg makes.

    Raises:
        InputError: The file is not a video.
    """
    from svb.extract.decode.decoder import DecodeError, check_file
    from svb.extract.decode.options import Limits
    from svb.extract.decode.pyav_file import opened
    from svb.retrieve.searching.pictures import begins_at

    path = Path(source)
    try:
        check_file(path)
        with opened(path, Limits()) as (container, stream):
            audio = container.streams.audio
            return {
                "container": container.format.name,
                "video": stream.codec_context.name if stream.codec_context else None,
                "pixels": stream.codec_context.pix_fmt if stream.codec_context else None,
                "audio": _codec_name(audio[0]) if audio else None,
                "begin_seconds": begins_at(container, stream),
                "preview_begin_seconds": (container.start_time or 0) / 1e6,
            }
    except (DecodeError, OSError) as error:
        raise InputError(str(error)) from error


def embed(index: str, request: dict[str, Any], device: str, max_seconds: float) -> dict[str, Any]:
    """Return the `(D,)` embedding of a request's image or video, its model, and the duration of each part."""
    began = time.perf_counter()
    from svb.retrieve.answer import SearchRequest
    from svb.retrieve.stored.manifest import read_manifest

    wanted = SearchRequest.from_json(request)
    if wanted.video is not None:
        _require_short(Path(wanted.video), wanted.span_seconds, max_seconds)
    fingerprint = read_manifest(Path(index))["model_fingerprint"]
    embedder = _embedder(index, fingerprint, device)
    loaded = embedder.load_seconds
    embedding = embedder.embed_media(wanted)
    took = {"embed": time.perf_counter() - began, "load": embedder.load_seconds - loaded}
    return {
        "embedding": [float(number) for number in embedding],
        "model_fingerprint": fingerprint,
        "elapsed_seconds": took,
    }


def timeline(query: str, videos: list[dict[str, Any]], handles_seconds: float, out: str) -> list[str]:
    """Write a timeline of videos that were found, for an editor; return what the user should know about it."""
    from svb.retrieve.answer import Moment, VideoResult
    from svb.retrieve.searching.timeline_files import write_timeline

    found = [
        VideoResult(**{**video, "moments": tuple(Moment(**moment) for moment in video["moments"])})
        for video in videos
    ]
    return write_timeline([(query, found)], Path(out), handles_seconds)


def cut(source: str, begin_seconds: float, end_seconds: float, out: str) -> None:
    """Cut a part out of a video as a clip."""
    from svb.retrieve.searching.cut import cut_clip

    cut_clip(Path(source), begin_seconds, end_seconds, Path(out))


TASKS: dict[str, Callable[..., Any]] = {
    "poster": poster,
    "strip": strip,
    "probe": probe,
    "embed": embed,
    "timeline": timeline,
    "cut": cut,
}


def _codec_name(stream: object) -> str:
    context = getattr(stream, "codec_context", None)
    # An unknown codec is not "no sound": no browser would play it.
    return str(context.name) if context is not None else "unknown"


@functools.lru_cache(maxsize=1)
def _embedder(index: str, fingerprint: str, device: str) -> QueryEmbedder:
    """Return the embedder of files, kept as long as the index has the same model."""
    from svb.retrieve.model.query_embedder import QueryEmbedder
    from svb.retrieve.stored.manifest import read_manifest

    # An export would take longer than a request may.
    return QueryEmbedder(Path(index), read_manifest(Path(index)), device, exports=False)


def _require_short(video: Path, span_seconds: tuple[float, float] | None, max_seconds: float) -> None:
    from svb.retrieve.searching.pictures import duration_seconds

    seconds = span_seconds[1] - span_seconds[0] if span_seconds else duration_seconds(video) or 0.0
    if seconds > max_seconds:
        raise InputError(
            f"{video} asks for {seconds:.0f} s - this server accepts up to {max_seconds:.0f} s; send a span of it"
        )


def answer(line: str) -> dict[str, Any]:
    """Do the task of one line; an error is an answer too."""
    message = json.loads(line)
    try:
        return {"result": TASKS[message.pop("task")](**message)}
    except SvbError as error:
        return {"error": str(error), "kind": _kind_of(error)}
    except ModuleNotFoundError as error:
        return {
            "error": f"{error.name} is not installed on this server, and this request needs it",
            "kind": "other",
        }
    except (MemoryError, OSError, RuntimeError, ValueError) as error:  # a strange file must not end the worker
        return {"error": f"this file cannot be used ({type(error).__name__}: {error})", "kind": "input"}


def _kind_of(error: SvbError) -> str:
    """Return the kind of an error; `child_processes.ERRORS` maps it back to a class."""
    kinds = {"usage": UsageError, "input": InputError}
    return next((kind for kind, cause in kinds.items() if isinstance(error, cause)), "other")


def main() -> None:
    """Answer until the pipe is closed."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints must not look like an answer
    for line in sys.stdin:
        answers.write(json.dumps(answer(line)) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
