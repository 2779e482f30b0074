"""Max-margin triplet loss of anchors against their candidates."""

from __future__ import annotations

import torch

from svb.errors import UsageError
from svb.train.config import NEGATIVES


def max_margin(
    positive: torch.Tensor,
    similarity: torch.Tensor,
    is_negative: torch.Tensor,
    margin: float,
    negatives: str,
    relevance: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the hinge loss of each anchor.

    `hardest` counts only the negative nearest to the anchor (Faghri et al. 2018, equation 6), `semi_hard` the
    nearest of those farther than the positive (Schroff et al. 2015, section 3.2), and `mean` all of them equally.
    An anchor without such negatives costs nothing.

    With a relevance, the margin of each negative is `margin * (1 - relevance)`, and the nearest negative is the one
    with the largest hinge. With a margin of 1 it is the loss of Falcon et al., *Relevance-based Margin for
    Contrastively-trained Video Retrieval Models* (ICMR 2022).

    Args:
        positive: `(A,)` cosine similarity of each anchor and its positive.
        similarity: `(A, C)` of anchors and candidates.
        is_negative: `(A, C)` bool; False on all that belongs to the anchor's own video.
        margin: The similarity by which the positive should beat a negative.
        negatives: One of `svb.train.config.NEGATIVES`.
        relevance: `(A, C)` from 0 to 1, of candidates to anchors.

    Returns:
        `(A,)`.

    Raises:
        UsageError: `negatives` is unknown.
    """
    reach = similarity if relevance is None else similarity - margin * relevance
    if negatives == "mean":
        hinges = (margin + reach - positive[:, None]).clamp_min(0) * is_negative
        return hinges.sum(dim=1) / is_negative.sum(dim=1).clamp_min(1)
    if negatives == "semi_hard":
        is_negative = is_negative & (similarity < positive[:, None])
    elif negatives != "hardest":
        raise UsageError(f"negatives is {negatives!r} - expected one of {', '.join(NEGATIVES)}")
    nearest = reach.masked_fill(~is_negative, float("-inf")).amax(dim=1)
    return (margin + nearest - positive).clamp_min(0)
