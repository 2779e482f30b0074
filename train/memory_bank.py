"""The memory bank: videos of earlier batches from which captions may be rebuilt, first in, first out."""

from __future__ import annotations

import torch
from torch import nn


class MemoryBank(nn.Module):
    """Embeddings and frame sequences of the latest videos.

    It starts empty, so no caption is ever rebuilt from made-up rows. All of its state is in buffers.

    Args:
        rows: The number of videos that it holds when full.
        frames: T, the longest frame sequence that it takes.
        size: D.
    """

    def __init__(self, rows: int, frames: int, size: int) -> None:
        super().__init__()
        self.embeddings: torch.Tensor
        self.frame_sequences: torch.Tensor
        self.frame_mask: torch.Tensor
        self.video: torch.Tensor
        self.position: torch.Tensor
        self.num_valid: torch.Tensor
        self.register_buffer("embeddings", torch.zeros(rows, size))
        self.register_buffer("frame_sequences", torch.zeros(rows, frames, size))
        self.register_buffer("frame_mask", torch.zeros(rows, frames, dtype=torch.bool))
        self.register_buffer("video", torch.zeros(rows, dtype=torch.int64))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))
        self.register_buffer("num_valid", torch.zeros((), dtype=torch.int64))

    def read(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the N valid rows: `(N, D)` embeddings, `(N, T, D)`, `(N, T)` bool, and `(N,)` video rows."""
        valid = slice(0, int(self.num_valid))
        return self.embeddings[valid], self.frame_sequences[valid], self.frame_mask[valid], self.video[valid]

    @torch.no_grad()
    def add(
        self, embeddings: torch.Tensor, frame_sequences: torch.Tensor, frame_mask: torch.Tensor, video: torch.Tensor
    ) -> None:
        """Replace the oldest rows by those of a batch; of a batch larger than the bank, keep the end.

        Shape:
            `(B, D)`, `(B, T, D)`, `(B, T)` bool, `(B,)`; T may be shorter than the bank's.
        """
        rows = len(self.embeddings)
        embeddings, frame_sequences = embeddings[-rows:], frame_sequences[-rows:]
        frame_mask, video = frame_mask[-rows:], video[-rows:]
        places = (self.position + torch.arange(len(embeddings), device=video.device)) % rows
        frames = frame_mask.shape[1]
        self.embeddings[places] = embeddings
        self.frame_sequences[places, :frames] = frame_sequences
        self.frame_mask[places] = False
        self.frame_mask[places, :frames] = frame_mask
        self.video[places] = video
        self.position.copy_((self.position + len(embeddings)) % rows)
        self.num_valid.copy_((self.num_valid + len(embeddings)).clamp_max(rows))
