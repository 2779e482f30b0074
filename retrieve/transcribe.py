"""`svb transcribe`: videos -> what is said in them, as a WebVTT file each, for `svb index --transcripts`.

<folder>/<video_id>.vtt   a header with the language, a NOTE with the record of the video as JSON (see `Record`),
                          then a cue for each sentence or so, on the video's own clock

Each video gets one record. The file of a video that has no sound or speech, or cannot be read, has no cues. A file
appears whole; a run that was stopped goes on with the videos that have none.
"""

from __future__ import annotations

import html
import json
import logging
import os
import re
import select
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from svb.config import option
from svb.data.publish import FolderLock, published_file
from svb.data.text import mtime_ns_of, storable_text
from svb.errors import InputError, Interrupted, ModelUnavailableError
from svb.interrupts import deferred_interrupts

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

logger = logging.getLogger(__name__)

SAMPLE_RATE = 16_000
# Longer sound is transcribed a piece at a time: half an hour has 58 MB.
PIECE_SECONDS = 1800
# A decoder that gives nothing for so long has hung.
STALL_SECONDS = 120.0
HEAD_BYTES = 65536


@dataclass(frozen=True)
class TranscribeConfig:
    """Options of `svb transcribe`.

    Attributes:
        model: Whisper model: its name on a hub, or its folder.
        language: Language that is spoken, e.g. en. [default: the model tells]
        retry_failed: Retry videos that could not be read before.
        device: Device that computes: auto, cpu, cuda:0, ...
    """

    model: str = option("small", metavar="NAME")
    language: str | None = option(None, metavar="LANG")
    retry_failed: bool = False
    device: str = "auto"


@dataclass(frozen=True)
class Record:
    """What is known of a transcript: its video as it was then, what made it, and how that ended.

    `status` is `ok`, `silent` (nothing is said, or there is no sound) or `failed`, explained in `error`.
    """

    video_id: str
    source_path: str
    size_bytes: int
    mtime_ns: int
    model: str
    asked_language: str | None
    language: str = ""
    status: str = "ok"
    error: str = ""

    def is_of(self, other: Record) -> bool:
        """Tell whether another was made of the same file in the same way."""
        return [getattr(self, name) for name in _MADE_FROM] == [getattr(other, name) for name in _MADE_FROM]


_MADE_FROM = ("video_id", "source_path", "size_bytes", "mtime_ns", "model", "asked_language")


@dataclass(frozen=True)
class Said:
    """Words, and the half-open interval of seconds in which they are said."""

    begin_seconds: float
    end_seconds: float
    text: str


class SpeechModel(Protocol):
    """Turns sound into text."""

    def transcribe(self, sound: NDArray[np.float32], language: str | None) -> tuple[str, list[Said]]:
        """Return the language and what is said in `(n,)` samples at 16 kHz, -1 to 1."""
        ...


def transcribe(
    sources: Sequence[Path | str],
    out: Path | str,
    config: TranscribeConfig | None = None,
    *,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Write what is said in videos as a WebVTT file each; those that have one are left out.

    Args:
        sources: A feature store, whose videos get its video_ids, or folders, files and lists of videos.
        out: The folder for the transcripts.
        config: The options.
        on_progress: Called with the number of videos that are done, and of all to do.

    Returns:
        `out`.

    Raises:
        InputError: A source is not there, or holds no videos.
        ModelUnavailableError: The model cannot be loaded.
        StoreError: Another process is writing to the folder.
        Interrupted: SIGINT or SIGTERM came; finished transcripts are kept.
    """
    out, config = Path(out), config or TranscribeConfig()
    videos = _videos([Path(source) for source in sources])
    out.mkdir(parents=True, exist_ok=True)
    lock = FolderLock(out)
    try:
        lock.take()
        todo = [record for record in (_record(*video, config) for video in videos) if _is_open(out, record, config)]
        logger.info(f"{len(todo):,} of {len(videos):,} videos to transcribe, {len(videos) - len(todo):,} are done")
        if todo:
            _transcribe_all(todo, out, config, on_progress)
    finally:
        lock.close()
    return out


def _videos(sources: Sequence[Path]) -> list[tuple[str, Path]]:
    """Return video_ids and paths."""
    if len(sources) == 1 and (sources[0].suffix == ".h5" or (sources[0] / "store.json").is_file()):
        from svb.data.feature_store import FeatureStore

        records = FeatureStore(sources[0]).records
        return [(video_id, Path(record.source_path)) for video_id, record in sorted(records.items())]
    from svb.extract.plan import plan_videos

    plan = plan_videos(sources, {})
    for message in plan.messages:
        logger.info(message)
    return [(video.video_id, video.path) for video in plan.asked]


def _record(video_id: str, path: Path, config: TranscribeConfig) -> Record:
    try:
        stat = path.stat()
        state = stat.st_size, mtime_ns_of(stat)
    except (OSError, ValueError):
        state = 0, 0
    return Record(video_id, storable_text(str(path)), *state, config.model, config.language)


def _is_open(out: Path, record: Record, config: TranscribeConfig) -> bool:
    """Tell whether a video has no transcript of its file as it is, made in this way."""
    held = read_record(_path(out, record))
    if held is None or not held.is_of(record):
        return True
    return held.status == "failed" and config.retry_failed


def _path(out: Path, record: Record) -> Path:
    from svb.retrieve.indexing.make_speech import transcript_path

    return transcript_path(out, record.video_id)


def _transcribe_all(
    todo: Sequence[Record], out: Path, config: TranscribeConfig, on_progress: Callable[[int, int], None]
) -> None:
    model = load_model(config.model, config.device)
    statuses = []
    with deferred_interrupts() as interrupted:
        for done, record in enumerate(todo):
            on_progress(done, len(todo))
            made = _transcribe(record, model, interrupted)
            if made is None:
                raise Interrupted(
                    interrupted(),
                    f"interrupted - {done} of {len(todo)} videos of this run have their transcripts in {out}; run "
                    "the same command again to go on",
                )
            finished, said = made
            write_transcript(_path(out, record), finished, said)
            statuses.append(finished.status)
            if finished.status == "failed":
                logger.warning(f"{finished.source_path}: {finished.error}")
    on_progress(len(todo), len(todo))
    counts = {status: statuses.count(status) for status in ("ok", "silent", "failed")}
    logger.info(f"{out}: {counts['ok']} transcribed, {counts['silent']} say nothing, {counts['failed']} failed")


def _transcribe(
    record: Record, model: SpeechModel, interrupted: Callable[[], int]
) -> tuple[Record, list[Said]] | None:
    """Return a video's finished record and what is said; None if a signal came."""
    said, language = list[Said](), record.asked_language
    try:
        for begin_seconds, sound in sound_of(Path(record.source_path)):
            language, found = model.transcribe(sound, language)  # the first piece decides on the language
            said += [
                replace(
                    each,
                    begin_seconds=each.begin_seconds + begin_seconds,
                    end_seconds=each.end_seconds + begin_seconds,
                )
                for each in found
                if each.text.strip() and each.end_seconds > each.begin_seconds
            ]
            if interrupted():
                return None
    except InputError as error:
        return replace(record, status="failed", error=str(error)), []
    return replace(record, language=language or "", status="ok" if said else "silent"), said


# --- files


def write_transcript(path: Path, record: Record, said: Sequence[Said]) -> None:
    """Write a transcript, whole or not at all."""
    from svb.retrieve.stored.cues import clock_of

    # Nothing in it can end the NOTE or look like a cue's times.
    held = json.dumps(asdict(record)).replace(">", "\\u003e")
    blocks = [f"WEBVTT\nLanguage: {record.language}" if record.language else "WEBVTT", f"NOTE svb\n{held}"]
    for each in said:
        text = html.escape(" ".join(each.text.split()), quote=False)
        blocks.append(f"{clock_of(each.begin_seconds)} --> {clock_of(each.end_seconds)}\n{text}")
    with published_file(path) as aside:
        aside.write_text("\n\n".join(blocks) + "\n", "utf-8")


def read_record(path: Path) -> Record | None:
    """Return the record of a transcript; None if there is none that `svb transcribe` wrote."""
    try:
        with path.open("rb") as file:
            found = re.search(rb"^NOTE svb\n(\{.*\})$", file.read(HEAD_BYTES), re.MULTILINE)
        return None if found is None else Record(**json.loads(found[1]))
    except (OSError, ValueError, TypeError):
        return None


# --- sound


def sound_of(path: Path) -> Iterator[tuple[float, NDArray[np.float32]]]:
    """Yield the sound of a video in pieces: when each begins on the file's clock, and `(n,)` samples at 16 kHz.

    ffmpeg, a process that can be stopped, decodes it. The first of several tracks is taken.

    Raises:
        InputError: The file cannot be read, or gives nothing for two minutes.
    """
    import imageio_ffmpeg
    import numpy as np

    try:
        file = path.open("rb")
    except (OSError, ValueError) as error:
        raise InputError(f"it cannot be opened ({error})") from error
    with file, tempfile.TemporaryFile() as log:
        begin_seconds = _begin_of_sound(file.fileno())
        if begin_seconds is None:
            return
        file.seek(0)
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-hide_banner", "-nostats", "-v", "error"]
        command += [
            "-protocol_whitelist",
            "fd,pipe",
            "-fd",
            str(file.fileno()),
            "-i",
            "fd:",
            "-map",
            "0:a:0",
            "-vn",
        ]
        # Gaps are filled, so that a sample's number tells its time.
        command += ["-af", "aresample=async=1:first_pts=0", "-ac", "1", "-ar", str(SAMPLE_RATE)]
        command += ["-f", "s16le", "pipe:1"]
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, pass_fds=(file.fileno(),)
        ) as process:
            try:
                for piece in _pieces(process):
                    samples = np.frombuffer(piece, "<i2").astype(np.float32)
                    yield begin_seconds, samples / np.float32(32768)
                    begin_seconds += len(piece) / 2 / SAMPLE_RATE
            finally:
                process.kill()
        if process.returncode:  # negative where a signal ended it
            log.seek(0)
            words = log.read().decode("utf-8", "replace").strip().splitlines()
            raise InputError(f"its sound cannot be decoded ({words[-1] if words else 'ffmpeg failed'})")


def _begin_of_sound(fd: int) -> float | None:
    """Return when a file begins on its own clock; None if it has no sound.

    Raises:
        InputError: The file cannot be read.
    """
    import av
    import av.error

    try:
        with av.open("fd:", options={"fd": str(fd), "protocol_whitelist": "fd"}) as container:
            return (container.start_time or 0) / 1e6 if container.streams.audio else None
    except (OSError, ValueError, av.error.FFmpegError) as error:
        raise InputError(f"it cannot be read ({error})") from error


def _pieces(process: subprocess.Popen[bytes]) -> Iterator[bytes]:
    """Yield what a process writes, in whole samples; it has ended after the last piece."""
    assert process.stdout is not None
    held, size = bytearray(), 2 * SAMPLE_RATE * PIECE_SECONDS
    while True:
        if not select.select([process.stdout], [], [], STALL_SECONDS)[0]:
            raise InputError(f"its sound gave nothing for {STALL_SECONDS:.0f} s and was left out")
        block = os.read(process.stdout.fileno(), 1 << 20)
        held += block
        if len(held) >= size:
            yield bytes(held[:size])
            del held[:size]
        if not block:
            if held:
                yield bytes(held[: len(held) // 2 * 2])
            process.wait()
            return


# --- the model


def load_model(name: str, device: str) -> SpeechModel:
    """Load a Whisper model with faster-whisper.

    Raises:
        ModelUnavailableError: The package or the model is not here.
    """
    try:
        from faster_whisper import WhisperModel
    except ImportError as error:
        raise ModelUnavailableError(
            f"svb transcribe needs faster-whisper ({error}) - run pip install '.[speech]' in svb's folder"
        ) from error
    kind, _, number = device.partition(":")
    try:
        model = WhisperModel(name, device=kind, device_index=int(number or 0))
    except Exception as error:  # of the hub, of CTranslate2, of a file that is missing
        raise ModelUnavailableError(
            f"the speech model {name!r} cannot be loaded ({error}) - name a folder with a model of faster-whisper, "
            "or one of a hub that can be reached, such as small"
        ) from error
    return _Whisper(model)


class _Whisper:
    """A `SpeechModel` of faster-whisper."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def transcribe(self, sound: NDArray[np.float32], language: str | None) -> tuple[str, list[Said]]:
        """As `SpeechModel.transcribe`; silence is left out, because Whisper makes up words for it."""
        segments, info = self._model.transcribe(
            sound, language=language, vad_filter=True, condition_on_previous_text=False
        )
        return info.language, [Said(segment.start, segment.end, segment.text) for segment in segments]
