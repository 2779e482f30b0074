"""Image towers of CLIP models, through open_clip: `open_clip:<model>/<tag or local checkpoint>`."""

from __future__ import annotations

import logging
from typing import Any, cast

import open_clip
import torch
from open_clip.transform import PreprocessCfg, merge_preprocess_dict
from torch import nn

from svb.data.weights import hash_weights
from svb.extract.backbones.backbone import Backbone
from svb.extract.backbones.transform import Transform, square_side
from svb.extract.clip import load_clip

logger = logging.getLogger(__name__)

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
        _transform(name, clip.preprocess, model, weights),
        clip.embedding_size,
        # A hash of both towers: it tells whether a backbone and a text encoder belong to one model.
        weights_hash=hash_weights(clip.module),
    )


def _transform(name: str, preprocess: dict[str, Any], model: str, weights: str) -> Transform:
    told = merge_preprocess_dict(PreprocessCfg(), preprocess)
    if weights:
        told = _told_by_published_weights(name, told, model, weights)
    fill = told["fill_color"]
    # "random" is for training; open_clip itself uses bicubic outside of it.
    interpolation = "bicubic" if told["interpolation"] == "random" else told["interpolation"]
    return Transform(
        square_side(name, told["size"]),
        tuple(told["mean"]),
        tuple(told["std"]),
        mode=told["resize_mode"],
        interpolation=interpolation,
        fill=(fill, fill, fill) if isinstance(fill, int) else tuple(fill),
    )


def _told_by_published_weights(name: str, told: dict[str, Any], model: str, weights: str) -> dict[str, Any]:
    """Return how the published weights of a model want its images, for a local checkpoint of it.

    open_clip itself takes OpenAI's preparation for every local checkpoint, which is wrong for SigLIP and PE-Core.
    """
    tags = open_clip.list_pretrained_tags_by_model(model)
    published: list[dict[str, Any]] = [
        merge_preprocess_dict(told, open_clip.get_pretrained_cfg(model, tag)) for tag in tags
    ]
    if weights in tags or not published:
        return told
    if all(one == published[0] for one in published):
        return published[0]
    logger.warning(
        f"{name}: published weights of {model} want frames prepared in different ways, and a local checkpoint does "
        "not say which - svb prepares them as for OpenAI's CLIP; for another way give local-dir:FOLDER with an "
        "open_clip_config.json"
    )
    return told
