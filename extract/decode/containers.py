"""Reads from a container's own bytes what neither PyAV nor ffmpeg's log says."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

# An MP4's fragments begin after a few boxes.
MAX_BOXES_BEFORE_FRAGMENTS = 50

# The index of a film of hours has some MB.
MAX_INDEX_BYTES = 256 * 2**20

TS_PACKET_BYTES, TS_SYNC_BYTE = 188, b"\x47"

TS_BYTES_LOOKED_AT = 2**20

# Of a page of Ogg: https://www.rfc-editor.org/rfc/rfc3533#section-6
OGG_HEADER_BYTES, MAX_OGG_SEGMENTS, OGG_FIRST_PAGE = 27, 255, 2
# The rest of the file counts as one part.
MAX_OGG_PARTS = 1000

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


def ogg_parts(path: Path) -> list[tuple[int, int]]:
    """Return where the parts of a joined Ogg file begin and end, in bytes; empty if a file is not joined.

    libavformat reads the first part, and others only if they hold a single stream.
    """
    begins: list[int] = []
    at = 0
    was_first_page = False
    with path.open("rb") as file:
        size = file.seek(0, 2)
        while at + OGG_HEADER_BYTES <= size and len(begins) < MAX_OGG_PARTS:
            file.seek(at)
            header = file.read(OGG_HEADER_BYTES + MAX_OGG_SEGMENTS)
            if header[:4] != b"OggS":
                break
            is_first_page = bool(header[5] & OGG_FIRST_PAGE)
            if is_first_page and not was_first_page:
                begins.append(at)
            was_first_page = is_first_page
            segments = header[OGG_HEADER_BYTES : OGG_HEADER_BYTES + header[26]]
            at += OGG_HEADER_BYTES + len(segments) + sum(segments)
    return list(zip(begins, [*begins[1:], size], strict=True)) if len(begins) > 1 else []


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
