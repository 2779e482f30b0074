"""How sure an answer is, from how a query's scores are spread over the whole index.

Scores of two queries cannot be compared: one text is near to everything, another to nothing. What can be is by how
many standard deviations an answer stands out of its own query's scores. The best of N rows that have nothing to do
with a query stands out by a little less than sqrt(2 ln N). So an answer is

    strong    from sqrt(2 ln N) on: hardly by chance
    fair      from 0.9 of it on: about where chance ends
    weak      below: likely the best of what does not fit

Over 3,395 MSR-VTT clips, with captions of val as queries, the best answer was right (its own clip, or one with a
caption that means much the same) in 71, 54 and 36 % of these levels, and with all that is right taken out 4 % were
still strong; over 244 clips in 60, 48 and 29 %, and 10 %. Where most of an index fits a query, nothing stands out
and all is weak.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from svb.retrieve.searching.catalog import Catalog

FAIR = 0.9
# Of fewer rows the best one's lead is not so small: of a single row every one would be strong.
FEWEST_ROWS = 5
# Windows of a video that are next to each other show much the same: about so many are one piece of evidence.
MOMENTS_A_SCENE = 8


@dataclass(frozen=True)
class Spread:
    """How a query's scores are spread over an index.

    Attributes:
        mean: Of the scores.
        deviation: Their standard deviation.
        chance: How many deviations above the mean the best of unrelated rows may lie.
    """

    mean: float
    deviation: float
    chance: float

    @classmethod
    def of(cls, scores: NDArray[np.floating], num_rows: float) -> Spread:
        """Return the spread of the scores of a sample of rows.

        Args:
            scores: `(n,)`, at least one.
            num_rows: How many independent rows are compared with the query.
        """
        wide = scores.astype(np.float64)
        return cls(float(wide.mean()), float(wide.std()), float(np.sqrt(2 * np.log(max(num_rows, FEWEST_ROWS)))))

    def confidence(self, score: float) -> str:
        """Return which of `svb.retrieve.answer.CONFIDENCES` an answer with a score has."""
        above = score - self.mean
        if self.deviation == 0 or above < FAIR * self.chance * self.deviation:
            return "weak"
        return "strong" if above >= self.chance * self.deviation else "fair"


def independent_rows(catalog: Catalog, by: str) -> float:
    """Return how many rows of an index count as independent of each other."""
    num_videos, num_moments = int(catalog.alive.sum()), int(catalog.moment_counts[catalog.alive].sum())
    return num_videos if by == "video" else max(num_videos, num_moments / MOMENTS_A_SCENE)
