"""The trained model: two heads, two scales and, during training, a caption decoder."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from svb.data.relevance import Relevance
from svb.errors import InputError
from svb.train.config import MAX_LOGIT_SCALE, TrainConfig
from svb.train.decoders import make_decoder
from svb.train.decoders.transformer import Vocabulary
from svb.train.graded_metrics import graded_means, graded_values
from svb.train.heads import TextHead, VideoHead
from svb.train.retrieval_metrics import require_finite_similarities, retrieval_metrics
from svb.train.training_data import SplitData


class RetrievalModel(nn.Module):
    """The heads of both sides.

    Args:
        config: Sizes and dropout.
        video_feature_sizes: F of each fused backbone, usually of one.
        text_feature_size: F of the text encoder.
        shared_part: The backbone that forms one model with the text encoder, so that heads start as residuals of
            zero in their common space; None if there is none.
        with_decoder: Also make the caption decoder that the config asks for.
        vocabulary: The words of the caption decoder, if it needs them.
    """

    def __init__(
        self,
        config: TrainConfig,
        video_feature_sizes: Sequence[int],
        text_feature_size: int,
        *,
        shared_part: int | None,
        with_decoder: bool = False,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        super().__init__()
        self.embedding_size = config.embedding_size if shared_part is None else video_feature_sizes[shared_part]
        self.video_head = VideoHead(
            video_feature_sizes,
            self.embedding_size,
            convolution=config.convolution,
            layers=config.layers,
            pooling=config.pooling,
            dropout=config.dropout,
            residual_part=shared_part,
        )
        self.text_head = TextHead(
            text_feature_size, self.embedding_size, dropout=config.dropout, residual=shared_part is not None
        )
        self.log_logit_scale = nn.Parameter(
            torch.tensor(math.log(config.logit_scale)), requires_grad=config.learn_logit_scale
        )
        self.log_support_temperature = nn.Parameter(
            torch.tensor(math.log(config.support_temperature)), requires_grad=config.learn_support_temperature
        )
        self.decoder = (
            make_decoder(
                config, memory_size=self.embedding_size, text_feature_size=text_feature_size, vocabulary=vocabulary
            )
            if with_decoder and config.variant != "none"
            else None
        )

    @property
    def logit_scale(self) -> torch.Tensor:
        return self.log_logit_scale.exp()

    @property
    def support_temperature(self) -> torch.Tensor:
        return self.log_support_temperature.exp()

    @torch.no_grad()
    def limit_scales(self) -> None:
        """Keep learned scales within their bounds. A limit inside the graph would stop their gradient there."""
        if self.log_logit_scale.requires_grad:
            self.log_logit_scale.clamp_(max=math.log(MAX_LOGIT_SCALE))
        if self.log_support_temperature.requires_grad:
            self.log_support_temperature.clamp_(min=-math.log(MAX_LOGIT_SCALE))


BATCH = 512


@torch.inference_mode()
def embed_in_batches(embed: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor) -> NDArray[np.float32]:
    """Apply `embed` to `rows` in batches: `(N, ...)` -> `(N, D)` float32 on the CPU."""
    embeddings: NDArray[np.float32] = torch.cat([embed(batch) for batch in rows.split(BATCH)]).cpu().numpy()
    return embeddings


def split_metrics(model: RetrievalModel, split: SplitData, relevance: Relevance | None = None) -> dict[str, float]:
    """Return the metrics of a split, and leave the model in the mode that it was in.

    With a relevance, the graded measures are among them, under keys such as `t2v/nDCG@10 of others by words`.

    Raises:
        InputError: An embedding is not finite; the error names the first bad video.
    """
    was_training = model.training
    model.eval()
    captions = embed_in_batches(lambda batch: model.text_head(batch.float()), split.caption_features)
    videos = embed_in_batches(
        lambda rows: model.video_head(*split.frames.gather(rows)).video_embeddings,
        torch.arange(split.num_videos, device=split.caption_video.device),
    )
    model.train(was_training)
    similarity = captions @ videos.T
    require_finite_similarities(similarity, split.caption_ids, split.frames.video_ids)
    caption_video = split.caption_video.cpu().numpy()
    metrics = retrieval_metrics(similarity, caption_video)
    if relevance is not None:
        graded = graded_means(graded_values(similarity, caption_video, relevance))
        metrics |= {f"{name} by {relevance.name}": value for name, value in graded.items()}
    return metrics


def graded_score(metrics: dict[str, float], relevance: Relevance) -> float:
    """Return the mean of nDCG@10 of others of both directions, which chooses the best checkpoint by a relevance.

    Raises:
        InputError: No query has another relevant candidate.
    """
    names = [f"{way}/nDCG@10 of others by {relevance.name}" for way in ("t2v", "v2t")]
    if not all(name in metrics for name in names):
        raise InputError(
            f"no caption has a relevant video by {relevance.name} but its own, so nothing can choose the best "
            "checkpoint by it - train with --select-by recalls"
        )
    return sum(metrics[name] for name in names) / 2
