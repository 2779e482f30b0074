"""What `svb search` makes of answers: tables, CSV, paths, a page, clips, and what it says about them on stderr."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import click

from svb.cli.output import Meter, print_table, say
from svb.errors import InputError, SvbError
from svb.retrieve.answer import Answer, CaptionResult, Line, Moment, SearchRequest, VideoResult
from svb.retrieve.searching.source_file import problem_of

CSV_HEADER = (
    *("query", "rank", "score", "confidence", "video_id", "source_path", "duration_seconds"),
    *("moment", "begin_seconds", "end_seconds", "best_seconds", "moment_score", "kind", "line"),
)
MOST_NAMED = 3
# A shorter search is over before anyone asks what took the time.
WORTH_DIVIDING_SECONDS = 0.1


def print_tables(answers: Sequence[Answer]) -> None:
    """Print each answer as a table, under its query if there are several."""
    for number, answer in enumerate(answers):
        if len(answers) > 1:
            click.echo(f"{chr(10) if number else ''}{printable(query_of(answer.request))}")
        if answer.captions:
            _print_captions(answer.captions)
        if any(result.lines for result in answer.results):
            _print_with_lines(answer.results)
        elif answer.results:
            print_table(["rank", "score", "confidence", "moments", "video"], [_row(r) for r in answer.results])


def _print_with_lines(results: Sequence[VideoResult]) -> None:
    """Print a table that says why each video is there, with the lines that are said under it."""
    rows = [[*cells[:3], result.why, *cells[3:]] for result in results for cells in [_row(result)]]
    lines = [[_shown(line) for line in result.lines] for result in results]
    print_table(["rank", "score", "confidence", "why", "moments", "video"], rows, below=lines)


def _shown(line: Line) -> str:
    """Return a line that is said with its time and language, and the words that were asked for in bold."""
    at = "" if line.begin_seconds is None else f"{clock(line.begin_seconds)} "
    text, end = "", 0
    for begin, stop in line.marks:
        text += printable(line.text[end:begin]) + click.style(printable(line.text[begin:stop]), bold=True)
        end = stop
    language = f" [{printable(line.language)}]" if line.language else ""
    return f'{at}"{text}{printable(line.text[end:])}"{language}'


def _is_of(line: Line, moment: Moment) -> bool:
    return moment.kind == "said" and line.begin_seconds in (None, moment.begin_seconds)


def print_csv(answers: Sequence[Answer]) -> None:
    """Print one row per moment; captions are left out."""
    import csv
    import io

    held = io.StringIO()
    writer = csv.writer(held, lineterminator="\n")
    writer.writerow(CSV_HEADER)
    for answer in answers:
        for result in answer.results:
            of_video = [query_of(answer.request), result.rank, result.score, result.confidence, result.video_id]
            of_video += [result.source_path, result.duration_seconds]
            for number, moment in enumerate(result.moments, start=1):
                times = [moment.begin_seconds, moment.end_seconds, moment.best_seconds]
                said = next((line.text for line in result.lines if _is_of(line, moment)), "")
                writer.writerow([*of_video, number, *times, moment.score, moment.kind, said])
    click.echo(held.getvalue(), nl=False)


def print_paths(answers: Sequence[Answer], end: bytes) -> None:
    """Print the paths of the videos, each followed by `end`, byte for byte as the file system has them."""
    for answer in answers:
        for result in answer.results:
            click.echo(os.fsencode(result.source_path) + end, nl=False)


def say_what_was_compared(answers: Sequence[Answer], server: str | None) -> None:
    """Say on stderr how much was compared and how, and what the user should know about the answers."""
    last = answers[-1]
    how = "exactly" if last.exact else f"approximately ({_recall(last.recall)}; --exact compares every row)"
    say(
        f"compared {last.num_videos:,} videos ({last.num_windows:,} windows) {how}, {_what_it_took(answers)}"
        f"{f', by the server at {server}' if server else ''}"
    )
    # If nothing could be compared, `require_a_match` says why: it is the reason for the exit status.
    for note in dict.fromkeys(note for answer in answers if answer.num_videos for note in answer.notes):
        say(f"note: {note}")
    files = {result.source_path: result for answer in answers for result in answer.results}
    problems = {path: problem for path, result in files.items() if (problem := problem_of(result)) is not None}
    missing = [path for path in problems if not Path(path).exists()]
    _say_of_files("no longer where it was extracted from", missing, "`svb extract` it where it is now")
    changed = [path for path in problems if path not in missing]
    _say_of_files("changed since it was extracted, and may show something else", changed, "`svb extract` it again")


def _what_it_took(answers: Sequence[Answer]) -> str:
    parts = ("total", "embed", "load", "scan")
    took = {part: sum(answer.elapsed_seconds.get(part, 0.0) for answer in answers) for part in parts}
    said = f"{took['total']:.2f} s"
    if took["total"] < WORTH_DIVIDING_SECONDS:
        return said
    load = f", of which {took['load']:.2f} s to load the model" if took["load"] >= 0.005 else ""
    return f"{said} ({took['embed']:.2f} s to embed the query{load}; {took['scan']:.2f} s to scan)"


def _say_of_files(what: str, paths: Sequence[str], remedy: str) -> None:
    if paths:
        named = ", ".join(printable(path) for path in paths[:MOST_NAMED])
        more = f" and {len(paths) - MOST_NAMED} more" if len(paths) > MOST_NAMED else ""
        say(f"note: {what}: {named}{more} - {remedy}, then `svb index`")


def write_html(answers: Sequence[Answer], html: Path, index: Path) -> None:
    """Write answers as one page with their pictures."""
    from svb.retrieve.page.page import write_report

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


def cut_clips(answers: Sequence[Answer], folder: Path) -> None:
    """Cut the moments of answers out as clips."""
    from svb.retrieve.searching.cut import cut_moments

    wanted = sum(len(result.moments) for answer in answers for result in answer.results)
    clips = cut_moments(answers, folder)
    say(f"{folder} holds {len(clips)} of {wanted} clips" if wanted else "there is no moment to cut")
    if wanted and not clips:
        raise InputError(f"none of the {wanted} moments could be cut - the lines above say why")


def save_timeline(answers: Sequence[Answer], file: Path, handles_seconds: float) -> None:
    """Write the moments of answers as a timeline for an editor."""
    from svb.retrieve.searching import timeline_files

    if not any(answer.results for answer in answers):
        say("there is no moment to put on a timeline")
        return
    found = [(query_of(answer.request), answer.results) for answer in answers]
    for note in timeline_files.write_timeline(found, file, handles_seconds):
        say(f"note: {note}")
    say(f"wrote {file}")


def require_a_match(answers: Sequence[Answer], ask: Callable[[SearchRequest], Answer]) -> None:
    """Name the nearest result of each query that found nothing sure.

    Raises:
        SvbError: No query found anything.
    """
    words = []
    for answer in answers:
        if answer.results and answer.confidence != "weak":
            continue
        best = answer
        if not answer.results:
            best = ask(replace(answer.request, min_confidence=None, k=1, with_curves=False))
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


def query_of(request: SearchRequest) -> str:
    """Return the name of a query: its text, its file, or the video_id it searches with."""
    asked = request.text or request.image or request.video or request.like or ""
    if request.span_seconds is None:
        return asked
    begin, end = request.span_seconds
    return f"{asked}@{clock(begin)}-{clock(end)}"


def nearest(answer: Answer) -> str:
    """Return the best result of an answer in words."""
    best = answer.results[0]
    return f"{printable(best.video_id)} at {_span(best.moments[0])} ({best.score:.3f}, {best.confidence})"


def clock(seconds: float) -> str:
    """Return `m:ss` or `h:mm:ss`, with tenths if there are any."""
    tenths = round(seconds * 10)
    minutes, rest = divmod(tenths, 600)
    hours, minutes = divmod(minutes, 60)
    whole = f"{rest // 10:02}{f'.{rest % 10}' if rest % 10 else ''}"
    return f"{hours}:{minutes:02}:{whole}" if hours else f"{minutes}:{whole}"


def printable(text: str) -> str:
    """Return a name without the characters that control a terminal: a stranger's file may have any name."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text)


def _row(result: VideoResult) -> list[str]:
    alike = f" (+{len(result.duplicates)} alike)" if result.duplicates else ""
    moments = "  ".join(map(_span, result.moments))
    return [
        str(result.rank),
        f"{result.score:.3f}",
        result.confidence,
        moments,
        f"{printable(result.video_id)}{alike}",
    ]


def _span(moment: Moment) -> str:
    return f"{clock(moment.begin_seconds)}-{clock(moment.end_seconds)}"


def _recall(recall: float | None) -> str:
    return "recall@10 not measured" if recall is None else f"recall@10 {recall:.3f}"


def _print_captions(captions: Sequence[CaptionResult]) -> None:
    rows = []
    for found in captions:
        at = "" if found.begin_seconds is None else clock(found.begin_seconds)
        rows.append(
            [
                str(found.rank),
                f"{found.score:.3f}",
                *map(printable, (found.caption, found.pool, found.video_id)),
                at,
            ]
        )
    print_table(["rank", "score", "caption", "pool", "of video", "at"], rows)
    click.echo()
