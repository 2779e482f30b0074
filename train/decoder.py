"""The caption decoder: a small transformer that rebuilds a caption from a sequence of frames."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from svb.errors import UsageError
from svb.train.heads import sinusoids
from svb.train.vocabulary import PADDING


class CaptionDecoder(nn.Module):
    """Predicts each word from the words before it and a mixture of frame sequences.

    The output layer shares its weights with the word embeddings.

    Args:
        vocabulary_size: With the special tokens.
        memory_size: D of the frame sequences.
        size: Width.
        layers: Transformer layers.
        dropout: In the layers.

    Raises:
        UsageError: The width cannot be divided among the attention heads.
    """

    def __init__(self, vocabulary_size: int, memory_size: int, *, size: int, layers: int, dropout: float) -> None:
        super().__init__()
        heads = max(1, size // 64)
        if size % heads:
            raise UsageError(f"decoder size {size} - expected a multiple of 64, for heads of 64")
        self.embedding = nn.Embedding(vocabulary_size, size)
        nn.init.normal_(self.embedding.weight, std=size**-0.5)
        self.project_memory = nn.Linear(memory_size, size)
        layer = nn.TransformerDecoderLayer(
            size,
            nhead=heads,
            dim_feedforward=4 * size,
            dropout=dropout,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.transformer = nn.TransformerDecoder(layer, layers, norm=nn.LayerNorm(size))
        self.size = size

    def forward(
        self,
        tokens: torch.Tensor,
        frame_sequences: torch.Tensor,
        frame_mask: torch.Tensor,
        wanted: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the logits of the next token at each position, or at the wanted ones.

        Most of the cost is the product with the vocabulary, and most positions of a padded batch are padding:
        naming the N positions that have a next token saves more than half of it.

        Shape:
            tokens `(B, L)` int64, frame_sequences `(B, T, D)`, frame_mask `(B, T)` bool ->
            `(B, L, vocabulary)`; with wanted `(B, L)` bool, N times True, `(N, vocabulary)`.
        """
        length = tokens.shape[1]
        words = self.embedding(tokens) * self.size**0.5 + sinusoids(length, self.size, tokens.device)
        future = torch.ones(length, length, dtype=torch.bool, device=tokens.device).triu(1)
        hidden = self.transformer(
            words,
            self.project_memory(frame_sequences),
            tgt_mask=future,
            tgt_key_padding_mask=tokens == PADDING,
            memory_key_padding_mask=~frame_mask,
            tgt_is_causal=True,
        )
        if wanted is not None:
            hidden = hidden.flatten(0, 1).index_select(0, wanted.flatten().nonzero().squeeze(1))
        return F.linear(hidden, self.embedding.weight)
