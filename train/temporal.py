"""What looks along a video's frames: a convolution, transformer layers, and a pooling that weighs frames.

All of them take the N real frames of a batch in one piece, and give each video what it would get alone:
neither padding nor neighbours reach it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from svb.errors import UsageError
from svb.train.dropout import Dropout


class TemporalConvolution(nn.Module):
    """A pre-norm residual branch: one convolution along time, from D to D channels.

    Residual, since clips are short: beyond a video's ends there are zeros, so of a video of one frame all
    taps but the middle one see nothing, and a plain convolution would leave it little of itself.

    Args:
        size: D.
        width: Frames that a tap reaches over; odd, so that it is centred.
        dropout: On the branch.

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
        # As a product with the real frames' windows rather than by conv1d, which would compute all padding.
        reach = self.width // 2
        padded = F.pad(unpack(self.norm(flat), real, frame_mask), (0, 0, reach, reach))  # (B, T + width - 1, D)
        windows = padded.unfold(1, self.width, 1).flatten(0, 1).index_select(0, real)  # (N, D, width)
        flat = flat + self.dropout(F.gelu(self.taps(windows.flatten(1))))
        return flat


class TemporalLayer(nn.Module):
    """One pre-norm transformer layer (Vaswani et al. 2017) over the frames of each video of a batch.

    Args:
        size: D.
        dropout: On both branches.

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
    """A learned query a head attends to a video's frames; it starts as their mean.

    With one fixed query, its product with the keys is linear in the frame, so query and keys are one
    `(heads, D)` matrix. It starts at zero: all frames weigh the same.

    Args:
        size: D, of which each head pools its own part.

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
    """Return how many attention heads of 64 a size makes.

    Raises:
        UsageError: It cannot be divided so.
    """
    heads = max(1, size // 64)
    if size % heads:
        raise UsageError(f"embedding size {size} - expected a multiple of 64, for heads of 64")
    return heads


def unpack(flat: torch.Tensor, real: torch.Tensor, frame_mask: torch.Tensor) -> torch.Tensor:
    """Put the real frames into their places, zeros elsewhere: `(N, D)`, `(N,)`, `(B, T)` -> `(B, T, D)`."""
    padded = flat.new_zeros(frame_mask.numel(), flat.shape[1]).index_copy(0, real, flat)
    return padded.view(*frame_mask.shape, flat.shape[1])
