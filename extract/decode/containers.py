"""Reads from a container's own bytes what neither PyAV nor ffmpeg's log says."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

# An MP4's fragments begin after a few boxes.
MAX_BOXES_BEFORE_FRAGMENTS = 50

# The index of a film of hours has some MB.
MAX_INDEX_BYTES = 256 * 2**20

TS_PACKET_BYTES, TS_SYNC_BYTE = 188, b"\x47"

TS_BYTES_LOOKED_AT = 2**20

# A page of Ogg begins with these four letters and its version: https://www.rfc-editor.org/rfc/rfc3533#section-6
OGG_SYNC, OGG_HEADER_BYTES, MAX_OGG_SEGMENTS, OGG_FIRST_PAGE = b"OggS\0", 27, 255, 2
# The rest of the file counts as one part.
MAX_OGG_PARTS = 1000
# After so many places where no page follows a page, the rest of the file is not looked at.
MAX_OGG_GAPS = 1000
# A file is searched in blocks of this size.
SEARCHED_BYTES = 2**16

FLV_HEADER_BYTES, ASF_BEGIN = 13, bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")

# Matroska's names of elements: https://www.matroska.org/technical/elements.html
_SEGMENT, _TRACKS, _TRACK, _TRACK_TYPE, _VIDEO = 0x18538067, 0x1654AE6B, 0xAE, 0x83, 0xE0

_VIDEO_TYPE = b"\x01"
_STREAM_TYPES = (_VIDEO_TYPE, b"\x02", b"\x11")  # video, sound, subtitles
_ENCODINGS, _ENCODING, _ENCRYPTION = 0x6D80, 0x6240, 0x5035

_CROPS = {0x54CC: "left", 0x54BB: "top", 0x54DD: "right", 0x54AA: "bottom"}

# The tracks come before the pictures, but fonts and covers may come before them.
_TRACKS_WITHIN_BYTES = 2**20


def lacks_index(path: Path) -> bool:
    """Return whether a file is an MP4 or MOV without its index: PyAV does not pass on what libavformat logs."""
    known = {b"ftyp", b"mdat", b"free", b"skip", b"wide", b"moov", b"moof", b"uuid", b"pnot"}
    end = 0
    for box in _boxes(path):
        if box.kind not in known:
            # The first box says what the file is; unknown bytes further on are damage.
            return box.start > 0
        if box.kind == b"moov":
            return False
        end = box.end
    return end > 0


def is_fragmented(path: Path) -> bool:
    """Return whether an MP4 consists of fragments: its durations then include the time at which it starts."""
    return any(box.kind == b"moof" for box in itertools.islice(_boxes(path), MAX_BOXES_BEFORE_FRAGMENTS))


def is_encrypted(path: Path, container_format: str) -> bool:
    """Return whether the pictures are encrypted: by common encryption (MP4, Matroska), or scrambled (TS)."""
    if "mp4" in container_format:
        return _is_encrypted_mp4(path)
    if "matroska" in container_format:
        videos = [track for track in _matroska_tracks(path) if track.get(_TRACK_TYPE) == _VIDEO_TYPE]
        return bool(videos) and all(_is_encrypted_track(track) for track in videos)
    return container_format == "mpegts" and _is_scrambled(path)


def _is_encrypted_mp4(path: Path) -> bool:
    """Look for an encrypted video's sample entry, which begins with six zero bytes after its name."""
    for box in _boxes(path):
        if box.kind == b"moov":
            with path.open("rb") as file:
                file.seek(box.start)
                return b"encv" + bytes(6) in file.read(min(box.end - box.start, MAX_INDEX_BYTES))
    return False


def _is_scrambled(path: Path) -> bool:
    """Return whether most packets of a transport stream's beginning have their scrambling bits set."""
    with path.open("rb") as file:
        data = file.read(TS_BYTES_LOOKED_AT)
    first = data.find(TS_SYNC_BYTE)
    controls = [
        data[at + 3] >> 6 for at in range(first, len(data) - 3, TS_PACKET_BYTES) if data[at] == TS_SYNC_BYTE[0]
    ]
    return sum(control != 0 for control in controls) > len(controls) / 2


@dataclass(frozen=True)
class OggPart:
    """A part of an Ogg file, from the byte `begin` to before the byte `end`; `is_cut` if it ends amid a page."""

    begin: int
    end: int
    is_cut: bool


def ogg_parts(path: Path, on_read: Callable[[], None]) -> list[OggPart]:
    """Return the parts that an Ogg file was joined from: one if it was not joined, none if it is not an Ogg file.

    libavformat reads the first part, and others only if they hold a single stream. It notices no cut: the
    length that an Ogg promises is the time on its last page. `on_read` is called often.
    """
    begins: list[int] = []
    are_cut: list[bool] = []
    was_first, page_end = False, 0
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        for begin, end, is_first in _ogg_pages(file, size, on_read):
            if is_first and not was_first:
                are_cut += [page_end > begin] if begins else []
                begins.append(begin)
            was_first, page_end = is_first, end
            if len(begins) == MAX_OGG_PARTS:
                break
    ends = [*begins[1:], size]
    return [OggPart(*part) for part in zip(begins, ends, [*are_cut, page_end > size], strict=False)]


def _ogg_pages(file: BinaryIO, size: int, on_read: Callable[[], None]) -> Iterator[tuple[int, int, bool]]:
    """Yield where each page begins, where it says that it ends, and whether it is the first of a stream."""
    begin = at = num_gaps = 0
    while at != size and num_gaps < MAX_OGG_GAPS:
        on_read()
        file.seek(at)
        header = file.read(OGG_HEADER_BYTES + MAX_OGG_SEGMENTS)
        if not header.startswith(OGG_SYNC):
            if at == 0:
                return
            num_gaps += 1
            # The page was cut, something else follows it, or the next page was cut within its first bytes.
            found = next(_places(file, OGG_SYNC, begin + len(OGG_SYNC), on_read), size)
            if at < found and OGG_SYNC.startswith(header[: found - at]):
                yield at, found + 1, False
            at = found
            continue
        begin, at = at, size + 1
        if len(header) >= OGG_HEADER_BYTES:
            segments = header[OGG_HEADER_BYTES : OGG_HEADER_BYTES + header[26]]
            at = begin + OGG_HEADER_BYTES + len(segments) + sum(segments)
        yield begin, at, len(header) > 5 and bool(header[5] & OGG_FIRST_PAGE)


def _places(file: BinaryIO, wanted: bytes, start: int, on_read: Callable[[], None]) -> Iterator[int]:
    """Yield each place from `start` on where these bytes are found."""
    file.seek(start)
    held = b""
    while block := file.read(SEARCHED_BYTES):
        on_read()
        held += block
        done = 0
        while (found := held.find(wanted, done)) >= 0:
            yield start + found
            done = found + len(wanted)
        done = max(done, len(held) - len(wanted) + 1)
        start, held = start + done, held[done:]


def what_is_missing(path: Path, parts: Sequence[OggPart], on_read: Callable[[], None]) -> str:
    """Return what the record says of what a file's bytes show to be missing; empty if nothing is.

    `parts` are those of an Ogg file; `on_read` is called often.
    """
    if num_unread := _num_unread_recordings(path, on_read):
        return f"{1 + num_unread} recordings were joined here, and not all of them can be read: split the file"
    if len(parts) == 1:
        return "the file is cut" if parts[0].is_cut else ""
    cut = (number for number, part in enumerate(parts, 1) if part.is_cut)
    return ", ".join(f"part {number} of {len(parts)} is cut" for number in cut)


def _num_unread_recordings(path: Path, on_read: Callable[[], None]) -> int:
    """Return how many recordings follow the first in a joined MP4, FLV or ASF: libavformat skips most of them."""
    with path.open("rb") as file:
        begin = file.read(len(ASF_BEGIN))
        begin = begin if begin == ASF_BEGIN else begin[:FLV_HEADER_BYTES] if begin.startswith(b"FLV") else b""
        count = sum(1 for _ in _places(file, begin, len(begin), on_read)) if begin else 0
        # Live streams repeat their index: another recording is one whose fragments begin as early as the first.
        num_indexes, fragment_times = 0, list[float]()
        for box in _boxes(path):
            on_read()
            num_indexes += box.kind == b"moov"
            if box.kind == b"moof" and len(fragment_times) < num_indexes:
                file.seek(box.start)
                fragment_times.append(_fragment_time(file.read(min(box.end - box.start, MAX_INDEX_BYTES))))
    if fragment_times:
        return sum(time <= fragment_times[0] for time in fragment_times[1:])
    return count or max(0, num_indexes - 1)


def _fragment_time(moof: bytes) -> float:
    """Return when a fragment begins, in its track's unit; NaN if it does not say."""
    at = moof.find(b"tfdt")
    if not 0 <= at < len(moof) - 16:
        return math.nan
    return int.from_bytes(moof[at + 8 : at + (16 if moof[at + 4] else 12)], "big")


def part_url(part: OggPart | None) -> tuple[str, str]:
    """Return what libavformat is to open for a part of the open file, or for all of it, and the protocols."""
    if part is None:
        return "fd:", "fd"
    return f"subfile,,start,{part.begin},end,{part.end},,:fd:", "fd,subfile"


@dataclass(frozen=True)
class _Box:
    """A box of an MP4, from the byte `start` to the byte `end`, which is `start` where no length is known."""

    kind: bytes
    start: int
    end: int


def _boxes(path: Path) -> Iterator[_Box]:
    """Yield an MP4's boxes of the top level, up to the first without a length."""
    size = path.stat().st_size
    at = 0
    with path.open("rb") as file:
        while at + 8 <= size:
            file.seek(at)
            header = file.read(16)
            length = int.from_bytes(header[:4], "big")
            if length == 1:
                length = int.from_bytes(header[8:16], "big")
            end = at + length if length >= 8 else at
            yield _Box(header[4:8], at, end)
            if end == at:
                return
            at = end


class Crop(NamedTuple):
    """How many pixels of each side of the coded picture are not shown."""

    left: int = 0
    top: int = 0
    right: int = 0
    bottom: int = 0


def container_crop(path: Path, container_format: str, stream_number: int) -> Crop:
    """Return what Matroska says not to show of the picture; PyAV does not pass it on, and ffmpeg applies it."""
    if "matroska" not in container_format:
        return Crop()
    # libavformat makes a stream of each of these, in this order.
    entries = [track for track in _matroska_tracks(path) if track.get(_TRACK_TYPE) in _STREAM_TYPES]
    if stream_number >= len(entries):
        return Crop()
    video = dict(_elements(entries[stream_number].get(_VIDEO, b"")))
    return Crop(**{side: int.from_bytes(video.get(name, b""), "big") for name, side in _CROPS.items()})


def _matroska_tracks(path: Path) -> list[dict[int, bytes]]:
    """Return the contents of each track's elements by their names."""
    with path.open("rb") as file:
        data = file.read(_TRACKS_WITHIN_BYTES)
    for segment in _contents(data, _SEGMENT):
        for tracks in _contents(segment, _TRACKS):
            return [dict(_elements(entry)) for entry in _contents(tracks, _TRACK)]
    return []


def _is_encrypted_track(track: dict[int, bytes]) -> bool:
    encodings = _contents(track.get(_ENCODINGS, b""), _ENCODING)
    return any(_contents(encoding, _ENCRYPTION) for encoding in encodings)


def _contents(data: bytes, wanted: int) -> list[bytes]:
    return [content for name, content in _elements(data) if name == wanted]


def _elements(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the names and contents of EBML elements, up to the first that is cut or damaged."""
    at = 0
    while at < len(data):
        name_bytes = 9 - data[at].bit_length()
        name = int.from_bytes(data[at : at + name_bytes], "big")
        at += name_bytes
        if name_bytes > 4 or at >= len(data):
            return
        size_bytes = 9 - data[at].bit_length()
        size = int.from_bytes(data[at : at + size_bytes], "big") & ((1 << 7 * size_bytes) - 1)
        at += size_bytes
        yield name, data[at : at + size]
        at += size
