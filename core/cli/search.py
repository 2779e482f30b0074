"""`svb search`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from svb.cli.output import Meter, print_json, say
from svb.cli.search_options import folders_of, part_of_file, queries_of, search_fields
from svb.config import default_path
from svb.errors import InputError, SvbError, UsageError

# All that is imported here is needed where a running server gives the answer: nothing heavy, and little else.
from svb.retrieve.answer import Answer, SearchRequest

# Of a query, to tell it from others of a list.
NAMED_LETTERS = 60
THUMBNAILS = ("auto", "kitty", "iterm", "blocks", "none")


@click.command()
@click.argument("query", required=False)
@click.option("--image", metavar="FILE", help="Search with a picture instead of a text.")
@click.option("--video", metavar="FILE[@START-END]", help="Search with a video, or a part: clip.mp4@0:05-0:12.")
@click.option("--like", metavar="VIDEO_ID", help="Search for what resembles a video of the index.")
@click.option("--queries", metavar="FILE", help="Search with each line of a file, or of stdin (-).")
@search_fields
@click.option("--json", "as_json", is_flag=True, help="Print JSON: docs/answer.schema.json; with --queries a list.")
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV, a row a moment; captions are not in it.")
@click.option("--paths", "as_paths", is_flag=True, help="Print the files' paths, one a line.")
@click.option("--paths0", "as_paths0", is_flag=True, help="Print the paths, a NUL after each, for xargs -0.")
@click.option("--html", type=click.Path(path_type=Path), help="Write a page with pictures to this file.")
@click.option("--cut", type=click.Path(path_type=Path), help="Cut the moments out as clips into this folder.")
@click.option(
    "--thumbnails",
    type=click.Choice(THUMBNAILS),
    default="auto",
    show_default=True,
    help="Pictures beside the table, in a terminal; auto: as it can.",
)
@click.option(
    "--no-server", is_flag=True, help="Search in this process, even where `svb serve` has the index open."
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda:0, ...; but auto: no server.")
@click.option("--index", "index_path", type=click.Path(path_type=Path), help="The index. [default: ./index]")
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
    thumbnails: str,
    no_server: bool,
    device: str,
    index_path: Path | None,
    **fields: Any,
) -> None:
    """Find the moments nearest to a text, a picture or a video.

    A picture or video is also answered with captions: of training, of your own files, and subtitles. Exits with 1
    where nothing passes.

    \b
    svb search "a dog catches a frisbee" -k 5
    svb search "a beach" --plus "at night" --not "people" --folder holiday --min-confidence fair
    svb search --video clip.mp4@0:05-0:12 --json
    svb search "a goal" --paths0 | xargs -0 mpv
    svb search "a goal" --html goals.html --cut goals/
    """
    printed = {"--json": as_json, "--csv": as_csv, "--paths": as_paths, "--paths0": as_paths0}
    chosen = [option for option, is_on in printed.items() if is_on]
    if len(chosen) > 1:
        raise UsageError(f"{' and '.join(chosen)} print in different ways - give one of them")
    _require_places(html, cut)
    file, span = part_of_file(video)
    asked: dict[str, Any] = {"image": image, "video": file, "span_seconds": span, "like": like}
    fields |= {"folders": folders_of(fields["folders"]), "with_curves": html is not None}
    if queries is None:
        requests = [SearchRequest(text=query, **asked, **fields)]
    elif query is not None or any(asked.values()):
        raise UsageError("--queries holds what to look for - give no other query with it")
    else:
        requests = [SearchRequest(text=line, **fields) for line in queries_of(queries)]
    if index_path is None:
        index_path = default_path("SVB_INDEX", "index")
        say(f"searching {index_path}")
    asker = _Asker(index_path, device, use_server=not no_server and device == "auto")
    answers = [asker.ask(request) for request in requests] if queries is None else _ask_all(requests, asker)
    _print(answers, chosen[0] if chosen else "", queries is not None, thumbnails)
    asker.say_what_was_compared(answers)
    _write(answers, html, cut, index_path)
    _require_a_match(answers, asker)


class _Asker:
    """Asks the server that has an index open, or opens it here, once."""

    def __init__(self, index: Path, device: str, use_server: bool) -> None:
        from svb.cli.client import running_server

        self._index = index
        self._device = device
        self._server = running_server(index) if use_server else None
        self._searcher: Any = None

    def ask(self, request: SearchRequest) -> Answer:
        answer = self._server.search(request) if self._server is not None else None
        if answer is not None:
            return answer
        self._server = None  # what has failed once is not waited for again
        if self._searcher is None:
            # numpy's BLAS starts its threads when it is imported, a quarter of what a repeated query takes. FAISS,
            # which scans, has threads of its own, and so has torch.
            os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
            from svb.retrieve.search import Searcher

            self._searcher = Searcher(self._index, self._device)
        found: Answer = self._searcher.search(request)
        return found

    def say_what_was_compared(self, answers: Sequence[Answer]) -> None:
        from svb.cli.search_output import say_what_was_compared

        say_what_was_compared(answers, self._server.url if self._server is not None else None)


def _ask_all(requests: Sequence[SearchRequest], asker: _Asker) -> list[Answer]:
    """Return the answer to each query of a list; what one of them is refused for names it."""
    from svb.cli.search_output import printable, query_of

    answers = []
    for number, request in enumerate(requests, start=1):
        try:
            answers.append(asker.ask(request))
        except InputError as error:
            query = printable(query_of(request))
            named = query if len(query) <= NAMED_LETTERS else f"{query[:NAMED_LETTERS]}..."
            raise InputError(f"query {number} of {len(requests)}, {named!r}: {error}") from error
    return answers


def _require_places(html: Path | None, cut: Path | None) -> None:
    """Refuse, before anything is searched, to write where it cannot be."""
    if html is not None and html.is_dir():
        raise UsageError(f"--html got {html}, a folder - name the file to write, such as {html / 'found.html'}")
    if cut is not None and cut.exists() and not cut.is_dir():
        raise UsageError(f"--cut got {cut}, which is no folder - name a folder for the clips, new or old")


def _print(answers: Sequence[Answer], chosen: str, is_list: bool, thumbnails: str) -> None:
    from svb.cli import search_output

    if chosen == "--json":
        held = [answer.as_json() for answer in answers]
        print_json(held if is_list else held[0])
    elif chosen == "--csv":
        search_output.print_csv(answers)
    elif chosen:
        search_output.print_paths(answers, b"\0" if chosen == "--paths0" else b"\n")
    else:
        search_output.print_tables(answers, _thumbnails(thumbnails))


def _thumbnails(asked: str) -> str:
    """Return how pictures are shown on stdout."""
    if asked == "none" or sys.stdout is None or not sys.stdout.isatty():
        return "none"
    from svb.cli.thumbnails import kind_of_terminal

    return kind_of_terminal(os.environ) if asked == "auto" else asked


def _write(answers: Sequence[Answer], html: Path | None, cut: Path | None, index: Path) -> None:
    """Write the page and the clips that were asked for."""
    if html is not None:
        from svb.retrieve.page.report import write_report

        meter = Meter("videos")
        try:
            page = write_report(answers, html, index, meter.update)
        except OSError as error:
            raise InputError(
                f"{html} cannot be written ({error.strerror}) - make room for it, or name another file"
            ) from error
        finally:
            meter.close()
        say(f"wrote {page}")
    if cut is not None:
        from svb.retrieve.searching.cut import cut_moments

        wanted = sum(len(result.moments) for answer in answers for result in answer.results)
        clips = cut_moments(answers, cut)
        say(f"{cut} holds {len(clips)} of {wanted} clips" if wanted else "nothing was found that could be cut")
        if wanted and not clips:
            raise InputError(f"none of the {wanted} moments could be cut - the lines above say why")


def _require_a_match(answers: Sequence[Answer], asker: _Asker) -> None:
    """Say of each query that found nothing sure what was nearest; raise where that is all of them."""
    from dataclasses import replace

    from svb.cli.search_output import nearest, printable, query_of

    words = []
    for answer in answers:
        if answer.results and answer.confidence != "weak":
            continue
        best = answer
        if not answer.results:
            best = asker.ask(replace(answer.request, min_confidence=None, k=1, with_curves=False))
        query = f"{printable(query_of(answer.request))}: " if len(answers) > 1 else ""
        if best.results:
            words.append(f"{query}no confident match; nearest: {nearest(best)}")
        else:
            words.append(
                f"{query}nothing found - {'; '.join(best.notes) or 'no video passes the filters: loosen them'}"
            )
    if not any(answer.results for answer in answers):
        for line in words[:-1]:
            say(line)
        raise SvbError(words[-1])
    for line in words:
        say(line)
