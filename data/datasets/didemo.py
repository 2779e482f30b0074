"""DiDeMo (Hendricks et al., ICCV 2017), for retrieving whole videos by paragraphs.

All descriptions of a video's moments, joined in the order of the file, are its one caption; their times are not
used. The division into splits is the official one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath

from svb.data.datasets.official import Annotations, Document, KnownSplit, OfficialFile, read_a_file_each

FILES = {
    split: OfficialFile(
        (f"{split}_data.json",), "the authors publish it with their code, in the folder data of LocalizingMoments"
    )
    for split in ("train", "val", "test")
}
PROTOCOLS = {"paragraph": {"train": KnownSplit(8395), "val": KnownSplit(1065), "test": KnownSplit(1004)}}


def read(annotations: Annotations, protocol: str, splits: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    """Return each split's videos with their paragraph; see `svb.data.datasets.Dataset.read`."""
    return read_a_file_each(annotations, FILES, PROTOCOLS[protocol], splits, _paragraphs)


def other_names(split: str, video_ids: Sequence[str]) -> dict[str, list[str]]:
    """Return none: the videos' files have the names of the annotations."""
    return {}


def _paragraphs(document: Document) -> dict[str, list[str]]:
    moments = document.json()
    if not isinstance(moments, list):
        raise document.error("not a list of moments")
    sentences: dict[str, list[str]] = {}
    for moment in moments:
        if not isinstance(moment, dict) or not isinstance(moment.get("video"), str):
            raise document.error("a moment has no video")
        # A store names a video without its suffix.
        video_id = PurePosixPath(moment["video"]).stem
        sentences.setdefault(video_id, []).extend(document.captions(video_id, [moment.get("description")]))
    return {video_id: [" ".join(" ".join(held).split())] for video_id, held in sentences.items()}
