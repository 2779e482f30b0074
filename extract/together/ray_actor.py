"""The actor of a Ray run: backbones on one GPU, or on the cores of one node, and the pipeline that feeds them."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from svb import __version__
from svb.data.rows import VideoRecord, VideoRows
from svb.device import choose_device, choose_precision
from svb.errors import MismatchError
from svb.extract.backbones import load_backbone
from svb.extract.compute.pipeline import Content, Pipeline
from svb.extract.pool.decode_pool import NOBODY, TICK_SECONDS
from svb.extract.request import Request
from svb.extract.run import cores
from svb.extract.together.ray_decode import LOST, DecodeTasks, Videos
from svb.memory import keep_freed_memory


@dataclass(frozen=True)
class Job:
    """What every actor of a run is told; see `svb.extract.run.extract`.

    Attributes:
        num_tasks: How many decode tasks an actor asks for at a time.
        version: The driver's svb.
    """

    request: Request
    device: str
    precision: str
    compile: bool
    keep_partial: bool
    stall_seconds: float
    time_limit_seconds: float
    num_tasks: int = 1
    version: str = __version__


@dataclass(frozen=True)
class Opened:
    """An actor has loaded its backbones: the settings of the store that it fills, and its device."""

    settings: dict[str, Any]
    device: str


@dataclass(frozen=True)
class Done:
    """What an actor has done since it last said so; the times are in seconds, the decoders' all together."""

    contents: list[Content]
    frames: int
    seconds: float
    waiting_seconds: float
    workers_waiting_seconds: float
    messages: list[str]


class BackboneActor:
    """Runs the backbones; `open` first, then `run` on one thread and `give` on another."""

    def __init__(self, job: Job) -> None:
        self._job = job

    def open(self) -> Opened:
        """Load the backbones.

        Raises:
            MismatchError: The node has another svb than the driver.
            As `load_backbone`.
        """
        job = self._job
        if __version__ != job.version:
            raise MismatchError(
                f"a node of the Ray cluster has svb {__version__}, the driver {job.version} - give all one version"
            )
        # Ray lends frames read-only, and nothing here writes to them.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        self._device = choose_device(job.device)
        if self._device.type == "cpu":
            keep_freed_memory()
        dtype = choose_precision(self._device, job.precision)
        self._networks = [
            load_backbone(name, self._device, dtype, compile=job.compile, batch_size=job.request.batch_size)
            for name in job.request.backbones
        ]
        self._tasks = DecodeTasks(
            job.num_tasks, job.request.decode_options(self._networks), job.stall_seconds, job.time_limit_seconds
        )
        return Opened(job.request.settings(self._networks), str(self._device))

    def give(self, videos: Videos) -> None:
        """Take the videos of one more decode task."""
        self._tasks.give(videos)

    def run(self) -> Iterator[Done]:
        """Yield what is done, for ever: whole videos as they become so, and every half second how it gets on."""
        records = _Records()
        messages: list[str] = []
        _hear(messages)
        frames, waiting, workers_waiting = 0, 0.0, 0.0
        told = time.monotonic()
        if self._device.type == "cpu":
            torch.set_num_threads(_own_cores())  # Ray allows one, and would leave the other cores idle
        with cores(self._device, self._job.compile) as (executor, ahead):
            pipeline = Pipeline(
                self._networks,
                self._job.request.batch_size,
                records,
                keep_partial=self._job.keep_partial,
                executor=executor,
                ahead=ahead,
            )
            for position, message in self._tasks.run():
                pipeline.take(position, message)
                if position == NOBODY and self._tasks.is_idle:
                    pipeline.finish()
                now = time.monotonic()
                if not records.contents and now - told < TICK_SECONDS:
                    continue
                yield Done(
                    records.contents,
                    pipeline.counts.frames - frames,
                    now - told,
                    self._tasks.waiting_seconds - waiting,
                    self._tasks.workers_waiting_seconds - workers_waiting,
                    list(messages),
                )
                records.contents = []
                messages.clear()
                frames, told = pipeline.counts.frames, now
                waiting, workers_waiting = self._tasks.waiting_seconds, self._tasks.workers_waiting_seconds


class _Records:
    """Where the pipeline's records go until the driver hears of them."""

    def __init__(self) -> None:
        self.contents: list[Content] = []

    def add(self, record: VideoRecord, rows: Mapping[str, VideoRows]) -> None:
        if record.status != LOST:
            self.contents.append((record, rows))


def _own_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _hear(messages: list[str]) -> None:
    """Gather what the user should hear: an actor is a process of its own, on another machine perhaps."""

    class Gather(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    logger = logging.getLogger("svb")
    logger.setLevel(logging.INFO)
    logger.handlers = [Gather()]
