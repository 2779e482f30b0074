"""Which frames of one file are used, and what need not be decoded for them.

Frames are chosen while they are decoded (`FrameChooser`), where it must be so after the packets were
listed (`PacketTimes`). A sparse choice leaves out whole stretches of an H.264 file (`SkipPlan`): eight
frames of a film need eight stretches of a few seconds. An IDR picture starts afresh: nothing after it
refers to anything before it, nor is shown before it. So what lies between two of them can be left out,
and the rest decodes to the same frames. The container's own key frames and seek tables are not trusted.
"""

from __future__ import annotations

import bisect
import math
import sys
from array import array
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from svb.extract.decode import decoder as decode_module
from svb.extract.decode.decoder import DecodeEnd, FrameChunk, VideoProperties, require_duration
from svb.extract.decode.options import DecodeOptions
from svb.extract.decode.sampling import TIME_TOLERANCE_SECONDS, Sampling

if TYPE_CHECKING:
    from av.packet import Packet
    from av.video.stream import VideoStream

Item = VideoProperties | FrameChunk | DecodeEnd

# Earlier than any frame.
BEFORE_ALL_SECONDS = -1e12

# The frames of `Sampling.frames` are held back up to this size. More are decoded twice.
HELD_BYTES = 256 * 2**20

# Above this share of a video the rest is decoded, too: damage there is then noticed.
WORTHWHILE_SHARE = 0.75

# Types of H.264 units.
_IDR = 5
_PARAMETER_SETS = (7, 8)


# Frames whose times are out of order by less are disorder within one clock, not a clock that starts again.
RESTART_SECONDS = 0.5
# How long a frame is shown before a clock starts again, if the file has no frame before it to tell.
DEFAULT_STEP_SECONDS = 0.04


class RunningClock:
    """Lets a clock that starts again within a file run on, as in transport streams that were joined.

    A frame whose time jumps back by more than `RESTART_SECONDS` follows the frame before it, and so do the
    frames after it. If the old clock comes back, the jump was one wrong frame, and the old clock counts.

    Attributes:
        restarts: How often a clock started again.
        parts: How many parts there were before this one, in a file that is known to be joined.
    """

    def __init__(self) -> None:
        self.restarts = self.parts = 0
        self._is_new = False
        self._step = DEFAULT_STEP_SECONDS
        self._offset = self._offset_before = 0.0
        self._last = -math.inf

    def begin_part(self) -> None:
        """Have the next frame follow the last one, whatever its time: another part of a joined file begins."""
        self.parts += 1
        self._is_new = self._last > -math.inf

    def running(self, time_seconds: float) -> float:
        """Return the time that a frame has on a clock that runs on; the file's own time before any restart."""
        running = time_seconds + self._offset
        before = time_seconds + self._offset_before
        if not self._is_new and self._last < before < self._last + RESTART_SECONDS < running:
            self._offset, running = self._offset_before, before
        elif self._is_new or running < self._last - RESTART_SECONDS:
            self._is_new = False
            self.restarts += 1
            self._offset_before = self._offset
            self._offset = self._last + self._step - time_seconds
            running = time_seconds + self._offset
        elif 0 < running - self._last < RESTART_SECONDS:
            self._step = running - self._last
        self._last = max(self._last, running)
        return running


class FrameChooser:
    """Decides for each decoded frame, in order of presentation, whether it is used; counts frames.

    Args:
        path: The file, for messages.
        options: Says which frames are wanted, and how long a video may run.
        positions: Positions of the wanted frames in order of presentation, if they were listed before.
        targets_seconds: Use the first frame at or after each of these ascending times, instead of positions.
        seen_seconds: Gets the time of every frame seen.

    Attributes:
        decoded: Number of frames seen.
        used: Number of frames used.
        first_time_seconds: Time of the first frame seen.
        last_time_seconds: The latest time among the frames seen.
    """

    def __init__(
        self,
        path: Path,
        options: DecodeOptions,
        positions: Collection[int] | None = None,
        targets_seconds: Sequence[float] | None = None,
        seen_seconds: array[float] | None = None,
    ) -> None:
        self.decoded = 0
        self.used = 0
        self.first_time_seconds = math.nan
        self.last_time_seconds = -math.inf
        self._path = path
        self._limits = options.limits
        self._sampling = options.sampling
        self._positions = None if positions is None else frozenset(positions)
        self._targets = None if targets_seconds is None else earliest(targets_seconds)
        self._last_used_seconds = -math.inf
        self._seen_seconds = seen_seconds

    def count(self, time_seconds: float) -> None:
        """Count one more decoded frame.

        Raises:
            DecodeError: `over_limit`: the video has run for too long.
        """
        decode_module.heartbeat()
        self.decoded += 1
        if self.decoded == 1:
            self.first_time_seconds = time_seconds
        self.last_time_seconds = max(self.last_time_seconds, time_seconds)
        if self._seen_seconds is not None:
            self._seen_seconds.append(time_seconds)
        require_duration(
            self._path, self._limits, self.last_time_seconds - self.first_time_seconds, "has run on to"
        )

    def chooses(self, time_seconds: float) -> bool:
        """Return whether the frame that was counted last is used."""
        # A clock that jumps back (joined broadcasts) must not break the ascending order of times.
        wanted = time_seconds > self._last_used_seconds and self._wants(time_seconds)
        if wanted:
            self.use(time_seconds)
        return wanted

    def use(self, time_seconds: float) -> None:
        """Record that a frame is used."""
        self.used += 1
        self._last_used_seconds = time_seconds

    def _wants(self, time_seconds: float) -> bool:
        if self._positions is not None:
            return self.decoded - 1 in self._positions
        if self._targets is not None:
            passed = bisect.bisect_right(self._targets, time_seconds)
            return passed > bisect.bisect_right(self._targets, self._last_used_seconds)
        if self._sampling.fps is not None:
            return self._is_next_on_grid(time_seconds)
        if self._sampling.every_nth is not None:
            return (self.decoded - 1) % self._sampling.every_nth == 0
        # libav has already picked the key frames or scenes: every frame that arrives here is wanted.
        return True

    def _is_next_on_grid(self, time_seconds: float) -> bool:
        if self.used == 0:
            return True
        first = self.first_time_seconds
        grid_point = self._sampling.grid_point
        return grid_point(time_seconds, first) > grid_point(self._last_used_seconds, first)


def earliest(targets_seconds: Sequence[float]) -> list[float]:
    """Return, for each target, the earliest time that counts as at the target: containers round times."""
    return [target - TIME_TOLERANCE_SECONDS for target in targets_seconds]


def scene_expression(threshold: float) -> str:
    """Return the expression for libavfilter's `select` that is true where a scene begins."""
    return f"if(n,gt(scene,{float(threshold)!r}),1)"


def without_skipping(options: DecodeOptions) -> DecodeOptions | None:
    """Return options to try when skipping left no frame at all; None if nothing was skipped.

    A video without key frames gives its first frame instead: it still shows what the video is about.
    """
    if options.sampling.keyframes:
        return replace(options, fast=False, sampling=Sampling(every_nth=sys.maxsize))
    return replace(options, fast=False) if options.fast else None


class PacketTimes:
    """The presentation times of a stream's packets, listed without decoding: 8 bytes a frame.

    Attributes:
        start_seconds: The earliest time.
        end_seconds: When the last packet's picture ends.
    """

    def __init__(self, frame_seconds: float) -> None:
        self.start_seconds = math.inf
        self.end_seconds = -math.inf
        self._frame_seconds = frame_seconds
        self._times_seconds = array("d")

    def add(self, time_seconds: float | None, duration_seconds: float) -> None:
        """Add one packet; a duration of 0 means unknown, and one frame's is assumed.

        The packets of a bare stream, without a container, have no times: they follow one another.
        """
        decode_module.heartbeat()
        if time_seconds is None:
            time_seconds = self.end_seconds if self._times_seconds else 0.0
        self._times_seconds.append(time_seconds)
        self.start_seconds = min(self.start_seconds, time_seconds)
        end = time_seconds + (duration_seconds if duration_seconds > 0 else self._frame_seconds)
        self.end_seconds = max(self.end_seconds, end)

    @property
    def count(self) -> int:
        """How many packets were added."""
        return len(self._times_seconds)

    def positions(self, sampling: Sampling) -> list[int]:
        """Return the positions, in order of presentation, that `frames` or `every_nth` sampling uses."""
        if not self._times_seconds:
            return [0]
        if sampling.every_nth is not None:
            return list(range(0, len(self._times_seconds), sampling.every_nth))
        return sampling.spread(sorted(self._times_seconds), self.end_seconds - self.start_seconds)

    def positions_among(self, decoded_seconds: Sequence[float], sampling: Sampling) -> list[int]:
        """Return the positions that `frames` sampling uses of the frames that were in fact decoded.

        Not every packet is a frame: fields are half a frame, some packets are never shown, and some cannot
        be decoded. A file whose packets are its frames keeps the `positions` of the packets.
        """
        if not self._times_seconds:
            return [0]
        times = sorted(decoded_seconds)
        span, listed_span = times[-1] - times[0], max(self._times_seconds) - min(self._times_seconds)
        if len(times) == len(self._times_seconds) and abs(span - listed_span) < RESTART_SECONDS:
            return self.positions(sampling)
        end = self.end_seconds if times[-1] < self.end_seconds else times[-1] + self._frame_seconds
        return sampling.spread(times, end - times[0])

    def targets_seconds(self, sampling: Sampling) -> list[float]:
        """Return the times of those frames: positions mean nothing when some frames are not decoded."""
        times = sorted(self._times_seconds) or [BEFORE_ALL_SECONDS]
        return [times[position] for position in self.positions(sampling)]


@dataclass(frozen=True)
class SkipPlan:
    """Which parts of a file are decoded.

    Attributes:
        stretches: The stretch of each packet, in order of decoding; an IDR picture begins a new one.
        needed: The stretches that hold a wanted frame.
        times_seconds: Times of the wanted frames, ascending.
        first_time_seconds: Time of the file's first frame.
        last_time_seconds: Time of the file's last frame.
    """

    stretches: Sequence[int]
    needed: frozenset[int]
    times_seconds: Sequence[float]
    first_time_seconds: float
    last_time_seconds: float


class StretchList:
    """Lists which stretch every packet lies in, and checks that each stretch decodes on its own.

    It does if every packet is shown, at a time of its own, and if the parameter sets are in the header or
    are the same in all IDR pictures.
    """

    def __init__(self, stream: VideoStream) -> None:
        header = stream.codec_context.extradata or b""
        # An avcC box says how many bytes a unit's length takes; other headers are not supported here.
        self._length_bytes = (header[4] & 3) + 1 if len(header) > 6 and header[0] == 1 else 0
        self._decodes_alone = stream.codec_context.name == "h264" and self._length_bytes > 0
        self._unit_seconds = float(stream.time_base or 0)
        self._times_seconds = array("d")
        self._stretches = array("l")
        self._stretch = 0
        self._parameter_sets: list[bytes] | None = None

    def add(self, packet: Packet[VideoStream]) -> None:
        """Add one packet, in order of decoding."""
        if not self._decodes_alone or not packet.size:
            return
        self._decodes_alone = self._stands_alone(packet)
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
        """Return all frames' times in order of presentation; empty if stretches do not decode alone."""
        times = sorted(self._times_seconds)
        return times if self._decodes_alone and len(set(times)) == len(times) else []

    def plan(self, times_seconds: Sequence[float]) -> SkipPlan | None:
        """Return what to decode for frames at these times; None if that is most of the video."""
        wanted = set(times_seconds)
        placed = zip(self._stretches, self._times_seconds, strict=True)
        needed = frozenset(stretch for stretch, seconds in placed if seconds in wanted)
        num_needed = sum(stretch in needed for stretch in self._stretches)
        if num_needed > WORTHWHILE_SHARE * len(self._stretches):
            return None
        first, last = min(self._times_seconds), max(self._times_seconds)
        return SkipPlan(self._stretches, needed, times_seconds, first, last)


def _units(data: memoryview, length_bytes: int) -> tuple[set[int], list[bytes]]:
    """Return the types of an H.264 packet's units, and its parameter sets; no types if the lengths are wrong."""
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


class PassedOn:
    """What has been passed on of a file, so that decoding it in another way passes on the rest."""

    def __init__(self) -> None:
        self._had_properties = False
        self._last_seconds = -math.inf

    def rest_of(self, items: Iterator[Item]) -> Iterator[Item]:
        """Pass on what is new: frames later than the last one, and the properties once."""
        for item in items:
            if isinstance(item, FrameChunk):
                yield from item.after(self._last_seconds)
                self._last_seconds = max(self._last_seconds, float(item.frame_times_seconds[-1]))
            elif not (self._had_properties and isinstance(item, VideoProperties)):
                self._had_properties = True
                yield item


def decoded_at_right_positions(
    decode: Callable[[list[int], array[float]], Iterator[Item]], listed: PacketTimes, sampling: Sampling
) -> Iterator[Item]:
    """Decode the frames at the positions that the packets tell; decode again if the packets were no frames.

    What the first decoding gives is held back until it is known to be right.

    Args:
        decode: Decodes the frames at these positions, and appends the time of every frame that it decodes.
        listed: The times of the packets.
        sampling: Has `frames`.
    """
    positions = listed.positions(sampling)
    times = array("d")
    held: list[Item] = []
    held_bytes = 0
    for item in decode(positions, times):
        if isinstance(item, FrameChunk):
            held_bytes += item.frames.nbytes
        if held_bytes <= HELD_BYTES:
            held.append(item)
        else:
            held.clear()
    right = listed.positions_among(times, sampling)
    if right == positions and held_bytes <= HELD_BYTES:
        yield from held
    else:
        held.clear()
        yield from decode(right, array("d"))
