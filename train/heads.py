"""The trained projections: frame features to video embeddings, caption features to caption embeddings.

If backbone and text encoder already share a space, as the two towers of CLIP do, the heads are residuals that start
at zero: before the first step the model is the zero-shot model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from svb.train.dropout import Dropout
from svb.train.temporal import AttentionPooling, TemporalConvolution, TemporalLayer, unpack


class VideoOutput(NamedTuple):
    """The output of a video head.

    Attributes:
        video_embeddings: `(B, D)`, L2-normalised.
        frame_sequences: `(B, T, D)`, the input of a caption decoder; rows beyond the mask are meaningless.
    """

    video_embeddings: torch.Tensor
    frame_sequences: torch.Tensor


class VideoHead(nn.Module):
    """Frame features -> projection -> convolution -> temporal transformer -> pooling -> projection.

    Args:
        feature_sizes: F of each fused backbone, usually of one. Each backbone's part of a row is normalised by
            itself, because the one with the larger scale would drown the other.
        embedding_size: D; equals F of the residual part.
        convolution: Width in frames of the temporal convolution; 0 omits it.
        layers: Number of temporal transformer layers; 0 omits them.
        pooling: `mean` of the frames, or `attention`, which weights frames by a learned query.
        dropout: Dropout probability in all of these.
        residual_part: The part that shares a space with the captions. The head adds to the normalised mean of its
            normalised frames, starting from zero. None if no part does.

    Shape:
        frame_features `(B, T, F)`, frame_mask `(B, T)` bool, at least one True a row.
    """

    def __init__(
        self,
        feature_sizes: Sequence[int],
        embedding_size: int,
        *,
        convolution: int,
        layers: int,
        pooling: str,
        dropout: float,
        residual_part: int | None,
    ) -> None:
        super().__init__()
        self.residual = None if residual_part is None else _span(feature_sizes, residual_part)
        self.project_in = nn.Sequential(
            PartNorm(feature_sizes), nn.Linear(sum(feature_sizes), embedding_size), Dropout(dropout)
        )
        self.convolution = TemporalConvolution(embedding_size, convolution, dropout) if convolution else None
        self.layers = nn.ModuleList(TemporalLayer(embedding_size, dropout) for _ in range(layers))
        self.pooling = AttentionPooling(embedding_size) if pooling == "attention" else None
        self.project_out = nn.Linear(embedding_size, embedding_size)
        if self.residual is not None:
            nn.init.zeros_(self.project_out.weight)
            nn.init.zeros_(self.project_out.bias)

    def forward(self, frame_features: torch.Tensor, frame_mask: torch.Tensor) -> VideoOutput:
        # Clips differ in length, so most of a padded batch is padding. All but attention runs on the N real
        # frames only, 3.6 times fewer on MSR-VTT's clips at one frame per second.
        real = frame_mask.flatten().nonzero().squeeze(1)  # (N,)
        flat = self.project_in(frame_features.flatten(0, 1).index_select(0, real))  # (N, F) -> (N, D)
        if self.convolution is not None:
            flat = self.convolution(flat, real, frame_mask)
        if self.layers:
            length = frame_mask.shape[1]
            flat = flat + sinusoids(length, flat.shape[1], flat.device)[real % length]
        for layer in self.layers:
            flat = layer(flat, real, frame_mask)
        frames = unpack(flat, real, frame_mask)  # (B, T, D)
        pooled = masked_mean(frames, frame_mask) if self.pooling is None else self.pooling(frames, frame_mask)
        pooled = self.project_out(pooled)  # (B, D)
        if self.residual is not None:
            pooled = pooled + mean_of_frames(frame_features[..., self.residual], frame_mask)
        return VideoOutput(F.normalize(pooled, dim=-1), frames)


class PartNorm(nn.Module):
    """Layer normalisation of each part of a row by itself; for one part it equals `nn.LayerNorm`.

    Args:
        sizes: The sizes of the parts, in order.

    Shape:
        `(N, F)` -> `(N, F)`, F the sum of sizes.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        self.sizes = list(sizes)
        self.weight, self.bias = nn.Parameter(torch.ones(sum(sizes))), nn.Parameter(torch.zeros(sum(sizes)))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        parts = zip(*(whole.split(self.sizes, dim=-1) for whole in (rows, self.weight, self.bias)), strict=True)
        return torch.cat([F.layer_norm(part, part.shape[1:], weight, bias) for part, weight, bias in parts], dim=1)


def _span(sizes: Sequence[int], part: int) -> slice:
    begin = sum(sizes[:part])
    return slice(begin, begin + sizes[part])


class TextHead(nn.Module):
    """Caption features -> embedding, through one hidden layer beside a linear path.

    Args:
        feature_size: F of the text encoder.
        embedding_size: D; equals F for a residual head.
        dropout: Dropout probability in the hidden layer.
        residual: Add to the normalised caption features, starting from zero.

    Shape:
        caption_features `(B, F)` -> `(B, D)`, L2-normalised.
    """

    def __init__(self, feature_size: int, embedding_size: int, *, dropout: float, residual: bool) -> None:
        super().__init__()
        self.residual = residual
        self.linear = None if residual else nn.Linear(feature_size, embedding_size)
        self.hidden = nn.Sequential(
            nn.Linear(feature_size, 2 * embedding_size),
            nn.GELU(),
            Dropout(dropout),
            nn.Linear(2 * embedding_size, embedding_size),
        )
        if residual:
            last = self.hidden[-1]
            assert isinstance(last, nn.Linear)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, caption_features: torch.Tensor) -> torch.Tensor:
        normalised = F.normalize(caption_features, dim=-1)
        base = normalised if self.linear is None else self.linear(normalised)
        return F.normalize(base + self.hidden(normalised), dim=-1)


def masked_mean(frames: torch.Tensor, frame_mask: torch.Tensor) -> torch.Tensor:
    """Return the mean over real frames: `(B, T, D)`, `(B, T)` bool -> `(B, D)`."""
    weights = frame_mask.to(frames.dtype)
    return torch.einsum("btd,bt->bd", frames, weights) / weights.sum(dim=1, keepdim=True)


def mean_of_frames(frame_features: torch.Tensor, frame_mask: torch.Tensor) -> torch.Tensor:
    """Return a CLIP model's zero-shot video embeddings: frames normalised, averaged and normalised again.

    Shape:
        `(B, T, F)`, `(B, T)` bool -> `(B, F)`.
    """
    return F.normalize(masked_mean(F.normalize(frame_features, dim=-1), frame_mask), dim=-1)


def sinusoids(length: int, size: int, device: torch.device) -> torch.Tensor:
    """Return position encodings, `(length, size)` (Vaswani et al. 2017, section 3.5)."""
    half = size // 2
    rates = torch.exp(-math.log(10_000.0) * torch.arange(half, device=device) / half)
    angles = torch.arange(length, device=device)[:, None] * rates[None]
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, size - 2 * half))
