"""InfoNCE over a batch, caption to video and video to caption."""

from __future__ import annotations

import torch


def info_nce(similarity: torch.Tensor, same_video: torch.Tensor, logit_scale: torch.Tensor) -> torch.Tensor:
    """Return the symmetric InfoNCE loss (van den Oord et al. 2018, equation 4; both directions averaged).

    Captions of one video are never each other's negatives: such pairs are left out of the denominators.

    Args:
        similarity: `(B, B)` cosine similarities, rows captions; the diagonal holds the positive pairs.
        same_video: `(B, B)` bool, True where caption and video belong together.
        logit_scale: Scalar that multiplies the similarities.

    Returns:
        Scalar.
    """
    positive = torch.eye(len(similarity), dtype=torch.bool, device=similarity.device)
    logits = (logit_scale * similarity).masked_fill(same_video & ~positive, float("-inf"))
    t2v = logits.log_softmax(dim=1).diagonal()
    v2t = logits.log_softmax(dim=0).diagonal()
    return -(t2v.mean() + v2t.mean()) / 2
