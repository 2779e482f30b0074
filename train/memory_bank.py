"""The memory bank: videos of earlier batches from which captions may be rebuilt, first in, first out."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from svb.device import to_device


class MemoryBank(nn.Module):
    """Embeddings and frame sequences of the latest videos.

    It starts empty, so no caption is ever rebuilt from made-up rows. All of its state is in buffers. Those that say
    which videos it holds, and where, are on the host, which then need not wait for a GPU to know.

    Args:
        rows: The number of videos that it holds when full.
        frames: T, the longest frame sequence that it takes.
        size: D.
        device: The device that holds embeddings and frame sequences.
    """

    def __init__(self, rows: int, frames: int, size: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.embeddings: torch.Tensor
        self.frame_sequences: torch.Tensor
        self.frame_mask: torch.Tensor
        self.video: torch.Tensor
        self.position: torch.Tensor
        self.num_valid: torch.Tensor
        self.register_buffer("embeddings", torch.zeros(rows, size, device=device))
        self.register_buffer("frame_sequences", torch.zeros(rows, frames, size, device=device))
        self.register_buffer("frame_mask", torch.zeros(rows, frames, dtype=torch.bool, device=device))
        self.register_buffer("video", torch.zeros(rows, dtype=torch.int64))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))
        self.register_buffer("num_valid", torch.zeros((), dtype=torch.int64))

    def read(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, NDArray[np.int64]]:
        """Return the N valid rows: `(N, D)` embeddings, `(N, T, D)`, `(N, T)` bool, and `(N,)` video rows."""
        valid = slice(0, int(self.num_valid.numpy()))
        return (
            self.embeddings[valid],
            self.frame_sequences[valid],
            self.frame_mask[valid],
            self.video.numpy()[valid].copy(),
        )

    @torch.no_grad()
    def add(
        self,
        embeddings: torch.Tensor,
        frame_sequences: torch.Tensor,
        frame_mask: torch.Tensor,
        video: NDArray[np.int64],
    ) -> None:
        """Replace the oldest rows by those of a batch; if the batch is larger than the bank, keep its end.

        Shape:
            `(B, D)`, `(B, T, D)`, `(B, T)` bool, `(B,)`; T may be shorter than the bank's.
        """
        rows = len(self.embeddings)
        embeddings, frame_sequences = embeddings[-rows:], frame_sequences[-rows:]
        frame_mask, video = frame_mask[-rows:], video[-rows:]
        position, num_valid = int(self.position.numpy()), int(self.num_valid.numpy())
        on_host = (position + np.arange(len(embeddings))) % rows
        places = to_device(on_host, embeddings.device)
        frames = frame_mask.shape[1]
        self.embeddings[places] = embeddings
        self.frame_sequences[places, :frames] = frame_sequences
        self.frame_mask[places] = False
        self.frame_mask[places, :frames] = frame_mask
        self.video.numpy()[on_host] = video
        self.position.fill_((position + len(embeddings)) % rows)
        self.num_valid.fill_(min(num_valid + len(embeddings), rows))
