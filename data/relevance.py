"""How relevant is a video to a caption? Three sources: a group of videos, shared words, or a file of judgements.

A relevance is a `(C, V)` matrix of numbers from 0 that is computed block by block, because the matrix of 200,000
captions and 10,000 videos would take 8 GB.

IoU, the share of common words, is that of Wray, Doughty and Damen, *On Semantic Similarity in Video Retrieval*
(CVPR 2021), section 4: |A and B| / |A or B|, and 0 where both are empty.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from svb.config import fingerprint
from svb.data.caption_table import CaptionTable
from svb.data.caption_words import content_words, synsets, verbs_and_nouns
from svb.errors import InputError, UsageError

OVER = {"max": "the best of the video's captions", "mean": "the mean of the video's captions"}
TEXT_SOURCES = {
    "words": "IoU of content words",
    "verbs-nouns": "half the IoU of verbs plus half the IoU of nouns, as spaCy tags and lemmatises them",
    "synsets": "half the IoU of WordNet's synsets of verbs plus half that of nouns, as spaCy and Lesk find them",
}
# Numbers of a dense block: 8 MB of float32, which stay in the cache from step to step. 64 MB take twice as long.
_BLOCK_SIZE = 2**21


class Relevance(Protocol):
    """The relevance of C captions and V videos.

    Attributes:
        name: What the user asked for, such as `words`.
        description: How it is counted, for people.
        fingerprint: Equal for equal relevances.
    """

    @property
    def name(self) -> str: ...

    @property
    def description(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...

    def block(self, captions: slice, videos: slice) -> NDArray[np.float32]:
        """Return the `(c, v)` relevance of some captions and videos, finite and at least 0."""

    def judged(self, captions: slice, videos: slice) -> NDArray[np.bool_] | None:
        """Return the `(c, v)` pairs that somebody judged; None if every pair has a relevance."""


@dataclass(frozen=True)
class GroupRelevance:
    """1 where a video is in the group of the caption's own video, else 0.

    Attributes:
        groups: `(V,)` number of each video's group.
        caption_video: `(C,)` column of each caption's own video.
    """

    groups: NDArray[np.int64]
    caption_video: NDArray[np.int64]
    name: str
    description: str
    fingerprint: str

    def block(self, captions: slice, videos: slice) -> NDArray[np.float32]:
        of_captions = self.groups[self.caption_video[captions]]
        is_same: NDArray[np.bool_] = of_captions[:, None] == self.groups[videos][None, :]
        return is_same.astype(np.float32)

    def judged(self, captions: slice, videos: slice) -> None:
        return None


@dataclass(frozen=True)
class TextRelevance:
    """Mean IoU of one or several kinds of words, between a caption and the captions of a video.

    Attributes:
        kinds: A `(C, words)` matrix of 0 and 1 for each kind of words, such as verbs; captions of one video are
            next to each other.
        begins: `(V + 1,)` the first row of each video's captions.
        place: `(C,)` the row of each caption.
        over: `max` or `mean` over the captions of a video.
    """

    kinds: tuple[scipy.sparse.csr_array, ...]
    begins: NDArray[np.int64]
    place: NDArray[np.int64]
    over: str
    name: str
    description: str
    fingerprint: str

    def block(self, captions: slice, videos: slice) -> NDArray[np.float32]:
        first, stop, _ = videos.indices(len(self.begins) - 1)
        begin, end = self.begins[first], self.begins[stop]
        rows, offsets = self.place[captions], self.begins[first:stop] - begin
        others = [(kind[:, begin:end], sizes[begin:end]) for kind, sizes in self._transposed]
        relevance = np.empty((len(rows), stop - first), np.float32)
        step = max(1, _BLOCK_SIZE // max(1, end - begin))
        for at in range(0, len(rows), step):
            own = rows[at : at + step]
            ious = [_iou(kind[own], *other) for kind, other in zip(self.kinds, others, strict=True)]
            shared = np.add.reduce(ious) / np.float32(len(ious)) if len(ious) > 1 else ious[0]
            if self.over == "max":
                relevance[at : at + step] = np.maximum.reduceat(shared, offsets, axis=1)
            else:
                counts = np.diff(self.begins[first : stop + 1])
                relevance[at : at + step] = np.add.reduceat(shared, offsets, axis=1) / counts
        return relevance

    @cached_property
    def _transposed(self) -> list[tuple[scipy.sparse.csr_array, NDArray[np.float32]]]:
        """The `(words, C)` matrix of each kind, and each caption's number of words."""
        return [(kind.T.tocsr(), np.diff(kind.indptr).astype(np.float32)) for kind in self.kinds]

    def among(self, captions: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the `(c, c)` IoU of single captions with each other, without other captions of their videos."""
        rows = [kind[self.place[captions]] for kind in self.kinds]
        ious = [_iou(kind, kind.T.tocsr(), np.diff(kind.indptr).astype(np.float32)) for kind in rows]
        among: NDArray[np.float32] = np.mean(ious, axis=0)
        return among

    def judged(self, captions: slice, videos: slice) -> None:
        return None


@dataclass(frozen=True)
class JudgedRelevance:
    """What people said of some pairs; a pair that nobody judged counts 0.

    Attributes:
        gains: `(C, V)` sparse relevances.
        pairs: `(C, V)` sparse, 1 at a judged pair.
    """

    gains: scipy.sparse.csr_array
    pairs: scipy.sparse.csr_array
    name: str
    description: str
    fingerprint: str

    def block(self, captions: slice, videos: slice) -> NDArray[np.float32]:
        block: NDArray[np.float32] = self.gains[captions][:, videos].toarray()
        return block

    def judged(self, captions: slice, videos: slice) -> NDArray[np.bool_]:
        is_judged: NDArray[np.bool_] = self.pairs[captions][:, videos].toarray() > 0
        return is_judged


def _iou(
    words: scipy.sparse.csr_array, others: scipy.sparse.csr_array, sizes: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Return the `(A, B)` IoU of A captions and B others.

    Args:
        words: `(A, words)` of 0 and 1.
        others: `(words, B)`.
        sizes: `(B,)` number of words of the others.
    """
    both = words @ others
    own_sizes = np.diff(words.indptr).astype(np.float32)
    both.data /= np.repeat(own_sizes, np.diff(both.indptr)) + sizes[both.indices] - both.data
    iou: NDArray[np.float32] = both.toarray()
    return iou


def _content_words(captions: Sequence[str]) -> list[list[set[str]]]:
    return [[content_words(caption) for caption in captions]]


_WORDS_OF = {"words": _content_words, "verbs-nouns": verbs_and_nouns, "synsets": synsets}


def words_relevance(
    captions: Sequence[str], caption_video: NDArray[np.int64], num_videos: int, name: str = "words"
) -> TextRelevance:
    """Return the relevance by the words that captions share.

    Args:
        captions: C sentences.
        caption_video: `(C,)` column of each caption's own video.
        num_videos: V; every video has at least one caption.
        name: A key of `TEXT_SOURCES`; with `:mean` the mean over a video's captions instead of the maximum.

    Raises:
        UsageError: What finds verbs, nouns and synsets is not installed.
    """
    source, _, over = name.partition(":")
    over = over or "max"
    kinds = _WORDS_OF[source](captions)
    order = np.argsort(caption_video, kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    counts = np.bincount(caption_video, minlength=num_videos)
    said = [[sorted(words) for words in kind] for kind in kinds]
    return TextRelevance(
        tuple(_matrix([kind[row] for row in order.tolist()]) for kind in kinds),
        np.concatenate([[0], counts.cumsum()]),
        place,
        over,
        name,
        f"{TEXT_SOURCES[source]}, {OVER[over]}",
        fingerprint({"name": name, "words": said, "videos": caption_video.tolist()}),
    )


def _matrix(word_sets: Sequence[Collection[str]]) -> scipy.sparse.csr_array:
    column: dict[str, int] = {}
    columns = [column.setdefault(word, len(column)) for words in word_sets for word in sorted(words)]
    ends = np.cumsum([0, *map(len, word_sets)])
    ones = np.ones(len(columns), np.float32)
    return scipy.sparse.csr_array(
        (ones, np.array(columns, np.int32), ends), shape=(len(word_sets), max(1, len(column)))
    )


def group_relevance(
    table: CaptionTable, video_ids: Sequence[str], caption_video: NDArray[np.int64]
) -> GroupRelevance:
    """Return the relevance by the column `group` of the caption table.

    Args:
        table: Captions of at least the videos.
        video_ids: V ids.
        caption_video: `(C,)` column of each measured caption's own video.

    Raises:
        InputError: The table has no groups, a video has none or two, or all videos are in one.
    """
    if not any(table.groups):
        raise InputError(
            "the captions have no column group - add one that names the videos that mean the same, and make the "
            "caption features again with `svb captions`; or measure with --relevance words"
        )
    group_of: dict[str, str] = {}
    wanted = set(video_ids)
    for video_id, group in zip(table.video_ids, table.groups, strict=True):
        if video_id not in wanted:
            continue
        if group_of.setdefault(video_id, group) != group:
            raise InputError(
                f"video {video_id!r} is in the groups {group_of[video_id]!r} and {group!r} - expected one group "
                "per video, the same in all of its captions"
            )
    without = [video_id for video_id in video_ids if not group_of.get(video_id)]
    if without:
        raise InputError(
            f"{len(without)} of {len(video_ids)} videos have an empty group, first {without[0]!r} - give every "
            "video a group; one that is alone needs a group of its own"
        )
    number = {group: row for row, group in enumerate(dict.fromkeys(group_of[v] for v in video_ids))}
    if len(number) == 1:
        raise InputError(
            f"all {len(video_ids)} videos are in the group {group_of[video_ids[0]]!r}, so every order of them is "
            "right - expected at least two groups in the measured split"
        )
    return GroupRelevance(
        np.array([number[group_of[video_id]] for video_id in video_ids]),
        caption_video,
        "group",
        "1 where the videos share a group of the caption table, else 0",
        fingerprint({"name": "group", "groups": [group_of[video_id] for video_id in video_ids]}),
    )


def relevance_name(option: str) -> str:
    """Return the name of a relevance in outputs: what `--relevance` says, for a file its name without folders."""
    return option if option == "group" or option.partition(":")[0] in TEXT_SOURCES else Path(option).name


def make_relevance(
    name: str,
    table: CaptionTable,
    *,
    captions: Sequence[str],
    caption_ids: Sequence[str],
    video_ids: Sequence[str],
    caption_video: NDArray[np.int64],
) -> Relevance:
    """Return the relevance that `--relevance` names.

    Args:
        name: `group`, a key of `TEXT_SOURCES` with or without `:mean`, or a file of judgements.
        table: The whole caption table.
        captions: C measured sentences.
        caption_ids: The ids of the captions.
        video_ids: V ids, each with at least one caption.
        caption_video: `(C,)` column of each caption's own video.

    Raises:
        InputError: The groups or the file cannot be used.
        UsageError: The name is unknown, or an extra package is not installed.
    """
    if name == "group":
        return group_relevance(table, video_ids, caption_video)
    source, colon, over = name.partition(":")
    if source in TEXT_SOURCES and (not colon or over in OVER):
        return words_relevance(captions, caption_video, len(video_ids), name)
    from svb.data.judgements import JUDGEMENT_SUFFIXES, read_judgements

    if Path(name).suffix.lower() not in JUDGEMENT_SUFFIXES and not Path(name).exists():
        raise UsageError(
            f"unknown relevance {name!r} - expected group, {', '.join(TEXT_SOURCES)}, one of these with :mean, or "
            f"a {', '.join(JUDGEMENT_SUFFIXES)} file of judgements"
        )
    judged = read_judgements(Path(name), table, caption_ids, video_ids)
    gains, pairs = (
        scipy.sparse.csr_array(
            (values.astype(np.float32), (judged.rows, judged.columns)), shape=(len(caption_ids), len(video_ids))
        )
        for values in (judged.values, np.ones(len(judged.values)))
    )
    return JudgedRelevance(gains, pairs, relevance_name(name), judged.description, judged.fingerprint)
