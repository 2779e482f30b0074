"""`svb extract`: videos -> frames -> frozen backbones -> a feature store."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import socket
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol

from svb.config import typed
from svb.data.feature_store import FeatureStore, GrowingRecords, read_store_description
from svb.data.feature_store_writer import FeatureStoreWriter
from svb.data.rows import VideoRecord
from svb.device import choose_device, explained_errors
from svb.errors import Interrupted, StoreError, UsageError
from svb.extract.backbones.transform import require_same_transforms
from svb.extract.compute.machine import cores_for_batches, keep_freed_memory, share_of_cores
from svb.extract.config import ExtractConfig
from svb.extract.decode.options import words_of_older_reader
from svb.extract.inputs import first_names, require_there
from svb.extract.plan import Plan, PlannedVideo, is_done, plan_videos
from svb.extract.pool.decode_pool import NOBODY, DecodePool, Listed
from svb.extract.pool.worker import Finished, Started
from svb.extract.progress import ExtractProgress, RunLog, what_limited
from svb.extract.together.devices import device_of, extract_on_devices, own_device, turn_to_choose_engine
from svb.extract.together.leases import UNIT_VIDEOS, LeasedVideos, Leases, start_at, units
from svb.interrupts import deferred_interrupts

logger = logging.getLogger(__name__)

DEFAULT_CONFIG = ExtractConfig()


def extract(
    videos: Sequence[Path | str],
    out: Path | str,
    config: ExtractConfig = DEFAULT_CONFIG,
    *,
    on_progress: Callable[[ExtractProgress], None] = lambda progress: None,
) -> Path:
    """Extract frozen features of videos into a store; continue where an earlier run stopped.

    Decode workers are spawned processes: a script that calls this needs the usual
    `if __name__ == "__main__":`.

    Args:
        videos: Folders (walked recursively), video files, or lists of them (.txt, .csv, .parquet).
        out: The store's folder; it is made where there is none.
        config: All options.
        on_progress: Called often.

    Returns:
        `out`.

    Raises:
        InputError: There is no such file, there are no videos, or there is no such Ray cluster.
        Interrupted: SIGINT or SIGTERM came; what was whole has been published.
        MismatchError: The store was made with other settings.
        ModelUnavailableError: A backbone's weights cannot be had.
        StoreError: The store is damaged, being written by another process, or cannot be written.
        UsageError: The machine lacks what an option asks for.
    """
    out = Path(out)
    config = settled(videos, out, config)
    _require_possible(config)
    plan = _plan(videos, out, config)  # what the store does not hold yet
    if not plan.todo:
        _without_work(plan, out, config)
    elif config.devices is not None:
        logger.info(extract_on_devices(_extract_share, videos, out, config, plan, on_progress))
    else:
        logger.info(_extract_planned(plan, out, config, on_progress))
    return out


def _extract_share(
    videos: Sequence[Path | str],
    out: Path,
    config: ExtractConfig,
    on_progress: Callable[[ExtractProgress], None],
) -> None:
    """Do the share of one process of several that `extract` started."""
    plan = _plan(videos, out, config)
    if plan.todo:
        _extract_planned(plan, out, config, on_progress)


def _extract_planned(
    plan: Plan, out: Path, config: ExtractConfig, on_progress: Callable[[ExtractProgress], None]
) -> str:
    """Extract what was planned, and return what limited it in a sentence."""
    with contextlib.ExitStack() as stack:
        with turn_to_choose_engine(config, out) as agreed:
            workplace = stack.enter_context(_workplace(agreed, plan, out))
            writer, log = stack.enter_context(_open_store(out, agreed, workplace))
        signal_number = _fill(writer, log, workplace, on_progress)  # frames -> backbones -> shards
        vanished = workplace.vanished
        if not signal_number:
            _require_records(plan, out)
            _remove(vanished if config.prune else (), writer)
            writer.compact()
        sentence = _end(log, workplace.progress(), out, signal_number)
    _tell_of_vanished(vanished, config.prune)
    return sentence


def settled(videos: Sequence[Path | str], out: Path | str, config: ExtractConfig) -> ExtractConfig:
    """Return the options, fill in what was not given from the store if there is one, and say what it filled in.

    Raises:
        InputError: There is no such file: a wrong path is told before anything about settings.
        StoreError: The store is damaged.
    """
    require_there([Path(video) for video in videos])
    out = Path(out)
    if not (out / "store.json").exists():
        return config.settled(None)
    full, new = config.settled(read_store_description(out)), config.settled(None).on(device_of(out))
    taken = [field for field in fields(full) if getattr(full, field.name) != getattr(config, field.name)]
    words = [
        typed(field, value) for field in taken if (value := getattr(full, field.name)) != getattr(new, field.name)
    ]
    if words:
        logger.info(f"{out} was made with {' '.join(words)}: new videos are treated alike")
    return full


def _require_records(plan: Plan, out: Path) -> None:
    """Check that each planned video ended with a record.

    Raises:
        StoreError: One did not.
    """
    records = FeatureStore(out).records
    missing = [video.video_id for video in plan.todo if video.video_id not in records]
    if missing:
        raise StoreError(
            f"{len(missing)} of {len(plan.todo)} planned videos have no record in {out}: {first_names(missing)} - "
            "expected one for each; run the same command again, and report this as a fault of svb"
        )


class Workplace(Protocol):
    """Where videos are decoded and go through the backbones: this machine, or a Ray cluster.

    Attributes:
        settings: The store's settings, with those of the backbones that were loaded.
        provenance: The device and the versions of packages.
        description: The facts that the log of the run records.
    """

    settings: dict[str, Any]
    provenance: dict[str, Any]
    description: dict[str, Any]

    def fill(self, writer: FeatureStoreWriter, is_interrupted: Callable[[], int]) -> Generator[None, None, None]:
        """Bring every video to the writer, until all are there or it is interrupted; yield often on the way."""

    def progress(self) -> ExtractProgress:
        """Return how far the run is."""

    @property
    def vanished(self) -> list[VideoRecord]:
        """Videos of the store whose files are gone, and have not turned up under another name."""


@contextlib.contextmanager
def _workplace(config: ExtractConfig, plan: Plan, out: Path) -> Iterator[Workplace]:
    """Yield this machine or a Ray cluster, with the backbones loaded."""
    if config.ray is None:
        yield ThisMachine(config, plan, out)
        return
    from svb.extract.together.ray import joined_cluster

    with joined_cluster(config, plan) as cluster:
        yield cluster


@contextlib.contextmanager
def _open_store(
    out: Path, config: ExtractConfig, workplace: Workplace
) -> Iterator[tuple[FeatureStoreWriter, RunLog]]:
    settings, provenance = workplace.settings, workplace.provenance
    if (out / "store.json").exists():
        require_same_transforms(FeatureStore(out).settings, settings, out)
    with FeatureStoreWriter(out, settings, provenance, shared=config.place is not None) as writer:
        log = RunLog(out)
        log.add("start", settings=settings, provenance=provenance, **workplace.description)
        yield writer, log


def _fill(
    writer: FeatureStoreWriter, log: RunLog, workplace: Workplace, on_progress: Callable[[ExtractProgress], None]
) -> int:
    """Fill the store; returns the signal that ended it early, or 0."""
    with deferred_interrupts() as interrupted, contextlib.closing(workplace.fill(writer, interrupted)) as steps:
        for _ in steps:
            writer.publish_if_due()  # a long video must not hold back those that are finished
            progress = workplace.progress()
            on_progress(progress)
            log.add_progress(progress)
        signal_number = interrupted()
    on_progress(workplace.progress())
    return signal_number


def _end(log: RunLog, progress: ExtractProgress, out: Path, signal_number: int) -> str:
    """Log the end of a run, and return what limited it in a sentence.

    Raises:
        Interrupted: A signal had ended it.
    """
    sentence = what_limited(progress)
    log.add_end(progress, "interrupted" if signal_number else "done", sentence)
    if signal_number:
        done = f"{progress.videos_done} videos of this run are in {out}"
        raise Interrupted(signal_number, f"interrupted - {done}; run the same command again to go on")
    return sentence


class ThisMachine:
    """This machine, with the backbones loaded; see `Workplace`. With a rank it shares the videos with others."""

    def __init__(self, config: ExtractConfig, plan: Plan, out: Path) -> None:
        self._device = choose_device(own_device(config, out))  # it chooses a GPU before torch is there
        self.provenance = config.provenance(self._device)
        config = config.on(self._device.type)
        self._config, self._plan, self._out = config, plan, out
        if self._device.type == "cpu":
            keep_freed_memory()
        self._networks = config.load_backbones(self._device)
        self._num_workers = config.workers or share_of_cores()
        self.settings = config.settings(self._networks)
        self.description = {"videos": len(plan.todo), "num_workers": self._num_workers}

    def fill(self, writer: FeatureStoreWriter, is_interrupted: Callable[[], int]) -> Generator[None, None, None]:
        from svb.extract.compute.pipeline import Contents, Pipeline  # and with it torch

        config = self._config
        with (
            explained_errors(self._device, smaller="lower --batch-size"),
            self._source(writer) as source,
            cores_for_batches(self._device, config.compile) as (executor, ahead),
        ):
            self._contents = None
            if not config.times:  # where each video has its own times, copies are not sampled alike
                self._contents = Contents.known(FeatureStore(self._out), self._plan, config.retry, writer)
            self._pool = DecodePool(
                self._num_workers,
                config.decode_options_for(self._networks),
                config.stall_seconds,
                config.time_limit_seconds,
                None if self._contents is None else self._contents.is_wanted,
            )
            self._pipeline = pipeline = Pipeline(
                self._networks,
                config.frames_a_batch,
                writer,
                keep_partial=config.on_partial == "keep",
                contents=self._contents,
                executor=executor,
                ahead=ahead,
            )
            num_in_software = 0
            self._leased = source if isinstance(source, LeasedVideos) else None
            with contextlib.closing(self._pool.run(source)) as messages:
                for position, message in messages:
                    pipeline.take(position, message)
                    if isinstance(message, Finished) and message.in_software:
                        num_in_software += 1
                        if num_in_software == 1:
                            logger.warning(f"--hwaccel {config.hwaccel} fails on this machine: {message.error}")
                    if position == NOBODY and isinstance(source, LeasedVideos) and pipeline.only_waits:
                        pipeline.finish()  # others wait for the leases of what is done here
                        writer.publish()
                    if not isinstance(message, Started):
                        yield
                    if is_interrupted():
                        break
                pipeline.finish()
            writer.publish()  # before the leases are given back
        if num_in_software:
            logger.warning(f"{num_in_software} videos were decoded in software: --hwaccel {config.hwaccel} failed")
        counts = pipeline.counts
        if (counts.renamed or counts.duplicates) and not is_interrupted():
            logger.info(
                f"not decoded, because their content is known: {counts.renamed} renamed, {counts.duplicates} "
                "duplicates"
            )

    @contextlib.contextmanager
    def _source(self, writer: FeatureStoreWriter) -> Iterator[Listed | LeasedVideos]:
        """Yield where the videos come from: the plan's list, or units of it taken by leases."""
        plan, place = self._plan, self._config.place
        if place is None:
            yield Listed(plan.todo)
            return
        with Leases(self._out / "leases", f"{socket.gethostname()}-{os.getpid()}") as leases:
            undone = _undone(self._out, plan, self._config.retry)
            source = LeasedVideos(start_at(units(plan.asked, UNIT_VIDEOS), *place), leases, undone, plan.todo)
            writer.on_published = source.published
            yield source

    def progress(self) -> ExtractProgress:
        counts, pool, plan = self._pipeline.counts, self._pool, self._plan
        seconds = max(pool.seconds, 1e-9)
        return ExtractProgress(
            num_videos=len(plan.todo) - (self._leased.num_by_others if self._leased else 0),
            num_bytes=plan.num_bytes - (self._leased.bytes_by_others if self._leased else 0),
            videos_done=counts.videos,
            bytes_done=counts.bytes,
            frames_done=counts.frames,
            seconds=pool.seconds,
            decode_wait_share=pool.waiting_seconds / seconds,
            device_wait_share=pool.workers_waiting_seconds / seconds / self._num_workers,
            queue_depth=pool.num_queued,
            num_workers=self._num_workers,
            device=str(self._device),
        )

    @property
    def vanished(self) -> list[VideoRecord]:
        return self._plan.vanished if self._contents is None else self._contents.vanished


def _require_possible(config: ExtractConfig) -> None:
    if config.hwaccel is not None:
        from svb.extract.decode.ffmpeg_process import require_hwaccel

        require_hwaccel(config.hwaccel)
    if config.ray is not None and importlib.util.find_spec("ray") is None:
        raise UsageError(
            f"--ray {config.ray} needs Ray, which is not installed - run pip install '.[ray]' in svb's folder"
        )


def _plan(videos: Sequence[Path | str], out: Path, config: ExtractConfig) -> Plan:
    records: Mapping[str, VideoRecord] = {}
    if (out / "store.json").exists():
        store = FeatureStore(out)
        config.require_fits(store.settings, out)
        if words := words_of_older_reader(out, store.description):
            logger.warning(words)
        records = store.records
    times = config.times_table
    plan = plan_videos(
        [Path(video) for video in videos],
        records,
        retry=config.retry,
        times_seconds=None if times is None else times.times_seconds,
        rules=config.folder_rules,
    )
    for line in plan.messages:
        logger.info(line)
    return plan


def _without_work(plan: Plan, out: Path, config: ExtractConfig) -> None:
    if config.prune and plan.vanished:
        with FeatureStoreWriter(out, FeatureStore(out).settings, {}) as writer:
            _remove(plan.vanished, writer)
            writer.compact()
    _tell_of_vanished(plan.vanished, config.prune)
    logger.info(f"nothing to do: all {len(plan.asked)} videos are in {out}, unchanged")


def _undone(
    out: Path, plan: Plan, retry: Collection[str]
) -> Callable[[Collection[PlannedVideo]], list[PlannedVideo]]:
    """Return a function that returns those of some videos that nobody has published yet."""
    published = GrowingRecords(out)
    tries = {video.video_id: video.tries for video in plan.asked}

    def is_undone(video: PlannedVideo) -> bool:
        record = published.records.get(video.video_id)
        # A failure of this very run is not tried again: another process has just done it.
        again = retry if record is not None and record.tries <= tries[video.video_id] else ()
        return not is_done(record, video.path, again)

    def undone(videos: Collection[PlannedVideo]) -> list[PlannedVideo]:
        published.refresh()
        return [video for video in videos if is_undone(video)]

    return undone


def _remove(vanished: Sequence[VideoRecord], writer: FeatureStoreWriter) -> None:
    for record in vanished:
        writer.remove(record)
    writer.publish()


def _tell_of_vanished(vanished: Sequence[VideoRecord], prune: bool) -> None:
    if vanished:
        done = "taken out of the store" if prune else "their features are kept; --prune takes them out of the store"
        logger.info(f"{len(vanished)} files are gone, first {vanished[0].source_path}: {done}")
