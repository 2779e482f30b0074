"""VATEX (Wang et al., ICCV 2019): 10-second clips with 10 English (and 10 Chinese, not read here) captions each.

The protocol `hgr` is Chen et al.'s ("HGR", CVPR 2020): the official training set, and the official validation set
halved into val and test. Every sentence is a query.
"""

from __future__ import annotations

from collections.abc import Sequence

from svb.data.datasets.official import Annotations, Document, KnownSplit, OfficialFile, select

TRAINING = OfficialFile(("vatex_training_v1.0.json",), "the VATEX project publishes it on its web site")
VALIDATION = OfficialFile(
    ("vatex_validation_v1.0.json", "validation.jsonl"), "the VATEX project publishes it on its web site"
)
LISTS = {
    split: OfficialFile(
        (f"{split}_list.txt",),
        "the ids of HGR's half of the validation set, one a line; HGR's authors published them with their code, "
        "and retrieval code passes them on",
    )
    for split in ("val", "test")
}
PROTOCOLS = {
    "hgr": {
        "train": KnownSplit(25_991, "b03ec83a23fa56c6", 259_910),
        "val": KnownSplit(1500, "77fde2983497b569", 15_000),
        "test": KnownSplit(1500, "efc26b559080d66f", 15_000),
    }
}
# A video_id is YouTube's 11 characters, then first and last second as `_000010_000020`.
_YOUTUBE_ID = 11


def read(annotations: Annotations, protocol: str, splits: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    """Return each split's clips with their captions; see `svb.data.datasets.Dataset.read`."""
    found: dict[str, dict[str, list[str]]] = {}
    for split in splits:
        known = PROTOCOLS[protocol][split]
        if split == "train":
            document = annotations.get(TRAINING)
            found[split] = _captions(document)
            known.require_ids(list(found[split]), split, document)
            continue
        document = annotations.get(LISTS[split])
        video_ids = document.lines()
        known.require_ids(video_ids, split, document)
        document = annotations.get(VALIDATION)
        found[split] = select(video_ids, _captions(document), [document])
    return found


def other_names(split: str, video_ids: Sequence[str]) -> dict[str, list[str]]:
    """Return the ids without the seconds, as files are called that were cut from YouTube by hand."""
    return {video_id: [video_id[:_YOUTUBE_ID]] for video_id in video_ids}


def _captions(document: Document) -> dict[str, list[str]]:
    is_official = document.name.endswith(".json")
    videos = document.json() if is_official else document.json_lines()
    key, value = ("videoID", "enCap") if is_official else ("video_id", "captions")
    captions: dict[str, list[str]] = {}
    if not isinstance(videos, list):
        raise document.error("not a list of videos")
    for video in videos:
        if not isinstance(video, dict) or not isinstance(video.get(key), str):
            raise document.error(f"a video has no {key}")
        if video[key] in captions:
            raise document.error(f"video {video[key]!r} appears twice")
        captions[video[key]] = document.captions(video[key], video.get(value))
    return captions
