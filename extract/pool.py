"""Decode workers: processes that turn files into frame chunks, watched, and replaced when they fail.

A damaged file can hang a decoder or take its process down, so no decoder runs in the main process. Each
worker talks through a pipe of its own, which blocks it while nobody reads: memory is bounded by the
queue, whatever the length of a video.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from svb.data.publish import hash_file
from svb.extract import decode
from svb.extract.decode import DecodeEnd, DecodeError, FrameChunk, VideoProperties
from svb.extract.decode_options import DecodeOptions
from svb.extract.plan import PlannedVideo

QUEUED_MESSAGES = 8
# What PyAV's ffmpeg cannot read, a newer ffmpeg may: animated WebP, for one.
RETRIED_WITH_FFMPEG = ("unreadable", "zero_frames")


@dataclass(frozen=True)
class Finished:
    """A video's last message.

    Attributes:
        status: `ok`, `partial` or a failure code.
        error: The decoder's last words, or empty.
        decoder: The one that gave the frames, or the last that was tried.
        content_hash: SHA-256 of the file; empty where it could not be read.
        size_bytes: As it was when decoding began.
        mtime_ns: As it was when decoding began.
    """

    status: str
    error: str
    decoder: str
    content_hash: str = ""
    size_bytes: int = 0
    mtime_ns: int = 0


@dataclass(frozen=True)
class Alive:
    """A worker has got on, though it has nothing to give yet."""


Message = VideoProperties | FrameChunk | Alive | Finished


class DecodePool:
    """Decodes videos in `num_workers` processes.

    Args:
        num_workers: How many processes.
        options: How to decode.
        stall_seconds: A worker that does not get on for this long, by a frame, a packet or a block of the
            file, is killed and its video recorded as `timeout`.
    """

    def __init__(self, num_workers: int, options: DecodeOptions, stall_seconds: float = 120.0) -> None:
        self._num_workers = num_workers
        self._options = options
        self._stall_seconds = stall_seconds
        self._messages: queue.Queue[tuple[int, Message] | BaseException | None] = queue.Queue(QUEUED_MESSAGES)
        self._stop = threading.Event()

    def run(self, videos: Sequence[PlannedVideo]) -> Iterator[tuple[int, Message]]:
        """Yield `(position, message)`, in order for each video, until every one has its `Finished`."""
        thread = threading.Thread(target=self._feed_safely, args=(videos,), daemon=True)
        thread.start()
        try:
            while True:
                item = self._messages.get()
                if item is None:
                    return
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            self._stop.set()
            with contextlib.suppress(queue.Empty):
                while True:
                    self._messages.get_nowait()
            thread.join(timeout=10)

    def _feed_safely(self, videos: Sequence[PlannedVideo]) -> None:
        try:
            self._feed(videos)
            self._put(None)
        except BaseException as error:
            self._put(error)

    def _feed(self, videos: Sequence[PlannedVideo]) -> None:
        todo = iter(enumerate(videos))
        workers: list[_Worker] = []
        try:
            for _ in range(min(self._num_workers, len(videos))):
                workers.append(_Worker())
                self._give_next(workers[-1], todo)
            while any(worker.position is not None for worker in workers) and not self._stop.is_set():
                wait([worker.connection for worker in workers if worker.position is not None], timeout=0.5)
                for number, worker in enumerate(workers):
                    if worker.position is not None and not self._serve(worker, todo):
                        worker.kill()
                        workers[number] = _Worker()
                        self._give_next(workers[number], todo)
        finally:
            for worker in workers:
                worker.kill()

    def _serve(self, worker: _Worker, todo: Iterator[tuple[int, PlannedVideo]]) -> bool:
        """Pass on what a worker has to say; return False when it is of no more use."""
        assert worker.position is not None
        try:
            if not worker.connection.poll():
                silent_seconds = time.monotonic() - worker.heard
                if silent_seconds < self._stall_seconds:
                    return True
                self._put_failure(worker, "timeout", f"the decoder gave nothing for {silent_seconds:.0f} s")
                return False
            message: Message = worker.connection.recv()
        except (EOFError, OSError):
            worker.process.join(timeout=5)
            words = f"the decoder's process died with exit code {worker.process.exitcode}"
            self._put_failure(worker, "decoder_crash", words)
            return False
        self._put((worker.position, message))
        # Time that the queue was full is not the worker's silence.
        worker.heard = time.monotonic()
        if isinstance(message, Finished):
            self._give_next(worker, todo)
        return True

    def _give_next(self, worker: _Worker, todo: Iterator[tuple[int, PlannedVideo]]) -> None:
        worker.position, worker.video = next(todo, (None, None))
        worker.heard = time.monotonic()
        if worker.video is not None:
            with contextlib.suppress(OSError):  # a dead worker is noticed when it is listened to
                worker.connection.send((worker.video.path, self._options))

    def _put_failure(self, worker: _Worker, status: str, words: str) -> None:
        # With the file's size and time the record says which file failed: an unchanged one is not tried again.
        assert worker.position is not None and worker.video is not None
        size_bytes, mtime_ns = _size_and_mtime(worker.video.path)
        failed = Finished(status, words, self._options.decoder, size_bytes=size_bytes, mtime_ns=mtime_ns)
        self._put((worker.position, failed))

    def _put(self, item: tuple[int, Message] | BaseException | None) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(queue.Full):
                self._messages.put(item, timeout=0.5)
                return


class _Worker:
    """One decode process and the pipe to it; `video`, at `position`, is what it works on."""

    def __init__(self) -> None:
        # spawn: a fork would copy torch's threads and CUDA's state in a broken condition.
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        self.position: int | None = None
        self.video: PlannedVideo | None = None
        self.heard = time.monotonic()

    def kill(self) -> None:
        assert self.process.pid is not None
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:  # not yet a group of its own
            self.process.kill()
        self.process.join()
        self.connection.close()


def _work(connection: Connection) -> None:
    # The terminal's Ctrl-C reaches the whole group; the main process decides when workers end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.setsid()  # an ffmpeg that this worker starts is killed with it
    decode.got_on = _Pulse(connection)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            path, options = connection.recv()
            for message in decode_file(path, options):
                connection.send(message)


class _Pulse:
    """Sends `Alive`, at most once a second."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._sent = time.monotonic()

    def __call__(self) -> None:
        if time.monotonic() - self._sent >= 1.0:
            self._sent = time.monotonic()
            self._connection.send(Alive())


def decode_file(path: Path, options: DecodeOptions) -> Iterator[Message]:
    """Yield a file's properties and chunks, then `Finished`; a file that cannot be decoded only that."""
    size_bytes, mtime_ns = _size_and_mtime(path)
    content_hash = ""
    used = options.decoder
    try:
        if path.is_file():  # reading a named pipe would wait for ever
            with contextlib.suppress(OSError):
                content_hash = hash_file(path, decode.got_on)
        for message in _decode_or_hand_over(path, options):
            if isinstance(message, str):
                used = message
            elif isinstance(message, DecodeEnd):
                status, error = message.status, message.error
            else:
                yield message
    except DecodeError as failure:
        status, error = failure.status, str(failure)
    except MemoryError:
        status, error = "out_of_memory", "the decoder ran out of memory"
    except Exception as unexpected:  # one strange file must not cost the others, and its words must not be lost
        status, error = "decoder_crash", f"{type(unexpected).__name__}: {unexpected}"
    yield Finished(status, error, used, content_hash, size_bytes, mtime_ns)


def _size_and_mtime(path: Path) -> tuple[int, int]:
    try:
        stat = path.stat()
    except (OSError, ValueError):
        return 0, 0
    return stat.st_size, stat.st_mtime_ns


def _decode_or_hand_over(path: Path, options: DecodeOptions) -> Iterator[Any]:
    from svb.extract import decode_ffmpeg, decode_pyav

    if options.decoder == "ffmpeg":
        yield from decode_ffmpeg.decode(path, options)
        return
    try:
        yield from decode_pyav.decode(path, options)
        return
    except DecodeError as failure:
        if failure.status not in RETRIED_WITH_FFMPEG:
            raise
        first_failure = failure
    yield "ffmpeg"
    try:
        yield from decode_ffmpeg.decode(path, options)
    except DecodeError as second_failure:
        raise first_failure from second_failure
