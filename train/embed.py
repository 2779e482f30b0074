"""Embeddings of whole splits, in batches and without gradients."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from svb.data.relevance import Relevance
from svb.errors import InputError
from svb.train.graded_metrics import graded_means, graded_values
from svb.train.model import RetrievalModel
from svb.train.retrieval_metrics import require_finite, retrieval_metrics
from svb.train.training_data import SplitData

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
    require_finite(similarity, split.caption_ids, split.frames.video_ids)
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
