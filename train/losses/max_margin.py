"""Max-margin triplet loss of anchors against their candidates."""

from __future__ import annotations

import torch

from svb.errors import UsageError
from svb.train.config import NEGATIVES


def max_margin(
    positive: torch.Tensor, similarity: torch.Tensor, is_negative: torch.Tensor, margin: float, negatives: str
) -> torch.Tensor:
    """Return the hinge loss of each anchor.

    `hardest` counts only the negative nearest to the anchor (Faghri et al. 2018, equation 6), `semi_hard` the
    nearest of those farther than the positive (Schroff et al. 2015, section 3.2), and `mean` all of them equally.
    An anchor without such negatives costs nothing.

    Args:
        positive: `(A,)` cosine similarity of each anchor and its positive.
        similarity: `(A, C)` of anchors and candidates.
        is_negative: `(A, C)` bool; False on all that belongs to the anchor's own video.
        margin: The similarity by which the positive should beat a negative.
        negatives: One of `svb.train.config.NEGATIVES`.

    Returns:
        `(A,)`.

    Raises:
        UsageError: `negatives` is unknown.
    """
    if negatives == "mean":
        hinges = (margin + similarity - positive[:, None]).clamp_min(0) * is_negative
        return hinges.sum(dim=1) / is_negative.sum(dim=1).clamp_min(1)
    if negatives == "semi_hard":
        is_negative = is_negative & (similarity < positive[:, None])
    elif negatives != "hardest":
        raise UsageError(f"negatives is {negatives!r} - expected one of {', '.join(NEGATIVES)}")
    nearest = similarity.masked_fill(~is_negative, float("-inf")).amax(dim=1)
    return (margin + nearest - positive).clamp_min(0)
