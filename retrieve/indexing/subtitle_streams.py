"""Subtitle streams inside video files, as cues: SubRip, ASS, WebVTT and MP4's timed text.

PyAV lists the streams; the ffmpeg program, which can be stopped, writes them as WebVTT.
"""

from __future__ import annotations

import logging
import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import av
import av.error
from av.subtitles.stream import SubtitleStream

from svb.errors import InputError
from svb.extract.decode.ffmpeg_process import run_to_end
from svb.retrieve.indexing.sidecars import MAX_SPEECH_BYTES, language_of, read_sidecar
from svb.retrieve.stored.cues import Cue

logger = logging.getLogger(__name__)

TEXT_CODECS = ("subrip", "srt", "ass", "ssa", "webvtt", "mov_text", "text")
# The whole file may have to be read for it, from a slow disk.
TIME_LIMIT_SECONDS = 60.0
SLOWEST_BYTES_PER_SECOND = 10e6


@dataclass(frozen=True)
class StreamCues:
    """A subtitle stream of a file: its number among all streams, its language (empty if not known), its cues."""

    number: int
    language: str
    cues: list[Cue]


def read_streams(path: Path) -> list[StreamCues]:
    """Return the subtitle streams of a video that hold text; pictures of text are left out, and the log names them.

    Raises:
        InputError: The file cannot be opened, or its subtitles cannot be read.
    """
    with _open(path) as file:
        languages = _text_streams(path, file.fileno())
        return _read(path, file.fileno(), languages) if languages else []


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}) - expected a video file") from error


def _text_streams(path: Path, fd: int) -> dict[int, str]:
    """Return the language of each stream of text, by its number."""
    try:
        # As in decoding: the demuxer gets one open file and access to nothing else.
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


def _read(path: Path, fd: int, languages: dict[int, str]) -> list[StreamCues]:
    with tempfile.TemporaryDirectory(prefix="svb-subtitles-") as folder:
        files = {number: Path(folder) / f"{number}.vtt" for number in languages}
        # Times stay on the file's own clock, as those of moments are.
        arguments = ["-nostdin", "-hide_banner", "-nostats", "-v", "error", "-copyts"]
        arguments += ["-protocol_whitelist", "fd", "-fd", str(fd), "-i", "fd:"]
        for number, file in files.items():
            arguments += ["-map", f"0:{number}", "-c:s", "webvtt", "-f", "webvtt", "-y", f"file:{file}"]
        limit = TIME_LIMIT_SECONDS + os.fstat(fd).st_size / SLOWEST_BYTES_PER_SECOND
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
