"""Data sets with their official annotation files and splits; one file each."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from svb.data.caption_table import SPLITS, CaptionTable, make_caption_table, split_contents
from svb.data.datasets import activitynet, didemo, lsmdc, msrvtt, msvd, vatex, youcook2
from svb.data.datasets.official import Annotations, KnownSplit
from svb.errors import InputError, UsageError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Dataset:
    """A data set that `svb captions --dataset` reads.

    Attributes:
        title: The data set's name in prose.
        protocols: The known splits by protocol; the first is the default.
        read: `read(annotations, protocol, splits) -> {split: {video_id: captions}}`; checks the ids.
        other_names: `other_names(split, video_ids) -> {video_id: names}` that the files may have instead.
    """

    title: str
    protocols: Mapping[str, Mapping[str, KnownSplit]]
    read: Callable[[Annotations, str, Sequence[str]], dict[str, dict[str, list[str]]]]
    other_names: Callable[[str, Sequence[str]], dict[str, list[str]]]


DATASETS = {
    "msrvtt": Dataset("MSR-VTT", msrvtt.PROTOCOLS, msrvtt.read, msrvtt.other_names),
    "msvd": Dataset("MSVD", msvd.PROTOCOLS, msvd.read, msvd.other_names),
    "vatex": Dataset("VATEX", vatex.PROTOCOLS, vatex.read, vatex.other_names),
    "activitynet": Dataset("ActivityNet", activitynet.PROTOCOLS, activitynet.read, activitynet.other_names),
    "lsmdc": Dataset("LSMDC", lsmdc.PROTOCOLS, lsmdc.read, lsmdc.other_names),
    "didemo": Dataset("DiDeMo", didemo.PROTOCOLS, didemo.read, didemo.other_names),
    "youcook2": Dataset("YouCook2", youcook2.PROTOCOLS, youcook2.read, youcook2.other_names),
}


@dataclass(frozen=True)
class OfficialCaptions:
    """A data set's captions under a protocol.

    Attributes:
        table: Its video_ids are those of the data set or of a store, its caption_ids those of the data set.
        dataset: The data set's name in DATASETS.
        protocol: The division into splits.
        splits: `split_contents` by the data set's own video_ids.
    """

    table: CaptionTable
    dataset: str
    protocol: str
    splits: dict[str, dict[str, Any]]


def read_dataset(
    name: str, folder: Path, *, protocol: str | None = None, splits: Collection[str] = ()
) -> OfficialCaptions:
    """Read a data set's official annotation files.

    Args:
        name: A name in DATASETS.
        folder: Holds the annotation files under their official names, as they are or in zip files.
        protocol: The data set's first one by default.
        splits: The splits to read; by default all that the protocol has.

    Raises:
        InputError: A file is missing, damaged, or not the official one; names the file.
        UsageError: The data set has no such protocol or split.
    """
    dataset = DATASETS[name]
    protocol = protocol or next(iter(dataset.protocols))
    if protocol not in dataset.protocols:
        raise UsageError(
            f"{dataset.title} has no protocol {protocol!r} - expected one of {', '.join(dataset.protocols)}"
        )
    known = dataset.protocols[protocol]
    unknown = [split for split in splits if split not in known]
    if unknown:
        raise UsageError(
            f"{dataset.title} {protocol} has no {unknown[0]} split - expected one of {', '.join(known)}"
            + ("; svb train puts one aside from train" if unknown[0] == "val" else "")
        )
    if not folder.is_dir():
        raise InputError(
            f"{folder} is not a folder - expected the one that holds {dataset.title}'s annotation files"
        )
    chosen = [split for split in SPLITS if split in known and (not splits or split in splits)]
    captions = dataset.read(Annotations(f"{dataset.title} {protocol}", folder), protocol, chosen)
    rows = [
        (f"{video_id}#{number}", video_id, caption.strip(), split)
        for split in chosen
        for video_id, sentences in captions[split].items()
        for number, caption in enumerate(sentences)
    ]
    empty = [caption_id for caption_id, _, caption, _ in rows if not caption]
    if empty:
        raise InputError(f"{folder}: caption {empty[0]!r} is empty - {dataset.title} has none; get the files again")
    table = make_caption_table(rows, has_split=True, source=str(folder))
    contents = split_contents(table)
    for split in chosen:
        _check(f"{dataset.title} {protocol}", split, known[split], contents[split])
    return OfficialCaptions(table, name, protocol, contents)


def _check(title: str, split: str, known: KnownSplit, found: Mapping[str, Any]) -> None:
    logger.info(
        f"{title} {split}: {found['videos']} videos, {found['captions']} captions, ids {found['video_ids_hash']}"
    )
    if known.num_captions not in (None, found["captions"]):
        raise InputError(
            f"{title} {split}: {found['captions']} captions, but the official files have {known.num_captions} - a "
            "file is cut short or altered; get it again"
        )
    if known.captions_hash in (None, found["captions_hash"]):
        return
    what = (
        f"{title} {split}: the videos are the official ones, but the captions are not, word for word (their hash "
        f"is {found['captions_hash']}, expected {known.captions_hash})"
    )
    if split == "test":
        raise InputError(
            f"{what}: results would not compare with others' - get the files again, or give captions of your own "
            "as a table, without --dataset"
        )
    logger.info(what)


def with_names_of(official: OfficialCaptions, stored: Collection[str]) -> OfficialCaptions:
    """Return the captions with the video_ids that a store has for the data set's videos.

    Videos that the store does not have keep the data set's own.

    Args:
        official: Captions with the data set's own video_ids.
        stored: The store's video_ids.

    Raises:
        InputError: The store has none of the videos.
    """
    dataset, table = DATASETS[official.dataset], official.table
    ids_of: dict[str, list[str]] = {split: [] for split in official.splits}
    for video_id, split in dict(zip(table.video_ids, table.splits, strict=True)).items():
        ids_of[split].append(video_id)
    other: dict[str, list[str]] = {}
    for split, video_ids in ids_of.items():
        other |= dataset.other_names(split, video_ids)
    name_of = match_names([video_id for ids in ids_of.values() for video_id in ids], other, stored)
    if not name_of:
        raise InputError(
            f"the store has none of {dataset.title}'s videos: its video_ids are such as "
            f"{next(iter(stored), 'none, it is empty')!r}, the data set's such as {table.video_ids[0]!r} - name "
            "the files as docs/datasets.md says and extract them again"
        )
    for split, video_ids in ids_of.items():
        held = [video_id for video_id in video_ids if video_id in name_of]
        renamed = sum(name_of[video_id] != video_id for video_id in held)
        logger.info(
            f"{split}: the store has {len(held)} of {len(video_ids)} videos"
            + (f", {renamed} under another name" if renamed else "")
        )
    renamed_ids = [name_of.get(video_id, video_id) for video_id in table.video_ids]
    return replace(official, table=replace(table, video_ids=renamed_ids))


def match_names(
    video_ids: Collection[str], other_names: Mapping[str, Sequence[str]], stored: Collection[str]
) -> dict[str, str]:
    """Return the stored name of every video that has exactly one, by the data set's video_id.

    A stored name fits if it is the video_id or its last part is (`TestVideo/video7010`); if none does, a name fits
    whose last part is one of the video's other names. A name that fits two videos, and a video that two names
    fit, are left alone: nothing tells which is meant.

    Args:
        video_ids: The data set's video_ids.
        other_names: Other names of each video, by video_id.
        stored: The store's video_ids.
    """
    names = set(stored)
    by_last_part: dict[str, list[str]] = defaultdict(list)
    for name in sorted(names):
        by_last_part[name.rsplit("/", 1)[-1]].append(name)
    fitting: dict[str, list[str]] = {}
    for video_id in video_ids:
        if video_id in names:
            fitting[video_id] = [video_id]
        else:
            # The first of its names that is stored at all decides.
            candidates = [by_last_part.get(name, []) for name in (video_id, *other_names.get(video_id, ()))]
            fitting[video_id] = next((found for found in candidates if found), [])
    wanted = Counter(name for found in fitting.values() for name in found)
    return {video_id: found[0] for video_id, found in fitting.items() if len(found) == 1 and wanted[found[0]] == 1}
