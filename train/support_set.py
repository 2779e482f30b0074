"""The support set: the videos from which a caption is rebuilt, and their weights (Patrick et al. 2021, 3.2)."""

from __future__ import annotations

import torch

from svb.train.heads import masked_mean

# The least share of a mixture's weight that counts at a time step: dividing by less would turn rounding errors into
# content, and the gradient into infinity.
SMALLEST_SHARE = 1e-9


def own_mask(caption_video: torch.Tensor, support_video: torch.Tensor) -> torch.Tensor:
    """Return `(B, S)` bool, True on the caption's own video, from `(B,)` and `(S,)` video rows."""
    return caption_video[:, None] == support_video[None, :]


def support_weights(
    caption_embeddings: torch.Tensor,
    support_embeddings: torch.Tensor,
    own: torch.Tensor,
    *,
    variant: str,
    temperature: torch.Tensor | float,
    older: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the weight of each support video in the mixture that a caption is rebuilt from.

    `cross` is a softmax of the cosine similarities over all videos but the caption's own, and `full` the same
    over all of them. `identity` takes only the own video, and `hybrid` is the mean of identity and full.

    Args:
        caption_embeddings: `(B, D)`, L2-normalised.
        support_embeddings: `(S, D)`, L2-normalised.
        own: `(B, S)` bool, True on the caption's own video.
        variant: `identity`, `full`, `hybrid` or `cross`.
        temperature: Divides the similarities.
        older: `(B, S)` bool, True on an older state of the caption's own video in a memory bank, which no variant
            uses.

    Returns:
        `(B, S)`, rows sum to 1. The row of a caption that has no video left is NaN: to look for one here, the host
        would have to wait for the device, and its callers leave such captions out.
    """
    if older is not None:
        own = own & ~older
    if variant == "identity":
        return _share_equally(own, caption_embeddings.dtype)
    logits = caption_embeddings @ support_embeddings.T / temperature  # (B, S)
    if older is not None:
        logits = logits.masked_fill(older, float("-inf"))
    if variant == "cross":
        return logits.masked_fill(own, float("-inf")).softmax(dim=1)
    full = logits.softmax(dim=1)
    return full if variant == "full" else (full + _share_equally(own, full.dtype)) / 2


def support_values(
    frame_sequences: torch.Tensor, frame_mask: torch.Tensor, kind: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the values to average over the support set: the `frames`, or their `pooled` mean as one frame.

    Shape:
        `(S, T, D)`, `(S, T)` bool -> the same, T being 1 for `pooled`.
    """
    if kind == "frames":
        return frame_sequences, frame_mask
    return masked_mean(frame_sequences, frame_mask)[:, None], frame_mask.any(dim=1, keepdim=True)


def mix(
    weights: torch.Tensor, frame_sequences: torch.Tensor, frame_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Average the support videos' frame sequences time step by time step.

    A video that has ended before a time step is left out there; the weights of the others are scaled up.

    Args:
        weights: `(B, S)`.
        frame_sequences: `(S, T, D)`.
        frame_mask: `(S, T)` bool.

    Returns:
        The mixtures `(B, T, D)`, and `(B, T)` bool that is True where a video with weight still goes on.
    """
    present = frame_mask.to(weights.dtype)
    total = weights @ present  # (B, S) x (S, T) -> (B, T)
    summed = torch.einsum("bs,std->btd", weights, frame_sequences * present[..., None])
    return summed / total.clamp_min(SMALLEST_SHARE)[..., None], total > SMALLEST_SHARE


def entropy(weights: torch.Tensor) -> torch.Tensor:
    """Return the entropy of each caption's weights: `(B, S)` -> `(B,)` nats, 0 if one video has all."""
    return -torch.xlogy(weights, weights).sum(dim=1)


def _share_equally(allowed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    share = allowed.to(dtype)
    return share / share.sum(dim=1, keepdim=True)
