"""Embeddings of whole splits, in batches, without gradient."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from svb.train.metrics import retrieval_metrics
from svb.train.model import RetrievalModel
from svb.train.training_data import FrameTable, SplitData

BATCH = 512


@torch.inference_mode()
def embed_videos(model: RetrievalModel, frames: FrameTable) -> NDArray[np.float32]:
    """Return `(V, D)` float32, L2-normalised; the model must be in eval mode."""
    rows = torch.arange(len(frames.video_ids), device=frames.offsets.device)
    batches = [model.video_head(*frames.gather(batch)).video_embeddings for batch in rows.split(BATCH)]
    embeddings: NDArray[np.float32] = torch.cat(batches).cpu().numpy()
    return embeddings


@torch.inference_mode()
def embed_captions(model: RetrievalModel, caption_features: torch.Tensor) -> NDArray[np.float32]:
    """Return `(C, D)` float32, L2-normalised, of `(C, F)` features; the model must be in eval mode."""
    batches = [model.text_head(batch.float()) for batch in caption_features.split(8 * BATCH)]
    embeddings: NDArray[np.float32] = torch.cat(batches).cpu().numpy()
    return embeddings


def split_metrics(model: RetrievalModel, split: SplitData) -> dict[str, float]:
    """Return the metrics of a split; the model's mode is kept."""
    was_training = model.training
    model.eval()
    similarity = embed_captions(model, split.caption_features) @ embed_videos(model, split.frames).T
    model.train(was_training)
    return retrieval_metrics(similarity, split.caption_video.cpu().numpy())
