"""Relevance-aware negatives and positives: pairs whose captions say the same are pulled, not pushed."""

from __future__ import annotations

from collections.abc import Callable

import torch

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def relevant_pairs(
    loss: Loss,
    positive: torch.Tensor,
    similarity: torch.Tensor,
    is_negative: torch.Tensor,
    is_relevant: torch.Tensor,
) -> torch.Tensor:
    """Return a contrastive loss that knows which negatives are relevant (RANP: Falcon et al., CVIU 2024).

    Relevant candidates are not negatives. The farthest of them is the second positive of an anchor and costs it the
    loss once more, against the same negatives. For the triplet loss this is the loss of the authors' code
    (`aranciokov/ranp`); beside their softmax loss they leave relevant candidates among the negatives.

    Args:
        loss: The loss of anchors from their positives, `(A, C)` similarities and the negatives among these.
        positive: `(A,)` cosine similarity of each anchor and its positive.
        similarity: `(A, C)` of anchors and candidates.
        is_negative: `(A, C)` bool; False on all that belongs to the anchor's own video.
        is_relevant: `(A, C)` bool, True on what is relevant to the anchor.

    Returns:
        `(A,)`.
    """
    is_second = is_negative & is_relevant
    is_negative = is_negative & ~is_relevant
    has_second = is_second.any(dim=1)
    farthest = similarity.masked_fill(~is_second, float("inf")).amin(dim=1)
    # Without a second positive the first stands in, so that nothing infinite enters the graph.
    second = torch.where(has_second, farthest, positive)
    return loss(positive, similarity, is_negative) + has_second * loss(second, similarity, is_negative)
