"""The small transformer that rebuilds a caption from a sequence of frames."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from svb.device import to_device
from svb.errors import InputError
from svb.train.heads import num_heads, sinusoids

PADDING, START, END, UNKNOWN = range(4)
SPECIAL = ("<padding>", "<start>", "<end>", "<unknown>")
# Longer captions are rare, and the longest caption of a batch sets its cost.
MAX_WORDS = 24
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")


class Vocabulary:
    """Translates words to tokens.

    Args:
        words: The words in token order, without the special ones.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self.words = [*SPECIAL, *words]
        self._token = {word: token for token, word in enumerate(self.words)}

    @classmethod
    def of(cls, captions: Iterable[str], min_count: int) -> Vocabulary:
        """Build a vocabulary of the words that occur in captions at least `min_count` times.

        Raises:
            InputError: No word does.
        """
        counts = Counter(word for caption in captions for word in split_words(caption))
        words = sorted(word for word, count in counts.items() if count >= min_count)
        if not words:
            raise InputError(
                f"no word occurs {min_count} times in the training captions - lower --min-word-count, or train "
                "with --variant none"
            )
        return cls(words)

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, caption: str) -> list[int]:
        """Return a caption's tokens from start to end, without words beyond the 24th."""
        words = split_words(caption)[:MAX_WORDS]
        return [START, *(self._token.get(word, UNKNOWN) for word in words), END]

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the words of a caption's tokens, without the special ones."""
        return " ".join(self.words[token] for token in tokens if token >= len(SPECIAL))


def split_words(caption: str) -> list[str]:
    """Return the words of a caption in lower case, without punctuation."""
    return _WORD.findall(caption.lower())


class CaptionDecoder(nn.Module):
    """Predicts each word from the words before it and a mixture of frame sequences.

    The output layer shares its weights with the word embeddings.

    Args:
        vocabulary: The words that it can say.
        memory_size: D of the frame sequences.
        size: Width of the layers.

    Raises:
        UsageError: The attention heads do not divide the width.
    """

    padding = PADDING

    def __init__(self, vocabulary: Vocabulary, memory_size: int, *, size: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(vocabulary), size)
        nn.init.normal_(self.embedding.weight, std=size**-0.5)
        self.project_memory = nn.Linear(memory_size, size)
        layer = nn.TransformerDecoderLayer(
            size,
            nhead=num_heads(size, "decoder size"),
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
        self,
        tokens: torch.Tensor,
        frame_sequences: torch.Tensor,
        frame_mask: torch.Tensor,
        wanted: NDArray[np.bool_],
    ) -> torch.Tensor:
        """Return the decoder's state at the wanted positions.

        The product with the vocabulary is most of the cost, and most positions of a padded batch are padding:
        taking only the N positions that have a next token saves more than half of it.

        Shape:
            tokens `(B, L)` int64, frame_sequences `(B, T, D)`, frame_mask `(B, T)` bool, wanted `(B, L)` bool,
            N times True -> `(N, size)`.
        """
        hidden = self._all_hidden(tokens, frame_sequences, frame_mask)
        return hidden.flatten(0, 1).index_select(0, to_device(np.flatnonzero(wanted), tokens.device))

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
