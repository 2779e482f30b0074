"""Which stretches of an H.264 file hold no wanted frame, known from its packets without decoding one.

Eight frames of a film need eight stretches of a few seconds. An IDR picture starts afresh: nothing after it
refers to anything before it, nor is shown before it. So what lies between two of them can be left out, and
the rest decodes to the same frames; the container's own word (key frames, seek tables) is not relied upon.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from av.packet import Packet
from av.video.stream import VideoStream

# Above this share of a video the rest is decoded, too: damage there is then noticed.
WORTHWHILE_SHARE = 0.75

_IDR = 5
_PARAMETER_SETS = (7, 8)


@dataclass(frozen=True)
class SkipPlan:
    """What is to be decoded of a file.

    Attributes:
        stretches: Each packet's, in order of decoding: an IDR picture begins the next.
        needed: Which of them hold a wanted frame.
        times_seconds: Of the wanted frames, ascending.
        first_time_seconds: Of the whole file.
        last_time_seconds: Of the whole file.
    """

    stretches: Sequence[int]
    needed: frozenset[int]
    times_seconds: Sequence[float]
    first_time_seconds: float
    last_time_seconds: float


class StretchList:
    """Lists which stretch every packet lies in, and whether the file is one whose stretches stand alone.

    For that every packet must be shown, at a time of its own, and parameter sets must lie in the header or
    be the same in all IDR pictures.
    """

    def __init__(self, stream: VideoStream) -> None:
        header = stream.codec_context.extradata or b""
        # An avcC box says how many bytes hold a unit's length; other forms are not read here.
        self._length_bytes = (header[4] & 3) + 1 if len(header) > 6 and header[0] == 1 else 0
        self._is_fit = stream.codec_context.name == "h264" and self._length_bytes > 0
        self._unit_seconds = float(stream.time_base or 0)
        self._times_seconds = array("d")
        self._stretches = array("l")
        self._stretch = 0
        self._parameter_sets: list[bytes] | None = None

    def add(self, packet: Packet[VideoStream]) -> None:
        """Note one packet, in order of decoding."""
        if not self._is_fit or not packet.size:
            return
        self._is_fit = self._stands_alone(packet)
        self._times_seconds.append((packet.pts or 0) * self._unit_seconds)
        self._stretches.append(self._stretch)

    def _stands_alone(self, packet: Packet[VideoStream]) -> bool:
        kinds, sets = _units(memoryview(packet), self._length_bytes)
        if _IDR in kinds:
            self._stretch += 1
            self._parameter_sets = sets if self._parameter_sets is None else self._parameter_sets
            has_same_sets = sets == self._parameter_sets
        else:
            has_same_sets = not sets
        is_odd = (
            packet.pts is None or packet.is_discard or packet.is_corrupt or packet.has_sidedata("new_extradata")
        )
        return bool(kinds) and has_same_sets and not is_odd

    def sorted_times_seconds(self) -> list[float]:
        """Return every frame's time in order of presentation; none where stretches do not stand alone."""
        times = sorted(self._times_seconds)
        return times if self._is_fit and len(set(times)) == len(times) else []

    def plan(self, times_seconds: Sequence[float]) -> SkipPlan | None:
        """Return what is to be decoded for frames at these times; None where that is most of the video."""
        wanted = set(times_seconds)
        placed = zip(self._stretches, self._times_seconds, strict=True)
        needed = frozenset(stretch for stretch, seconds in placed if seconds in wanted)
        num_needed = sum(stretch in needed for stretch in self._stretches)
        if num_needed > WORTHWHILE_SHARE * len(self._stretches):
            return None
        first, last = min(self._times_seconds), max(self._times_seconds)
        return SkipPlan(self._stretches, needed, times_seconds, first, last)


def _units(data: memoryview, length_bytes: int) -> tuple[set[int], list[bytes]]:
    """Return the types of an H.264 packet's units and its parameter sets; no types where lengths do not fit."""
    kinds: set[int] = set()
    sets: list[bytes] = []
    at = 0
    while at + length_bytes < len(data):
        start = at + length_bytes
        at = start + int.from_bytes(data[at:start], "big")
        kinds.add(data[start] & 31)
        if data[start] & 31 in _PARAMETER_SETS:
            sets.append(bytes(data[start:at]))
    return (kinds if at == len(data) else set()), sets
