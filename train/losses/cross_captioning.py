"""Cross-captioning: the loss of rebuilding each caption from other videos (Patrick et al. 2021, section 3.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def cross_captioning(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the mean negative log-likelihood of the words to be rebuilt.

    Args:
        logits: `(N, vocabulary)` of the N words of all captions of a batch, padding left out.
        targets: `(N,)` int64, the words.

    Returns:
        Scalar.
    """
    return F.cross_entropy(logits.float(), targets)
