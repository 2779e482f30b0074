"""ActivityNet Captions (Krishna et al., ICCV 2017), for retrieving whole videos by paragraphs.

All sentences of a video, joined in the order given, are its one caption. The protocol `val_1` trains on train.json
and tests on val_1.json: the captions of the official test set are not public. There is no val split: training
holds out some of the training videos to choose a checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence

from svb.data.datasets.official import Annotations, Document, KnownSplit, OfficialFile, read_a_file_each

_ORIGIN = "in captions.zip, which Stanford University publishes with the paper on dense-captioning events in videos"
FILES = {"train": OfficialFile(("train.json",), _ORIGIN), "test": OfficialFile(("val_1.json",), _ORIGIN)}
PROTOCOLS = {
    "val_1": {
        "train": KnownSplit(10_009, "1742cdf0c50c460c", 10_009, "2653881375349610"),
        "test": KnownSplit(4917, "9b39bfbdf6a256a6", 4917, "a5c36bc1938744a5"),
    }
}


def read(annotations: Annotations, protocol: str, splits: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    """Return each split's videos with their paragraph; see `svb.data.datasets.Dataset.read`."""
    return read_a_file_each(annotations, FILES, PROTOCOLS[protocol], splits, _paragraphs)


def other_names(split: str, video_ids: Sequence[str]) -> dict[str, list[str]]:
    """Return YouTube's ids: `v_` in front of them is ActivityNet's own."""
    return {video_id: [video_id.removeprefix("v_")] for video_id in video_ids}


def _paragraphs(document: Document) -> dict[str, list[str]]:
    held = document.json()
    if not isinstance(held, dict) or not all(isinstance(video, dict) for video in held.values()):
        raise document.error("not an object of videos and their sentences")
    return {
        video_id: [" ".join(" ".join(document.captions(video_id, video.get("sentences"))).split())]
        for video_id, video in held.items()
    }
