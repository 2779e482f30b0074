"""Which videos to extract: folders, files and lists become `video_id`s, minus what a store already holds."""

from __future__ import annotations

import codecs
import csv
import errno
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from svb.data.publish import hash_file
from svb.data.text import mtime_ns_of, plain_name, storable_text
from svb.errors import InputError

if TYPE_CHECKING:
    from svb.data.rows import VideoRecord

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
# Beside a video of the same name they are its thumbnail.
PICTURE_SUFFIXES = frozenset({".jpeg", ".jpg", ".png", ".webp"})
# TypeScript has the suffixes of transport streams.
TYPESCRIPT_SUFFIXES = frozenset({".mts", ".ts"})
TEXT_BYTES_LOOKED_AT = 4096
# Where systems keep what was deleted, and what they make for themselves; names with a dot in front come on top.
HIDDEN_NAMES = frozenset(
    (
        *("$recycle.bin", "recycler", "#recycle", "@recycle", "trash", "lost+found", "lost.dir"),
        *("@eadir", "#snapshot", "system volume information"),
    )
)


@dataclass(frozen=True)
class PlannedVideo:
    """A video to extract.

    Attributes:
        video_id: Its id in the store.
        path: Where its file lies.
        size_bytes: The file's size; 0 if the file cannot be read.
        tries: How often the unchanged file has been tried before.
        times_seconds: The times to sample it at; empty if sampling is the same for all videos.
    """

    video_id: str
    path: Path
    size_bytes: int = 0
    tries: int = 0
    times_seconds: tuple[float, ...] = ()


@dataclass(frozen=True)
class FolderRules:
    """Which files of a folder are videos to extract.

    Attributes:
        hidden: Take hidden files and folders, too, and what was thrown away.
        exclude: Patterns of files and folders to leave out, as in a .gitignore, relative to the folder given.
        suffixes: Suffixes of videos beyond `VIDEO_SUFFIXES`, each with its dot.
    """

    hidden: bool = False
    exclude: tuple[str, ...] = ()
    suffixes: tuple[str, ...] = ()


DEFAULT_RULES = FolderRules()


@dataclass(frozen=True)
class Plan:
    """What is to be done and what is not.

    Attributes:
        asked: All videos asked for, in order.
        todo: Those to extract, in order.
        vanished: Videos of the store whose files should be in the folders or lists asked for, and are gone.
        messages: What the user should know: ignored files, ids that had to be made unique.
    """

    asked: list[PlannedVideo]
    todo: list[PlannedVideo]
    vanished: list[VideoRecord]
    messages: list[str]


def plan_videos(
    inputs: Sequence[Path],
    records: Mapping[str, VideoRecord],
    *,
    retry: Collection[str] = (),
    times_seconds: Mapping[str, tuple[float, ...]] | None = None,
    rules: FolderRules = DEFAULT_RULES,
) -> Plan:
    """Find the videos, and leave out those that the store holds and whose files have not changed.

    The id of a file in a folder is its path below that folder without suffix; that of a file given by itself is its
    name without suffix. If two files would share an id, the first in order keeps it, and the next gets its suffix
    too, then a number; a file that the store knows keeps its id.

    Args:
        inputs: Folders (walked recursively), video files, or lists of them (.txt, .csv, .parquet).
        records: What the store holds, by video_id.
        retry: Statuses of videos to take up again.
        times_seconds: The times to sample each video at; videos without times are left out.
        rules: Which files of folders are taken.

    Raises:
        InputError: A path does not exist, a list is unreadable, or there is no video at all.
    """
    messages: list[str] = []
    require_there(inputs)
    candidates = _unique_paths(_candidates(inputs, rules, messages.append))
    if not candidates:
        folders = ", ".join(str(path) for path in inputs)
        raise InputError(f"no videos in {folders} - expected files such as .mp4, .mkv, .webm, .avi or .gif")
    id_of_path = {record.source_path: video_id for video_id, record in records.items()}
    known = {path: id_of_path.get(storable_text(str(path))) for _, path in candidates}
    taken = {video_id for video_id in known.values() if video_id is not None}
    without_times: list[str] = []
    # The table may spell accents otherwise than the file system.
    times_by_name = {plain_name(video_id): times for video_id, times in (times_seconds or {}).items()}
    asked: list[PlannedVideo] = []
    todo: list[PlannedVideo] = []
    for name, path in candidates:
        video_id = known[path] or _free_id(name, path, taken, records)
        if video_id != name and known[path] is None:
            messages.append(f"another video is already called {name!r}: {path} becomes {video_id!r}")
        taken.add(video_id)
        times = (times_seconds or {}).get(video_id) or times_by_name.get(plain_name(video_id), ())
        if times_seconds is not None and not times:
            without_times.append(video_id)
            continue
        record = records.get(video_id)
        size_and_mtime = _size_and_mtime(path)
        is_unchanged = _is_unchanged(record, path, size_and_mtime)
        tries = record.tries if record is not None and is_unchanged else 0
        asked.append(PlannedVideo(video_id, path, size_and_mtime[0] if size_and_mtime else 0, tries, times))
        if record is None or not is_unchanged or record.status in retry:
            todo.append(asked[-1])
    if without_times:
        messages.append(
            f"{len(without_times)} videos are not in the table of times, first {without_times[0]!r}: left out"
        )
    vanished = _vanished(inputs, candidates, records)
    return Plan(asked, todo, vanished, messages)


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


def is_done(record: VideoRecord | None, path: Path, retry: Collection[str] = ()) -> bool:
    """Tell whether a record is of a file as it is now, and its status is none of those to be tried again."""
    return record is not None and _is_unchanged(record, path, _size_and_mtime(path)) and record.status not in retry


def _is_unchanged(record: VideoRecord | None, path: Path, size_and_mtime: tuple[int, int] | None) -> bool:
    if record is None:
        return False
    if record.status == "no_permission":  # a permission that is given changes neither size nor time
        return not os.access(path, os.R_OK)
    if size_and_mtime is None:  # the file is gone: what was extracted from it is kept
        return record.usable or record.status == "missing"
    return size_and_mtime == (record.size_bytes, record.mtime_ns)


def _size_and_mtime(path: Path) -> tuple[int, int] | None:
    try:
        stat = path.stat()
    except (OSError, ValueError):
        return None
    return stat.st_size, mtime_ns_of(stat)


def _vanished(
    inputs: Sequence[Path], candidates: Sequence[tuple[str, Path]], records: Mapping[str, VideoRecord]
) -> list[VideoRecord]:
    """Return the videos of the store that should be where we looked, and are not."""
    folders = [os.path.join(os.path.abspath(path), "") for path in inputs if path.is_dir()]  # noqa: PTH100, PTH118
    here = {storable_text(str(path)): path for _, path in candidates}
    return [
        record
        for record in records.values()
        if record.usable
        and (record.source_path in here or record.source_path.startswith(tuple(folders)))
        and _is_gone(here.get(record.source_path, Path(record.source_path)))
    ]


def _is_gone(path: Path) -> bool:
    """Tell whether there is no such file; in a closed folder it may well be there."""
    try:
        path.stat()
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EPERM)
    except ValueError:
        return True
    return False


def _free_id(name: str, path: Path, taken: Collection[str], records: Mapping[str, VideoRecord]) -> str:
    def is_free(video_id: str) -> bool:
        if video_id in taken:
            return False
        record = records.get(video_id)
        return record is None or not _is_another_file(record, path)

    if is_free(name):
        return name
    with_suffix = f"{name}{storable_text(path.suffix)}"
    number, video_id = 2, with_suffix
    while not is_free(video_id):
        video_id = f"{with_suffix}~{number}"
        number += 1
    return video_id


def _is_another_file(record: VideoRecord, path: Path) -> bool:
    stored = Path(record.source_path)
    try:
        return not stored.samefile(path)
    except (OSError, ValueError):
        if not _is_gone(stored):
            return True
    # The stored file is gone. It was moved here if the content is the same; else its disk may not be mounted.
    try:
        return path.stat().st_size != record.size_bytes or hash_file(path) != record.content_hash
    except (OSError, ValueError):
        return True


def _unique_paths(candidates: Iterable[tuple[str, Path]]) -> list[tuple[str, Path]]:
    first: dict[Path, str] = {}
    for name, path in candidates:
        # abspath drops the `..` of the folder a command was run in, and follows no link to a shared file.
        first.setdefault(Path(os.path.abspath(path)), storable_text(name))  # noqa: PTH100
    return [(name, path) for path, name in first.items()]


def _candidates(
    inputs: Sequence[Path], rules: FolderRules, say: Callable[[str], None]
) -> Iterable[tuple[str, Path]]:
    for given in inputs:
        if given.is_dir():
            yield from _walk(given, rules, say)
        elif given.suffix.lower() in LIST_SUFFIXES:
            yield from _listed(given)
        else:
            yield given.stem, given


def _walk(folder: Path, rules: FolderRules, say: Callable[[str], None]) -> Iterable[tuple[str, Path]]:
    """Yield a folder's videos with their ids, and say what is left out."""
    from pathspec import GitIgnoreSpec

    excluded = GitIgnoreSpec.from_lines(rules.exclude)
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
        videos = [name for name in sorted(names) if Path(name).suffix.lower() in suffixes]
        kept: dict[bool, list[str]] = {}
        for are_folders, found in ((True, sorted(folders)), (False, videos)):
            shown = [name for name in found if rules.hidden or not _is_hidden(name)]
            hidden += (str(below / name) for name in found if name not in shown)
            end = "/" if are_folders else ""
            kept[are_folders] = [n for n in shown if not excluded.match_file((below / n).as_posix() + end)]
            num_excluded += len(shown) - len(kept[are_folders])
        folders[:] = kept[True]
        ignored.update(Path(name).suffix.lower() or "no suffix" for name in names if name not in videos)
        stems = {Path(name).stem for name in videos if Path(name).suffix.lower() not in PICTURE_SUFFIXES}
        for path in (Path(parent, name) for name in kept[False]):
            suffix = path.suffix.lower()
            if suffix in PICTURE_SUFFIXES and path.stem in stems:
                ignored[f"{suffix} of a video's name"] += 1
            elif suffix in TYPESCRIPT_SUFFIXES and _is_text(path):
                ignored[f"{suffix} of text"] += 1
            else:
                yield str((below / path.name).with_suffix("").as_posix()), path
    _tell_of_closed(folder, closed)
    if ignored:
        kinds = ", ".join(f"{suffix} {count}" for suffix, count in ignored.most_common(5))
        say(f"{folder}: ignored {ignored.total()} files that are not videos by their suffix ({kinds})")
    if hidden:
        say(f"{folder}: left out {len(hidden)} hidden files and folders ({_first(hidden)}); --hidden takes them")
    if num_excluded:
        say(f"{folder}: left out {num_excluded} files and folders by --exclude")


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
        names = _first([str(error.filename) for error in closed])
        logger.warning(
            f"cannot look into {len(closed)} folders ({names}): {closed[0].strerror} - they are left out"
        )


def _first(names: Sequence[str], count: int = 5) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


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
