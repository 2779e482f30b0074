"""What runs in a decode worker: a process that turns files into frame chunks.

It imports neither torch nor h5py: it must start fast and stay small. What it says goes through a pipe,
frames through shared memory (`svb.extract.pool.frame_memory`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from svb.data.publish import hash_file
from svb.extract.decode import decoder as decode
from svb.extract.decode.decoder import DecodeEnd, DecodeError, FrameChunk, VideoProperties
from svb.extract.decode.options import DecodeOptions
from svb.extract.plan import PlannedVideo
from svb.extract.pool.frame_memory import SLOT_BYTES, SLOTS, FrameMemory

# What PyAV's ffmpeg cannot read, a newer ffmpeg may: animated WebP, for one.
RETRIED_WITH_FFMPEG = ("unreadable", "zero_frames")

# Decoders leak, and their heaps grow ragged: a worker is replaced after so many videos or with so much memory.
VIDEOS_A_WORKER = 1000
RECYCLED_AT_BYTES = 1536 * 2**20

# A status of `Finished` alone, never of a record: the content is another video's, and was not decoded.
DUPLICATE = "duplicate"


@dataclass(frozen=True)
class Started:
    """A video's first message: a worker has been given it."""

    video: PlannedVideo


@dataclass(frozen=True)
class Hashed:
    """A video's content hash, before it is decoded: the worker waits to hear whether it should be."""

    content_hash: str


@dataclass(frozen=True)
class SharedChunk:
    """A `FrameChunk` whose frames lie in a slot of the shared memory."""

    slot: int
    shape: tuple[int, ...]
    frame_times_seconds: Any


@dataclass(frozen=True)
class Finished:
    """A video's last message.

    Attributes:
        status: `ok`, `partial`, a failure code, or `DUPLICATE`.
        error: The decoder's last words, or empty.
        decoder: The one that gave the frames, or the last that was tried.
        cause: Of `partial`, the failure it is where partial videos are none to keep.
        content_hash: SHA-256 of the file; empty where it could not be read.
        size_bytes: As it was when decoding began.
        mtime_ns: As it was when decoding began.
        elapsed_seconds: What hashing and decoding took, without waiting for the backbones.
        waiting_seconds: How long the worker waited for the backbones to take its frames.
        is_last: The worker ends itself now and wants to be replaced.
    """

    status: str
    error: str
    decoder: str
    cause: str = ""
    content_hash: str = ""
    size_bytes: int = 0
    mtime_ns: int = 0
    elapsed_seconds: float = 0.0
    waiting_seconds: float = 0.0
    is_last: bool = False


@dataclass(frozen=True)
class Alive:
    """A worker has got on, though it has nothing to give yet."""


Message = Started | VideoProperties | FrameChunk | Alive | Finished


def decode_file(
    path: Path, options: DecodeOptions, is_wanted: Callable[[str], bool] = lambda content_hash: True
) -> Iterator[VideoProperties | FrameChunk | Finished]:
    """Yield a file's properties and chunks, then `Finished`; a file that cannot be decoded only that.

    Args:
        path: The file.
        options: How to decode.
        is_wanted: Asked with the content hash, where there is one, before anything is decoded.
    """
    size_bytes, mtime_ns = size_and_mtime(path)
    content_hash = ""
    used = options.decoder
    status, error, cause = DUPLICATE, "", ""
    try:
        if path.is_file():  # reading a named pipe would wait for ever
            with contextlib.suppress(OSError):
                content_hash = hash_file(path, decode.got_on)
        if not content_hash or is_wanted(content_hash):
            for message in _decode_or_hand_over(path, options):
                if isinstance(message, str):
                    used = message
                elif isinstance(message, DecodeEnd):
                    status, error, cause = message.status, message.error, message.cause
                else:
                    yield message
    except DecodeError as failure:
        status, error = failure.status, str(failure)
    except MemoryError:
        status, error = "out_of_memory", "the decoder ran out of memory"
    except Exception as unexpected:  # one strange file must not cost the others, and its words must not be lost
        status, error = "decoder_crash", f"{type(unexpected).__name__}: {unexpected}"
    yield Finished(status, error, used, cause, content_hash, size_bytes, mtime_ns)


def size_and_mtime(path: Path) -> tuple[int, int]:
    """Return a file's size in bytes and time of change in ns; zeros where it cannot be asked."""
    try:
        stat = path.stat()
    except (OSError, ValueError):
        return 0, 0
    return stat.st_size, stat.st_mtime_ns


def _decode_or_hand_over(path: Path, options: DecodeOptions) -> Iterator[Any]:
    from svb.extract.decode import ffmpeg_decoder, pyav_decoder

    if options.decoder == "ffmpeg":
        yield from ffmpeg_decoder.decode(path, options)
        return
    try:
        yield from pyav_decoder.decode(path, options)
        return
    except DecodeError as failure:
        if failure.status not in RETRIED_WITH_FFMPEG:
            raise
        first_failure = failure
    yield "ffmpeg"
    try:
        yield from ffmpeg_decoder.decode(path, options)
    except DecodeError as second_failure:
        raise first_failure from second_failure


def work(
    connection: Connection,
    memory: FrameMemory,
    options: DecodeOptions,
    asks: bool,
    time_limit_seconds: float,
    num_videos: int,
) -> None:
    """Decode what comes through the pipe until it closes.

    Args:
        connection: Videos and released slots come in, messages go out.
        memory: Where frames go.
        options: How to decode.
        asks: Ask before a file is decoded whether its content is wanted.
        time_limit_seconds: After so long a video ends as `timeout`, waiting for the backbones left out.
        num_videos: After so many it ends itself.
    """
    # The terminal's Ctrl-C reaches the whole group; the main process decides when workers end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.setsid()  # an ffmpeg that this worker starts is killed with it
    _die_with_parent()
    desk = _Desk(connection, memory, time_limit_seconds, num_videos)
    decode.got_on = desk.got_on
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while not desk.is_tired:
            video = desk.next_video()
            its_options = options.at_times(video.times_seconds)
            for message in decode_file(
                video.path, its_options, desk.is_wanted if asks else lambda content_hash: True
            ):
                desk.send(message)


class _Desk:
    """A worker's side of the pipe and of the shared memory."""

    def __init__(
        self, connection: Connection, memory: FrameMemory, time_limit_seconds: float, num_videos: int
    ) -> None:
        self._connection = connection
        self._memory = memory
        self._time_limit_seconds = time_limit_seconds
        self._free = deque(range(SLOTS))
        self._videos_left = num_videos
        self._sent = self._began = time.monotonic()
        self._waiting_seconds = 0.0
        self.is_tired = False

    def next_video(self) -> PlannedVideo:
        """Wait for the next video, and start its clock."""
        video = self._receive()
        self._began, self._waiting_seconds = time.monotonic(), 0.0
        assert isinstance(video, PlannedVideo)
        return video

    def is_wanted(self, content_hash: str) -> bool:
        """Ask whether a content should be decoded."""
        self._connection.send(Hashed(content_hash))
        return bool(self._receive())

    def got_on(self) -> None:
        """Tell the main process, at most once a second, that the decoder is alive; end a video that takes too long.

        Raises:
            DecodeError: `timeout`.
        """
        now = time.monotonic()
        if now - self._sent < 1.0:
            return
        self._sent = now
        self._connection.send(Alive())
        elapsed = now - self._began - self._waiting_seconds
        if elapsed > self._time_limit_seconds:
            raise DecodeError(
                "timeout",
                f"decoding has taken {elapsed:.0f} s - a video may take {self._time_limit_seconds:g} s; raise "
                "--time-limit",
            )

    def send(self, message: VideoProperties | FrameChunk | Finished) -> None:
        if isinstance(message, FrameChunk) and message.frames.nbytes <= SLOT_BYTES:
            slot = self._take_slot()
            self._memory.view(slot, message.frames.shape)[...] = message.frames
            self._connection.send(SharedChunk(slot, message.frames.shape, message.frame_times_seconds))
        elif isinstance(message, Finished):
            self._videos_left -= 1
            self.is_tired = self._videos_left <= 0 or resident_bytes() >= RECYCLED_AT_BYTES
            waited = self._waiting_seconds
            elapsed = time.monotonic() - self._began - waited
            self._connection.send(
                replace(message, elapsed_seconds=elapsed, waiting_seconds=waited, is_last=self.is_tired)
            )
        else:
            self._connection.send(message)

    def _take_slot(self) -> int:
        began = time.monotonic()
        while not self._free:
            self._free.append(self._connection.recv())
        self._waiting_seconds += time.monotonic() - began
        return self._free.popleft()

    def _receive(self) -> PlannedVideo | bool:
        """Return the next thing that is no released slot."""
        while True:
            received = self._connection.recv()
            if isinstance(received, bool) or not isinstance(received, int):
                return received
            self._free.append(received)


def resident_bytes() -> int:
    """Return the memory that this process has now; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    except (OSError, ValueError, IndexError):
        return 0


def _die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies, even while a decoder hangs and holds the GIL."""
    if sys.platform != "linux":
        return
    import ctypes

    set_parent_death_signal = 1
    ctypes.CDLL(None, use_errno=True).prctl(set_parent_death_signal, signal.SIGKILL, 0, 0, 0)
