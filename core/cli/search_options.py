"""What `svb search` can be told, and how it is read."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import click

from svb.data.text import storable_text
from svb.errors import InputError, UsageError
from svb.retrieve.answer import CONFIDENCES, RANKED_BY, SearchRequest

CLOCK = r"(?:(?:(\d+):)?(\d+):)?(\d+(?:\.\d+)?)"


def seconds_of(text: str) -> float:
    """Return the seconds of a number, `m:ss` or `h:mm:ss`, for click."""
    match = re.fullmatch(CLOCK, text.strip())
    if match is None:
        raise click.BadParameter(f"{text!r} is no time - expected seconds, m:ss or h:mm:ss")
    return _seconds(match.groups())


def search_fields(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for each field of SearchRequest but the query itself; they are named alike."""
    defaults = SearchRequest(text="")
    choices: Callable[[Sequence[str]], click.Choice[str]] = click.Choice
    at_least_1 = click.IntRange(min=1)
    options = (
        click.option("--plus", multiple=True, metavar="TEXT", help="What it must fit as well; may be repeated."),
        click.option("--not", "without", multiple=True, metavar="TEXT", help="What it must not fit; likewise."),
        click.option("-k", default=defaults.k, type=at_least_1, show_default=True, help="How many videos."),
        click.option(
            "--by",
            type=choices(RANKED_BY),
            help="Rank videos by their best moment, or the whole. [default: moment; video for a whole video]",
        ),
        click.option(
            "--folder", "folders", multiple=True, metavar="DIR", help="Only videos in it; may be repeated."
        ),
        click.option(
            "--min-duration", "min_duration_seconds", type=seconds_of, metavar="TIME", help="Only videos this long."
        ),
        click.option(
            "--max-duration", "max_duration_seconds", type=seconds_of, metavar="TIME", help="Only videos no longer."
        ),
        click.option("--after", metavar="DATE", help="Only files changed on this day (2026-05-31) or later."),
        click.option("--before", metavar="DATE", help="Only files changed before this day."),
        click.option(
            "--where",
            multiple=True,
            metavar="EXPR",
            help="Only videos whose metadata fit: column=value, or with !=, <, <=, >, >=, ~ (contains).",
        ),
        click.option(
            "--min-confidence",
            type=choices(CONFIDENCES),
            help="Only answers this sure; where none is, the exit status is 1.",
        ),
        click.option("--fold/--no-fold", default=defaults.fold, help="Put near-duplicates under the best of them."),
        click.option("--exact", is_flag=True, help="Compare every row, even with an approximate index at hand."),
        click.option(
            "--moments",
            "num_moments",
            default=defaults.num_moments,
            type=at_least_1,
            show_default=True,
            help="Moments a video.",
        ),
        click.option(
            "--captions",
            "num_captions",
            default=defaults.num_captions,
            type=click.IntRange(min=0),
            show_default=True,
            help="Captions that answer an image or a video.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def part_of_file(video: str | None) -> tuple[str | None, tuple[float, float] | None]:
    """Return a file and the part of it that `FILE@START-END` asks for; a file of that very name is taken whole.

    Raises:
        UsageError: What follows a file's name and `@` is no begin and end.
    """
    if video is None or Path(video).exists():
        return video, None
    match = re.fullmatch(rf"(.+)@{CLOCK}-{CLOCK}", video, re.DOTALL)
    if match is None:
        file, at, part = video.rpartition("@")
        if at and Path(file).exists():
            raise UsageError(
                f"--video got {part!r} after {file}@ - expected the part's begin and end, such as {file}@0:05-0:12"
            )
        return video, None
    return match[1], (_seconds(match.groups()[1:4]), _seconds(match.groups()[4:7]))


def _seconds(clock: Sequence[str | None]) -> float:
    hours, minutes, seconds = clock
    return int(hours or 0) * 3600 + int(minutes or 0) * 60 + float(seconds or 0)


def folders_of(folders: Sequence[str]) -> tuple[str, ...]:
    """Return folders as they were typed, and where they are: an index knows videos by either.

    `.` and `../x` are only places: as the beginning of a video_id, the first would be that of any.
    """
    there = {folder: os.path.abspath(folder) for folder in folders if Path(folder).is_dir()}  # noqa: PTH100
    named = [
        folder
        for folder in folders
        if folder not in there or Path(os.path.normpath(folder)).parts[:1] not in ((), (os.pardir,))
    ]
    return tuple(map(storable_text, dict.fromkeys([*named, *there.values()])))


def queries_of(file: str) -> list[str]:
    """Return the lines of a file, of stdin for `-`, without empty ones.

    Raises:
        InputError: It cannot be read, is not UTF-8, or holds none.
    """
    try:
        text = (sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()).decode("utf-8-sig")
    except OSError as error:
        raise InputError(
            f"{file} cannot be read ({error.strerror}) - expected a file with a query a line"
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{file} is not UTF-8 ({error.reason} at byte {error.start}) - save it as UTF-8"
        ) from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise InputError(f"{'stdin' if file == '-' else file} holds no query - expected one a line")
    return lines
