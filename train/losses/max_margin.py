"""Max-margin triplet loss with the hardest negative of the batch, both directions."""

from __future__ import annotations

import torch


def max_margin(similarity: torch.Tensor, same_video: torch.Tensor, margin: float) -> torch.Tensor:
    """Return the hinge loss of each pair against its hardest negative (Faghri et al. 2018, equation 6).

    Captions of one video are never each other's negatives. A row without any negative costs nothing.

    Args:
        similarity: `(B, B)` cosine similarities, rows captions; the diagonal holds the positive pairs.
        same_video: `(B, B)` bool, True where caption and video belong together.
        margin: By which the positive is to beat the hardest negative.

    Returns:
        Scalar: the mean over captions plus the mean over videos.
    """
    negatives = similarity.masked_fill(same_video, float("-inf"))
    positive = similarity.diagonal()
    hardest_video = (margin + negatives.amax(dim=1) - positive).clamp_min(0)
    hardest_caption = (margin + negatives.amax(dim=0) - positive).clamp_min(0)
    return hardest_video.mean() + hardest_caption.mean()
