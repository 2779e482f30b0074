"""`svb search`."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from svb.cli import search_output as output
from svb.cli.options import config_options
from svb.cli.output import print_json, say
from svb.config import default_path
from svb.data.text import storable_text
from svb.errors import InputError, UsageError

# Only what a search through a running server needs is imported here: nothing heavy.
from svb.retrieve.answer import Answer, SearchRequest, seconds_of

# Letters of a query that an error shows, to tell it from the others of a list.
NAMED_LETTERS = 60
HANDLES_HELP = "Time to add around each moment of the timeline.  [default: 0s]"


def _seconds(text: str) -> float:
    try:
        return seconds_of(text.strip().removesuffix("s"))
    except UsageError as error:
        raise click.BadParameter(str(error)) from error


@click.command()
@click.argument("query", required=False)
@click.option("--image", metavar="FILE", help="Search with a picture instead of a text.")
@click.option("--video", metavar="FILE[@START-END]", help="Search with a video, or a part: clip.mp4@0:05-0:12.")
@click.option("--like", metavar="VIDEO_ID", help="Search for videos similar to one in the index.")
@click.option("--queries", metavar="FILE", help="Search with each line of a file, or of stdin (-).")
@config_options(SearchRequest)
@click.option(
    "--json", "as_json", is_flag=True, help="Print JSON (docs/answer.schema.json); with --queries a list."
)
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV, one row per moment, without captions.")
@click.option("--paths", "as_paths", is_flag=True, help="Print the paths of the files, one per line.")
@click.option("--paths0", "as_paths0", is_flag=True, help="Print the paths, a NUL after each, for xargs -0.")
@click.option("--html", type=click.Path(path_type=Path), help="Write a page with pictures to this file.")
@click.option("--cut", type=click.Path(path_type=Path), help="Cut the moments out as clips into this folder.")
@click.option(
    "--otio", type=click.Path(path_type=Path), help="Write a timeline for an editor: .otio, .edl, .fcpxml."
)
@click.option("--handles", metavar="TIME", type=_seconds, help=HANDLES_HELP)
@click.option("--no-server", is_flag=True, help="Search in this process, even if `svb serve` has the index open.")
@click.option(
    "--device", default="auto", show_default=True, help="auto, cpu, cuda:0, ...; any but auto asks no server."
)
@click.option("--index", "index_path", type=click.Path(path_type=Path), help="Index to search. [default: ./index]")
def search(
    query: str | None,
    image: str | None,
    video: str | None,
    like: str | None,
    queries: str | None,
    as_json: bool,
    as_csv: bool,
    as_paths: bool,
    as_paths0: bool,
    html: Path | None,
    cut: Path | None,
    otio: Path | None,
    handles: float | None,
    no_server: bool,
    device: str,
    index_path: Path | None,
    **options: Any,
) -> None:
    """Find the moments that match a text, a picture or a video best.

    A picture or a video also finds captions: those of training, those of your own files, and subtitles.
    Exits with 1 if nothing is found.

    \b
    svb search "a dog catches a frisbee" -k 5
    svb search "a beach" --plus "at night" --not "people" --folder holiday --min-confidence fair
    svb search --video clip.mp4@0:05-0:12 --json
    svb search "a goal" --paths0 | xargs -0 mpv
    svb search "a goal" --html goals.html --cut goals/
    svb search "a goal" --otio goals.otio --handles 1s
    """
    printed = {"--json": as_json, "--csv": as_csv, "--paths": as_paths, "--paths0": as_paths0}
    chosen = [option for option, is_on in printed.items() if is_on]
    if len(chosen) > 1:
        raise UsageError(f"{' and '.join(chosen)} exclude each other - give one of them")
    _require_places(html, cut)
    _require_timeline(otio, handles)
    file, span = part_of_file(video)
    asked: dict[str, Any] = {"image": image, "video": file, "span_seconds": span, "like": like}
    options |= {"folders": folders_of(options["folders"]), "with_curves": html is not None}
    if queries is None:
        requests = [SearchRequest(text=query, **asked, **options)]
    elif query is not None or any(asked.values()):
        raise UsageError("--queries is a file of queries - give no other query with it")
    else:
        requests = [SearchRequest(text=line, **options) for line in queries_of(queries)]
    if index_path is None:
        index_path = default_path("SVB_INDEX", "index")
        say(f"searching {index_path}")
    asker = _Asker(index_path, device, use_server=not no_server and device == "auto")
    answers = [asker.ask(request) for request in requests] if queries is None else _ask_all(requests, asker)
    _print(answers, chosen[0] if chosen else "", is_list=queries is not None)
    output.say_what_was_compared(answers, asker.server_url)
    if html is not None:
        output.write_html(answers, html, index_path)
    if cut is not None:
        output.cut_clips(answers, cut)
    if otio is not None:
        output.save_timeline(answers, otio, handles or 0.0)
    output.require_a_match(answers, asker.ask)


class _Asker:
    """Asks the server that has an index open, or opens the index here, once."""

    def __init__(self, index: Path, device: str, use_server: bool) -> None:
        from svb.cli.client import running_server

        self._index = index
        self._device = device
        self._server = running_server(index) if use_server else None
        self._searcher: Any = None

    @property
    def server_url(self) -> str | None:
        return None if self._server is None else self._server.url

    def ask(self, request: SearchRequest) -> Answer:
        answer = self._server.search(request) if self._server is not None else None
        if answer is not None:
            return answer
        self._server = None  # a server that failed once is not asked again
        if self._searcher is None:
            # numpy's BLAS starts its threads when it is imported, a quarter of what a repeated query takes. FAISS,
            # which scans, has threads of its own, and so has torch.
            os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
            from svb.retrieve.search import open_searcher

            self._searcher = open_searcher(self._index, self._device)
        found: Answer = self._searcher.search(request)
        return found


def _ask_all(requests: Sequence[SearchRequest], asker: _Asker) -> list[Answer]:
    """Return the answer to each query of a list; an error names the query."""
    answers = []
    for number, request in enumerate(requests, start=1):
        try:
            answers.append(asker.ask(request))
        except InputError as error:
            query = output.printable(output.query_of(request))
            named = query if len(query) <= NAMED_LETTERS else f"{query[:NAMED_LETTERS]}..."
            raise InputError(f"query {number} of {len(requests)}, {named!r}: {error}") from error
    return answers


def _print(answers: Sequence[Answer], chosen: str, *, is_list: bool) -> None:
    if chosen == "--json":
        held = [answer.as_json() for answer in answers]
        print_json(held if is_list else held[0])
    elif chosen == "--csv":
        output.print_csv(answers)
    elif chosen:
        output.print_paths(answers, b"\0" if chosen == "--paths0" else b"\n")
    else:
        output.print_tables(answers)


# --- what was typed


def _require_timeline(otio: Path | None, handles_seconds: float | None) -> None:
    """Refuse, before anything is searched, a timeline that cannot be written."""
    if otio is not None:
        from svb.retrieve.searching.timeline_files import require_timeline

        require_timeline(otio, handles_seconds or 0.0)
    elif handles_seconds is not None:
        raise UsageError(f"got --handles {handles_seconds:g}s without --otio - give both, or neither")


def _require_places(html: Path | None, cut: Path | None) -> None:
    """Refuse, before anything is searched, a place that cannot be written to."""
    if html is not None and html.is_dir():
        raise UsageError(f"--html got {html}, a folder - name the file to write, such as {html / 'found.html'}")
    if cut is not None and cut.exists() and not cut.is_dir():
        raise UsageError(f"--cut got {cut}, which is not a folder - name a folder for the clips, new or old")


def part_of_file(video: str | None) -> tuple[str | None, tuple[float, float] | None]:
    """Return the file and the part that `FILE@START-END` asks for; a file that has this very name is taken whole.

    Raises:
        UsageError: What follows `@` is not a start and an end.
    """
    if video is None or Path(video).exists():
        return video, None
    match = re.fullmatch(r"(.+)@([\d:.]+)-([\d:.]+)", video, re.DOTALL)
    if match is not None:
        try:
            return match[1], (seconds_of(match[2]), seconds_of(match[3]))
        except UsageError:
            pass
    file, at, part = video.rpartition("@")
    if at and Path(file).exists():
        raise UsageError(
            f"--video got {part!r} after {file}@ - expected the start and end of a part, such as {file}@0:05-0:12"
        )
    return video, None


def folders_of(folders: Sequence[str]) -> tuple[str, ...]:
    """Return folders as they were typed, and as absolute paths if they exist: an index knows videos by either.

    `.` and `../x` are only looked up as paths: as the beginning of a video_id, `.` would match every video.
    """
    there = {folder: os.path.abspath(folder) for folder in folders if Path(folder).is_dir()}  # noqa: PTH100
    named = [
        folder
        for folder in folders
        if folder not in there or Path(os.path.normpath(folder)).parts[:1] not in ((), (os.pardir,))
    ]
    return tuple(map(storable_text, dict.fromkeys([*named, *there.values()])))


def queries_of(file: str) -> list[str]:
    """Return the lines of a file, or of stdin for `-`, without the empty ones.

    Raises:
        InputError: The file cannot be read, is not UTF-8, or has no lines.
    """
    if file == "-" and sys.stdin is None:
        raise InputError("standard input is closed - name a file, or pipe the queries in")
    try:
        text = (sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()).decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}) - expected a file of queries") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{file} is not UTF-8 ({error.reason} at byte {error.start}) - save it as UTF-8"
        ) from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise InputError(f"{'stdin' if file == '-' else file} holds no query - expected one per line")
    return lines
