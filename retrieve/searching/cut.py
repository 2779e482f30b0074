"""`svb search --cut`: cuts the moments out as clips, re-encoded so that each begins at its first frame."""

from __future__ import annotations

import errno
import logging
import math
import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from svb.data.publish import published_file
from svb.errors import InputError
from svb.extract.decode.decoder import DecodeError, check_file
from svb.extract.decode.ffmpeg_process import run_to_end
from svb.extract.decode.options import Limits
from svb.retrieve.answer import Answer, Moment, VideoResult
from svb.retrieve.searching.source_file import problem_of

logger = logging.getLogger(__name__)

# Encoding takes a fraction of the clip's length; decoding from a distant key frame, or a hang, takes more.
TIME_LIMIT_SECONDS = 60.0
TIME_LIMIT_PER_SECOND = 20.0
# A moment may be shorter than from one frame to the next.
MIN_CLIP_SECONDS = 0.2
# A clip whose first frame comes later than this begins at the wrong place.
MAX_LATE_SECONDS = 0.1
NAME_LETTERS = 48  # each takes up to 4 bytes, and a file's name may have 255


def cut_moments(answers: Sequence[Answer], folder: Path) -> list[Path]:
    """Cut every moment of some answers out of its video into a folder, which is made if needed.

    A clip is named `<rank>-<video>-<start>-<end>.mp4`, in seconds; with several answers, `q<number>-` comes first.
    A clip that exists is kept. A moment is skipped if it cannot be cut, or if its video has changed since it was
    indexed. The log names both.

    Returns:
        The clips that exist now, cut or kept.

    Raises:
        OSError: The folder cannot be written to.
    """
    clips = []
    for name, result, moment in _named(answers):
        target = folder / name
        if target.exists():
            logger.info(f"{target} exists and is kept - remove it to cut it again")
            clips.append(target)
            continue
        problem = problem_of(result)
        if problem is not None:
            logger.warning(f"not cut: {problem} - `svb extract` and `svb index` its folder again")
            continue
        try:
            clips.append(cut_clip(Path(result.source_path), moment.begin_seconds, moment.end_seconds, target))
        except InputError as error:
            logger.warning(f"not cut: {error}")
    return clips


def cut_clip(source: Path, begin_seconds: float, end_seconds: float, target: Path) -> Path:
    """Re-encode `[begin_seconds, end_seconds)` of a video, with its sound, as H.264 in an MP4 file.

    Times are on the file's own clock, as those of moments are. The clip appears only once it is whole, and replaces
    an older one.

    Returns:
        `target`.

    Raises:
        InputError: The video is missing or cannot be decoded, it has no frame in the interval, or ffmpeg takes too
            long.
        OSError: The clip cannot be written.
    """
    seconds = max(end_seconds - begin_seconds, MIN_CLIP_SECONDS)
    try:
        check_file(source)
        file = source.open("rb")
    except DecodeError as error:
        raise InputError(str(error)) from error
    except OSError as error:
        raise InputError(f"{source} cannot be read ({error.strerror}) - expected a video file") from error
    with file, published_file(target) as aside:
        words = _cut(source, file.fileno(), (begin_seconds, seconds), aside)
        if words:
            raise InputError(
                f"{source} gave no clip from {begin_seconds:.1f} to {end_seconds:.1f} s ({words}) - the file may "
                "be damaged: play it"
            )
    return target


def _cut(source: Path, video_fd: int, interval: tuple[float, float], target: Path) -> str:
    """Write a clip; return what went wrong, or an empty string.

    Some containers (MPEG-TS) have no index: a seek lands between key frames, and the clip would begin late. Reading
    the file from its start takes longer, and cuts every file at the right place.
    """
    begin_seconds, seconds = interval
    limit = TIME_LIMIT_SECONDS + TIME_LIMIT_PER_SECOND * seconds
    for by_seeking, latest, may_take in ((True, MAX_LATE_SECONDS, limit), (False, seconds, limit + begin_seconds)):
        words = _run(_arguments(video_fd, interval, target, by_seeking), video_fd, (source, target), may_take)
        if not words and _first_frame_seconds(target) <= latest:
            return ""
    return words or "there is no frame"


def _named(answers: Sequence[Answer]) -> Iterator[tuple[str, VideoResult, Moment]]:
    for number, answer in enumerate(answers, start=1):
        query = f"q{number}-" if len(answers) > 1 else ""
        for result in answer.results:
            video = re.sub(r"[^\w.-]+", "_", result.video_id).strip("._-")[-NAME_LETTERS:]
            if video != result.video_id.replace("/", "_"):  # another video may get the same name
                video = f"{video}-{result.key[:6]}".lstrip("-")
            for moment in result.moments:
                times = f"{moment.begin_seconds:.1f}-{moment.end_seconds:.1f}"
                yield f"{query}{result.rank:02}-{video}-{times}.mp4", result, moment


def _arguments(video_fd: int, interval: tuple[float, float], target: Path, by_seeking: bool) -> list[str]:
    """Return ffmpeg's arguments: it reads the open file and nothing else, and writes one named file."""
    begin, seconds = ["-ss", f"{interval[0]:.3f}"], interval[1]
    # Moments are on the file's own clock, which need not begin at 0.
    seek = ["-seek_timestamp", "1", *begin] if by_seeking else ["-copyts"]
    read = [
        "-max_pixels",
        str(Limits().max_pixels),
        "-protocol_whitelist",
        "fd",
        "-fd",
        str(video_fd),
        "-i",
        "fd:",
    ]
    # H.264 in 4:2:0 needs even sides.
    video = ["-vf", "pad=ceil(iw/2)*2:ceil(ih/2)*2", "-c:v", "libx264", "-preset", "veryfast", "-crf", "20"]
    return [
        *("-nostdin", "-hide_banner", "-nostats", "-v", "error"),
        *(*seek, *read, *([] if by_seeking else begin), "-t", f"{seconds:.3f}"),
        *("-map", "0:V:0", "-map", "0:a:0?", "-sn", "-dn", "-map_metadata", "-1", "-map_chapters", "-1"),
        *(*video, "-pix_fmt", "yuv420p", "-c:a", "aac", "-movflags", "+faststart"),
        *("-f", "mp4", "-y", f"file:{target}"),
    ]


def _run(arguments: list[str], video_fd: int, files: tuple[Path, Path], time_limit_seconds: float) -> str:
    """Run ffmpeg; return its last line if it fails, else an empty string.

    Raises:
        OSError: The disk is full.
    """
    source, target = files
    try:
        exit_code, lines = run_to_end(arguments, video_fd, time_limit_seconds)
    except subprocess.TimeoutExpired as error:
        raise InputError(
            f"cutting {source} took more than {time_limit_seconds:.0f} s and was stopped - the file may be "
            "damaged: play it"
        ) from error
    if exit_code == 0:
        return ""
    if any(os.strerror(errno.ENOSPC) in line for line in lines):  # later lines only report the consequences
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target.parent))
    return lines[-1].strip() if lines else f"exit status {exit_code}"


def _first_frame_seconds(clip: Path) -> float:
    """Return when the first frame of a clip is shown; infinity if it has none."""
    from svb.extract.decode.pyav_file import opened

    try:
        with opened(clip, Limits()) as (container, stream):
            first = next(container.decode(stream), None)
            return math.inf if first is None or first.time is None else float(first.time)
    except (DecodeError, OSError):
        return math.inf
