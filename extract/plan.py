"""Which videos to extract: folders, files and lists become `video_id`s, minus what a store already holds."""

from __future__ import annotations

import csv
import math
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from svb.data.publish import hash_file
from svb.data.text import mtime_ns_of, storable_text
from svb.errors import InputError

if TYPE_CHECKING:
    from svb.data.rows import VideoRecord

VIDEO_SUFFIXES = frozenset(
    (
        *(".3g2", ".3gp", ".apng", ".asf", ".avi", ".divx", ".dv", ".f4v", ".flv", ".gif", ".h264", ".h265"),
        *(".ivf", ".m2ts", ".m2v", ".m4v", ".mjpeg", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".mxf"),
        *(".nut", ".obu", ".ogv", ".rm", ".rmvb", ".swf", ".ts", ".vob", ".webm", ".webp", ".wmv", ".y4m"),
    )
)
LIST_SUFFIXES = frozenset({".txt", ".csv", ".parquet"})


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

    Raises:
        InputError: A path does not exist, a list is unreadable, or there is no video at all.
    """
    messages: list[str] = []
    candidates = _unique_paths(_candidates(inputs, messages.append))
    if not candidates:
        folders = ", ".join(str(path) for path in inputs)
        raise InputError(f"no videos in {folders} - expected files such as .mp4, .mkv, .webm, .avi or .gif")
    id_of_path = {record.source_path: video_id for video_id, record in records.items()}
    known = {path: id_of_path.get(storable_text(str(path))) for _, path in candidates}
    taken = {video_id for video_id in known.values() if video_id is not None}
    without_times: list[str] = []
    asked: list[PlannedVideo] = []
    todo: list[PlannedVideo] = []
    for name, path in candidates:
        video_id = known[path] or _free_id(name, path, taken, records)
        if video_id != name and known[path] is None:
            messages.append(f"another video is already called {name!r}: {path} becomes {video_id!r}")
        taken.add(video_id)
        times = () if times_seconds is None else times_seconds.get(video_id, ())
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
        and not here.get(record.source_path, Path(record.source_path)).exists()
    ]


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
        if stored.exists():
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


def _candidates(inputs: Sequence[Path], say: Callable[[str], None]) -> Iterable[tuple[str, Path]]:
    for given in inputs:
        if given.is_dir():
            yield from _walk(given, say)
        elif not given.exists():
            raise InputError(f"no such file or folder: {given} - give folders, video files or a list of them")
        elif given.suffix.lower() in LIST_SUFFIXES:
            yield from _listed(given)
        else:
            yield given.stem, given


def _walk(folder: Path, say: Callable[[str], None]) -> Iterable[tuple[str, Path]]:
    ignored: Counter[str] = Counter()

    def refuse(error: OSError) -> None:
        raise InputError(f"cannot read the folder {error.filename} ({error.strerror}) - fix its permissions")

    seen: set[str] = set()
    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        folders.sort()
        if os.path.realpath(parent) in seen:  # a link back into what was walked
            folders.clear()
            continue
        seen.add(os.path.realpath(parent))
        for name in sorted(names):
            path = Path(parent, name)
            if path.suffix.lower() in VIDEO_SUFFIXES:
                yield str(path.relative_to(folder).with_suffix("").as_posix()), path
            else:
                ignored[path.suffix.lower() or "no suffix"] += 1
    if ignored:
        kinds = ", ".join(f"{suffix} {count}" for suffix, count in ignored.most_common(5))
        say(f"{folder}: ignored {ignored.total()} files that are not videos by their suffix ({kinds})")


def _listed(path: Path) -> Iterable[tuple[str, Path]]:
    suffix = path.suffix.lower()
    try:
        if suffix == ".txt":
            lines = path.read_text("utf-8-sig").split("\n")
            rows = [("", line) for line in lines if line.strip()]
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
