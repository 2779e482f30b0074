"""Decode tasks on a Ray cluster, which one actor takes its frames from as from a decode pool.

A task runs a pool of one worker, so a file that hangs a decoder or kills it costs one video, as anywhere. A
task, worker or node that is lost is not the file's fault: what it had not finished is decoded again.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from svb.extract.decode.options import DecodeOptions
from svb.extract.plan import PlannedVideo
from svb.extract.pool.decode_pool import NOBODY, TICK_SECONDS, DecodePool
from svb.extract.pool.worker import Alive, Finished, Message, Started, size_and_mtime

# How many messages a task may be ahead of the backbones; most chunks of frames take at most 16 MB.
AHEAD_MESSAGES = 3
# A video that was being decoded when this many tasks were lost is not tried again.
MAX_TRIES = 3

# A status of `Finished` alone, never of a record: the video is decoded again, at another position.
LOST = "lost"

Videos = tuple[PlannedVideo, ...]


def decode(
    videos: Videos, options: DecodeOptions, stall_seconds: float, time_limit_seconds: float
) -> Iterator[tuple[int, Message]]:
    """Yield `(position, message)` of some videos, one video after the other: what a decode task does."""
    pool = DecodePool(1, options, stall_seconds, time_limit_seconds)
    with contextlib.closing(pool.run(videos)) as messages:
        for position, message in messages:
            if not isinstance(message, Alive):
                # Ray has copied the frames when it asks for the next message; the pool takes them back then.
                yield position, message


@dataclass
class _Task:
    """A task under way: the position of its first video and those that it has not finished, in order."""

    first: int
    videos: Videos
    left: deque[PlannedVideo]


class DecodeTasks:
    """Decodes videos in Ray tasks, up to `num_tasks` at a time.

    Args:
        num_tasks: How many tasks are asked for at a time; Ray starts each where a CPU is free.
        options: How to decode.
        stall_seconds: As for `svb.extract.pool.decode_pool.DecodePool`.
        time_limit_seconds: As for `svb.extract.pool.decode_pool.DecodePool`.

    Attributes:
        waiting_seconds: How long `run` waited for messages while tasks were under way.
        workers_waiting_seconds: How long decoders waited, all together, for the consumer.
    """

    def __init__(
        self, num_tasks: int, options: DecodeOptions, stall_seconds: float, time_limit_seconds: float
    ) -> None:
        self.waiting_seconds = self.workers_waiting_seconds = 0.0
        self._num_tasks = num_tasks
        self._decoder = options.decoder
        self._arguments = (options, stall_seconds, time_limit_seconds)
        # Ray's own retries skip as many messages as have come, but a second try need not give the same ones.
        options_of_tasks: dict[str, Any] = {
            "num_cpus": 1,
            "max_retries": 0,
            "_generator_backpressure_num_objects": AHEAD_MESSAGES,
        }
        self._decode: Any = ray.remote(**options_of_tasks)(decode)
        self._waiting: deque[Videos] = deque()
        self._given = threading.Event()
        self._running: dict[Any, _Task] = {}
        self._losses: Counter[str] = Counter()
        self._num_started = 0

    def give(self, videos: Videos) -> None:
        """Take the videos of one more task. Called from another thread than `run`."""
        self._waiting.append(videos)
        self._given.set()

    @property
    def is_idle(self) -> bool:
        """Whether every video that was given has its `Finished`."""
        return not self._waiting and not self._running

    def run(self) -> Iterator[tuple[int, Message]]:
        """Yield `(position, message)`, in order for each video, for ever; `Alive` of `NOBODY` for want of one."""
        while True:
            while self._waiting and len(self._running) < self._num_tasks:
                self._start(self._waiting.popleft())
            if not self._running:
                yield NOBODY, Alive()
                self._given.wait(TICK_SECONDS)
                self._given.clear()
                continue
            began = time.monotonic()
            ready, _ = ray.wait(list(self._running), timeout=TICK_SECONDS)
            self.waiting_seconds += time.monotonic() - began
            if not ready:
                yield NOBODY, Alive()
            for stream in ready:
                yield from self._next_of(stream)

    def _start(self, videos: Videos) -> None:
        self._running[self._decode.remote(videos, *self._arguments)] = _Task(
            self._num_started, videos, deque(videos)
        )
        self._num_started += len(videos)

    def _next_of(self, stream: Any) -> Iterator[tuple[int, Message]]:
        task = self._running[stream]
        try:
            position, message = ray.get(next(stream))
        except StopIteration:
            del self._running[stream]
            return
        except RayTaskError:  # raised by our own code
            raise
        except RayError as error:
            del self._running[stream]
            yield from self._do_again(task, error)
            return
        if isinstance(message, Finished):
            self.workers_waiting_seconds += message.waiting_seconds
            task.left.popleft()
        yield task.first + position, message

    def _do_again(self, task: _Task, error: RayError) -> Iterator[tuple[int, Message]]:
        """Have decoded what a lost task left; the video that it was at is given up if that happens too often."""
        if not task.left:
            return
        video = task.left[0]
        position = task.first + len(task.videos) - len(task.left)
        self._losses[video.video_id] += 1
        losses = self._losses[video.video_id]
        status = LOST if losses < MAX_TRIES else "decoder_crash"
        if status != LOST:
            task.left.popleft()
        size_bytes, mtime_ns = size_and_mtime(video.path)
        words = f"{losses} decode tasks were lost while they had it, the last to {type(error).__name__}"
        yield position, Started(video)  # it starts anew: frames that have come are forgotten
        yield position, Finished(status, words, self._decoder, size_bytes=size_bytes, mtime_ns=mtime_ns)
        if task.left:
            self._waiting.appendleft(tuple(task.left))
