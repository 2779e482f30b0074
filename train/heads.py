"""The trained projections: frame features to video embeddings, caption features to caption embeddings.

Where backbone and text encoder already share a space (a CLIP model's two towers), heads are residuals of
zero: before the first step the model is the zero-shot model.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


class VideoOutput(NamedTuple):
    """What a video head gives.

    Attributes:
        video_embeddings: `(B, D)`, L2-normalised.
        frame_sequences: `(B, T, D)`, what a caption decoder reads; its rows beyond the mask mean nothing.
    """

    video_embeddings: torch.Tensor
    frame_sequences: torch.Tensor


class VideoHead(nn.Module):
    """Frame features -> projection -> temporal transformer -> mean over frames -> projection.

    Args:
        feature_size: F.
        embedding_size: D; equals F for a residual head.
        layers: Of the temporal transformer; 0 leaves it out.
        dropout: In it and before it.
        residual: Add to the normalised mean of normalised frames, starting from zero.

    Shape:
        frame_features `(B, T, F)`, frame_mask `(B, T)` bool, at least one True a row.
    """

    def __init__(
        self, feature_size: int, embedding_size: int, *, layers: int, dropout: float, residual: bool
    ) -> None:
        super().__init__()
        self.residual = residual
        self.project_in = nn.Sequential(
            nn.LayerNorm(feature_size), nn.Linear(feature_size, embedding_size), nn.Dropout(dropout)
        )
        layer = nn.TransformerEncoderLayer(
            embedding_size,
            nhead=max(1, embedding_size // 64),
            dim_feedforward=2 * embedding_size,
            dropout=dropout,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.transformer = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False) if layers else None
        self.project_out = nn.Linear(embedding_size, embedding_size)
        if residual:
            nn.init.zeros_(self.project_out.weight)
            nn.init.zeros_(self.project_out.bias)

    def forward(self, frame_features: torch.Tensor, frame_mask: torch.Tensor) -> VideoOutput:
        frames = self.project_in(frame_features)  # (B, T, F) -> (B, T, D)
        if self.transformer is not None:
            frames = frames + sinusoids(frames.shape[1], frames.shape[2], frames.device)
            frames = self.transformer(frames, src_key_padding_mask=~frame_mask)
        pooled = self.project_out(masked_mean(frames, frame_mask))  # (B, D)
        if self.residual:
            pooled = pooled + mean_of_frames(frame_features, frame_mask)
        return VideoOutput(F.normalize(pooled, dim=-1), frames)


class TextHead(nn.Module):
    """Caption features -> embedding, through one hidden layer beside a linear path.

    Args:
        feature_size: F of the text encoder.
        embedding_size: D; equals F for a residual head.
        dropout: In the hidden layer.
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
            nn.Dropout(dropout),
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
    """Return the zero-shot video embeddings of a CLIP model: frames normalised, averaged, normalised.

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
