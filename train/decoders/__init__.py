"""Caption decoders, which rebuild a caption from a mixture of other videos' frames.

To add a decoder of words, write a module with the methods of `WordDecoder` and add a line to `make_decoder`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from svb.data.t5 import absolute_t5_name
from svb.train.config import TrainConfig
from svb.train.decoders.t5 import T5Decoder
from svb.train.decoders.transformer import CaptionDecoder, Vocabulary
from svb.train.heads import Dropout, masked_mean

__all__ = ["EmbeddingDecoder", "WordDecoder", "absolute_decoder", "make_decoder", "needs_vocabulary", "pad"]


class WordDecoder(Protocol):
    """Rebuilds a caption word by word.

    Attributes:
        padding: The token that pads short captions.
    """

    padding: int

    @property
    def output_weight(self) -> torch.Tensor:
        """`(vocabulary, H)`: the product of `hidden` with this gives the logits of the next token."""
        ...

    def encode(self, captions: Sequence[str]) -> list[list[int]]:
        """Return each caption's tokens from the start token to the end token."""
        ...

    def hidden(
        self,
        tokens: torch.Tensor,
        frame_sequences: torch.Tensor,
        frame_mask: torch.Tensor,
        wanted: NDArray[np.bool_],
    ) -> torch.Tensor:
        """Return the decoder's state at the wanted positions.

        Shape:
            tokens `(B, L)` int64, frame_sequences `(B, T, D)`, frame_mask `(B, T)` bool, wanted `(B, L)` bool,
            N times True -> `(N, H)`.
        """
        ...

    def write(self, frame_sequences: torch.Tensor, frame_mask: torch.Tensor) -> list[str]:
        """Return the B captions that are likeliest word by word, from `(B, T, D)` and `(B, T)` bool."""
        ...


class EmbeddingDecoder(nn.Module):
    """Predicts the frozen features of a caption from a mixture of frame sequences, through one hidden layer.

    It costs far less than rebuilding the caption's words.

    Args:
        memory_size: D of the frame sequences.
        text_feature_size: F of the text encoder.
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


def make_decoder(
    config: TrainConfig, *, memory_size: int, text_feature_size: int, vocabulary: Vocabulary | None
) -> CaptionDecoder | T5Decoder | EmbeddingDecoder:
    """Return the untrained decoder that a config asks for.

    Args:
        config: Its `rebuild`, `caption_decoder` and sizes count.
        memory_size: D of the frame sequences.
        text_feature_size: F of the text encoder.
        vocabulary: The words of the small transformer; the others need none.

    Raises:
        As `svb.data.t5.load_t5_with_decoder`.
    """
    if config.rebuild == "embedding":
        return EmbeddingDecoder(memory_size, text_feature_size, dropout=config.dropout)
    family, _, name = config.caption_decoder.partition(":")
    if family == "t5":
        return T5Decoder(name, memory_size)
    assert vocabulary is not None
    return CaptionDecoder(
        vocabulary, memory_size, size=config.decoder_size, layers=config.decoder_layers, dropout=config.dropout
    )


def absolute_decoder(decoder: str) -> str:
    """Return a config's `caption_decoder` with a local folder made absolute, so that it is valid everywhere."""
    family, _, name = decoder.partition(":")
    return f"t5:{absolute_t5_name(name)}" if family == "t5" else decoder


def needs_vocabulary(config: TrainConfig) -> bool:
    """Tell whether a config's decoder is limited to the words of the training captions."""
    return config.variant != "none" and config.rebuild == "tokens" and config.caption_decoder == "transformer"


def pad(encoded: Sequence[Sequence[int]], padding: int) -> NDArray[np.int64]:
    """Return `(B, L)` int64 tokens, padded to the longest caption."""
    tokens = np.full((len(encoded), max(map(len, encoded))), padding, dtype=np.int64)
    for row, caption in enumerate(encoded):
        tokens[row, : len(caption)] = caption
    return tokens
