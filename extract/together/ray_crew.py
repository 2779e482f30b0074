"""The backbone actors of a Ray run, as the driver sees them: given videos, heard, and replaced when they die."""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from svb import __version__
from svb.errors import InputError, SvbError
from svb.extract.plan import PlannedVideo
from svb.extract.pool.decode_pool import TICK_SECONDS
from svb.extract.together.ray_actor import BackboneActor, Done, Job, Opened
from svb.extract.together.ray_cluster import Cluster, first_line
from svb.extract.together.ray_decode import MAX_TRIES, Videos

logger = logging.getLogger(__name__)

# Videos of one decode task at most: its decoder takes a second to start.
TASK_VIDEOS = 8
# Smaller tasks where there are few videos: so many for each CPU.
TASKS_PER_CPU = 4
# An actor is given tasks for all its CPUs, and as many that wait.
STOCK = 2


class Crew:
    """Backbone actors, each with a thread that gives it videos, hears of them and replaces it when it dies."""

    def __init__(self, job: Job, cluster: Cluster, todo: Sequence[PlannedVideo]) -> None:
        self._job = job
        self._size = max(1, min(TASK_VIDEOS, len(todo) // (TASKS_PER_CPU * cluster.num_cpus)))
        self._stock = STOCK * job.num_tasks * self._size
        self._waiting = deque(self._cut(todo))
        self._events: queue.SimpleQueue[Opened | Done | str | BaseException] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._actors: list[Any] = []
        self._threads = [
            threading.Thread(target=self._serve, args=(place,), daemon=True) for place in cluster.places
        ]

    def __enter__(self) -> Crew:
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

    def first_opened(self) -> Opened:
        """Wait for an actor that has loaded the backbones."""
        while not isinstance(event := self.next(), Opened):
            if isinstance(event, str):
                logger.info(event)
        return event

    def next(self) -> Opened | Done | str | None:
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
                    if isinstance(event, Done) and event.contents:
                        deaths = 0
            except RayTaskError as error:  # raised by our own code
                self._events.put(_explained(error))
                return
            except RayError as error:
                self._waiting.extendleft(self._cut(list(given.values())))
                deaths += 1
                self._events.put(_death(error, deaths, len(given)))
            except BaseException as error:
                self._events.put(error)
                return

    def _work(self, place: Mapping[str, Any], given: dict[str, PlannedVideo]) -> Iterator[Opened | Done]:
        """Yield what one actor says, until it dies or the run ends; `given` is what it has not done yet."""
        with self._lock:
            if self._stop.is_set():
                return
            actor: Any = ray.remote(BackboneActor).options(num_cpus=0, max_concurrency=2, **place).remote(self._job)
            self._actors.append(actor)
        try:
            yield ray.get(actor.open.remote())
            for reference in actor.run.remote():
                done = ray.get(reference)
                for record, _ in done.contents:
                    del given[record.video_id]
                while len(given) < self._stock and (videos := self._next_videos()):
                    given |= {video.video_id: video for video in videos}
                    actor.give.remote(videos)
                yield done
        finally:
            ray.kill(actor)

    def _cut(self, videos: Sequence[PlannedVideo]) -> list[Videos]:
        """Return the videos of each task."""
        return [tuple(videos[start : start + self._size]) for start in range(0, len(videos), self._size)]

    def _next_videos(self) -> Videos:
        try:
            return self._waiting.popleft()
        except IndexError:  # another thread took the last ones
            return ()


def _death(error: RayError, deaths: int, num_given: int) -> str | SvbError:
    reason = first_line(error)
    if deaths < MAX_TRIES:
        return f"a backbone actor was lost ({reason}): another is started and given the {num_given} videos it had"
    return SvbError(
        f"{deaths} backbone actors were lost in a row and had done nothing ({reason}) - expected them to live: "
        "look into Ray's logs, then run the same command again; what is done is kept"
    )


def _explained(error: RayTaskError) -> BaseException:
    """Return an error of our own code in an actor or task as it was there, or with what to do about it."""
    cause: BaseException = error
    while isinstance(cause, RayTaskError):  # an actor passes on that of a task
        cause = cause.cause
    if isinstance(cause, ImportError):
        return InputError(
            f"a node of the Ray cluster cannot import what it needs ({cause}) - install the driver's svb on every "
            f"node: run pip install '.[ray]' in the folder of svb {__version__}"
        )
    return cause if isinstance(cause, SvbError) else error
