"""The names that a feature store has for the videos of a data set."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence


def match_names(
    video_ids: Collection[str], other_names: Mapping[str, Sequence[str]], stored: Collection[str]
) -> dict[str, str]:
    """Return the stored name of every video that has exactly one, by the data set's video_id.

    A stored name fits where it is the video_id, or its last part is (`TestVideo/video7010`); where none does,
    where its last part is one of the video's other names. A name that fits two videos, and a video that two names
    fit, are left alone: nothing tells which is meant.

    Args:
        video_ids: The data set's.
        other_names: Other names of a video, by video_id.
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
