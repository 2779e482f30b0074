"""Collects what is said in an index's videos: files beside them, streams inside them, and transcripts."""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from numpy.typing import NDArray

from svb.data.text import mtime_ns_of
from svb.errors import InputError
from svb.extract.decode.ffmpeg_process import run_to_end
from svb.retrieve.indexing.sidecars import (
    MAX_SPEECH_BYTES,
    find_sidecars,
    language_of,
    language_of_sidecar,
    read_sidecar,
)
from svb.retrieve.stored.cues import (
    KINDS,
    Cue,
    Speech,
    Track,
    cut_into_windows,
    join_speech,
    select_tracks,
    speech_of,
)

if TYPE_CHECKING:
    from av.subtitles.stream import SubtitleStream

logger = logging.getLogger(__name__)

TEXT_CODECS = ("subrip", "srt", "ass", "ssa", "webvtt", "mov_text", "text")
# The whole file may have to be read for its subtitles, from a slow disk.
SUBTITLES_TIME_LIMIT_SECONDS = 60.0
SLOWEST_BYTES_PER_SECOND = 10e6

# Texts to `(W, D)` float32, L2-normalised.
EmbedTexts = Callable[[Sequence[str]], NDArray[np.float32]]


@dataclass(frozen=True)
class _File:
    """A file that may say something of a video, as it is now."""

    video_id: str
    kind: str
    path: str
    state: tuple[int, int]


def transcript_path(folder: Path, video_id: str) -> Path:
    """Return where a video's transcript lies in a folder of transcripts: below the folders of its video_id.

    A video_id that leads out of the folder, or is too long for a file, has a name made of its hash.
    """
    parts = PurePosixPath(video_id).parts
    is_plain = "/".join(parts) == video_id and ".." not in parts and not video_id.startswith("/")
    if not is_plain or "\0" in video_id or any(len(part.encode("utf-8", "replace")) > 240 for part in parts):
        return folder / f"{hashlib.sha256(video_id.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}.vtt"
    return folder / f"{video_id}.vtt"


def collect_speech(
    videos: Iterable[tuple[str, str]],
    embed: EmbedTexts,
    previous: Speech | None,
    *,
    transcripts: Path | None,
    embedding_size: int,
    max_windows: int | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Speech | None:
    """Return all that is said; files that have not changed are not read or embedded again.

    What is known of a video whose file is not there, such as on a disk that is not mounted, stays.

    Args:
        videos: The video_id of each video of the index, and the path of its file.
        embed: Embeds texts with the index's model.
        previous: The speech that is known already, embedded by the same model.
        transcripts: Folder of transcripts, as `svb transcribe` makes them.
        embedding_size: D.
        max_windows: Embed about this many windows at most, so that long work can be saved in between: call it again
            with what it returned, until it returns that itself.
        on_progress: Called with how many files were read, and how many are to be read.

    Returns:
        `previous` itself if nothing has changed; None if there is no file that could say anything.
    """
    held = _tracks_of_files(previous)
    kept, new = list[int](), list[_File]()
    of_video: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    for file, of_file in held.items():
        of_video[file.video_id, file.kind] += of_file
    for video_id, files, lost in _files_of(videos, transcripts):
        kept += [track for kind in lost for track in of_video.get((video_id, kind), [])]
        for file in files:
            if file in held:
                kept += held[file]
            else:
                new.append(file)
    if not new and (previous is None or len(kept) == previous.num_tracks):
        return previous
    tracks, num_windows, windows = list[Track](), 0, list[list[int]]()
    for done, file in enumerate(new):
        if max_windows is not None and num_windows >= max_windows:
            break
        on_progress(done, len(new))
        for track in _read(file):
            tracks.append(track)
            windows.append(cut_into_windows(track.cues))
            num_windows += len(windows[-1])
    on_progress(len(new), len(new))
    added = speech_of(tracks, np.empty((num_windows, embedding_size), np.float16), windows)
    if num_windows:
        texts = added.window_texts()
        distinct = list(dict.fromkeys(texts))
        row_of = {text: row for row, text in enumerate(distinct)}
        added.window_embeddings[:] = embed(distinct)[[row_of[text] for text in texts]]
    if previous is None:
        return added
    return join_speech(select_tracks(previous, sorted(kept)), added)


def _tracks_of_files(speech: Speech | None) -> dict[_File, list[int]]:
    held: defaultdict[_File, list[int]] = defaultdict(list)
    if speech is not None:
        columns = zip(
            speech.video_ids, speech.sources, speech.track_kind.tolist(), speech.track_state.tolist(), strict=True
        )
        for track, (video_id, source, kind, state) in enumerate(columns):
            path = source.rpartition("#")[0] if KINDS[kind] == "stream" else source
            held[_File(video_id, KINDS[kind], path, (state[0], state[1]))].append(track)
    return dict(held)


def _files_of(
    videos: Iterable[tuple[str, str]], transcripts: Path | None
) -> Iterator[tuple[str, list[_File], tuple[str, ...]]]:
    """Yield each video_id, the files that may say something of it, and the kinds that cannot be read now."""
    paths = {video_id: Path(source_path) for video_id, source_path in videos}
    sidecars = find_sidecars(set(paths.values()))
    for video_id, path in sorted(paths.items()):
        files, lost = [_file(video_id, "sidecar", sidecar) for sidecar in sidecars.get(path, ())], tuple[str, ...]()
        if transcripts is not None:
            files.append(_file(video_id, "transcript", transcript_path(transcripts, video_id)))
        own = _file(video_id, "stream", path)
        if own is None:
            lost = ("stream",) if sidecars.get(path) or path.parent.is_dir() else ("stream", "sidecar")
        yield video_id, [file for file in (own, *files) if file is not None], lost


def _file(video_id: str, kind: str, path: Path) -> _File | None:
    try:
        stat = path.stat()
    except (OSError, ValueError):
        return None
    return _File(video_id, kind, str(path), (stat.st_size, mtime_ns_of(stat)))


def _read(file: _File) -> list[Track]:
    """Return a file's tracks; one without cues if it says nothing, so that it is not read again."""
    path = Path(file.path)

    def track(source: str, language: str, cues: Sequence[Cue]) -> Track:
        return Track(file.video_id, source, language, file.kind, file.state, cues)

    try:
        if file.kind == "stream":
            streams = read_streams(path)
            return [track(f"{path}#{each.number}", each.language, each.cues) for each in streams] or [
                track(f"{path}#", "", [])
            ]
        return [track(file.path, language_of_sidecar(path), read_sidecar(path, MAX_SPEECH_BYTES))]
    except InputError as error:
        logger.info(f"{error}; it was left out")
        return [track(f"{path}#" if file.kind == "stream" else file.path, "", [])]


@dataclass(frozen=True)
class StreamCues:
    """A subtitle stream of a file: its number among all streams, its language (empty if not known), its cues."""

    number: int
    language: str
    cues: list[Cue]


def read_streams(path: Path) -> list[StreamCues]:
    """Return the subtitle streams of a video that hold text; pictures of text are left out, and the log names them.

    SubRip, ASS, WebVTT and MP4's timed text are read. PyAV lists the streams; the ffmpeg program, which can be
    stopped, writes them as WebVTT.

    Raises:
        InputError: The file cannot be opened, or its subtitles cannot be read.
    """
    with _open_video(path) as file:
        languages = _text_streams(path, file.fileno())
        return _cues_of_streams(path, file.fileno(), languages) if languages else []


def _open_video(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}) - expected a video file") from error


def _text_streams(path: Path, fd: int) -> dict[int, str]:
    """Return the language of each stream of text, by its number."""
    import av  # an index run that has nothing new to read does not need it
    import av.error

    try:
        # The demuxer gets one open file and access to nothing else, as in decoding.
        with av.open("fd:", options={"fd": str(fd), "protocol_whitelist": "fd"}) as container:
            found = [
                (stream.index, _codec_of(stream), stream.language or "") for stream in container.streams.subtitles
            ]
    except (OSError, ValueError, av.error.FFmpegError) as error:
        raise InputError(f"{path} has no subtitles that can be read ({error})") from error
    for number, codec, _ in found:
        if codec not in TEXT_CODECS:
            what = f"holds pictures ({codec}), not text" if codec else "has an unknown codec"
            logger.info(f"{path}: subtitle stream {number} {what}, and was left out")
    return {number: language_of(language) for number, codec, language in found if codec in TEXT_CODECS}


def _codec_of(stream: SubtitleStream) -> str:
    return stream.codec_context.codec.canonical_name if stream.codec_context else ""


def _cues_of_streams(path: Path, fd: int, languages: dict[int, str]) -> list[StreamCues]:
    with tempfile.TemporaryDirectory(prefix="svb-subtitles-") as folder:
        files = {number: Path(folder) / f"{number}.vtt" for number in languages}
        # Times stay on the file's own clock, as those of moments are.
        arguments = ["-nostdin", "-hide_banner", "-nostats", "-v", "error", "-copyts"]
        arguments += ["-protocol_whitelist", "fd", "-fd", str(fd), "-i", "fd:"]
        for number, file in files.items():
            arguments += ["-map", f"0:{number}", "-c:s", "webvtt", "-f", "webvtt", "-y", f"file:{file}"]
        limit = SUBTITLES_TIME_LIMIT_SECONDS + os.fstat(fd).st_size / SLOWEST_BYTES_PER_SECOND
        try:
            exit_code, lines = run_to_end(arguments, fd, limit)
        except subprocess.TimeoutExpired as error:
            raise InputError(
                f"{path}: reading its subtitles took more than {limit:.0f} s and was stopped"
            ) from error
        if exit_code:
            raise InputError(
                f"{path} has subtitles that cannot be read ({lines[-1] if lines else 'ffmpeg failed'})"
            )
        return [
            StreamCues(number, languages[number], read_sidecar(file, MAX_SPEECH_BYTES))
            for number, file in files.items()
            if file.exists()
        ]
