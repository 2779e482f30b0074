"""Image towers of CLIP models, through open_clip: `open_clip:<model>/<tag or local checkpoint>`."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from svb.data.weights import hash_weights
from svb.extract.backbones.backbone import Backbone
from svb.extract.clip import load_clip

PACKAGES = ("open_clip_torch", "torchvision", "timm")


class _ImageTower(nn.Module):
    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.visual = cast(nn.Module, clip.visual)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.visual(images)  # (B, 3, S, S) -> (B, D), not normalised
        return features


def load(name: str, model: str, weights: str) -> Backbone:
    """Load the image tower; its features lie in the space that it shares with the text tower.

    Raises:
        As `svb.extract.clip.load_clip`.
    """
    clip = load_clip(name, model, weights)
    return Backbone(
        name,
        _ImageTower(clip.module),
        image_size=clip.image_size,
        feature_size=clip.embedding_size,
        mean=clip.mean,
        std=clip.std,
        # A hash of both towers: it tells whether a backbone and a text encoder belong to one model.
        weights_hash=hash_weights(clip.module),
    )
