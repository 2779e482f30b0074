"""`svb extract --ray`: decode tasks on a Ray cluster's CPUs, backbone actors on its GPUs, one writer here.

The driver hands out videos to actors (`ray_actor`), which have them decoded by tasks
(`ray_decode`); records and rows come back through Ray's object store, and only the driver writes
to the feature store. What an actor had when it died is handed out again: nothing is recorded twice, since a
video's record comes whole or not at all. Every node must see the videos, and local weights, under the driver's
paths, and have the driver's svb installed.

Contents are not compared: a file that was renamed, or is the same as another, is decoded like any other.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from svb.config import require_same
from svb.data.feature_store_writer import FeatureStoreWriter
from svb.errors import InputError, Interrupted
from svb.extract.plan import Plan, PlannedVideo
from svb.extract.progress import ExtractProgress, RunLog, what_limited
from svb.extract.together.ray_actor import Done, Job, Opened
from svb.extract.together.ray_cluster import joined, look_at_cluster
from svb.extract.together.ray_crew import Crew
from svb.interrupts import deferred_interrupts

logger = logging.getLogger(__name__)


def extract_on_ray(
    address: str,
    job: Job,
    plan: Plan,
    out: Path,
    *,
    prune: bool,
    versions: Mapping[str, str],
    on_progress: Callable[[ExtractProgress], None],
) -> str:
    """Extract what a plan has to do on a Ray cluster; see `svb.extract.run.extract`.

    Args:
        address: `HOST:PORT` of the cluster's head, `auto` for the cluster of this machine, or `local`: one is
            started on this machine and ended with the run.
        job: What the actors are told; `num_tasks` follows from the cluster.
        plan: What to do.
        out: The store's folder.
        prune: Take videos out of the store whose files are gone.
        versions: Of packages, for the store's provenance.
        on_progress: Called often.

    Returns:
        What limited the run, in one sentence.

    Raises:
        As `extract`, and:
        InputError: There is no such cluster, it has no CPUs, or its nodes do not see the files.
        SvbError: Actors die again and again.
    """
    with joined(address):
        cluster = look_at_cluster(job.device)
        job = replace(job, num_tasks=math.ceil(cluster.num_cpus / len(cluster.places)))
        logger.info(cluster.description)
        with Crew(job, cluster, plan.todo) as crew:
            opened = crew.first_opened()
            settings, provenance = opened.settings, {"device": opened.device, "versions": dict(versions)}
            with FeatureStoreWriter(out, settings, provenance) as writer:
                log = RunLog(out)
                log.add(
                    "start",
                    settings=settings,
                    provenance=provenance,
                    videos=len(plan.todo),
                    ray=cluster.description,
                )
                report = _Report(plan.todo, cluster.num_cpus, opened.device)
                signal_number = _drive(crew, settings, plan.todo, writer, report, log, on_progress)
                writer.publish()
                sentence = what_limited(report.progress)
                on_progress(report.progress)
                if signal_number:
                    log.add_end(report.progress, "interrupted", sentence)
                    done = f"{report.progress.videos_done} videos of this run are in {out}"
                    raise Interrupted(signal_number, f"interrupted - {done}; run the same command again to go on")
                for record in plan.vanished if prune else ():
                    writer.remove(record)
                writer.publish()
                writer.compact()
                log.add_end(report.progress, "done", sentence)
    return sentence


def _drive(
    crew: Crew,
    settings: Mapping[str, Any],
    todo: Sequence[PlannedVideo],
    writer: FeatureStoreWriter,
    report: _Report,
    log: RunLog,
    on_progress: Callable[[ExtractProgress], None],
) -> int:
    """Bring every record from the crew to the writer; returns the signal that ended it early, or 0."""
    path_of = {video.video_id: video.path for video in todo}
    with deferred_interrupts() as interrupted:
        while report.progress.videos_done < len(todo) and not interrupted():
            event = crew.next()
            if isinstance(event, str):
                logger.info(event)
            elif isinstance(event, Opened):
                require_same(
                    settings,
                    event.settings,
                    what="what the first of the backbone actors loaded",
                    do_next="Give --precision, and the same packages and weights to every node.",
                )
            elif isinstance(event, Done):
                for record, rows in event.contents:
                    if record.status == "missing" and path_of[record.video_id].exists():
                        raise InputError(
                            f"{record.source_path} is here, but not on a node of the Ray cluster - every node must "
                            "see the videos under the same paths: use a file system that all share"
                        )
                    writer.add(record, rows)
                for message in event.messages:
                    logger.info(message)
                report.add(event)
            writer.publish_if_due()
            on_progress(report.progress)
            log.add_progress(report.progress)
        return interrupted()


class _Report:
    """Puts together how far a run is."""

    def __init__(self, todo: Sequence[PlannedVideo], num_cpus: int, device: str) -> None:
        self._began = time.monotonic()
        self._size_of = {video.video_id: video.size_bytes for video in todo}
        self._actor_seconds = self._waiting_seconds = self._workers_waiting_seconds = 0.0
        self.progress = ExtractProgress(len(todo), sum(self._size_of.values()), num_workers=num_cpus, device=device)

    def add(self, done: Done) -> None:
        progress = self.progress
        self._actor_seconds += done.seconds
        self._waiting_seconds += done.waiting_seconds
        self._workers_waiting_seconds += done.workers_waiting_seconds
        seconds = max(time.monotonic() - self._began, 1e-9)
        self.progress = replace(
            progress,
            videos_done=progress.videos_done + len(done.contents),
            bytes_done=progress.bytes_done + sum(self._size_of[record.video_id] for record, _ in done.contents),
            frames_done=progress.frames_done + done.frames,
            seconds=seconds,
            decode_wait_share=self._waiting_seconds / max(self._actor_seconds, 1e-9),
            device_wait_share=self._workers_waiting_seconds / seconds / progress.num_workers,
        )
