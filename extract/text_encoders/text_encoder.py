"""A frozen text encoder as the pipeline sees it, whatever its family."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

BATCH = 64


@dataclass
class TextEncoder:
    """A frozen network from captions to features.

    Attributes:
        name: `family:model[/weights]`, the key in every file.
        module: The network, whose weights are hashed.
        feature_size: F.
        encode_batch: At most `BATCH` captions to `(B, F)` features, not normalised.
        num_tokens: How many tokens a caption has, with the special ones.
        max_tokens: How many of them the network reads; it never sees the rest.
        tokenizer: The family's own tokenizer, from which an exporter makes another; None where there is none.
        weights_hash: A hash of the module.
    """

    name: str
    module: nn.Module
    feature_size: int
    encode_batch: Callable[[list[str]], torch.Tensor]
    num_tokens: Callable[[str], int]
    max_tokens: int
    tokenizer: Any = None
    weights_hash: str = ""

    @torch.inference_mode()
    def encode(self, captions: Sequence[str]) -> NDArray[np.float32]:
        """Return the features of captions, `(C, F)` float32, in their order.

        Captions of similar length share a batch, so that little padding is computed.
        """
        features = np.empty((len(captions), self.feature_size), np.float32)
        by_length = sorted(range(len(captions)), key=lambda position: len(captions[position]))
        for begin in range(0, len(captions), BATCH):
            positions = by_length[begin : begin + BATCH]
            batch = self.encode_batch([captions[position] for position in positions])
            features[positions] = batch.float().cpu().numpy()
        return features

    def settings(self) -> dict[str, Any]:
        """Return what shapes the features, as stored and fingerprinted."""
        return {
            "name": self.name,
            "weights_hash": self.weights_hash,
            "feature_size": self.feature_size,
            "max_tokens": self.max_tokens,
        }
