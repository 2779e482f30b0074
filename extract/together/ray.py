"""`svb extract --ray`: decode tasks on a Ray cluster's CPUs, backbone actors on its GPUs, one writer here.

The driver hands out videos to actors, which have them decoded by tasks (`ray_actor`). Records and rows come back
through Ray's object store, and only the driver writes to the feature store. What an actor had when it died is
handed out again: a video's record comes whole or not at all, so nothing is recorded twice. Every node must see the
videos, and local weights, under the driver's paths, and have the driver's svb installed.

Contents are not compared: a file that was renamed, or is the same as another, is decoded like any other.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import queue
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from svb import __version__
from svb.config import require_same
from svb.data.feature_store_writer import FeatureStoreWriter
from svb.data.rows import VideoRecord
from svb.device import is_device_failure, is_out_of_memory
from svb.errors import InputError, SvbError, UsageError, first_line
from svb.extract.config import ExtractConfig
from svb.extract.plan import Plan, PlannedVideo
from svb.extract.pool.decode_pool import TICK_SECONDS
from svb.extract.progress import ExtractProgress
from svb.extract.together.ray_actor import MAX_TRIES, ActorDid, ActorLoaded, BackboneActor, TaskVideos

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 5.0
# The most videos of one decode task: its decoder takes a second to start.
TASK_VIDEOS = 8
# Tasks are smaller if there are few videos, so that there are this many for each CPU.
TASKS_PER_CPU = 4
# An actor is given tasks for all its CPUs, and as many that wait.
STOCK = 2


@contextlib.contextmanager
def joined_cluster(config: ExtractConfig, plan: Plan) -> Iterator[RayCluster]:
    """Join the cluster that the options name, with backbones loaded on it, and leave it again.

    `HOST:PORT` is a cluster's head, `auto` the cluster of this machine, and `local` one that is started here.

    Raises:
        InputError: There is no such cluster, it is another version's, or it has no CPUs.
        SvbError: Actors die again and again.
        UsageError: It cannot be joined in this way.
    """
    assert config.ray is not None
    with _joined(config.ray):
        resources = _look_at_cluster(config.device)
        logger.info(resources.description)
        with BackboneActors(config, resources, plan.todo) as actors:
            yield RayCluster(plan, resources, actors)


class RayCluster:
    """A Ray cluster as a place to work, see `svb.extract.run.Workplace`."""

    def __init__(self, plan: Plan, resources: ClusterResources, actors: BackboneActors) -> None:
        self._todo, self._actors = plan.todo, actors
        loaded = actors.first_loaded()
        self.settings, self.provenance = loaded.settings, loaded.provenance
        self.description = {"videos": len(plan.todo), "ray": resources.description}
        self.vanished: list[VideoRecord] = plan.vanished
        self._began = time.monotonic()
        self._size_of = {video.video_id: video.size_bytes for video in plan.todo}
        self._actor_seconds = self._waiting_seconds = self._workers_waiting_seconds = 0.0
        self._progress = ExtractProgress(
            len(plan.todo), sum(self._size_of.values()), num_workers=resources.num_cpus, device=loaded.device
        )

    def fill(self, writer: FeatureStoreWriter, is_interrupted: Callable[[], int]) -> Generator[None, None, None]:
        path_of = {video.video_id: video.path for video in self._todo}
        while self._progress.videos_done < len(self._todo) and not is_interrupted():
            event = self._actors.next()
            if isinstance(event, str):
                logger.info(event)
            elif isinstance(event, ActorLoaded):
                require_same(
                    self.settings,
                    event.settings,
                    what="what the first of the backbone actors loaded",
                    do_next="Give --precision, and the same packages and weights to every node.",
                )
            elif isinstance(event, ActorDid):
                for record, rows in event.contents:
                    if record.status == "missing" and path_of[record.video_id].exists():
                        raise InputError(
                            f"{record.source_path} is here, but not on a node of the Ray cluster - every node must "
                            "see the videos under the same paths: use a file system that all share"
                        )
                    writer.add(record, rows)
                for message in event.messages:
                    logger.info(message)
                self._count(event)
            yield
        writer.publish()

    def progress(self) -> ExtractProgress:
        return self._progress

    def _count(self, did: ActorDid) -> None:
        progress = self._progress
        self._actor_seconds += did.seconds
        self._waiting_seconds += did.waiting_seconds
        self._workers_waiting_seconds += did.workers_waiting_seconds
        seconds = max(time.monotonic() - self._began, 1e-9)
        self._progress = replace(
            progress,
            videos_done=progress.videos_done + len(did.contents),
            bytes_done=progress.bytes_done + sum(self._size_of[record.video_id] for record, _ in did.contents),
            frames_done=progress.frames_done + did.frames,
            seconds=seconds,
            decode_wait_share=self._waiting_seconds / max(self._actor_seconds, 1e-9),
            device_wait_share=self._workers_waiting_seconds / seconds / progress.num_workers,
        )


@dataclass(frozen=True)
class ClusterResources:
    """What a cluster has: its CPUs, and the options of an actor for every place where one can be."""

    num_cpus: int
    places: list[dict[str, Any]]
    description: str


def _look_at_cluster(device: str) -> ClusterResources:
    """Look at the cluster: an actor for every GPU, or on every node where there is none.

    Raises:
        InputError: It has no CPU to decode on.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    on_cpus = [node for node in nodes if node["Resources"].get("CPU", 0) >= 1]
    num_cpus = sum(int(node["Resources"]["CPU"]) for node in on_cpus)
    num_gpus = 0 if device == "cpu" else sum(int(node["Resources"].get("GPU", 0)) for node in nodes)
    if not num_cpus:
        raise InputError(
            f"the Ray cluster's {len(nodes)} nodes have no CPU - start one with `ray start --num-cpus`"
        )
    places: list[dict[str, Any]] = [{"num_gpus": 1}] * num_gpus or [
        {"scheduling_strategy": NodeAffinitySchedulingStrategy(node["NodeID"], soft=True)} for node in on_cpus
    ]
    where = "GPU" if num_gpus else "node"
    description = f"Ray: backbone actors: {len(places)} (one a {where}), decoders: {num_cpus} (one a CPU)"
    return ClusterResources(num_cpus, places, description)


@contextlib.contextmanager
def _joined(address: str) -> Iterator[None]:
    """Join a cluster, or start one, and leave it again."""
    if address.startswith("ray://"):
        raise UsageError(f"cannot join {address!r} by Ray's client - give HOST:PORT of the cluster's head, or auto")
    if ray.is_initialized():
        raise UsageError("this process is in a Ray cluster already - call ray.shutdown() first")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    on_terminate = signal.getsignal(signal.SIGTERM)
    options: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    host, _, port = address.rpartition(":")
    try:
        if port.isdecimal():  # Ray itself tries for minutes where nobody answers
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **options)
    except (OSError, OverflowError, RuntimeError, ValueError, RayError) as error:
        raise InputError(
            f"cannot join a Ray cluster at {address!r} ({first_line(error)}) - expected HOST:PORT of a running "
            "cluster's head, auto or local; run this on one of its nodes, or start one with `ray start --head`"
        ) from error
    try:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_terminate)  # Ray's would end the process
        yield
    finally:
        ray.shutdown()


class BackboneActors:
    """The actors, each with a thread that gives it videos, hears of them, and replaces it when it dies."""

    def __init__(self, config: ExtractConfig, resources: ClusterResources, todo: Sequence[PlannedVideo]) -> None:
        num_tasks = math.ceil(resources.num_cpus / len(resources.places))
        self._config, self._num_tasks = config, num_tasks
        self._choosing = threading.Lock()
        self._size = max(1, min(TASK_VIDEOS, len(todo) // (TASKS_PER_CPU * resources.num_cpus)))
        self._stock = STOCK * num_tasks * self._size
        self._waiting = deque(self._cut(todo))
        self._events: queue.SimpleQueue[ActorLoaded | ActorDid | str | BaseException] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._actors: list[Any] = []
        self._num_serving = len(resources.places)
        self._threads = [
            threading.Thread(target=self._serve, args=(place,), daemon=True) for place in resources.places
        ]

    def __enter__(self) -> BackboneActors:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._stop.set()
            for actor in self._actors:
                ray.kill(actor)
        for thread in self._threads:
            thread.join(timeout=10)

    def first_loaded(self) -> ActorLoaded:
        """Wait for an actor that has loaded the backbones."""
        while not isinstance(event := self.next(), ActorLoaded):
            if isinstance(event, str):
                logger.info(event)
        return event

    def next(self) -> ActorLoaded | ActorDid | str | None:
        """Return what an actor has done, or a line about one; None where there is nothing for a while.

        Raises:
            BaseException: What went wrong in an actor.
        """
        try:
            event = self._events.get(timeout=TICK_SECONDS)
        except queue.Empty:
            return None
        if isinstance(event, BaseException):
            raise event
        return event

    def _serve(self, place: Mapping[str, Any]) -> None:
        deaths = 0
        while not self._stop.is_set():
            given: dict[str, PlannedVideo] = {}
            try:
                for event in self._work(place, given):
                    self._events.put(event)
                    if isinstance(event, ActorDid) and event.contents:
                        deaths = 0
            except RayError as error:
                if isinstance(error, RayTaskError) and not _is_of_device(error):  # raised by our own code
                    self._events.put(_explained(error))
                    return
                self._waiting.extendleft(self._cut(list(given.values())))
                deaths += 1
                if deaths < MAX_TRIES:
                    self._events.put(_replaced(error, len(given)))
                else:
                    self._events.put(self._retired(error, deaths))
                    return
            except BaseException as error:
                self._events.put(error)
                return

    def _retired(self, error: RayError, deaths: int) -> str | SvbError:
        """Give a place up: the other actors take its videos, and without any the run fails."""
        with self._lock:
            self._num_serving -= 1
        words = f"{deaths} backbone actors were lost in a row and had done nothing ({first_line(_cause(error))})"
        if self._num_serving:
            return f"{words}: going on without that place, with the other {self._num_serving}"
        return SvbError(
            f"{words} - expected them to live: look into Ray's logs and at nvidia-smi, then run the same command "
            "again; what is done is kept"
        )

    def _work(self, place: Mapping[str, Any], given: dict[str, PlannedVideo]) -> Iterator[ActorLoaded | ActorDid]:
        """Yield what one actor says, until it dies or the run ends; `given` is what it has not done yet."""
        started = self._started(place)
        if started is None:
            return
        actor, loaded = started
        try:
            yield loaded
            for reference in actor.run.remote():
                did = ray.get(reference)
                for record, _ in did.contents:
                    del given[record.video_id]
                while len(given) < self._stock and (videos := self._next_videos()):
                    given |= {video.video_id: video for video in videos}
                    actor.give.remote(videos)
                yield did
        finally:
            ray.kill(actor)

    def _started(self, place: Mapping[str, Any]) -> tuple[Any, ActorLoaded] | None:
        """Return an actor that has loaded its backbones; None if the run has ended.

        The first one on a CPU chooses the engine, and the others take its choice.
        """
        with self._choosing:
            if self._config.engine == "auto" and "num_gpus" not in place:
                started = self._loaded(place)
                if started is not None:
                    self._config = self._config.settled({"settings": started[1].settings, "provenance": {}})
                return started
        return self._loaded(place)

    def _loaded(self, place: Mapping[str, Any]) -> tuple[Any, ActorLoaded] | None:
        with self._lock:
            if self._stop.is_set():
                return None
            options = {"num_cpus": 0, "max_concurrency": 2, **place}
            arguments = self._config, self._num_tasks, __version__
            actor: Any = ray.remote(BackboneActor).options(**options).remote(*arguments)
            self._actors.append(actor)
        try:
            return actor, ray.get(actor.open.remote())
        except BaseException:
            ray.kill(actor)
            raise

    def _cut(self, videos: Sequence[PlannedVideo]) -> list[TaskVideos]:
        """Return the videos of each task."""
        return [tuple(videos[start : start + self._size]) for start in range(0, len(videos), self._size)]

    def _next_videos(self) -> TaskVideos:
        try:
            return self._waiting.popleft()
        except IndexError:  # another thread took the last ones
            return ()


def _replaced(error: RayError, num_given: int) -> str:
    reason = first_line(_cause(error))
    return f"a backbone actor was lost ({reason}): another is started and given the {num_given} videos it had"


def _cause(error: BaseException) -> BaseException:
    """Return what was raised in an actor or task; an actor passes on that of a task."""
    while isinstance(error, RayTaskError):
        error = error.cause
    return error


def _is_of_device(error: RayTaskError) -> bool:
    """Tell whether the GPU of an actor failed or lacked memory; another's need not."""
    cause = _cause(error)
    return is_device_failure(cause) or is_out_of_memory(cause)


def _explained(error: RayTaskError) -> BaseException:
    """Return an error of our own code in an actor or task as it was there, or with what to do about it."""
    cause = _cause(error)
    if isinstance(cause, ImportError):
        return InputError(
            f"a node of the Ray cluster cannot import what it needs ({cause}) - install the driver's svb on every "
            f"node: run pip install '.[ray]' in the folder of svb {__version__}"
        )
    return cause if isinstance(cause, SvbError) else error
