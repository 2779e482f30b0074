"""How well many queries fit a segment's videos, computed in blocks: for what is measured at `svb index`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from svb.retrieve.stored.segment import Segment

# So many embeddings are held in float32 at once.
ROWS = 16_384


def chunks(segment: Segment, by: str) -> Iterator[tuple[int, int]]:
    """Yield intervals of videos `[begin, end)` of at most `ROWS` rows of embeddings, but at least one video."""
    offsets = segment.moment_offsets if by == "moment" else np.arange(segment.num_videos + 1)
    begin = 0
    while begin < segment.num_videos:
        end = max(begin + 1, int(np.searchsorted(offsets, offsets[begin] + ROWS, side="right")) - 1)
        yield begin, end
        begin = end


def video_scores(
    segment: Segment, begin: int, end: int, queries: NDArray[np.float32], by: str
) -> NDArray[np.float32]:
    """Return the `(Q, v)` scores of the videos `[begin, end)` of a segment: of their best moment, or as a whole."""
    if by == "video":
        return queries @ segment.video_embeddings[begin:end].astype(np.float32).T
    bounds = segment.moment_offsets[begin : end + 1]
    moments = segment.moment_embeddings[bounds[0] : bounds[-1]].astype(np.float32)  # (m, D)
    # Along the first axis numpy takes the maximum of whole rows at once.
    scores: NDArray[np.float32] = np.maximum.reduceat(moments @ queries.T, bounds[:-1] - bounds[0], axis=0).T
    return scores


def all_video_scores(segments: Sequence[Segment], queries: NDArray[np.float32], by: str) -> NDArray[np.float32]:
    """Return `(Q, V)` scores with the videos of all segments, deleted ones too."""
    scores = [
        video_scores(segment, begin, end, queries, by) for segment in segments for begin, end in chunks(segment, by)
    ]
    return np.concatenate(scores, axis=1)
