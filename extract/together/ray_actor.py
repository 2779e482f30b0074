"""What runs on a Ray cluster: actors with the backbones, and the decode tasks that they take their frames from.

A task runs a pool of one worker, so a file that hangs a decoder or kills it costs one video, as anywhere. If a
task, worker or node is lost, that is not the file's fault: what it had not finished is decoded again.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import warnings
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.exceptions import RayError, RayTaskError

from svb import __version__
from svb.data.rows import VideoRecord, VideoRows
from svb.device import choose_device
from svb.errors import MismatchError
from svb.extract.compute.machine import available_cores, cores_for_batches, keep_freed_memory
from svb.extract.compute.pipeline import Content, Pipeline
from svb.extract.config import ExtractConfig
from svb.extract.decode.options import DecodeOptions
from svb.extract.plan import PlannedVideo
from svb.extract.pool.decode_pool import NOBODY, TICK_SECONDS, DecodePool
from svb.extract.pool.worker import Alive, Finished, Message, Started, size_and_mtime

# How many messages a task may be ahead of the backbones; most chunks of frames take at most 16 MB.
AHEAD_MESSAGES = 3
# A video that was being decoded when this many tasks were lost is not tried again.
MAX_TRIES = 3

# A status of `Finished`, but never of a record: the video is decoded again, at another position.
LOST = "lost"

# The videos of one decode task.
TaskVideos = tuple[PlannedVideo, ...]


@dataclass(frozen=True)
class ActorLoaded:
    """An actor has loaded its backbones: the settings and provenance of the store that it fills, and its device."""

    settings: dict[str, Any]
    provenance: dict[str, Any]
    device: str


@dataclass(frozen=True)
class ActorDid:
    """What an actor has done since its last report; times are in seconds, those of all its decoders together."""

    contents: list[Content]
    frames: int
    seconds: float
    waiting_seconds: float
    workers_waiting_seconds: float
    messages: list[str]


class BackboneActor:
    """Runs the backbones on one GPU, or on the cores of one node.

    Call `open` first, then `run` on one thread and `give` on another.

    Args:
        num_tasks: How many decode tasks to ask for at a time.
        version: The driver's svb.
    """

    def __init__(self, config: ExtractConfig, num_tasks: int, version: str) -> None:
        self._config, self._num_tasks, self._version = config, num_tasks, version

    def open(self) -> ActorLoaded:
        """Load the backbones.

        Raises:
            MismatchError: The node has another svb than the driver.
            As `ExtractConfig.load_backbones`.
        """
        if __version__ != self._version:
            raise MismatchError(
                f"a node of the Ray cluster has svb {__version__}, the driver {self._version} - install the same "
                "version on all"
            )
        self._messages: list[str] = []
        _gather_messages(self._messages)
        # Ray lends frames read-only, and nothing here writes to them.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        self._device = choose_device(self._config.device)
        provenance = self._config.provenance(self._device)
        self._config = config = self._config.on(self._device.type)
        if self._device.type == "cpu":
            keep_freed_memory()
        self._networks = config.load_backbones(self._device)
        options = config.decode_options_for(self._networks)
        self._tasks = DecodeTasks(self._num_tasks, options, config.stall_seconds, config.time_limit_seconds)
        return ActorLoaded(config.settings(self._networks), provenance, str(self._device))

    def give(self, videos: TaskVideos) -> None:
        """Take the videos of one more decode task."""
        self._tasks.give(videos)

    def run(self) -> Iterator[ActorDid]:
        """Yield what is done, for ever: whole videos as soon as they are, and every half second how it gets on."""
        records = _RecordsForDriver()
        messages = self._messages
        frames, waiting, workers_waiting = 0, 0.0, 0.0
        reported = time.monotonic()
        if self._device.type == "cpu":
            torch.set_num_threads(available_cores())  # Ray allows one, and would leave the other cores idle
        with cores_for_batches(self._device, self._config.compile) as (executor, ahead):
            pipeline = Pipeline(
                self._networks,
                self._config.frames_a_batch,
                records,
                keep_partial=self._config.on_partial == "keep",
                executor=executor,
                ahead=ahead,
            )
            for position, message in self._tasks.run():
                pipeline.take(position, message)
                if position == NOBODY and self._tasks.is_idle:
                    pipeline.finish()
                now = time.monotonic()
                if not records.contents and now - reported < TICK_SECONDS:
                    continue
                yield ActorDid(
                    records.contents,
                    pipeline.counts.frames - frames,
                    now - reported,
                    self._tasks.waiting_seconds - waiting,
                    self._tasks.workers_waiting_seconds - workers_waiting,
                    list(messages),
                )
                records.contents = []
                messages.clear()
                frames, reported = pipeline.counts.frames, now
                waiting, workers_waiting = self._tasks.waiting_seconds, self._tasks.workers_waiting_seconds


class _RecordsForDriver:
    """Holds the pipeline's records until the driver hears of them."""

    def __init__(self) -> None:
        self.contents: list[Content] = []

    def add(self, record: VideoRecord, rows: Mapping[str, VideoRows]) -> None:
        if record.status != LOST:
            self.contents.append((record, rows))


def _gather_messages(messages: list[str]) -> None:
    """Gather what the user should hear: an actor is a process of its own, perhaps on another machine."""

    class Gather(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    logger = logging.getLogger("svb")
    logger.setLevel(logging.INFO)
    logger.handlers = [Gather()]


def decode(
    videos: TaskVideos, options: DecodeOptions, stall_seconds: float, time_limit_seconds: float
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
    videos: TaskVideos
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
        self._waiting: deque[TaskVideos] = deque()
        self._given = threading.Event()
        self._running: dict[Any, _Task] = {}
        self._losses: Counter[str] = Counter()
        self._num_started = 0

    def give(self, videos: TaskVideos) -> None:
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

    def _start(self, videos: TaskVideos) -> None:
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
