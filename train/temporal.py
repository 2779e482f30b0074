"""Layers that look along a video's frames: a convolution, a transformer, and a pooling that weighs frames.

All of them take the N real frames of a batch in one tensor, and give each video the same as it would get alone:
neither padding nor other videos change it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from svb.errors import UsageError
from svb.train.dropout import Dropout


class TemporalConvolution(nn.Module):
    """A pre-norm residual branch: one convolution along time, from D to D channels.

    It is residual because clips are short. Beyond a video's ends there are zeros, so all taps but the middle one
    see nothing of a video with one frame, and a plain convolution would keep little of it.

    Args:
        size: D.
        width: Width in frames; odd, so that the convolution is centred.
        dropout: Dropout probability on the branch.

    Shape:
        As `TemporalLayer`.
    """

    def __init__(self, size: int, width: int, dropout: float) -> None:
        super().__init__()
        self.width = width
        self.norm = nn.LayerNorm(size)
        self.taps = nn.Linear(size * width, size)
        self.dropout = Dropout(dropout)

    def forward(self, flat: torch.Tensor, real: torch.Tensor, frame_mask: torch.Tensor) -> torch.Tensor:
        # A product with the windows of real frames: conv1d would compute all the padding too.
        reach = self.width // 2
        padded = F.pad(unpack(self.norm(flat), real, frame_mask), (0, 0, reach, reach))  # (B, T + width - 1, D)
        windows = padded.unfold(1, self.width, 1).flatten(0, 1).index_select(0, real)  # (N, D, width)
        flat = flat + self.dropout(F.gelu(self.taps(windows.flatten(1))))
        return flat


class TemporalLayer(nn.Module):
    """One pre-norm transformer layer (Vaswani et al. 2017) over the frames of each video of a batch.

    Args:
        size: D.
        dropout: Dropout probability on both branches.

    Shape:
        flat `(N, D)`, the real frames of all videos; real `(N,)`, their places in the flattened batch;
        frame_mask `(B, T)` bool -> `(N, D)`.
    """

    def __init__(self, size: int, dropout: float) -> None:
        super().__init__()
        self.heads = num_heads(size)
        self.norm_attention, self.norm_hidden = nn.LayerNorm(size), nn.LayerNorm(size)
        self.query_key_value, self.out = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.hidden = nn.Sequential(
            nn.Linear(size, 2 * size), nn.GELU(), Dropout(dropout), nn.Linear(2 * size, size)
        )
        self.dropout = Dropout(dropout)

    def forward(self, flat: torch.Tensor, real: torch.Tensor, frame_mask: torch.Tensor) -> torch.Tensor:
        projected = self.query_key_value(self.norm_attention(flat))  # (N, 3D)
        padded = unpack(projected, real, frame_mask).unflatten(-1, (3, self.heads, -1))
        query, key, value = padded.permute(2, 0, 3, 1, 4)  # each (B, heads, T, D / heads)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=frame_mask[:, None, None, :])
        attended = attended.transpose(1, 2).flatten(2).flatten(0, 1).index_select(0, real)  # (N, D)
        flat = flat + self.dropout(self.out(attended))
        flat = flat + self.dropout(self.hidden(self.norm_hidden(flat)))
        return flat


class AttentionPooling(nn.Module):
    """Attention of one learned query per head to a video's frames, which starts as their mean.

    The product of a fixed query with the keys is linear in the frame, so query and keys are one `(heads, D)`
    matrix. It starts at zero, where all frames weigh the same.

    Args:
        size: D; each head pools its own part of it.

    Shape:
        frames `(B, T, D)`, frame_mask `(B, T)` bool -> `(B, D)`.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.query = nn.Linear(size, num_heads(size), bias=False)
        nn.init.zeros_(self.query.weight)

    def forward(self, frames: torch.Tensor, frame_mask: torch.Tensor) -> torch.Tensor:
        scores = self.query(F.layer_norm(frames, frames.shape[2:]))  # (B, T, heads)
        weights = scores.masked_fill(~frame_mask[..., None], float("-inf")).softmax(dim=1)
        values = frames.unflatten(-1, (scores.shape[-1], -1))  # (B, T, heads, D / heads)
        return torch.einsum("bthd,bth->bhd", values, weights).flatten(1)


def num_heads(size: int) -> int:
    """Return the number of attention heads of 64 in a size.

    Raises:
        UsageError: The size is no multiple of 64.
    """
    heads = max(1, size // 64)
    if size % heads:
        raise UsageError(f"embedding size {size} - expected a multiple of 64, the size of an attention head")
    return heads


def unpack(flat: torch.Tensor, real: torch.Tensor, frame_mask: torch.Tensor) -> torch.Tensor:
    """Put real frames in their places and zeros elsewhere: `(N, D)`, `(N,)`, `(B, T)` -> `(B, T, D)`."""
    padded = flat.new_zeros(frame_mask.numel(), flat.shape[1]).index_copy(0, real, flat)
    return padded.view(*frame_mask.shape, flat.shape[1])
