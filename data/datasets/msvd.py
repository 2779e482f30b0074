"""MSVD, the Microsoft Research Video Description Corpus (Chen and Dolan, ACL 2011).

1,970 clips with about 40 captions each. The division into 1,200 / 100 / 670 clips is Venugopalan et al.'s: clips in
the order of their names. Every sentence is a query.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from svb.data.datasets.official import Annotations, Document, KnownSplit, OfficialFile, select

logger = logging.getLogger(__name__)

CAPTIONS = OfficialFile(
    ("AllVideoDescriptions.txt", "MSR Video Description Corpus.csv", "video_corpus.csv", "captions_msvd.json"),
    "the corpus of Microsoft Research; the University of Texas at Austin published it as AllVideoDescriptions.txt",
)
LISTS = {
    split: OfficialFile(
        (f"{split}_list.txt", "youtube_mapping.txt"),
        "retrieval code passes on the split lists with MSVD, one clip's name a line; youtube_mapping.txt of "
        "arctic-capgen-vid, which numbers the clips, does as well",
    )
    for split in ("train", "val", "test")
}
# Versions differ in punctuation and in a few captions; the clips are the same.
PROTOCOLS = {
    "all-sentences": {
        "train": KnownSplit(1200, "abfb8ab5660b464c"),
        "val": KnownSplit(100, "9527cf1ef6c8fe2f"),
        "test": KnownSplit(670, "95eacd1fddb1d88c"),
    }
}
_NUMBERS = {"train": range(1, 1201), "val": range(1201, 1301), "test": range(1301, 1971)}


def read(annotations: Annotations, protocol: str, splits: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    """Return each split's clips with their captions; see `svb.data.datasets.Dataset.read`."""
    lists: dict[str, list[str]] = {}
    for split in splits:
        document = annotations.get(LISTS[split])
        lists[split] = _listed(document, split)
        PROTOCOLS[protocol][split].require_ids(lists[split], split, document)
    document = annotations.get(CAPTIONS)
    captions, num_empty = _without_empty(_READERS[document.name](document))
    if num_empty:
        logger.info(f"{document.place}: left out {num_empty} rows without a description")
    return {split: select(video_ids, captions, [document]) for split, video_ids in lists.items()}


def other_names(split: str, video_ids: Sequence[str]) -> dict[str, list[str]]:
    """Return `vid1` to `vid1970`, which number all clips in the order of their names, by clip."""
    return {video_id: [f"vid{number}"] for number, video_id in zip(_NUMBERS[split], sorted(video_ids), strict=True)}


def _listed(document: Document, split: str) -> list[str]:
    if document.name != "youtube_mapping.txt":
        return document.lines()
    video_ids = []
    for line in document.lines():
        video_id, _, number = line.partition(" ")
        if not (number.startswith("vid") and number.removeprefix("vid").isdecimal()):
            raise document.error(f"the line {line[:60]!r} is not a clip's name and vidN")
        if int(number.removeprefix("vid")) in _NUMBERS[split]:
            video_ids.append(video_id)
    return video_ids


def _without_empty(captions: dict[str, list[str]]) -> tuple[dict[str, list[str]], int]:
    # The corpus has rows without a description.
    kept = {video_id: [caption for caption in held if caption.strip()] for video_id, held in captions.items()}
    return kept, sum(map(len, captions.values())) - sum(map(len, kept.values()))


def _from_text(document: Document) -> dict[str, list[str]]:
    captions: dict[str, list[str]] = {}
    for line in document.lines():
        if not line.startswith("#"):
            video_id, _, caption = line.partition(" ")
            captions.setdefault(video_id, []).append(caption)
    return captions


def _from_csv(document: Document) -> dict[str, list[str]]:
    captions: dict[str, list[str]] = {}
    for row in document.csv_rows("VideoID", "Start", "End", "Language", "Description"):
        if row["Language"] == "English":
            try:
                begin, end = int(float(row["Start"])), int(float(row["End"]))
            except (ValueError, OverflowError) as error:
                raise document.error(f"Start or End of {row['VideoID']!r} is not a number") from error
            captions.setdefault(f"{row['VideoID']}_{begin}_{end}", []).append(row["Description"])
    return captions


def _from_json(document: Document) -> dict[str, list[str]]:
    held = document.json()
    if not isinstance(held, dict):
        raise document.error("not an object of clips and their captions")
    return {video_id: document.captions(video_id, sentences) for video_id, sentences in held.items()}


_READERS = {
    "AllVideoDescriptions.txt": _from_text,
    "MSR Video Description Corpus.csv": _from_csv,
    "video_corpus.csv": _from_csv,
    "captions_msvd.json": _from_json,
}
