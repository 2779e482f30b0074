"""Runs in a decode worker: a process that turns files into frame chunks.

It imports neither torch nor h5py, because it must start fast and stay small. Messages go through a
pipe, and frames through memory that the worker shares with the main process.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from multiprocessing import reduction
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svb.data.publish import hash_file
from svb.data.text import mtime_ns_of
from svb.extract.decode import decoder as decode
from svb.extract.decode.decoder import DecodeEnd, DecodeError, FrameChunk, VideoProperties
from svb.extract.decode.options import DecodeOptions
from svb.extract.plan import PlannedVideo

# How many chunks a worker may be ahead of the backbones. Memory that is never written to is not allocated.
SLOTS = 4
# The largest chunk that goes through shared memory: one frame of 4K. A larger one goes through the pipe, slower.
SLOT_BYTES = 32 * 2**20

# The ffmpeg program is newer than PyAV's libraries and reads more, such as animated WebP.
RETRIED_WITH_FFMPEG = ("unreadable", "zero_frames")

# Decoders leak memory and fragment it: a worker is replaced after this many videos or at this much memory.
VIDEOS_A_WORKER = 1000
RECYCLED_AT_BYTES = 1536 * 2**20

# A status of `Finished`, never of a record: another video has the same content, so this one was not decoded.
DUPLICATE = "duplicate"


@dataclass(frozen=True)
class Started:
    """A video's first message: a worker has taken it."""

    video: PlannedVideo


@dataclass(frozen=True)
class Hashed:
    """A video's content hash before decoding: the worker waits for the answer whether to decode it."""

    content_hash: str


@dataclass(frozen=True)
class SharedChunk:
    """A `FrameChunk` whose frames are in a slot of the shared memory."""

    slot: int
    shape: tuple[int, ...]
    frame_times_seconds: Any


@dataclass(frozen=True)
class Finished:
    """A video's last message.

    Attributes:
        status: `ok`, `partial`, a failure code, or `DUPLICATE`.
        error: The decoder's last complaint, or empty.
        decoder: The decoder that gave the frames, or the last one that was tried.
        cause: The failure code that replaces `partial` if partial videos are not kept.
        duration_seconds: What was decoded, where that is more than the container promises; else None.
        in_software: Whether the hardware decoder that was asked for failed.
        content_hash: SHA-256 of the file; empty if it could not be read.
        size_bytes: The file's size when decoding began.
        mtime_ns: The file's time of change when decoding began.
        elapsed_seconds: How long hashing and decoding took, without waiting for the backbones.
        waiting_seconds: How long the worker waited for the backbones to take its frames.
        is_last: The worker ends now and must be replaced.
    """

    status: str
    error: str
    decoder: str
    cause: str = ""
    duration_seconds: float | None = None
    in_software: bool = False
    content_hash: str = ""
    size_bytes: int = 0
    mtime_ns: int = 0
    elapsed_seconds: float = 0.0
    waiting_seconds: float = 0.0
    is_last: bool = False


@dataclass(frozen=True)
class Alive:
    """The worker is making progress but has no frames to send yet."""


Message = Started | VideoProperties | FrameChunk | Alive | Finished


def decode_file(
    path: Path, options: DecodeOptions, is_wanted: Callable[[str], bool] = lambda content_hash: True
) -> Iterator[VideoProperties | FrameChunk | Finished]:
    """Yield a file's properties and chunks, then `Finished`; only that if the file cannot be decoded.

    Before anything is decoded, `is_wanted` is called with the content hash, if there is one.
    """
    size_bytes, mtime_ns = size_and_mtime(path)
    content_hash = ""
    used = options.decoder
    end = DecodeEnd(DUPLICATE)
    try:
        with contextlib.suppress(OSError):
            if path.is_file():  # reading a named pipe would never end
                content_hash = hash_file(path, decode.heartbeat)
        if not content_hash or is_wanted(content_hash):
            for message in _decode_or_hand_over(path, options):
                if isinstance(message, str):
                    used = message
                elif isinstance(message, DecodeEnd):
                    end = message
                else:
                    yield message
    except DecodeError as failure:
        end = DecodeEnd(failure.status, str(failure))
    except MemoryError:
        end = DecodeEnd("out_of_memory", "the decoder ran out of memory")
    except Exception as unexpected:  # one strange file must not fail the others
        end = DecodeEnd("decoder_crash", f"{type(unexpected).__name__}: {unexpected}")
    finished = Finished(end.status, end.error, used, end.cause, end.duration_seconds, end.in_software)
    yield replace(finished, content_hash=content_hash, size_bytes=size_bytes, mtime_ns=mtime_ns)


def size_and_mtime(path: Path) -> tuple[int, int]:
    """Return a file's size in bytes and time of change in ns; zeros if they cannot be read."""
    try:
        stat = path.stat()
    except (OSError, ValueError):
        return 0, 0
    return stat.st_size, mtime_ns_of(stat)


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
    asks_first: bool,
    time_limit_seconds: float,
    num_videos: int,
) -> None:
    """Decode the videos that come through the pipe until it closes.

    Args:
        connection: Receives videos and released slots, and sends messages.
        memory: Memory for frames.
        options: How to decode.
        asks_first: Ask before decoding a file whether its content is wanted.
        time_limit_seconds: A video that decodes for longer ends as `timeout`; waiting is not counted.
        num_videos: The worker ends after this many videos.
    """
    # Ctrl-C reaches the whole process group, but the main process decides when workers end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.setsid()  # an ffmpeg process of this worker is killed with it
    die_with_parent(signal.SIGKILL)
    messenger = _Messenger(connection, memory, time_limit_seconds, num_videos)
    decode.heartbeat = messenger.heartbeat
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while not messenger.is_worn_out:
            video = messenger.next_video()
            its_options = options.at_times(video.times_seconds)
            for message in decode_file(
                video.path, its_options, messenger.is_wanted if asks_first else lambda content_hash: True
            ):
                messenger.send(message)


class _Messenger:
    """Sends and receives for the worker, through the pipe and the shared memory."""

    def __init__(
        self,
        connection: Connection,
        memory: FrameMemory,
        time_limit_seconds: float,
        num_videos: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._connection = connection
        self._memory = memory
        self._time_limit_seconds = time_limit_seconds
        self._free = deque(range(SLOTS))
        self._videos_left = num_videos
        self._clock = clock
        self._sent = self._began = clock()
        self._waiting_seconds = 0.0
        self.is_worn_out = False

    def next_video(self) -> PlannedVideo:
        """Wait for the next video and start its clock."""
        video = self._receive()
        self._began, self._waiting_seconds = self._clock(), 0.0
        assert isinstance(video, PlannedVideo)
        return video

    def is_wanted(self, content_hash: str) -> bool:
        """Ask the main process whether a content should be decoded."""
        self._connection.send(Hashed(content_hash))
        return bool(self._receive())

    def heartbeat(self) -> None:
        """Tell the main process at most once a second that the decoder is alive; end a video that takes too long.

        Raises:
            DecodeError: `timeout`.
        """
        now = self._clock()
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
            self.is_worn_out = self._videos_left <= 0 or resident_bytes() >= RECYCLED_AT_BYTES
            waited = self._waiting_seconds
            elapsed = self._clock() - self._began - waited
            self._connection.send(
                replace(message, elapsed_seconds=elapsed, waiting_seconds=waited, is_last=self.is_worn_out)
            )
        else:
            self._connection.send(message)

    def _take_slot(self) -> int:
        began = self._clock()
        while not self._free:
            self._free.append(self._connection.recv())
        self._waiting_seconds += self._clock() - began
        return self._free.popleft()

    def _receive(self) -> PlannedVideo | bool:
        """Return the next message; collect slots that are released before it."""
        while True:
            received = self._connection.recv()
            if isinstance(received, bool) or not isinstance(received, int):
                return received
            self._free.append(received)


def resident_bytes() -> int:
    """Return the memory that this process uses now; 0 if the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    except (OSError, ValueError, IndexError):
        return 0


def die_with_parent(number: int) -> None:
    """Have the kernel send this process a signal when its parent dies, even while a decoder holds the GIL."""
    if sys.platform != "linux":
        return
    import ctypes

    set_parent_death_signal = 1
    ctypes.CDLL(None, use_errno=True).prctl(set_parent_death_signal, int(number), 0, 0, 0)


class FrameMemory:
    """`SLOTS` places for chunks of frames, in memory that is shared with a spawned process.

    It is an unnamed file in memory: /dev/shm is not used, because containers keep it small, and nothing
    is left behind if either process is killed.
    """

    def __init__(self, descriptor: int | None = None) -> None:
        if descriptor is None:
            descriptor = _unnamed_file()
            os.ftruncate(descriptor, SLOTS * SLOT_BYTES)
        self._descriptor = descriptor
        self._map = mmap.mmap(descriptor, SLOTS * SLOT_BYTES)

    def __reduce__(self) -> tuple[Callable[[Any], FrameMemory], tuple[object]]:
        return _attached, (reduction.DupFd(self._descriptor),)

    def view(self, slot: int, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """Return a slot as a uint8 array of this shape, without a copy."""
        size = int(np.prod(shape))
        return np.frombuffer(self._map, np.uint8, size, offset=slot * SLOT_BYTES).reshape(shape)

    def close(self) -> None:
        """Close the file; the memory is freed with the last array that uses it."""
        os.close(self._descriptor)


def _attached(duplicate: Any) -> FrameMemory:
    return FrameMemory(duplicate.detach())


def _unnamed_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("svb-frames")
    with tempfile.TemporaryFile() as file:  # macOS
        return os.dup(file.fileno())
