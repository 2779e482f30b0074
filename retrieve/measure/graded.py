"""Graded measures of a split's similarities by every relevance that `svb evaluate` was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svb.data.caption_table import CaptionTable
from svb.data.relevance import make_relevance
from svb.errors import UsageError
from svb.retrieve.measure.query_ranks import GRADED, RELEVANCE
from svb.train.graded_metrics import Values, graded_means, graded_values, left_out


@dataclass(frozen=True)
class Graded:
    """Graded measures by one relevance, see `svb.train.graded_metrics`.

    Attributes:
        description: How the relevance is counted.
        fingerprint: Equal for equal relevances; only values of one relevance can be compared.
        metrics: Means in percent, such as `t2v/nDCG@10 of others`; a measure that no query has is not there.
        left_out: The number of queries without any relevant candidate, by measure.
    """

    description: str
    fingerprint: str
    metrics: dict[str, float]
    left_out: dict[str, int]


def graded_measures(
    names: Sequence[str],
    similarity: NDArray[np.floating],
    table: CaptionTable,
    measured: tuple[list[str], list[str], list[str]],
    caption_video: NDArray[np.int64],
) -> tuple[dict[str, Graded], dict[str, Any]]:
    """Return the graded measures by each relevance, and every query's value as `ranks.npz` holds it.

    Args:
        names: As `svb.data.relevance.make_relevance` takes them.
        similarity: `(C, V)`.
        table: The whole caption table.
        measured: The C captions and caption_ids, and the V video_ids.
        caption_video: `(C,)` column of each caption's own video.
    """
    captions, caption_ids, video_ids = measured
    graded: dict[str, Graded] = {}
    held: dict[str, Any] = {}
    for name in dict.fromkeys(names):
        relevance = make_relevance(
            name,
            table,
            captions=captions,
            caption_ids=caption_ids,
            video_ids=video_ids,
            caption_video=caption_video,
        )
        values: dict[str, Values] = graded_values(similarity, caption_video, relevance)
        if relevance.name in graded:
            raise UsageError(f"two relevances are named {relevance.name} - give the files different names")
        graded[relevance.name] = Graded(
            relevance.description, relevance.fingerprint, graded_means(values), left_out(values)
        )
        held |= {f"{GRADED}{measure} by {relevance.name}": of_queries for measure, of_queries in values.items()}
        held[f"{RELEVANCE}{relevance.name}"] = relevance.fingerprint
    return graded, held
