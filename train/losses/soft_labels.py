"""Soft labels: captions and videos should be as alike as the frozen features of their captions."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def soft_labels(
    similarity: torch.Tensor,
    anchor_features: torch.Tensor,
    candidate_features: torch.Tensor,
    is_own: torch.Tensor,
    logit_scale: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """Return the cross-entropy from what the captions say of each anchor to the model's similarities.

    The cross-modal part of CUSA (Huang et al., AAAI 2024) with the caption encoder as the only teacher:
    `-sum over candidates of softmax(cosines / temperature) * log softmax(logit_scale * similarity)`. Its gradient
    is that of the Kullback-Leibler divergence.

    Args:
        similarity: `(A, C)` of anchors and candidates.
        anchor_features: `(A, F)` frozen features of each anchor's caption.
        candidate_features: `(C, F)` of each candidate's.
        is_own: `(A, C)` bool, True on all that belongs to the anchor's own video; these cosines count 1.
        logit_scale: Scalar that multiplies the similarities.
        temperature: Divides the cosines.

    Returns:
        `(A,)`.
    """
    cosines = F.normalize(anchor_features, dim=1) @ F.normalize(candidate_features, dim=1).T  # (A, C)
    wanted = (cosines.masked_fill(is_own, 1.0) / temperature).softmax(dim=1)
    return -(wanted * (logit_scale * similarity).log_softmax(dim=1)).sum(dim=1)
