"""YouCook2 (Zhou et al., AAAI 2018): cooking videos, cut into the steps of their recipes, one sentence a step.

The protocol `clips` takes each step for a video. It trains on the official training videos and tests on all steps
of the validation videos: the sentences of the official test set are not public. There is no val split: training
holds out some of the training clips to choose a checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from svb.data.datasets.official import Annotations, Document, KnownSplit, OfficialFile

FILE = OfficialFile(("youcookii_annotations_trainval.json",), "the authors publish it on the web site of YouCook2")
PROTOCOLS = {"clips": {"train": KnownSplit(10_337), "test": KnownSplit(3492)}}
_SUBSETS = {"train": "training", "test": "validation"}


def read(annotations: Annotations, protocol: str, splits: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    """Return each split's clips with their captions; see `svb.data.datasets.Dataset.read`."""
    document = annotations.get(FILE)
    found = {split: _clips(document, _SUBSETS[split]) for split in splits}
    for split, clips in found.items():
        PROTOCOLS[protocol][split].require_ids(list(clips), split, document)
    return found


def other_names(split: str, video_ids: Sequence[str]) -> dict[str, list[str]]:
    """Return none: nobody publishes the clips."""
    return {}


def _clips(document: Document, subset: str) -> dict[str, list[str]]:
    held = document.json()
    videos = held.get("database") if isinstance(held, dict) else None
    if not isinstance(videos, dict) or not all(isinstance(video, dict) for video in videos.values()):
        raise document.error("no database of videos in it")
    clips: dict[str, list[str]] = {}
    for video_id, video in videos.items():
        for step in _steps(document, video_id, video) if video.get("subset") == subset else []:
            try:
                begin, end = (int(float(second)) for second in step["segment"])
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                raise document.error(f"a step of {video_id!r} has no segment of two seconds") from error
            clip = f"{video_id}_{begin}_{end}"
            clips.setdefault(clip, []).extend(document.captions(clip, [step.get("sentence")]))
    return clips


def _steps(document: Document, video_id: str, video: dict[str, Any]) -> list[dict[str, Any]]:
    steps = video.get("annotations")
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise document.error(f"the annotations of {video_id!r} are not a list of steps")
    return steps
