"""The small transformer that rebuilds a caption from a sequence of frames."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from svb.errors import UsageError
from svb.train.heads import sinusoids
from svb.train.vocabulary import END, MAX_WORDS, PADDING, START, UNKNOWN, Vocabulary


class CaptionDecoder(nn.Module):
    """Predicts each word from the words before it and a mixture of frame sequences.

    The output layer shares its weights with the word embeddings.

    Args:
        vocabulary: The words that it can say.
        memory_size: D of the frame sequences.
        size: Width.
        layers: Transformer layers.
        dropout: Dropout probability in the layers.

    Raises:
        UsageError: The attention heads do not divide the width.
    """

    padding = PADDING

    def __init__(self, vocabulary: Vocabulary, memory_size: int, *, size: int, layers: int, dropout: float) -> None:
        super().__init__()
        heads = max(1, size // 64)
        if size % heads:
            raise UsageError(f"decoder size {size} - expected a multiple of 64, the size of an attention head")
        self.embedding = nn.Embedding(len(vocabulary), size)
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
        self.size, self.vocabulary = size, vocabulary

    @property
    def output_weight(self) -> torch.Tensor:
        return self.embedding.weight

    def encode(self, captions: Sequence[str]) -> list[list[int]]:
        return [self.vocabulary.encode(caption) for caption in captions]

    def hidden(
        self, tokens: torch.Tensor, frame_sequences: torch.Tensor, frame_mask: torch.Tensor, wanted: torch.Tensor
    ) -> torch.Tensor:
        """Return the decoder's state at the wanted positions.

        The product with the vocabulary is most of the cost, and most positions of a padded batch are padding:
        taking only the N positions that have a next token saves more than half of it.

        Shape:
            tokens `(B, L)` int64, frame_sequences `(B, T, D)`, frame_mask `(B, T)` bool, wanted `(B, L)` bool,
            N times True -> `(N, size)`.
        """
        hidden = self._all_hidden(tokens, frame_sequences, frame_mask)
        return hidden.flatten(0, 1).index_select(0, wanted.flatten().nonzero().squeeze(1))

    @torch.inference_mode()
    def write(self, frame_sequences: torch.Tensor, frame_mask: torch.Tensor) -> list[str]:
        tokens = torch.full((len(frame_mask), 1), START, device=frame_mask.device)
        for _ in range(MAX_WORDS):
            last = self._all_hidden(tokens, frame_sequences, frame_mask)[:, -1]
            logits = F.linear(last, self.output_weight)
            logits[:, [PADDING, START, UNKNOWN]] = float("-inf")
            has_ended = (tokens == END).any(dim=1)
            following = logits.argmax(dim=1).masked_fill(has_ended, PADDING)
            tokens = torch.cat([tokens, following[:, None]], dim=1)
        return [self.vocabulary.decode(caption) for caption in tokens.tolist()]

    def _all_hidden(
        self, tokens: torch.Tensor, frame_sequences: torch.Tensor, frame_mask: torch.Tensor
    ) -> torch.Tensor:
        length = tokens.shape[1]
        words = self.embedding(tokens) * self.size**0.5 + sinusoids(length, self.size, tokens.device)
        future = torch.ones(length, length, dtype=torch.bool, device=tokens.device).triu(1)
        hidden: torch.Tensor = self.transformer(
            words,
            self.project_memory(frame_sequences),
            tgt_mask=future,
            tgt_key_padding_mask=tokens == PADDING,
            memory_key_padding_mask=~frame_mask,
            tgt_is_causal=True,
        )
        return hidden  # (B, L, size)
