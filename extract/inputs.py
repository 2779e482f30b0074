"""The folders, files and lists that a user names -> files that may be videos, each with a name for its id."""

from __future__ import annotations

import codecs
import csv
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from svb.errors import InputError, UsageError

logger = logging.getLogger(__name__)

VIDEO_SUFFIXES = frozenset(
    (
        *(".264", ".265", ".3g2", ".3gp", ".apng", ".asf", ".avi", ".dav", ".divx", ".dv", ".f4v", ".flv", ".gif"),
        *(".h264", ".h265", ".hevc", ".insv", ".ivf", ".lrv", ".m1v", ".m2t", ".m2ts", ".m2v", ".m4v", ".mjpeg"),
        *(".mkv", ".mod", ".mov", ".mp2t", ".mp4", ".mpeg", ".mpg", ".mts", ".mxf", ".nut", ".obu", ".ogm", ".ogv"),
        *(".qt", ".rm", ".rmvb", ".swf", ".tod", ".ts", ".vob", ".webm", ".webp", ".wmv", ".wtv", ".y4m"),
    )
)
LIST_SUFFIXES = frozenset({".txt", ".csv", ".parquet"})
PLAYLIST_SUFFIXES = frozenset({".asx", ".m3u", ".m3u8", ".mpd", ".pls", ".wpl", ".xspf"})
# A picture beside a video of the same name is its thumbnail.
PICTURE_SUFFIXES = frozenset({".jpeg", ".jpg", ".png", ".webp"})
# TypeScript has the suffixes of transport streams.
TYPESCRIPT_SUFFIXES = frozenset({".mts", ".ts"})
TEXT_BYTES_LOOKED_AT = 4096
# Folders in which systems keep what was deleted, and what they make for themselves. Names with a dot in front are
# left out too.
HIDDEN_NAMES = frozenset(
    (
        *("$recycle.bin", "recycler", "#recycle", "@recycle", "trash", "lost+found", "lost.dir"),
        *("@eadir", "#snapshot", "system volume information"),
    )
)


@dataclass(frozen=True)
class FolderRules:
    """Which files of a folder are videos to extract.

    Attributes:
        hidden: Take hidden files and folders, too, and what was thrown away.
        exclude: Patterns of files and folders to leave out, as in a .gitignore, relative to the folder given.
        suffixes: Suffixes of videos beyond `VIDEO_SUFFIXES`, each with its dot.

    Raises:
        UsageError: A pattern is not valid.
    """

    hidden: bool = False
    exclude: tuple[str, ...] = ()
    suffixes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for pattern in self.exclude:
            try:
                _excludes((pattern,))
            except (ValueError, re.error) as error:
                raise UsageError(
                    f"--exclude got {pattern!r} ({error}) - expected a pattern as in a .gitignore, such as 'raw/*'"
                ) from error


DEFAULT_RULES = FolderRules()


def require_there(inputs: Sequence[Path]) -> None:
    """Refuse a path that does not exist, and playlists.

    Raises:
        InputError: Names it.
    """
    for given in inputs:
        if not os.path.exists(given):  # noqa: PTH110 - a name that is too long does not exist either
            raise InputError(f"no such file or folder: {given} - give folders, video files or a list of them")
        if given.suffix.lower() in PLAYLIST_SUFFIXES and not given.is_dir():
            raise InputError(
                f"{given} is a playlist, which svb does not follow - give the videos, or a .txt file with a path a "
                "line"
            )


def find_candidates(
    inputs: Sequence[Path], rules: FolderRules, say: Callable[[str], None]
) -> Iterable[tuple[str, Path]]:
    """Yield the name and path of every file that may be a video; `say` hears what is left out.

    Raises:
        InputError: A folder or list cannot be read.
    """
    for given in inputs:
        if given.is_dir():
            yield from _walk(given, rules, say)
        elif given.suffix.lower() in LIST_SUFFIXES:
            yield from _listed(given)
        else:
            yield given.stem, given


def _walk(folder: Path, rules: FolderRules, say: Callable[[str], None]) -> Iterable[tuple[str, Path]]:
    """Yield a folder's videos with their ids, and say what is left out."""
    is_excluded = _excludes(rules.exclude)
    suffixes = {*VIDEO_SUFFIXES, *rules.suffixes}
    ignored, hidden, num_excluded = Counter[str](), list[str](), 0
    closed: list[OSError] = []
    seen: set[str] = set()
    for parent, folders, names in os.walk(folder, onerror=closed.append, followlinks=True):
        if os.path.realpath(parent) in seen:  # a link back into what was walked
            folders.clear()
            continue
        seen.add(os.path.realpath(parent))
        below = Path(parent).relative_to(folder)
        suffix_of = {name: Path(name).suffix.lower() for name in sorted(names)}
        videos = [name for name, suffix in suffix_of.items() if suffix in suffixes]
        ignored.update(suffix or "no suffix" for suffix in suffix_of.values() if suffix not in suffixes)
        kept: dict[bool, list[str]] = {}
        for are_folders, found in ((True, sorted(folders)), (False, videos)):
            shown = [name for name in found if rules.hidden or not _is_hidden(name)]
            hidden += (str(below / name) for name in found if not rules.hidden and _is_hidden(name))
            end = "/" if are_folders else ""
            kept[are_folders] = [n for n in shown if not is_excluded((below / n).as_posix() + end)]
            num_excluded += len(shown) - len(kept[are_folders])
        folders[:] = kept[True]
        stems = {Path(name).stem for name in videos if suffix_of[name] not in PICTURE_SUFFIXES}
        for name in kept[False]:
            path, suffix = Path(parent, name), suffix_of[name]
            if suffix in PICTURE_SUFFIXES and path.stem in stems:
                ignored[f"{suffix} of a video's name"] += 1
            elif suffix in TYPESCRIPT_SUFFIXES and _is_text(path):
                ignored[f"{suffix} of text"] += 1
            else:
                yield (below / name).with_suffix("").as_posix(), path
    _tell_of_closed(folder, closed)
    if ignored:
        kinds = ", ".join(f"{suffix} {count}" for suffix, count in ignored.most_common(5))
        say(f"{folder}: ignored {ignored.total()} files that are not videos by their suffix ({kinds})")
    if hidden:
        shown_names = first_names(hidden)
        say(f"{folder}: left out {len(hidden)} hidden files and folders ({shown_names}); --hidden takes them")
    if num_excluded:
        say(f"{folder}: left out {num_excluded} files and folders by --exclude")


def _excludes(patterns: Sequence[str]) -> Callable[[str], bool]:
    """Return what tells whether a path is left out; that of a folder ends with a slash."""
    if not patterns:
        return lambda path: False
    from pathspec import GitIgnoreSpec  # decode workers need none of it

    return GitIgnoreSpec.from_lines(patterns).match_file


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.casefold() in HIDDEN_NAMES


def _is_text(path: Path) -> bool:
    """Tell whether a file begins as text; a transport stream begins with NULs and bytes that are not UTF-8."""
    try:
        with path.open("rb") as file:
            data = file.read(TEXT_BYTES_LOOKED_AT)
    except OSError:
        return False
    try:
        codecs.getincrementaldecoder("utf-8")().decode(data)  # the last letter may be cut
    except UnicodeDecodeError:
        return False
    return bool(data) and b"\0" not in data


def _tell_of_closed(folder: Path, closed: Sequence[OSError]) -> None:
    """Warn of folders that could not be looked into.

    Raises:
        InputError: The folder that was given is one of them.
    """
    for error in closed:
        if error.filename == str(folder):
            raise InputError(f"cannot read the folder {folder} ({error.strerror}) - fix its permissions")
    if closed:
        names = first_names([str(error.filename) for error in closed])
        logger.warning(
            f"cannot look into {len(closed)} folders ({names}): {closed[0].strerror} - they are left out"
        )


def first_names(names: Sequence[str]) -> str:
    """Return the first five names with commas between, and dots where there are more."""
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _listed(path: Path) -> Iterable[tuple[str, Path]]:
    suffix = path.suffix.lower()
    try:
        if suffix == ".txt":
            rows = [("", listed) for listed in _listed_lines(path)]
        elif suffix == ".csv":
            with path.open(encoding="utf-8-sig", newline="") as file:
                rows = _table_rows(path, list(csv.DictReader(file)))
        else:
            rows = _table_rows(path, _parquet_rows(path))
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 - save the list as UTF-8") from error
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{path} is not a readable list of videos ({error}) - write it again") from error
    for number, (video_id, listed) in enumerate(rows, start=1):
        if "\0" in listed:
            raise InputError(f"{path}, row {number}: the path holds a NUL - save the list as UTF-8")
        if not Path(listed).name:
            raise InputError(f"{path}, row {number}: the path is {listed!r} - expected a video's")
        name = video_id or Path(listed).with_suffix("").as_posix().removeprefix("/")
        yield name, path.parent / listed


def _listed_lines(path: Path) -> Iterator[str]:
    """Yield the paths of a text file: no blank lines, no comments, no quotes around a path."""
    for line in path.read_text("utf-8-sig").split("\n"):
        listed = line.strip()
        is_comment, is_quoted = listed.startswith("#"), len(listed) > 2 and listed[0] == listed[-1] in ("'", '"')
        # A file may have such a name.
        if (is_comment or is_quoted) and os.path.lexists(path.parent / listed):
            yield listed
        elif listed and not is_comment:
            yield listed[1:-1] if is_quoted else line


def _table_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> list[tuple[str, str]]:
    if rows and "path" not in rows[0]:
        raise InputError(f"{path}: no column path - expected the header path (and optionally video_id)")
    return [(_text(row.get("video_id")), _text(row["path"])) for row in rows]


def _text(value: object) -> str:
    # csv and pandas write what is missing as None or NaN.
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else str(value)


def _parquet_rows(path: Path) -> list[dict[str, object]]:
    import pandas as pd

    table = pd.read_parquet(path).astype(object)
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]
