"""InfoLOOB loss: InfoNCE that leaves the positive out of what it is compared with."""

from __future__ import annotations

import torch


def info_loob(
    positive: torch.Tensor, similarity: torch.Tensor, is_negative: torch.Tensor, logit_scale: torch.Tensor
) -> torch.Tensor:
    """Return the InfoLOOB loss of each anchor, the contrastive loss of CLOOB (Fürst et al., NeurIPS 2022).

    InfoNCE saturates once the positive outweighs all negatives; this loss, which may be negative, does not. An
    anchor without negatives costs nothing. Arguments and result are those of `info_nce`.
    """
    negatives = (logit_scale * similarity).masked_fill(~is_negative, float("-inf"))
    has_negatives = is_negative.any(dim=1)
    # The gradient of a logarithm of a sum of nothing is not a number, even where it is not used.
    negatives = negatives.masked_fill(~has_negatives[:, None], 0.0)
    return (negatives.logsumexp(dim=1) - logit_scale * positive).masked_fill(~has_negatives, 0.0)
