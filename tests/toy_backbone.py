"""Backbones that cost nothing: whole pipelines run in tests without a real network."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from svb.extract.backbones.backbone import Backbone
from svb.extract.backbones.transform import Transform

CLIP_FRAMES = 4
# Backbones that want their frames prepared in other ways.
TRANSFORMS: dict[str, dict[str, Any]] = {
    "squash": {"mode": "squash", "interpolation": "bilinear"},
    "small-squash": {"mode": "squash", "interpolation": "bilinear", "resize_px": (12, 12)},
    "longest": {"mode": "longest", "fill": (9, 9, 9)},
    "rough": {"antialias": False},
}


class _Pooled(nn.Module):
    """Mixes the pixels of a coarse grid with fixed random weights; a clip's frames are told apart."""

    def __init__(self, feature_size: int, scale: float) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(feature_size)
        self.weight = nn.Parameter(scale * torch.randn(3 * 4 * 4, feature_size, generator=generator))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if images.ndim == 5:  # (B, 3, T, S, S)
            ramp = torch.arange(1, images.shape[2] + 1, dtype=images.dtype).view(1, 1, -1, 1, 1)
            images = (images * ramp).mean(dim=2)
        grid = nn.functional.adaptive_avg_pool2d(images, 4).flatten(1)
        features: torch.Tensor = grid @ self.weight.to(grid.dtype)
        return features


def load(name: str, model: str, weights: str) -> Backbone:
    """Load `toy:frames`, `toy:wide`, `toy:clips`, `toy:overflow`, or one of `TRANSFORMS`."""
    half = (0.5, 0.5, 0.5)
    if model in TRANSFORMS:
        return Backbone(name, _Pooled(8, 1.0), Transform(16, half, half, **TRANSFORMS[model]), 8)
    feature_size, scale, clip_frames = {
        "frames": (8, 1.0, 1),
        "wide": (12, 1.0, 1),
        "clips": (6, 1.0, CLIP_FRAMES),
        "overflow": (8, 1e6, 1),
    }[model]
    return Backbone(name, _Pooled(feature_size, scale), Transform(16, half, half), feature_size, clip_frames)
