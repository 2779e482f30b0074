"""The embedding decoder, which rebuilds a caption's frozen embedding: far cheaper than its words."""

from __future__ import annotations

import torch
from torch import nn

from svb.train.heads import Dropout, masked_mean


class EmbeddingDecoder(nn.Module):
    """Predicts the frozen features of a caption from a mixture of frame sequences, through one hidden layer.

    Args:
        memory_size: D of the frame sequences.
        text_feature_size: F of the text encoder.
        dropout: Dropout probability in the hidden layer.
    """

    def __init__(self, memory_size: int, text_feature_size: int, *, dropout: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.LayerNorm(memory_size),
            nn.Linear(memory_size, 2 * memory_size),
            nn.GELU(),
            Dropout(dropout),
            nn.Linear(2 * memory_size, text_feature_size),
        )

    def forward(self, frame_sequences: torch.Tensor, frame_mask: torch.Tensor) -> torch.Tensor:
        """Shape: `(B, T, D)`, `(B, T)` bool -> `(B, F)`."""
        predicted: torch.Tensor = self.layers(masked_mean(frame_sequences, frame_mask))
        return predicted
