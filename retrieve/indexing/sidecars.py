"""Subtitles and notes beside a video: `clip.srt`, `clip.en.vtt` or `clip.txt` of `clip.mp4`, as cues with times.

Files in the wild are sloppy: what cannot be read as a cue is left out and counted. pysubs2 takes NOTE blocks, cue
names and broken cues for words of the cue before them, webvtt-py silently drops broken cues, and both must be told
the encoding. Hence this reader, for SubRip and WebVTT alike.
"""

from __future__ import annotations

import html
import logging
import re
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from svb.data.feature_store import FeatureStore, shard_names
from svb.errors import InputError, SvbError
from svb.retrieve.indexing.index_config import state_of
from svb.retrieve.stored.cues import Cue

logger = logging.getLogger(__name__)

SUFFIXES = (".srt", ".vtt", ".txt")
# The words of a day of talking are a quarter of this.
MAX_BYTES = 4 * 2**20
# A hundred thousand cues have a tenth of this.
MAX_SPEECH_BYTES = 64 * 2**20
# Cues this close to each other are one after the other.
GAP_SECONDS = 0.1
HEAD_BYTES = 4096
# Lines that subtitles show at a time, at most.
MAX_SHOWN = 8

_LANGUAGE = re.compile(r"\.[A-Za-z]{2,3}([-_][A-Za-z0-9]{1,12})*(\.(forced|sdh|cc|hi|default))?$")
_TIME = r"(?:(\d{1,4}):)?(\d{1,2}):(\d{1,2})(?:[.,](\d{1,3}))?"
_TIMES = re.compile(rf"\s*{_TIME}\s*-->\s*{_TIME}(\s.*)?")
# Blocks of WebVTT that are not cues.
_NO_CUE = re.compile(r"(WEBVTT|NOTE|STYLE|REGION)(\s|$)")
# A letter or a digit must follow `<`, so that `1 < 2` stays: <i>, </font>, <v Roger>, <00:00:01.000>; and {\an8}.
_TAGS = re.compile(r"</?[A-Za-z][^<>]*>|<\d[\d:.]*>|\{\\[^{}]*\}")
_LINE_BREAKS = re.compile(r"\\[Nnh]")
# Drones write their readings beside each video: a cue per frame or second, with camera settings and position.
_READING = re.compile(
    r"\b(SrtCnt|FrameCnt|DiffTime|GPS|HOME|BAROMETER|latitude|longt?itude|rel_alt|abs_alt|altitude|iso|shutter|fnum|ev"
    r"|ct|focal_len|SS|[HV]\.S) ?[:(]? ?-?\d",
    re.ASCII | re.IGNORECASE,
)
# A photographer who talks names fewer of them at a time.
MIN_READINGS = 4
_INVISIBLE = re.compile("[\u200b-\u200f\u202a-\u202e\u2060\ufeff]")


def find_sidecars(videos: Iterable[Path]) -> dict[Path, list[Path]]:
    """Return the sidecars of each video that has any: files of its name, perhaps with a language after it.

    Every folder is listed once. `a.b.srt` belongs to `a.b.mp4` if there is one, else to `a.mp4`.
    """
    found: dict[Path, list[Path]] = {}
    by_folder: defaultdict[Path, defaultdict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
    for video in videos:
        by_folder[video.parent][video.stem].append(video)
    for folder, by_stem in by_folder.items():
        for sidecar in _candidates(folder):
            stem = sidecar.stem if sidecar.stem in by_stem else _LANGUAGE.sub("", sidecar.stem)
            for video in by_stem.get(stem, ()):
                found.setdefault(video, []).append(sidecar)
    return found


# The codes of languages in Matroska and MP4, and those that people use.
_LANGUAGE_CODES = """
ara:ar ben:bn bul:bg cat:ca ces:cs cze:cs chi:zh zho:zh dan:da deu:de ger:de dut:nl nld:nl ell:el gre:el eng:en
est:et fin:fi fra:fr fre:fr heb:he hin:hi hrv:hr hun:hu ind:id ita:it jpn:ja kor:ko lav:lv lit:lt nor:no nob:nb
per:fa fas:fa pol:pl por:pt ron:ro rum:ro rus:ru slk:sk slo:sk slv:sl spa:es srp:sr swe:sv tha:th tur:tr ukr:uk
urd:ur vie:vi und: mul:
"""
_TWO_LETTERS = dict(pair.split(":") for pair in _LANGUAGE_CODES.split())


def language_of(tag: str) -> str:
    """Return a language as users see and type it, such as `en` or `pt-br`; empty if the tag names none."""
    first, *rest = tag.strip().lower().replace("_", "-").split("-")
    first = _TWO_LETTERS.get(first, first)
    return "-".join([first, *rest]) if first else ""


def language_of_sidecar(path: Path) -> str:
    """Return the language in a file's name or its WebVTT header; empty if neither names one."""
    match = _LANGUAGE.search(path.stem)
    if match is not None:
        return language_of(match[0].split(".")[1])
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES).decode("utf-8", "replace")
    except OSError:
        return ""
    header = re.match(r"\ufeff?WEBVTT[^\n]*\n(?:[^\n]+\n)*?Language: *([\w-]+)", head.replace("\r\n", "\n"))
    return language_of(header[1]) if header else ""


def read_sidecar(path: Path, max_bytes: int = MAX_BYTES) -> list[Cue]:
    """Read a sidecar's cues, in order of time; of a `.txt` file its lines, which have no times.

    Tags, positions and cues of a drone's readings are left out. Words that the next cue repeats, as rolling
    subtitles do, are one cue.

    Args:
        path: The file; its suffix tells the format.
        max_bytes: Largest file that is read.

    Raises:
        InputError: The file cannot be read, is too large, or holds no text.
    """
    text = _read_text(path, max_bytes)
    if path.suffix.lower() == ".txt":
        lines = (_clean(line) for line in text.split("\n"))
        return [Cue(line) for line in lines if line]
    cues, num_broken = _parse(text)
    if num_broken:
        logger.info(
            f"{path}: {num_broken} of {num_broken + len(cues)} cues have no readable times and were left out"
        )
    said = [(cue, lines) for cue, lines in cues if not _is_telemetry(cue.text)]
    if len(said) < len(cues):
        num = len(cues) - len(said)
        logger.info(f"{path}: {num} of {len(cues)} cues are a drone's readings, not speech, and were left out")
    return _without_repeats(said)


def _is_telemetry(text: str) -> bool:
    return len({name.lower() for name in _READING.findall(text)}) >= MIN_READINGS


def _candidates(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    except OSError:
        return []  # a folder that is gone has no sidecars


def _read_text(path: Path, max_bytes: int) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}) - make it readable, or move it away") from error
    if len(data) > max_bytes:
        raise InputError(
            f"{path} has more than {max_bytes / 2**20:g} MiB, too many for captions - cut it, or move it away"
        )
    text = _decode(path, data)
    if "\0" in text:
        raise InputError(f"{path} is not text: it holds a NUL - save it as UTF-8, or move it away")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _decode(path: Path, data: bytes) -> str:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16", "replace")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        logger.info(f"{path} is not UTF-8: reading it as Windows-1252 - save it as UTF-8 if letters come out wrong")
        return data.decode("cp1252", "replace")


def _parse(text: str) -> tuple[list[tuple[Cue, list[str]]], int]:
    """Return the cues with their lines, in order of time, and the number of those that are broken."""
    cues, num_broken = list[tuple[Cue, list[str]]](), 0
    for block in re.split(r"\n{2,}", text.strip("\n")):
        lines = block.split("\n")
        starts = [number for number, line in enumerate(lines) if "-->" in line]
        num_broken += not starts and not _NO_CUE.match(block) and any(_clean(line) for line in lines)
        for start, end in pairwise([*starts, len(lines)]):
            # If the empty line between two cues is missing, the next one's number ends this one's words.
            words = lines[start + 1 : end - 1 if end < len(lines) and lines[end - 1].strip().isdigit() else end]
            words = [cleaned for cleaned in map(_clean, words) if cleaned]
            times = _times(lines[start])
            if times is None:
                num_broken += 1
            elif words:
                cues.append((Cue(" ".join(words), *times), words))
    return sorted(cues, key=lambda cue: cue[0].begin_seconds or 0.0), num_broken


def _times(line: str) -> tuple[float, float] | None:
    matched = _TIMES.fullmatch(line)
    if matched is None:
        return None
    begin, end = _seconds(matched.groups()[:4]), _seconds(matched.groups()[4:8])
    return (begin, end) if begin < end else None


def _seconds(parts: Sequence[str | None]) -> float:
    hours, minutes, seconds, fraction = parts
    whole = int(hours or 0) * 3600 + int(minutes or 0) * 60 + int(seconds or 0)
    return whole + int((fraction or "0").ljust(3, "0")) / 1000


def _clean(line: str) -> str:
    shown = html.unescape(_TAGS.sub("", _LINE_BREAKS.sub(" ", line)))
    return " ".join(_INVISIBLE.sub("", shown).split())


def _without_repeats(cues: Iterable[tuple[Cue, list[str]]]) -> list[Cue]:
    """Leave out lines that a cue repeats from the one before it, and cues that show nothing new."""
    kept: list[Cue] = []
    shown, until = list[str](), 0.0
    for cue, lines in cues:
        assert cue.begin_seconds is not None and cue.end_seconds is not None
        new = _after_repeated(lines, shown) if cue.begin_seconds <= until + GAP_SECONDS else lines
        if new:
            kept.append(replace(cue, text=" ".join(new)))
        elif kept:
            kept[-1] = replace(kept[-1], end_seconds=max(kept[-1].end_seconds or 0.0, cue.end_seconds))
        shown, until = lines, cue.end_seconds
    return kept


def _after_repeated(lines: list[str], shown: list[str]) -> list[str]:
    for count in range(min(len(lines), len(shown), MAX_SHOWN), 0, -1):
        if shown[-count:] == lines[:count]:
            return lines[count:]
    return lines


# --- watching them

# A file that is added within a tick of the clock after a listing leaves the folder's time unchanged.
SETTLED_SECONDS = 2.0


class SidecarWatch:
    """Looks at the folders that hold a store's videos.

    Args:
        store: The store's folder.
    """

    def __init__(self, store: Path) -> None:
        self._store = store
        self._shards: list[str] | None = None
        self._videos: dict[Path, list[Path]] = {}
        self._listed: dict[Path, tuple[int, list[Path]]] = {}

    def states(self) -> list[Any]:
        """Return size and time of every sidecar. A folder that has not changed is not listed again."""
        shards = shard_names(self._store)
        if shards != self._shards:
            try:
                records = FeatureStore(self._store).records.values()
            except (SvbError, OSError):  # the next reader reports it; the folders stay as they were
                return self._states()
            self._shards, self._videos, self._listed = shards, {}, {}
            for path in sorted({Path(record.source_path) for record in records}):
                self._videos.setdefault(path.parent, []).append(path)
        return self._states()

    def _states(self) -> list[Any]:
        return [state_of(sidecar) for folder in self._videos for sidecar in self._sidecars_in(folder)]

    def _sidecars_in(self, folder: Path) -> list[Path]:
        try:
            mtime_ns = folder.stat().st_mtime_ns
        except OSError:  # it is gone for now
            return []
        known_ns, sidecars = self._listed.get(folder, (-1, []))
        if mtime_ns == known_ns:
            return sidecars
        found = find_sidecars(self._videos[folder])
        sidecars = sorted({sidecar for of_video in found.values() for sidecar in of_video})
        if time.time() - mtime_ns / 1e9 > SETTLED_SECONDS:
            self._listed[folder] = (mtime_ns, sidecars)
        return sidecars
