"""The trained model: two heads, a scale, and while it trains a caption decoder."""

from __future__ import annotations

import math

import torch
from torch import nn

from svb.train.config import MAX_LOGIT_SCALE, TrainConfig
from svb.train.decoder import CaptionDecoder
from svb.train.heads import TextHead, VideoHead


class RetrievalModel(nn.Module):
    """Heads of both sides.

    Args:
        config: Sizes and dropout.
        video_feature_size: F of the backbone.
        text_feature_size: F of the text encoder.
        shared_space: Backbone and text encoder are two towers of one model: heads are residuals of zero.
        vocabulary_size: Of the caption decoder; None without one.
    """

    def __init__(
        self,
        config: TrainConfig,
        video_feature_size: int,
        text_feature_size: int,
        *,
        shared_space: bool,
        vocabulary_size: int | None,
    ) -> None:
        super().__init__()
        self.embedding_size = video_feature_size if shared_space else config.embedding_size
        self.video_head = VideoHead(
            video_feature_size,
            self.embedding_size,
            layers=config.layers,
            dropout=config.dropout,
            residual=shared_space,
        )
        self.text_head = TextHead(
            text_feature_size, self.embedding_size, dropout=config.dropout, residual=shared_space
        )
        self.log_logit_scale = nn.Parameter(torch.tensor(math.log(config.logit_scale)))
        self.decoder = (
            CaptionDecoder(
                vocabulary_size,
                self.embedding_size,
                size=config.decoder_size,
                layers=config.decoder_layers,
                dropout=config.dropout,
            )
            if vocabulary_size is not None
            else None
        )

    @property
    def logit_scale(self) -> torch.Tensor:
        return self.log_logit_scale.exp()

    @torch.no_grad()
    def limit_logit_scale(self) -> None:
        """Keep the learned scale at `MAX_LOGIT_SCALE` or below; a limit in the graph would hold it there."""
        self.log_logit_scale.clamp_(max=math.log(MAX_LOGIT_SCALE))
