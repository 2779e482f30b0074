"""Frames in, records and rows out: what passes from the decode pool through the backbones to the writer."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from svb.data.feature_store import FeatureStore
from svb.data.feature_store_writer import FeatureStoreWriter
from svb.data.rows import USABLE, VideoRecord, VideoRows
from svb.extract.backbones.backbone import Backbone
from svb.extract.compute.packing import Packer, to_rows, with_memory
from svb.extract.compute.transform import Uploader
from svb.extract.decode.decoder import FrameChunk, VideoProperties
from svb.extract.plan import Plan, PlannedVideo
from svb.extract.pool.worker import DUPLICATE, Alive, Finished, Message, Started

Content = tuple[VideoRecord, Mapping[str, VideoRows]]


class Records(Protocol):
    """What takes records and rows: a store's writer, or a list."""

    def add(self, record: VideoRecord, rows: Mapping[str, VideoRows]) -> None:
        """Take one finished video; `rows` by backbone, empty for a failed one."""


@dataclass
class _InFlight:
    """A video between its first message and its record."""

    planned: PlannedVideo
    properties: VideoProperties | None = None
    finished: Finished | None = None
    has_frames: bool = False


@dataclass
class Counts:
    """What has become of the videos so far."""

    videos: int = 0
    frames: int = 0
    bytes: int = 0
    renamed: int = 0
    duplicates: int = 0


class Pipeline:
    """Takes every message of a decode pool, in one process.

    Args:
        networks: The backbones; each sees every frame.
        batch_size: B, of every batch.
        keep_partial: Keep a video that decodes in part; otherwise it has failed.
        contents: What is known of videos whose content was seen before.
        executor: Runs batches on the CPU's cores.
        ahead: How many batches of a backbone may be under way.
    """

    def __init__(
        self,
        networks: Sequence[Backbone],
        batch_size: int,
        records: Records,
        *,
        keep_partial: bool = True,
        contents: Contents | None = None,
        executor: Executor | None = None,
        ahead: int = 1,
    ) -> None:
        self.counts = Counts()
        self._packers = [Packer(network, batch_size, executor=executor, ahead=ahead) for network in networks]
        self._uploader = Uploader(networks[0].device)
        self._records = records
        self._keep_partial = keep_partial
        self._contents = contents
        self._in_flight: dict[int, _InFlight] = {}

    def take(self, position: int, message: Message) -> None:
        """Take one message, and pass on the records of videos that are complete with it."""
        if isinstance(message, Alive):
            self.settle()
            return
        if isinstance(message, Started):
            self._in_flight[position] = _InFlight(message.video)
            return
        video = self._in_flight[position]
        if isinstance(message, VideoProperties):
            video.properties = message
        elif isinstance(message, FrameChunk):
            video.has_frames = True
            run_packers(self._packers, self._uploader, position, message)
            self.counts.frames += len(message.frames)
        elif isinstance(message, Finished):
            video.finished = message
            for packer in self._packers:
                if video.has_frames:
                    packer.end(position)
            self._pass_on_complete()

    def settle(self) -> None:
        """Pass on what only waited for batches that have ended meanwhile; waiting here would idle the cores."""
        for packer in self._packers:
            packer.fetch_done()
        self._pass_on_complete()

    @property
    def only_waits(self) -> bool:
        """Whether there are videos, and each of them only waits for a batch to fill."""
        return bool(self._in_flight) and all(video.finished is not None for video in self._in_flight.values())

    def finish(self) -> None:
        """Run the padded last batches and pass on what waited for them; videos still decoding are dropped."""
        for packer in self._packers:
            packer.flush()
        self._pass_on_complete()

    def _pass_on_complete(self) -> None:
        """Pass on every complete video; a copy is complete once its original is, which may come after it."""
        num_before = -1
        while len(self._in_flight) != num_before:
            num_before = len(self._in_flight)
            self._pass_on_once()

    def _pass_on_once(self) -> None:
        for position, video in list(self._in_flight.items()):
            if video.finished is None:
                continue
            if video.finished.status == DUPLICATE:
                if self._pass_on_duplicate(video.planned, video.finished):
                    del self._in_flight[position]
                continue
            failed = not video.has_frames or not self._is_kept(video.finished)
            if not failed and not all(packer.is_complete(position) for packer in self._packers):
                continue
            self._pass_on(position, video, video.finished, failed)
            del self._in_flight[position]

    def _is_kept(self, finished: Finished) -> bool:
        return finished.status == "ok" or (finished.status == "partial" and self._keep_partial)

    def _pass_on(self, position: int, video: _InFlight, finished: Finished, failed: bool) -> None:
        rows: dict[str, VideoRows] = {}
        status, error = finished.status, finished.error
        if status == "partial" and not self._keep_partial:
            status = finished.cause
        for packer in self._packers:
            if failed:
                packer.forget(position)
                continue
            features, times_seconds = packer.take(position)
            stored = to_rows(features, times_seconds)
            if stored is None:
                status, error = "nonfinite_features", _worst(packer.backbone.name, features)
            else:
                rows[packer.backbone.name] = stored
        if status not in USABLE:
            rows = {}
        if self._contents is not None and not finished.content_hash:
            # A worker that was killed had told the content it worked on.
            finished = replace(finished, content_hash=self._contents.claimed_by(position))
        record = _record(video.planned, video.properties, finished, status, error)
        self._add(record, rows, video.planned)
        if self._contents is not None:
            self._contents.settled(record)

    def _pass_on_duplicate(self, planned: PlannedVideo, finished: Finished) -> bool:
        assert self._contents is not None
        content = self._contents.of(planned, finished.content_hash)
        if content is None:
            return False  # the other one is still being decoded
        original, rows = content
        record = replace(
            original,
            video_id=planned.video_id,
            source_path=str(planned.path),
            mtime_ns=finished.mtime_ns,
            size_bytes=finished.size_bytes,
            elapsed_seconds=finished.elapsed_seconds,
            tries=planned.tries + 1,
        )
        self._add(record, rows, planned)
        if self._contents.take_place_of(original, planned):
            self.counts.renamed += 1
        elif original.video_id != planned.video_id:
            self.counts.duplicates += 1
        return True

    def _add(self, record: VideoRecord, rows: Mapping[str, VideoRows], planned: PlannedVideo) -> None:
        self._records.add(record, rows)
        self.counts.videos += 1
        self.counts.bytes += planned.size_bytes


class Contents:
    """Knows which contents a store holds or a run works on, so that each is decoded once.

    Args:
        held: Usable records of the store whose files have not changed.
        touched: Usable records whose files may have changed: they are extracted again unless the content is the
            same.
        vanished: Usable records whose files are gone: a file of the same content was renamed.
        read: Returns a video's record and rows, from the store or from what was added to it since.
        remove: Takes a video out of the store.
    """

    def __init__(
        self,
        held: Iterable[VideoRecord],
        touched: Iterable[VideoRecord],
        vanished: Iterable[VideoRecord],
        read: Callable[[str], Content],
        remove: Callable[[VideoRecord], None],
    ) -> None:
        self._vanished = {record.video_id: record for record in vanished}
        self._owner = {record.content_hash: record.video_id for record in held}
        # A file that was renamed takes its features along, even if a copy of it is known too.
        self._owner.update({record.content_hash: record.video_id for record in self._vanished.values()})
        self._own_hash = {record.video_id: record.content_hash for record in touched}
        self._claims: dict[str, int] = {}
        self._read, self._remove = read, remove

    @classmethod
    def known(cls, store: FeatureStore, plan: Plan, retry: Collection[str], writer: FeatureStoreWriter) -> Contents:
        """Return what a store knows that a plan's videos go to; `retry` are statuses that count for nothing."""
        changing = {video.video_id for video in plan.todo} | {record.video_id for record in plan.vanished}
        usable = [record for record in store.records.values() if record.usable and record.status not in retry]
        return cls(
            held=[record for record in usable if record.video_id not in changing],
            touched=[record for record in usable if record.video_id in changing],
            vanished=plan.vanished,
            read=lambda video_id: writer.added(video_id) or (store.records[video_id], store.rows_of(video_id)),
            remove=writer.remove,
        )

    def is_wanted(self, position: int, video: PlannedVideo, content_hash: str) -> bool:
        """Tell whether to decode a content: it is neither held nor being decoded. Called from a thread."""
        if content_hash in self._owner or self._own_hash.get(video.video_id) == content_hash:
            return False
        return self._claims.setdefault(content_hash, position) == position

    def claimed_by(self, position: int) -> str:
        """Return the hash of the content that is decoded at a position; empty if it is not known."""
        return next((content_hash for content_hash, owner in self._claims.items() if owner == position), "")

    def settled(self, record: VideoRecord) -> None:
        """Note what became of a video that was decoded."""
        if self._claims.pop(record.content_hash, None) is not None:
            self._owner[record.content_hash] = record.video_id

    def of(self, video: PlannedVideo, content_hash: str) -> Content | None:
        """Return the record and rows of a content; None while it is still being decoded."""
        if self._own_hash.get(video.video_id) == content_hash:
            return self._read(video.video_id)
        video_id = self._owner.get(content_hash)
        return None if video_id is None else self._read(video_id)

    def take_place_of(self, original: VideoRecord, video: PlannedVideo) -> bool:
        """Take a video out of the store whose file was renamed to another's; returns whether it was."""
        vanished = self._vanished.pop(original.video_id, None)
        if vanished is None:
            return False
        self._owner[original.content_hash] = video.video_id
        self._remove(vanished)
        return True

    @property
    def vanished(self) -> list[VideoRecord]:
        """Videos whose files are gone and have not turned up under another name."""
        return list(self._vanished.values())


def run_packers(packers: Sequence[Packer], uploader: Uploader, position: int, chunk: FrameChunk) -> None:
    """Give every packer a chunk's frames; they share one upload, and those of one geometry share its squares."""
    transforms = [packer.backbone.transform for packer in packers]
    squares = with_memory(lambda: uploader.squares(chunk.frames, transforms), packers)
    for packer, transform in zip(packers, transforms, strict=True):
        packer.add(position, squares[transform.geometry], chunk.frame_times_seconds)


def _record(
    planned: PlannedVideo, properties: VideoProperties | None, finished: Finished, status: str, error: str
) -> VideoRecord:
    known = properties or VideoProperties(math.nan, math.nan, 0, 0, 0, "")
    return VideoRecord(
        video_id=planned.video_id,
        source_path=str(planned.path),
        size_bytes=finished.size_bytes,
        mtime_ns=finished.mtime_ns,
        content_hash=finished.content_hash,
        duration_seconds=finished.duration_seconds or known.duration_seconds,
        frame_rate=known.frame_rate,
        width_px=known.width_px,
        height_px=known.height_px,
        rotation_degrees=known.rotation_degrees,
        codec=known.codec,
        decoder=finished.decoder,
        status=status,
        error=error,
        elapsed_seconds=finished.elapsed_seconds,
        tries=planned.tries + 1,
    )


def _worst(backbone: str, features: NDArray[np.float32]) -> str:
    largest = np.abs(features).max()
    return f"{backbone} gave a value of {largest:g} - float16 holds finite values up to 65504"
