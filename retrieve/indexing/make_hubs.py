"""Hubs at `svb index`: what a bank of training captions says about the videos, and whether it helps on val.

`svb index` calls, before it commits:

    hubs, normalise = index_hubs(
        out, segments, previous=old_manifest["hubs"], table=captions.table, splits=positions_of_splits(...),
        embed=lambda positions: embedder.embed_captions(torch.from_numpy(captions.features[positions])),
        model_fingerprint=embedder.fingerprint,
    )
    manifest["hubs"], manifest["normalise"] = hubs, normalise

`normalise` is None where there is no bank, else what `hubs_on_val` beside this file measured, and the bank's size.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svb.config import fingerprint
from svb.data.caption_table import CaptionTable
from svb.errors import StoreError
from svb.retrieve.answer import RANKED_BY
from svb.retrieve.indexing.hubs_on_val import Val, describe, measure_on_val
from svb.retrieve.indexing.video_scores import chunks, video_scores
from svb.retrieve.measure.hub_normalisation import BLOCK, QB_NORM_SCALE, query_bank
from svb.retrieve.searching.catalog import Catalog
from svb.retrieve.searching.hubs import LOWEST, SegmentHubs, combine, read_hubs
from svb.retrieve.stored.manifest import publish_part
from svb.retrieve.stored.segment import Segment

logger = logging.getLogger(__name__)

BANK_CAPTIONS = 10_000
VAL_CAPTIONS = 2_000

Embed = Callable[[list[int]], NDArray[np.float32]]


@dataclass(frozen=True)
class Bank:
    """Q captions that stand for what people ask.

    Attributes:
        embeddings: `(Q, D)` float32, L2-normalised.
        video_ids: Whose captions they are.
        key: Of their words and the model; banks of equal keys are the same.
    """

    embeddings: NDArray[np.float32]
    video_ids: list[str]
    key: str

    def __len__(self) -> int:
        return len(self.embeddings)

    def only(self, captions: NDArray[np.integer]) -> Bank:
        """Return the bank of some of its captions."""
        return replace(
            self, embeddings=self.embeddings[captions], video_ids=[self.video_ids[caption] for caption in captions]
        )


def index_hubs(
    out: Path,
    segments: Sequence[Segment],
    *,
    previous: Sequence[Mapping[str, Any]],
    table: CaptionTable,
    splits: Mapping[str, list[int]],
    embed: Embed,
    model_fingerprint: str,
) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """Publish the hubs of every segment that has none yet, and measure on val whether they help.

    Args:
        out: The index's folder.
        segments: All of the index, in the manifest's order, written.
        previous: The entries of the manifest that is to be replaced.
        table: The captions.
        splits: Positions in the table of the captions of `train`, the bank, and of `val`.
        embed: Returns `(n, D)` embeddings of the captions at some positions.
        model_fingerprint: Of the model that embeds them and has embedded the videos.

    Returns:
        The manifest's `hubs` and `normalise`; none without a train split.
    """
    chosen = _sample(table, splits["train"], BANK_CAPTIONS)
    if not chosen or not segments:
        return [], None
    captions = [[table.video_ids[position], table.captions[position]] for position in chosen]
    key = fingerprint({"model": model_fingerprint, "captions": captions, "scale": QB_NORM_SCALE})
    bank = Bank(embed(chosen), [video_id for video_id, _ in captions], key)
    known = {entry["segment"]: entry for entry in previous if entry["bank"] == key}
    entries = [_publish(out, segment, bank, known.get(segment.key)) for segment in segments]
    banks = {by: combine([read_hubs(out, entry, by) for entry in entries], QB_NORM_SCALE) for by in RANKED_BY}
    live = Catalog(segments).live_rows
    of_live = [position for position in splits["val"] if table.video_ids[position] in live]
    asked = _sample(table, of_live, VAL_CAPTIONS)
    val = Val(embed(asked), [table.video_ids[position] for position in asked]) if asked else None
    normalise = {**measure_on_val(segments, banks, val), "scale": QB_NORM_SCALE, "bank": len(bank)}
    logger.info(describe(normalise))
    return entries, normalise


def segment_hubs(segment: Segment, bank: Bank, by: str, scale: float = QB_NORM_SCALE) -> SegmentHubs:
    """Sum up what a bank says about a segment's V videos."""
    best, log_sums = _Best(len(bank)), np.empty(segment.num_videos)
    for begin, end in chunks(segment, by):
        log_sums[begin:end] = query_bank(_blocks(segment, begin, end, bank, by, best), scale).log_sums
    return SegmentHubs(log_sums, best.scores, best.rows())


def without_deleted(hubs: SegmentHubs, segment: Segment, bank: Bank, by: str) -> SegmentHubs:
    """Return hubs of a segment after more of its videos were deleted.

    Sums are of each video alone and stay; a caption whose best video has gone needs the best of the others.
    """
    gone = np.isin(hubs.best_rows[:, 1], segment.deleted)
    captions = np.unique(hubs.best_rows[gone, 0])
    if not captions.size:
        return hubs
    best, scores = _Best(len(captions)), hubs.best_scores.copy()
    for begin, end in chunks(segment, by):
        for _ in _blocks(segment, begin, end, bank.only(captions), by, best):
            pass
    scores[captions] = best.scores
    found = best.rows()
    found[:, 0] = captions[found[:, 0]]
    kept = hubs.best_rows[~np.isin(hubs.best_rows[:, 0], captions)]
    return replace(hubs, best_scores=scores, best_rows=np.concatenate([kept, found]))


class _Best:
    """The best score of each of Q captions so far, and every video that has it."""

    def __init__(self, num_captions: int) -> None:
        self.scores = np.full(num_captions, LOWEST, np.float32)
        self._found: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]] = []

    def see(self, first: int, scores: NDArray[np.float32], begin: int) -> None:
        """Take note of the `(B, v)` scores of the captions from `first` on with the videos from `begin` on."""
        so_far, best = self.scores[first : first + len(scores)], scores.max(axis=1)
        captions, videos = np.nonzero((scores == np.maximum(best, so_far)[:, None]) & (scores > LOWEST))
        self._found.append((first + captions, begin + videos, scores[captions, videos]))
        np.maximum(so_far, best, out=so_far)

    def rows(self) -> NDArray[np.int64]:
        """Return `(N, 2)` captions and rows of the videos that have their best score."""
        if not self._found:
            return np.empty((0, 2), np.int64)
        captions, videos, scores = (np.concatenate(column) for column in zip(*self._found, strict=True))
        rows: NDArray[np.int64] = np.stack([captions, videos], axis=1)[scores == self.scores[captions]]
        return rows


def _blocks(
    segment: Segment, begin: int, end: int, bank: Bank, by: str, best: _Best
) -> Iterator[NDArray[np.float32]]:
    """Yield `(B, v)` scores of the bank with the videos `[begin, end)`, and have `best` take note of them."""
    rows = {segment.video_ids[row]: row - begin for row in range(begin, end)}
    own = np.array([rows.get(video_id, -1) for video_id in bank.video_ids], np.int64)
    deleted = segment.deleted[(segment.deleted >= begin) & (segment.deleted < end)] - begin
    for first in range(0, len(bank), BLOCK):
        scores = video_scores(segment, begin, end, bank.embeddings[first : first + BLOCK], by)
        captions = np.flatnonzero(own[first : first + BLOCK] >= 0)
        scores[captions, own[first + captions]] = LOWEST
        live = scores
        if deleted.size:
            live = scores.copy()
            live[:, deleted] = LOWEST
        best.see(first, live, begin)
        yield scores


def _publish(out: Path, segment: Segment, bank: Bank, entry: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the entry of a segment's hubs: that of before where it still holds, else a new part's."""
    before = _read_all(out, entry)
    hubs = {
        by: without_deleted(before[by], segment, bank, by) if before else segment_hubs(segment, bank, by)
        for by in RANKED_BY
    }
    if entry is not None and all(hubs[by] is before.get(by) for by in RANKED_BY):
        return dict(entry)

    def write(folder: Path) -> None:
        for by in RANKED_BY:
            for name in ("log_sums", "best_scores", "best_rows"):
                np.save(folder / f"{by}_{name}.npy", getattr(hubs[by], name))

    return {**publish_part(out, "hubs", write), "segment": segment.key, "bank": bank.key}


def _read_all(out: Path, entry: Mapping[str, Any] | None) -> dict[str, SegmentHubs]:
    """Return a part's hubs for each way of ranking; empty where there is no part, or a damaged one."""
    if entry is None:
        return {}
    try:
        return {by: read_hubs(out, entry, by) for by in RANKED_BY}
    except StoreError:
        return {}


def _sample(table: CaptionTable, positions: Sequence[int], size: int) -> list[int]:
    """Return at most `size` positions of different captions, the same ones as long as the captions are."""
    first = {table.captions[position]: position for position in reversed(positions)}
    # By a hash: few of those that were drawn give way when captions are added.
    drawn = sorted(first, key=lambda caption: hashlib.blake2b(caption.encode(), digest_size=8).digest())
    return [first[caption] for caption in drawn[:size]]
