"""How answers are printed: as a table with pictures, as CSV, as paths; and what is said of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import click

from svb.cli.output import print_table, say, table_lines
from svb.retrieve.answer import Answer, CaptionResult, Moment, SearchRequest, VideoResult
from svb.retrieve.searching.source_file import problem_of

CSV_HEADER = (
    *("query", "rank", "score", "confidence", "video_id", "source_path", "duration_seconds"),
    *("moment", "begin_seconds", "end_seconds", "best_seconds", "moment_score"),
)
MOST_NAMED = 3


def print_tables(answers: Sequence[Answer], thumbnails: str) -> None:
    """Print each answer as a table, under its query where there are several.

    Args:
        answers: What was found.
        thumbnails: How pictures are shown, as `svb.cli.thumbnails.kind_of_terminal` gives it.
    """
    for number, answer in enumerate(answers):
        if len(answers) > 1:
            click.echo(f"{chr(10) if number else ''}{printable(query_of(answer.request))}")
        if answer.captions:
            _print_captions(answer.captions)
        if answer.results and thumbnails == "none":
            print_table(["rank", "score", "confidence", "moments", "video"], [_row(r) for r in answer.results])
        elif answer.results:
            _print_with_pictures(answer.results, thumbnails)


def print_csv(answers: Sequence[Answer]) -> None:
    """Print a row a moment; captions are not among them."""
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
                writer.writerow([*of_video, number, *times, moment.score])
    click.echo(held.getvalue(), nl=False)


def print_paths(answers: Sequence[Answer], end: bytes) -> None:
    """Print where the videos lie, each followed by `end`, byte for byte as the file system has it."""
    for answer in answers:
        for result in answer.results:
            click.echo(os.fsencode(result.source_path) + end, nl=False)


def say_what_was_compared(answers: Sequence[Answer], server: str | None) -> None:
    """Tell on stderr how much was compared and how, and what there is to know of the answers."""
    last = answers[-1]
    how = "exactly" if last.exact else f"approximately ({_recall(last.recall)}; --exact compares all)"
    seconds = sum(answer.elapsed_seconds.get("total", 0.0) for answer in answers)
    say(
        f"compared {last.num_videos:,} videos ({last.num_moments:,} moments) {how}, {seconds:.2f} s"
        f"{f', by the server at {server}' if server else ''}"
    )
    # Why nothing could be compared is said at the end, as the reason of the exit status.
    for note in dict.fromkeys(note for answer in answers if answer.num_videos for note in answer.notes):
        say(f"note: {note}")
    files = {result.source_path: result for answer in answers for result in answer.results}
    problems = {path: problem for path, result in files.items() if (problem := problem_of(result)) is not None}
    missing = [path for path in problems if not Path(path).exists()]
    _say_of_files("no longer where it was extracted from", missing, "`svb extract` it where it is now")
    changed = [path for path in problems if path not in missing]
    _say_of_files("changed since it was extracted, and may show something else", changed, "`svb extract` it again")


def _say_of_files(what: str, paths: Sequence[str], remedy: str) -> None:
    if paths:
        named = ", ".join(printable(path) for path in paths[:MOST_NAMED])
        more = f" and {len(paths) - MOST_NAMED} more" if len(paths) > MOST_NAMED else ""
        say(f"note: {what}: {named}{more} - {remedy}, then `svb index`")


def query_of(request: SearchRequest) -> str:
    """Return what an answer is called: the text, or the file or video that was asked for."""
    asked = request.text or request.image or request.video or request.like or ""
    if request.span_seconds is None:
        return asked
    begin, end = request.span_seconds
    return f"{asked}@{clock(begin)}-{clock(end)}"


def nearest(answer: Answer) -> str:
    """Return the best of an answer in words."""
    best = answer.results[0]
    return f"{printable(best.video_id)} at {_span(best.moments[0])} ({best.score:.3f}, {best.confidence})"


def clock(seconds: float) -> str:
    """Return `m:ss` or `h:mm:ss`, with tenths where there are some."""
    tenths = round(seconds * 10)
    minutes, rest = divmod(tenths, 600)
    hours, minutes = divmod(minutes, 60)
    whole = f"{rest // 10:02}{f'.{rest % 10}' if rest % 10 else ''}"
    return f"{hours}:{minutes:02}:{whole}" if hours else f"{minutes}:{whole}"


def printable(text: str) -> str:
    """Return a name without what a terminal would obey: files of strangers may be called anything."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text)


def _row(result: VideoResult) -> list[str]:
    rank, score, confidence, video = _head(result)
    return [rank, score, confidence, "  ".join(map(_span, result.moments)), video]


def _head(result: VideoResult) -> list[str]:
    alike = f" (+{len(result.duplicates)} alike)" if result.duplicates else ""
    video = f"{printable(result.video_id)}{alike}"
    return [str(result.rank), f"{result.score:.3f}", result.confidence, video]


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


def _print_with_pictures(results: Sequence[VideoResult], kind: str) -> None:
    """Print a block a video: the picture of its best moment, beside it what is known of it, a moment a line."""
    import shutil

    from svb.cli.thumbnails import CELLS, GAP, beside, thumbnail

    header, *rows = table_lines(["rank", "score", "confidence", "video"], [_head(result) for result in results])
    indent = CELLS[kind][0] + GAP
    click.echo(f"{' ' * indent}{header}")
    # A line that wraps would run into the picture.
    room = max(shutil.get_terminal_size().columns - indent, 20)
    for row, result in zip(rows, results, strict=True):
        moments = [f"      {moment.score:.3f}  {_span(moment)}" for moment in result.moments]
        picture = thumbnail(Path(result.source_path), result.moments[0].best_seconds)
        block = beside(picture, [line[:room] for line in (row, *moments)], kind)
        # The caller has looked at what stdout is: colours are not to be stripped.
        click.echo(block, nl=False, color=True)
