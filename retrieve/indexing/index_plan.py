"""The changes that bring an index up to date with its store: a comparison of two lists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from svb.data.rows import VideoRecord
from svb.retrieve.stored.segment import Segment, content_of, is_untouched

# The number of a segment, and a video's row in it.
Place = tuple[int, int]


@dataclass(frozen=True)
class IndexPlan:
    """The change for every video of a store and of an index.

    Attributes:
        new: Videos that the index does not have.
        changed: Videos that it has with other content.
        renamed: Videos whose content it has under a video_id that is gone; `new video_id -> old one`.
        touched: Videos that it has with the same content, at another path or with another time.
        gone: Videos that it has and the store does not, and where.
        num_same: How many have not changed.
        copies: Videos among these whose vectors the index already has, and where.
        replaced: Videos among these that replace a row of the index, and the place of that row.
    """

    new: list[str]
    changed: list[str]
    renamed: dict[str, str]
    touched: list[str]
    gone: dict[str, Place]
    num_same: int
    copies: dict[str, Place]
    replaced: dict[str, Place]

    @property
    def to_embed(self) -> list[str]:
        """Return the videos that must be embedded, sorted."""
        return sorted(video_id for video_id in (*self.new, *self.changed) if video_id not in self.copies)

    def __str__(self) -> str:
        """Return the plan in one line: `+412 new ~3 changed >2 renamed -7 gone =11,980 same`."""
        parts = [
            f"+{len(self.new):,} new",
            f"~{len(self.changed):,} changed",
            f">{len(self.renamed):,} renamed",
            *([f"^{len(self.touched):,} touched"] if self.touched else []),
            f"-{len(self.gone):,} gone",
            f"={self.num_same:,} same",
        ]
        return " ".join(parts)


def plan_index(
    records: Mapping[str, VideoRecord], segments: Sequence[Segment], *, by_content: bool = True
) -> IndexPlan:
    """Compare a store with an index.

    Args:
        records: The store's newest records.
        segments: The index's.
        by_content: Copy vectors between videos of the same content. Wrong if videos were extracted at times of
            their own, because equal content then has different features.
    """
    held = dict(live_videos(segments))
    usable = {video_id: record for video_id, record in records.items() if record.usable}
    gone = {video_id: place for video_id, place in held.items() if video_id not in usable}
    owners = _owners(segments, held, gone) if by_content else {}
    plan = IndexPlan([], [], {}, [], gone, 0, {}, {})
    num_same = 0
    for video_id, record in sorted(usable.items()):
        place, content = held.get(video_id), content_of(record)
        if place is not None:
            segment, row = segments[place[0]], place[1]
            if segment.content_hashes[row] == content:
                if is_untouched(segment, row, record):
                    num_same += 1
                else:
                    plan.touched.append(video_id)
                    plan.copies[video_id] = plan.replaced[video_id] = place
                continue
            plan.changed.append(video_id)
            plan.replaced[video_id] = place
        before = _take_over(owners, content, gone)
        if before is None:
            if place is None:
                plan.new.append(video_id)
            continue
        plan.copies[video_id] = held[before]
        if place is None and before in gone:
            plan.renamed[video_id] = before
            plan.replaced[video_id] = gone.pop(before)
        elif place is None:
            plan.new.append(video_id)
    return IndexPlan(plan.new, plan.changed, plan.renamed, plan.touched, gone, num_same, plan.copies, plan.replaced)


def live_videos(segments: Sequence[Segment]) -> list[tuple[str, Place]]:
    """Return the videos of an index that were not deleted, and where each is."""
    return [
        (video_ids[row], (s, row))
        for s, segment in enumerate(segments)
        for video_ids in [segment.video_ids.tolist()]
        for row in np.delete(np.arange(segment.num_videos), segment.deleted).tolist()
    ]


def _owners(
    segments: Sequence[Segment], held: Mapping[str, Place], gone: Mapping[str, Place]
) -> dict[str, list[str]]:
    """Return the videos of each content; those that are gone come last, to be taken over first."""
    contents = [segment.content_hashes.tolist() for segment in segments]
    owners: dict[str, list[str]] = {}
    for video_id, (s, row) in sorted(held.items(), key=lambda item: (item[0] in gone, item[0])):
        if contents[s][row]:
            owners.setdefault(contents[s][row], []).append(video_id)
    return owners


def _take_over(owners: Mapping[str, list[str]], content: str, gone: Mapping[str, Place]) -> str | None:
    """Return a video with some content whose vectors can be copied, preferably one that is gone."""
    videos = owners.get(content, [])
    if not videos:
        return None
    # A video that is gone is renamed to one other video only.
    return videos.pop() if len(videos) > 1 and videos[-1] in gone else videos[-1]
