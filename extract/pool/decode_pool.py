"""The decode pool: worker processes that decode videos, are watched, and are replaced when they fail.

A damaged file can hang a decoder or crash its process, so no decoder runs in the main process. A
worker waits while the backbones have not taken its frames: memory is bounded however long a video is.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Generator, Sequence
from multiprocessing.connection import wait
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from svb.extract.decode.decoder import FrameChunk
from svb.extract.decode.options import DecodeOptions
from svb.extract.plan import PlannedVideo
from svb.extract.pool.worker import (
    SLOTS,
    VIDEOS_A_WORKER,
    Alive,
    Finished,
    FrameMemory,
    Hashed,
    Message,
    SharedChunk,
    Started,
    size_and_mtime,
    work,
)

QUEUED_MESSAGES = 64
# How often an idle consumer gets `Alive`, so that it can publish what is due and notice an interrupt.
TICK_SECONDS = 0.5
NOBODY = -1

DEFAULT_STALL_SECONDS = 120.0
DEFAULT_TIME_LIMIT_SECONDS = 4 * 3600.0


class WorkSource(Protocol):
    """Gives a pool its videos, one whenever a worker is free."""

    @property
    def is_exhausted(self) -> bool:
        """Whether no video will ever come again."""

    def take(self) -> PlannedVideo | None:
        """Return the next video, or None if there is none now; must not wait."""


class Listed:
    """A list of videos as a source."""

    def __init__(self, videos: Sequence[PlannedVideo]) -> None:
        self._videos = iter(videos)
        self._next = next(self._videos, None)

    @property
    def is_exhausted(self) -> bool:
        return self._next is None

    def take(self) -> PlannedVideo | None:
        video, self._next = self._next, next(self._videos, None)
        return video


class DecodePool:
    """Decodes videos in `num_workers` processes.

    Args:
        stall_seconds: A worker that reads no frame, packet or block of the file for this long is killed,
            and its video recorded as `timeout`.
        time_limit_seconds: A video that decodes for longer is recorded as `timeout`.
        is_wanted: Called in a thread with a video's position, the video and its content hash, before it is
            decoded; if it returns False the video ends as `DUPLICATE`.
        videos_a_worker: A worker is replaced after this many videos, or when it has grown large: decoders
            leak memory.
        clock: Gives the seconds by which workers are judged silent.

    Attributes:
        waiting_seconds: How long the consumer waited for messages, after the first one.
        workers_waiting_seconds: How long all workers together waited for the consumer.
    """

    def __init__(
        self,
        num_workers: int,
        options: DecodeOptions,
        stall_seconds: float = DEFAULT_STALL_SECONDS,
        time_limit_seconds: float = DEFAULT_TIME_LIMIT_SECONDS,
        is_wanted: Callable[[int, PlannedVideo, str], bool] | None = None,
        videos_a_worker: int = VIDEOS_A_WORKER,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.waiting_seconds = self.workers_waiting_seconds = 0.0
        self._first_message = math.nan
        self._num_workers = num_workers
        self._options = options
        self._stall_seconds = stall_seconds
        self._time_limit_seconds = time_limit_seconds
        self._is_wanted = is_wanted
        self._videos_a_worker = videos_a_worker
        self._clock = clock
        self._messages: queue.Queue[_Item | BaseException | None] = queue.Queue(QUEUED_MESSAGES)
        self._stop = threading.Event()
        self._num_started = 0

    @property
    def seconds(self) -> float:
        """How long ago the first message came, when workers had started."""
        return 0.0 if math.isnan(self._first_message) else time.monotonic() - self._first_message

    @property
    def num_queued(self) -> int:
        """How many messages wait for the consumer."""
        return self._messages.qsize()

    def run(self, videos: Sequence[PlannedVideo] | WorkSource) -> Generator[tuple[int, Message], None, None]:
        """Yield `(position, message)`, in order for each video, until every video has its `Finished`.

        A chunk's frames are valid until the next message is asked for. While nothing else comes,
        `(NOBODY, Alive())` comes every `TICK_SECONDS`.
        """
        source = Listed(videos) if isinstance(videos, Sequence) else videos
        thread = threading.Thread(target=self._feed_safely, args=(source,), daemon=True)
        thread.start()
        try:
            while True:
                item = self._next()
                if item is None:
                    return
                if isinstance(item, BaseException):
                    raise item
                position, message, release = item
                yield position, message
                release()
        finally:
            self._stop.set()
            with contextlib.suppress(queue.Empty):
                while True:
                    self._messages.get_nowait()
            thread.join(timeout=10)

    def _next(self) -> _Item | BaseException | None:
        began = time.monotonic()
        try:
            item = self._messages.get(timeout=TICK_SECONDS)
        except queue.Empty:
            item = NOBODY, Alive(), _nothing
        now = time.monotonic()
        if not math.isnan(self._first_message):
            self.waiting_seconds += now - began
        elif isinstance(item, tuple) and not isinstance(item[1], Started | Alive):
            self._first_message = now
        return item

    def _feed_safely(self, source: WorkSource) -> None:
        try:
            self._feed(source)
            self._put(None)
        except BaseException as error:
            self._put(error)

    def _feed(self, source: WorkSource) -> None:
        workers: list[_Worker] = []
        try:
            while not self._stop.is_set():
                self._give_work(workers, source)
                busy = [worker for worker in workers if worker.video is not None]
                if not busy and source.is_exhausted:
                    return
                wait([worker.connection for worker in busy], timeout=TICK_SECONDS)
                for worker in busy:
                    if not self._serve(worker):
                        worker.kill()
                        workers.remove(worker)
        finally:
            for worker in workers:
                worker.kill()

    def _give_work(self, workers: list[_Worker], source: WorkSource) -> None:
        while True:
            idle = next((worker for worker in workers if worker.video is None), None)
            if (idle is None and len(workers) == self._num_workers) or self._stop.is_set():
                return
            video = source.take()
            if video is None:
                return
            if idle is None:
                asks_first = self._is_wanted is not None
                idle = _Worker(
                    self._options, asks_first, self._time_limit_seconds, self._videos_a_worker, self._clock
                )
                workers.append(idle)
            idle.position, idle.video = self._num_started, video
            self._num_started += 1
            self._put((idle.position, Started(video), _nothing))
            idle.heard = idle.given = self._clock()
            idle.send(video)  # a dead worker is noticed when its messages are read

    def _serve(self, worker: _Worker) -> bool:
        """Pass on a worker's next message; return False if the worker must be replaced."""
        assert worker.video is not None
        try:
            if not worker.connection.poll():
                silent_seconds = self._clock() - worker.heard
                if worker.slots_out == SLOTS or silent_seconds < self._stall_seconds:
                    return True
                self._put_failure(worker, "timeout", f"the decoder gave nothing for {silent_seconds:.0f} s")
                return False
            message = worker.connection.recv()
        except (EOFError, OSError):
            worker.process.join(timeout=5)
            words = f"the decoder's process died with exit code {worker.process.exitcode}"
            self._put_failure(worker, "decoder_crash", words)
            return False
        if isinstance(message, Hashed):
            assert self._is_wanted is not None
            worker.send(self._is_wanted(worker.position, worker.video, message.content_hash))
        elif isinstance(message, SharedChunk):
            chunk = FrameChunk(worker.borrow(message), message.frame_times_seconds)
            self._put((worker.position, chunk, lambda: worker.release(message.slot)))
        else:
            self._put((worker.position, message, _nothing))
        # Time that the queue was full does not count as the worker's silence.
        worker.heard = self._clock()
        if isinstance(message, Finished):
            self.workers_waiting_seconds += message.waiting_seconds
            worker.video = None
            return not message.is_last
        return True

    def _put_failure(self, worker: _Worker, status: str, words: str) -> None:
        # The record holds the file's size and time, so that an unchanged file is not tried again.
        assert worker.video is not None
        size_bytes, mtime_ns = size_and_mtime(worker.video.path)
        failed = Finished(
            status,
            words,
            self._options.decoder,
            size_bytes=size_bytes,
            mtime_ns=mtime_ns,
            elapsed_seconds=self._clock() - worker.given,
        )
        self._put((worker.position, failed, _nothing))

    def _put(self, item: _Item | BaseException | None) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(queue.Full):
                self._messages.put(item, timeout=0.5)
                return


# A video's position, its message, and a function to call when the consumer is done with the message.
_Item = tuple[int, Message, Callable[[], None]]


def _nothing() -> None: ...


class _Worker:
    """One decode process, its pipe and its shared memory; it decodes `video`, which has this `position`."""

    def __init__(
        self,
        options: DecodeOptions,
        asks_first: bool,
        time_limit_seconds: float,
        num_videos: int,
        clock: Callable[[], float],
    ) -> None:
        # spawn: a fork would copy torch's threads and CUDA's state, and break them.
        context = multiprocessing.get_context("spawn")
        self.memory = FrameMemory()
        self.connection, theirs = context.Pipe()
        arguments = (theirs, self.memory, options, asks_first, time_limit_seconds, num_videos)
        self.process = context.Process(target=work, args=arguments, daemon=True)
        self.process.start()
        theirs.close()
        self.position = NOBODY
        self.video: PlannedVideo | None = None
        self._clock = clock
        self.heard = self.given = clock()
        self.slots_out = 0
        self._sending = threading.Lock()

    def send(self, thing: object) -> None:
        """Send something, from any thread; nothing happens if the worker is dead."""
        with self._sending, contextlib.suppress(OSError):
            self.connection.send(thing)

    def borrow(self, chunk: SharedChunk) -> NDArray[np.uint8]:
        """Return a chunk's frames, which do not change until its slot is released."""
        with self._sending:
            self.slots_out += 1
        return self.memory.view(chunk.slot, chunk.shape)

    def release(self, slot: int) -> None:
        """Give a slot back to the worker; the time that it waited does not count as silence."""
        with self._sending:
            self.slots_out -= 1
            self.heard = self._clock()
        self.send(slot)

    def kill(self) -> None:
        assert self.process.pid is not None
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:  # it has no process group of its own yet
            self.process.kill()
        self.process.join()
        self.process.close()
        with self._sending:
            self.connection.close()
        self.memory.close()
