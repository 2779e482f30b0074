"""Cross-captioning: the loss of rebuilding each caption from other videos (Patrick et al. 2021, section 3.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def cross_captioning(logits: torch.Tensor, tokens: torch.Tensor, padding_id: int) -> torch.Tensor:
    """Return the mean negative log-likelihood of the captions' tokens.

    Args:
        logits: `(B, L - 1, vocabulary)`; position l predicts token l + 1.
        tokens: `(B, L)` int64, from the start token to the end token, then padding.
        padding_id: The token that is not predicted.

    Returns:
        Scalar: the mean over all tokens that are not padding.
    """
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=padding_id)
