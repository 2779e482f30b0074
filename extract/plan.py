"""Which videos to extract: folders, files and lists become `video_id`s, minus what a store already holds."""

from __future__ import annotations

import errno
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from svb.data.publish import hash_file
from svb.data.text import mtime_ns_of, plain_name, storable_text
from svb.errors import InputError
from svb.extract.inputs import DEFAULT_RULES, FolderRules, find_candidates, require_there

if TYPE_CHECKING:
    from svb.data.rows import VideoRecord


@dataclass(frozen=True)
class PlannedVideo:
    """A video to extract.

    Attributes:
        video_id: The video's id in the store.
        path: The video's file.
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
        todo: The videos to extract, in order.
        vanished: Videos of the store whose files should be in the folders or lists asked for, and are gone.
        messages: What the user should know: ignored files, ids that had to be made unique.
    """

    asked: list[PlannedVideo]
    todo: list[PlannedVideo]
    vanished: list[VideoRecord]
    messages: list[str]

    @cached_property
    def num_bytes(self) -> int:
        """The size of the files to extract; progress asks for it after every message."""
        return sum(video.size_bytes for video in self.todo)


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
    candidates = _unique_paths(find_candidates(inputs, rules, messages.append))
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
