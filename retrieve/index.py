"""`svb index`: a run or a store -> embeddings of every video and moment -> an index folder.

manifest.json     the commit point, written last, see `svb.retrieve.stored.manifest`
segments/<key>/   embeddings, see `svb.retrieve.stored.segment`; tombstones/<key>/ lists their deleted videos
captions/<key>/   pools of captions that answer a video or an image
speech/<key>/     what is said, see `svb.retrieve.stored.cues`
heads/<key>/      heads.safetensors: a run's heads, or a classifier's last layer with its class names' embeddings
text/<key>/       the text tower as ONNX, which embeds queries
confidence/<key>/ how sure an answer to a text is, see `svb.retrieve.stored.calibration`
metadata/<key>/   columns of a table, to show and to filter by
cache/            files that can be made again: FAISS files, words of the speech, query vectors, pictures

The steps of a run: compare the store with the index; copy renamed videos; embed new ones, a segment at a time, each
committed by itself; then merge small segments, and make the parts that depend on all of them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from svb.data.feature_store import FeatureStore
from svb.errors import InputError, Interrupted, StoreError
from svb.interrupts import deferred_interrupts
from svb.retrieve.indexing.index_config import IndexConfig, state_of
from svb.retrieve.indexing.index_parts import IndexParts, keep_scan_within_budget, keep_words_of
from svb.retrieve.indexing.index_plan import IndexPlan, plan_index
from svb.retrieve.indexing.index_source import IndexModel, IndexSource
from svb.retrieve.indexing.index_writer import IndexWriter, copy_videos, writing
from svb.retrieve.indexing.sidecars import SidecarWatch
from svb.retrieve.stored.segment import MomentWindows

logger = logging.getLogger(__name__)

# How often a run begins again because `svb extract` merged shards that it was about to read.
MAX_TRIES = 5
# A thousand videos of an hour have two million moments.
COPIED_VIDEOS = 1024
DEFAULT_WATCH_SECONDS = 10.0


def index(
    source: Path | str,
    out: Path | str,
    config: IndexConfig | None = None,
    *,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Make or update an index of every video and moment of a store, embedded by a run's heads or zero-shot.

    Videos that the index has already are not embedded again. A search sees the whole index before or after each
    commit, and a run that was killed goes on from its last one.

    Args:
        source: A run, or a feature store to be searched without training.
        out: The index's folder.
        config: The options; by default the index keeps its own.
        on_progress: Called with the number of videos embedded, and of all to embed.

    Returns:
        `out`.

    Raises:
        InputError: The store has no usable video, `out` is a file, or a path is not UTF-8.
        MismatchError: The index was made with another model or other moments; or store or captions were made with
            other settings than the run's.
        StoreError: The index or the store is damaged, or another process is writing to the index.
        Interrupted: SIGINT or SIGTERM arrived; the index is whole.
    """
    source, out, config = Path(source), Path(out), config or IndexConfig()
    _require_utf8([source, out, config.store, config.captions, config.metadata, config.transcripts, *config.pools])
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file - expected a folder for the index, new or old: name another with -o")
    job = _IndexRun(out, config, IndexModel(IndexSource(source, config)), on_progress)
    if config.watch:
        watch(job.run, job.watched, config.watch_seconds or DEFAULT_WATCH_SECONDS)
    else:
        job.run()
    return out


class _IndexRun:
    """One `svb index`: its options, and the steps of a run."""

    def __init__(
        self, out: Path, config: IndexConfig, model: IndexModel, on_progress: Callable[[int, int], None]
    ) -> None:
        self.out, self.config, self.model = out, config, model
        self._on_progress = on_progress

    def watched(self) -> list[Any]:
        """Return a value that changes when there may be work to do."""
        files = [*self.config.pools, *([self.config.metadata] if self.config.metadata else [])]
        reads_none = self.config.sidecars is False and self.config.speech is False
        sidecars = [] if reads_none else self._sidecars.states()
        folder = self.config.transcripts
        transcripts = [] if folder is None else [state_of(path) for path in sorted(folder.rglob("*.vtt"))]
        return [*self.model.source.watched(files), sidecars, transcripts]

    @cached_property
    def _sidecars(self) -> SidecarWatch:
        return SidecarWatch(self.model.source.store_path)

    def run(self) -> None:
        """Update the index to its store."""
        self.model = self.model.up_to_date()
        if not (self.out / "manifest.json").exists():
            _require_videos(
                self.model.opened.store
            )  # so that a source that cannot be opened leaves no folder behind
        with writing(self.out):
            for left in reversed(range(MAX_TRIES)):
                store = FeatureStore(self.model.source.store_path)
                try:
                    self._update(store)
                    break
                except StoreError:
                    if not left or all(shard.path.exists() for shard in store.shards):
                        raise
        self.config = replace(self.config, rebuild=False)  # --watch rebuilds only once

    def _update(self, store: FeatureStore) -> None:
        out = self.out
        writer = IndexWriter(out, rebuild=self.config.rebuild)
        plan = plan_index(store.records, writer.segments, by_content="times" not in store.settings["sampling"])
        windows = self.config.windows(writer.before.get("moments"))
        if not writer.is_new:
            self.model.reuse(out, writer.draft)
        inputs = self.config.inputs(self.model.source.identity(store), writer.before.get("inputs", {}))
        remake = inputs != writer.draft.get("inputs")
        self._require_fitting(writer, store, windows, inputs)
        logger.info(str(plan))
        if plan.gone and not self.config.prune:
            logger.info(f"{len(plan.gone):,} videos that are not in the store stay - remove them with --prune")
        writer.draft |= {"store": str(store.path.absolute()), "inputs": inputs}
        parts = IndexParts(out, writer.draft, self.model, self.config)
        if parts.drop_damaged() or remake:
            parts.start()
        self._copy(plan, store, writer)
        self._embed(plan, store, writer, windows)
        if self.config.prune:
            writer.delete(plan.gone.values())
        parts.update_sidecars(writer.segments, lambda: self._commit(writer))
        parts.update_speech(writer.segments, lambda: self._commit(writer), self._on_progress)
        writer.merge()
        if not parts.are_finished:
            parts.finish(writer.segments)
            parts.note_finished()
        parts.mirror(self._on_progress)
        writer.commit()
        keep_scan_within_budget(out, writer.draft, writer.segments)
        keep_words_of(out, writer.draft)
        parts.remove_gone()
        logger.info(_summary(out, writer.draft))

    def _require_fitting(
        self, writer: IndexWriter, store: FeatureStore, windows: MomentWindows, inputs: dict[str, Any]
    ) -> None:
        """Refuse another model or other moments than the index has; a new index has none."""
        moments = {"seconds": windows.seconds, "stride_seconds": windows.stride_seconds}
        if writer.is_new:
            _require_videos(store)
            embedder = self.model.embedder
            writer.draft |= {"model": embedder.model, "model_fingerprint": embedder.fingerprint, "moments": moments}
        elif inputs["source"] == writer.draft["inputs"]["source"]:
            writer.require_model(writer.draft["model"], moments)  # the model is the same, without loading it
        else:
            writer.require_model(self.model.embedder.model, moments)

    def _copy(self, plan: IndexPlan, store: FeatureStore, writer: IndexWriter) -> None:
        video_ids = sorted(plan.copies)
        for begin in range(0, len(video_ids), COPIED_VIDEOS):
            batch = video_ids[begin : begin + COPIED_VIDEOS]
            records = [store.records[video_id] for video_id in batch]
            writer.add(copy_videos(writer.segments, [plan.copies[video_id] for video_id in batch], records))
            self._replace(plan, batch, writer)

    def _embed(self, plan: IndexPlan, store: FeatureStore, writer: IndexWriter, windows: MomentWindows) -> None:
        todo, done = plan.to_embed, 0
        if not todo:
            return
        from svb.retrieve.indexing.embed_segment import embed_segment, embedding_batches

        embedder = self.model.embedder
        with deferred_interrupts() as interrupted:
            for batch in embedding_batches(store, embedder.backbone, todo, windows):
                self._on_progress(done, len(todo))
                writer.add(embed_segment(store, embedder, windows, self.model.device, batch))
                self._replace(plan, batch, writer)
                done += len(batch)
                if interrupted():
                    break
            self._on_progress(done, len(todo))
            if interrupted():
                raise Interrupted(
                    interrupted(),
                    f"interrupted - {done} of {len(todo)} videos of this run are in {self.out}; run the same "
                    "command again to go on",
                )

    def _replace(self, plan: IndexPlan, batch: Sequence[str], writer: IndexWriter) -> None:
        """Delete the rows that added videos replace, and commit both together."""
        writer.delete(plan.replaced[video_id] for video_id in batch if video_id in plan.replaced)
        self._commit(writer)

    def _commit(self, writer: IndexWriter) -> None:
        if not self.config.rebuild:
            writer.commit()


def _summary(out: Path, manifest: Mapping[str, Any]) -> str:
    said = "".join(
        f", {entry['cues']:,} lines that are said ({', '.join(entry['languages']) or 'in no named language'})"
        for entry in manifest["speech"]
        if entry["cues"]
    )
    return (
        f"{out}: {manifest['videos']:,} videos, {manifest['moments_total']:,} moments of "
        f"{manifest['moments']['seconds']:g} s, {manifest['model']['kind']}, segments: {len(manifest['segments'])}"
        f"{said}"
    )


def _require_videos(store: FeatureStore) -> None:
    if not store.video_ids:
        raise InputError(f"{store.path} has no video with features - `svb info --failures` says why")


def _require_utf8(paths: Sequence[Path | str | None]) -> None:
    """Refuse, before anything is made, paths that a manifest cannot hold or the tower's libraries cannot open."""
    for path in paths:
        try:
            str(Path(path or "").absolute()).encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"the path {str(path)!r} is not UTF-8, which an index cannot store - rename the file or folder"
            ) from error


# --- --watch

# After a failure that may pass, such as a full disk, the next try comes after this time.
RETRY_SECONDS = 60.0
# Longest time until a signal is noticed.
SLICE_SECONDS = 0.2


def watch(
    work: Callable[[], None],
    watched: Callable[[], object],
    seconds: float,
) -> None:
    """Do work, and do it again after every change, until SIGINT or SIGTERM.

    A failure of the first run is raised. Later failures (a damaged or missing file, a full disk, another writer)
    are logged, and the work is tried again after the next change or a minute. Errors that the user must decide
    about, such as another model, end it.

    Args:
        work: What to do.
        watched: Returns a value that differs after a change.
        seconds: Time between two checks.

    Raises:
        Interrupted: A signal arrived, which is the usual end; nothing is left half-done.
    """
    seen = watched()
    work()
    retry_at: float | None = None
    with deferred_interrupts() as interrupted:
        logger.info(f"watching: looking for changes every {seconds:g} s")
        while _wait(seconds, interrupted):
            try:
                now = watched()
                if now == seen and (retry_at is None or time.monotonic() < retry_at):
                    continue
                seen, retry_at = now, None
                work()
            except (StoreError, InputError, OSError) as error:
                if retry_at is not None and time.monotonic() < retry_at:
                    continue  # reported already
                retry_at = time.monotonic() + RETRY_SECONDS
                logger.info(f"{error} - trying again when something changes, or in {RETRY_SECONDS:g} s")
        raise Interrupted(interrupted(), "stopped watching; run the same command again to go on")


def _wait(seconds: float, interrupted: Callable[[], int]) -> bool:
    """Wait, and return whether to go on: False as soon as a signal comes."""
    until = time.monotonic() + seconds
    while not interrupted() and time.monotonic() < until:
        time.sleep(min(SLICE_SECONDS, max(until - time.monotonic(), 0)))
    return not interrupted()
