"""Does normalisation against hubs help? Measured with the captions of val on the index's own videos.

The manifest's `normalise` holds, beside the size of the bank:

helps        of the ranking by moments, which a search uses unless told otherwise
candidates   how many videos were ranked: all live ones of the index
by           for `moment` and `video`: `helps`, and `val`, which is None without a val split, else `captions` (how
             many), `R@1` and `normalised_R@1` in percent, `low` and `high` (the 95 % interval of the gain), `p`
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svb.retrieve.indexing.video_scores import all_video_scores
from svb.retrieve.measure.hub_normalisation import QueryBank, qb_norm
from svb.retrieve.measure.paired import RESAMPLES, percentile_interval, resampled_ratios
from svb.retrieve.searching.catalog import Catalog
from svb.retrieve.stored.segment import Segment
from svb.train.retrieval_metrics import t2v_ranks

# So many captions are compared with all videos at once.
BLOCK = 256


@dataclass(frozen=True)
class Val:
    """C captions of the val split, each of a live video: `(C, D)` embeddings, and the video_ids."""

    embeddings: NDArray[np.float32]
    video_ids: list[str]


def measure_on_val(segments: Sequence[Segment], banks: Mapping[str, QueryBank], val: Val | None) -> dict[str, Any]:
    """Return `helps`, `candidates` and `by`, as the manifest holds them.

    Args:
        segments: All of the index, in the manifest's order.
        banks: What the bank says of all their videos, for each way of ranking.
        val: None where no caption of val is of a live video.
    """
    rows = Catalog(segments).live_rows
    alive = np.array([*rows.values()], np.int64)  # (L,), ascending
    own = np.searchsorted(alive, [rows[video_id] for video_id in val.video_ids] if val else [])
    measured: dict[str, Any] = {}
    for by, bank in banks.items():
        live = QueryBank(bank.log_sums[alive], bank.is_hub[alive], bank.scale)
        gain = None if val is None else _gain(segments, alive, live, val.embeddings, own, by)
        # Beyond chance: where nothing but noise reorders, one time in forty.
        measured[by] = {"helps": gain is not None and gain["low"] > 0, "val": gain}
    return {"helps": measured["moment"]["helps"], "candidates": len(rows), "by": measured}


def describe(normalise: Mapping[str, Any]) -> str:
    """Return a line that tells what was measured for the ranking by moments."""
    val = normalise["by"]["moment"]["val"]
    what = f"normalisation against hubs ({normalise['bank']:,} captions, {normalise['candidates']:,} videos)"
    if val is None:
        return f"{what}: off, as no captions of a val split tell whether it helps"
    return (
        f"{what}: {'on' if normalise['helps'] else 'off'}, t2v R@1 on val {val['R@1']:.1f} -> "
        f"{val['normalised_R@1']:.1f} (gain {val['low']:+.1f} to {val['high']:+.1f}, {val['captions']:,} captions)"
    )


def _gain(
    segments: Sequence[Segment],
    alive: NDArray[np.int64],
    bank: QueryBank,
    queries: NDArray[np.float32],
    own: NDArray[np.int64],
    by: str,
) -> dict[str, float]:
    """Return t2v R@1 without and with the bank, and the interval of the difference over videos.

    Args:
        segments: All.
        alive: `(L,)` rows of the live videos.
        bank: Of those.
        queries: `(C, D)`.
        own: `(C,)`, which of the live videos each caption is of.
        by: What is ranked.
    """
    hits = np.empty((2, len(own)), np.int64)
    for begin in range(0, len(own), BLOCK):
        rows = slice(begin, begin + BLOCK)
        scores = all_video_scores(segments, queries[rows], by)[:, alive]
        hits[0, rows] = t2v_ranks(scores, own[rows]) <= 1
        hits[1, rows] = t2v_ranks(qb_norm(scores, bank), own[rows]) <= 1
    _, video = np.unique(own, return_inverse=True)
    gains = np.bincount(video, hits[1] - hits[0]).astype(np.float64)[:, None]
    sizes = np.bincount(video).astype(np.int64)[:, None]
    interval = percentile_interval(100 * resampled_ratios(gains, sizes, RESAMPLES, seed=0)[:, 0])
    return {
        "captions": len(own),
        "R@1": 100 * float(hits[0].mean()),
        "normalised_R@1": 100 * float(hits[1].mean()),
        "low": interval.low,
        "high": interval.high,
        "p": interval.p,
    }
