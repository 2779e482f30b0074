"""`svb extract`: videos -> frames -> frozen backbones -> a feature store."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import socket
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from svb.data.feature_store import FeatureStore, GrowingRecords
from svb.data.feature_store_writer import FeatureStoreWriter
from svb.data.rows import FAILURES, USABLE, VideoRecord
from svb.device import choose_device, choose_precision
from svb.errors import InputError, Interrupted, UsageError
from svb.extract.decode.decoder import FrameChunk
from svb.extract.decode.options import DecodeOptions, Limits
from svb.extract.decode.sampling import Sampling
from svb.extract.names import DEFAULT_BACKBONE
from svb.extract.plan import Plan, PlannedVideo, is_done, plan_videos
from svb.extract.pool.decode_pool import (
    DEFAULT_STALL_SECONDS,
    DEFAULT_TIME_LIMIT_SECONDS,
    NOBODY,
    DecodePool,
    Listed,
)
from svb.extract.pool.worker import Finished, Started
from svb.extract.progress import ExtractProgress, RunLog, what_limited
from svb.extract.request import Request, make_request
from svb.extract.together.leases import Leases, start_at, units
from svb.extract.together.ranks import UNIT_VIDEOS, LeasedVideos
from svb.interrupts import deferred_interrupts
from svb.memory import keep_freed_memory

if TYPE_CHECKING:
    import torch

    from svb.extract.backbones.backbone import Backbone
    from svb.extract.compute.pipeline import Contents, Counts, Pipeline

logger = logging.getLogger(__name__)

MAX_BATCH_SIZE = 4096


def extract(
    videos: Sequence[Path | str],
    out: Path | str,
    *,
    backbones: Sequence[str] = (DEFAULT_BACKBONE,),
    sampling: Sampling | None = None,
    times: Path | str | None = None,
    decoder: str = "pyav",
    fast_decode: bool = False,
    hwaccel: str | None = None,
    resize: str = "device",
    limits: Limits | None = None,
    device: str = "auto",
    precision: str = "auto",
    compile: bool = False,
    num_workers: int = 2,
    batch_size: int = 32,
    stall_seconds: float = DEFAULT_STALL_SECONDS,
    time_limit_seconds: float = DEFAULT_TIME_LIMIT_SECONDS,
    keep_partial: bool = True,
    retry: Collection[str] = (),
    prune: bool = False,
    rank: tuple[int, int] | None = None,
    ray: str | None = None,
    on_progress: Callable[[ExtractProgress], None] = lambda progress: None,
) -> Path:
    """Extract frozen features of videos into a store; continue where an earlier run stopped.

    Decode workers are spawned processes: a script that calls this needs the usual
    `if __name__ == "__main__":`.

    Args:
        videos: Folders (walked recursively), video files, or lists of them (.txt, .csv, .parquet).
        out: The store's folder; made where there is none.
        backbones: Names, `family:model[/weights]`; one decode feeds all of them.
        sampling: Which frames; 1 a second where not given.
        times: Instead of `sampling`: a table of times for each video, see `svb.extract.decode.times_table`.
        decoder: `pyav`, which hands over to ffmpeg what it cannot read, or `ffmpeg`.
        fast_decode: Skip frames that no other frame refers to; picked frames may move by a few.
        hwaccel: A hardware decoder of ffmpeg's, such as `cuda`.
        resize: `device`, or `decoder`: ffmpeg scales frames to the largest backbone's size before they cross.
        limits: What a video may ask for.
        device: `auto`, `cpu`, `cuda:0`, ...
        precision: `auto`, `float32`, `bfloat16` or `float16`.
        compile: Compile the backbones with torch.compile.
        num_workers: Decode processes.
        batch_size: B, frames (or clips of frames) in a batch.
        stall_seconds: A video whose decoder gives nothing for this long is recorded as `timeout`.
        time_limit_seconds: So is one that decodes for longer than this.
        keep_partial: Keep videos that decode in part; else they fail, as `truncated` or `concealed_errors`.
        retry: Statuses of videos to take up again; `svb.data.rows.FAILURES` for all that failed.
        prune: Take videos out of the store whose files are gone.
        rank: This process's rank and the number of processes that fill the store together; they share a file
            system and may be fewer or more than said.
        ray: A Ray cluster to decode and compute on, see `together.ray_run`; its CPUs take `num_workers`' place.
        on_progress: Called often.

    Returns:
        `out`.

    Raises:
        InputError: No such file, or no videos.
        Interrupted: SIGINT or SIGTERM came; what was whole has been published.
        MismatchError: The store was made with other settings.
        ModelUnavailableError: A backbone's weights cannot be had.
        StoreError: The store is damaged, being written by another process, or cannot be written.
        UsageError: An option means nothing.
    """
    out = Path(out)
    _check_numbers(num_workers, batch_size, stall_seconds, time_limit_seconds)
    _check_retry(retry)
    _check_ray(ray, rank, device, hwaccel)
    request = make_request(
        backbones,
        sampling=sampling,
        times=times,
        decoder=decoder,
        fast_decode=fast_decode,
        hwaccel=hwaccel,
        resize=resize,
        limits=limits,
        batch_size=batch_size,
    )
    plan = _plan(videos, out, request, precision, retry)
    for line in plan.messages:
        logger.info(line)
    if not plan.todo:
        return _without_work(plan, out, prune)

    if ray is not None:
        job = request, device, precision, compile, keep_partial, stall_seconds, time_limit_seconds
        return _on_ray(ray, job, plan, out, prune, on_progress)

    from svb.extract.compute.pipeline import Pipeline  # and with it torch

    torch_device = choose_device(_own_device(device, rank))
    dtype = choose_precision(torch_device, precision)
    if torch_device.type == "cpu":
        keep_freed_memory()
    networks = _load(request.backbones, torch_device, dtype, compile, batch_size)
    settings = request.settings(networks)
    provenance = {"device": str(torch_device), "versions": _versions()}
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(FeatureStoreWriter(out, settings, provenance, shared=rank is not None))
        log = RunLog(out)
        log.add("start", settings=settings, provenance=provenance, videos=len(plan.todo), num_workers=num_workers)
        contents = None if request.times else _known_contents(FeatureStore(out), plan, retry, writer)
        source: Listed | LeasedVideos = Listed(plan.todo)
        if rank is not None:
            source = _leased_videos(out, plan, rank, retry, stack)
            writer.on_published = source.published
        pool = DecodePool(
            num_workers,
            request.decode_options(networks),
            stall_seconds,
            time_limit_seconds,
            None if contents is None else contents.is_wanted,
        )
        executor, ahead = stack.enter_context(cores(torch_device, compile))
        pipeline = Pipeline(
            networks,
            batch_size,
            writer,
            keep_partial=keep_partial,
            contents=contents,
            executor=executor,
            ahead=ahead,
        )
        report = _Report(plan, source, pool, pipeline, str(torch_device), num_workers)
        signal_number = _drive(pool, source, pipeline, writer, report, log, on_progress)
        writer.publish()
        progress = report.progress()
        on_progress(progress)
        sentence = what_limited(progress)
        if signal_number:
            log.add_end(progress, "interrupted", sentence)
            done = f"{progress.videos_done} videos of this run are in {out}"
            raise Interrupted(signal_number, f"interrupted - {done}; run the same command again to go on")
        vanished = plan.vanished if contents is None else contents.vanished
        _remove(vanished if prune else (), writer)
        writer.compact()
        log.add_end(progress, "done", sentence)
    _tell_of_known(pipeline.counts)
    _tell_of_vanished(vanished, prune)
    logger.info(sentence)
    return out


def _drive(
    pool: DecodePool,
    source: Listed | LeasedVideos,
    pipeline: Pipeline,
    writer: FeatureStoreWriter,
    report: _Report,
    log: RunLog,
    on_progress: Callable[[ExtractProgress], None],
) -> int:
    """Bring every video of the source from the pool through the backbones to the writer.

    Returns:
        The signal that ended it early, or 0.
    """
    with deferred_interrupts() as interrupted, contextlib.closing(pool.run(source)) as messages:
        for position, message in messages:
            pipeline.take(position, message)
            if position == NOBODY and isinstance(source, LeasedVideos) and pipeline.only_waits:
                pipeline.finish()  # others wait for the leases of what is done here
                writer.publish()
            writer.publish_if_due()  # a long video must not hold back those that are finished
            if not isinstance(message, Started):
                on_progress(report.progress())
                log.add_progress(report.progress())
            if interrupted():
                break
        pipeline.finish()
        return interrupted()


class _Report:
    """Puts together how far a run is."""

    def __init__(
        self,
        plan: Plan,
        source: Listed | LeasedVideos,
        pool: DecodePool,
        pipeline: Pipeline,
        device: str,
        num_workers: int,
    ) -> None:
        self._num_bytes = sum(video.size_bytes for video in plan.todo)
        self._num_videos = len(plan.todo)
        self._source, self._pool, self._pipeline = source, pool, pipeline
        self._device, self._num_workers = device, num_workers

    def progress(self) -> ExtractProgress:
        counts, pool = self._pipeline.counts, self._pool
        others = self._source.by_others if isinstance(self._source, LeasedVideos) else []
        seconds = max(pool.seconds, 1e-9)
        return ExtractProgress(
            num_videos=self._num_videos - len(others),
            num_bytes=self._num_bytes - sum(video.size_bytes for video in others),
            videos_done=counts.videos,
            bytes_done=counts.bytes,
            frames_done=counts.frames,
            seconds=pool.seconds,
            decode_wait_share=pool.waiting_seconds / seconds,
            device_wait_share=pool.workers_waiting_seconds / seconds / self._num_workers,
            queue_depth=pool.num_queued,
            num_workers=self._num_workers,
            device=self._device,
        )


def extract_file(
    file: Path, backbones: Sequence[Backbone], options: DecodeOptions, batch_size: int
) -> list[tuple[NDArray[np.float32], NDArray[np.float64]]]:
    """Return one file's `(T, F)` float32 features and `(T,)` times by each backbone, decoded once in a worker.

    Raises:
        InputError: The file gives no frame.
    """
    from svb.extract.compute.packing import Packer
    from svb.extract.compute.pipeline import run_packers
    from svb.extract.compute.upload import Uploader

    device = backbones[0].device
    uploader = Uploader(device)
    with cores(device, compile=False) as (executor, ahead):
        packers = [Packer(backbone, batch_size, executor=executor, ahead=ahead) for backbone in backbones]
        for _, message in DecodePool(1, options).run([PlannedVideo(str(file), file)]):
            if isinstance(message, FrameChunk):
                run_packers(packers, uploader, 0, message)
            elif isinstance(message, Finished) and message.status not in USABLE:
                raise InputError(f"{file} cannot be used as a video ({message.status}): {message.error}")
        for packer in packers:
            packer.end(0)
            packer.flush()
        return [packer.take(0) for packer in packers]


def _check_numbers(num_workers: int, batch_size: int, stall_seconds: float, time_limit_seconds: float) -> None:
    if num_workers < 1:
        raise UsageError(f"{num_workers} workers decode nothing - give at least one backbone and one worker")
    if not 1 <= batch_size <= MAX_BATCH_SIZE:
        raise UsageError(f"batch size {batch_size} - expected 1 to {MAX_BATCH_SIZE}")
    for what, seconds in (("wait", stall_seconds), ("decode a video for", time_limit_seconds)):
        if not seconds > 0:
            raise UsageError(f"cannot {what} {seconds} s - give a positive number of seconds")


def _check_ray(address: str | None, rank: tuple[int, int] | None, device: str, hwaccel: str | None) -> None:
    if address is None:
        return
    if importlib.util.find_spec("ray") is None:
        raise UsageError(
            f"--ray {address} needs Ray, which is not installed - run pip install '.[ray]' in svb's folder"
        )
    if rank is not None:
        raise UsageError("got a rank and a Ray cluster, which shares the work out itself - give one of the two")
    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"device {device!r} on a Ray cluster - expected auto, cpu or cuda: Ray chooses the GPUs")
    if hwaccel is not None:
        raise UsageError(f"hardware decoder {hwaccel!r} on a Ray cluster, which decodes on CPUs - leave it out")


def _check_retry(retry: Collection[str]) -> None:
    unknown = set(retry) - {*FAILURES, "partial"}
    if unknown:
        raise UsageError(
            f"no video ends as {', '.join(sorted(unknown))} - expected some of {', '.join(FAILURES)} or partial"
        )


def _plan(
    videos: Sequence[Path | str], out: Path, request: Request, precision: str, retry: Collection[str]
) -> Plan:
    records: dict[str, VideoRecord] = {}
    if (out / "store.json").exists():
        store = FeatureStore(out)
        request.require_fits(store.settings, precision, out)
        records = store.records
    return plan_videos(
        [Path(video) for video in videos],
        records,
        retry=retry,
        times_seconds=None if request.times is None else request.times.times_seconds,
    )


def _load(
    names: Sequence[str], device: torch.device, dtype: torch.dtype, compile: bool, batch_size: int
) -> list[Backbone]:
    from svb.extract.backbones import load_backbone

    return [load_backbone(name, device, dtype, compile=compile, batch_size=batch_size) for name in names]


@contextlib.contextmanager
def cores(device: torch.device, compile: bool) -> Iterator[tuple[Executor | None, int]]:
    """Yield what runs batches, and how many may be under way.

    On the CPU every core has a batch of its own: cores that share one wait for each other at every layer, and
    for long where decoders want the cores too. Features then do not depend on how many there are. What is
    compiled runs on all cores at once.
    """
    import torch

    if device.type != "cpu" or compile:
        yield None, 1
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as executor:
            yield executor, threads
    finally:
        torch.set_num_threads(threads)


def _known_contents(
    store: FeatureStore, plan: Plan, retry: Collection[str], writer: FeatureStoreWriter
) -> Contents:
    from svb.extract.compute.pipeline import Contents

    changing = {video.video_id for video in plan.todo} | {record.video_id for record in plan.vanished}
    usable = [record for record in store.records.values() if record.usable and record.status not in retry]
    return Contents(
        held=[record for record in usable if record.video_id not in changing],
        touched=[record for record in usable if record.video_id in changing],
        vanished=plan.vanished,
        read=lambda video_id: writer.added(video_id) or (store.records[video_id], store.rows_of(video_id)),
        remove=writer.remove,
    )


def _leased_videos(
    out: Path, plan: Plan, rank: tuple[int, int], retry: Collection[str], stack: contextlib.ExitStack
) -> LeasedVideos:
    """Return this process's share of what is to be done, with its leases open until the stack unwinds."""
    owner = f"{socket.gethostname()}-{os.getpid()}"
    published = GrowingRecords(out)
    tries = {video.video_id: video.tries for video in plan.asked}

    def undone(videos: Collection[PlannedVideo]) -> list[PlannedVideo]:
        published.refresh()
        found = []
        for video in videos:
            record = published.records.get(video.video_id)
            # What failed in a try of now is not tried again: one of the others has just done it.
            again = retry if record is not None and record.tries <= tries[video.video_id] else ()
            if not is_done(record, video.path, again):
                found.append(video)
        return found

    leases = stack.enter_context(Leases(out / "leases", owner))
    return LeasedVideos(start_at(units(plan.asked, UNIT_VIDEOS), *rank), leases, undone, plan.todo)


def _without_work(plan: Plan, out: Path, prune: bool) -> Path:
    if prune and plan.vanished:
        with FeatureStoreWriter(out, FeatureStore(out).settings, {}) as writer:
            _remove(plan.vanished, writer)
            writer.compact()
    _tell_of_vanished(plan.vanished, prune)
    logger.info(f"nothing to do: all {len(plan.asked)} videos are in {out}, unchanged")
    return out


def _on_ray(
    address: str,
    job: tuple[Request, str, str, bool, bool, float, float],
    plan: Plan,
    out: Path,
    prune: bool,
    on_progress: Callable[[ExtractProgress], None],
) -> Path:
    from svb.extract.together.ray_actor import Job
    from svb.extract.together.ray_run import extract_on_ray

    sentence = extract_on_ray(
        address,
        Job(*job),
        plan,
        out,
        prune=prune,
        versions=_versions(),
        on_progress=on_progress,
    )
    _tell_of_vanished(plan.vanished, prune)
    logger.info(sentence)
    return out


def _remove(vanished: Sequence[VideoRecord], writer: FeatureStoreWriter) -> None:
    for record in vanished:
        writer.remove(record)
    writer.publish()


def _tell_of_known(counts: Counts) -> None:
    if counts.renamed or counts.duplicates:
        logger.info(
            f"not decoded, because their content is known: {counts.renamed} renamed, {counts.duplicates} duplicates"
        )


def _tell_of_vanished(vanished: Sequence[VideoRecord], prune: bool) -> None:
    if vanished:
        done = "taken out of the store" if prune else "their features are kept; --prune takes them out of the store"
        logger.info(f"{len(vanished)} files are gone, first {vanished[0].source_path}: {done}")


def _own_device(name: str, rank: tuple[int, int] | None) -> str:
    """Return the device of one of several processes of a machine: each takes a GPU where there are any."""
    local = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID")
    if name != "auto" or rank is None or local is None:
        return name
    import torch

    gpus = torch.cuda.device_count()
    return f"cuda:{int(local) % gpus}" if gpus else "cpu"


def _versions() -> dict[str, str]:
    names = (
        "svb-video",
        "torch",
        "torchvision",
        "timm",
        "open_clip_torch",
        "av",
        "imageio-ffmpeg",
        "h5py",
        "numpy",
    )
    return {name: version(name) for name in names}
