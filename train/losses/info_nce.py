"""InfoNCE loss of anchors against their candidates."""

from __future__ import annotations

import torch


def info_nce(
    positive: torch.Tensor, similarity: torch.Tensor, is_negative: torch.Tensor, logit_scale: torch.Tensor
) -> torch.Tensor:
    """Return the InfoNCE loss of each anchor (van den Oord et al. 2018, equation 4).

    An anchor without negatives costs nothing.

    Args:
        positive: `(A,)` cosine similarity of each anchor and its positive.
        similarity: `(A, C)` of anchors and candidates.
        is_negative: `(A, C)` bool; False on all that belongs to the anchor's own video.
        logit_scale: Scalar that multiplies the similarities.

    Returns:
        `(A,)`.
    """
    negatives = (logit_scale * similarity).masked_fill(~is_negative, float("-inf"))
    logits = torch.cat([logit_scale * positive[:, None], negatives], dim=1)  # (A, 1 + C)
    return -logits.log_softmax(dim=1)[:, 0]
