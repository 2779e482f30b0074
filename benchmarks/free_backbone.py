"""A backbone that costs nothing: what is left of an extraction is decoding and svb itself."""

from __future__ import annotations

import torch
from torch import nn

from svb.extract.backbones.backbone import Backbone


class _FourPixels(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images[:, :, 4::8, 4::8].flatten(1)  # (B, 3, 16, 16) -> (B, 12)


def load(name: str, model: str, weights: str) -> Backbone:
    """Load `free:four-pixels`."""
    half = (0.5, 0.5, 0.5)
    return Backbone(name, _FourPixels(), 16, 12, half, half, weights_hash="none")
