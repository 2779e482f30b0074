"""Embeddings of whole splits, in batches and without gradients."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from svb.train.model import RetrievalModel
from svb.train.retrieval_metrics import require_finite, retrieval_metrics
from svb.train.training_data import SplitData

BATCH = 512


@torch.inference_mode()
def embed_in_batches(embed: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor) -> NDArray[np.float32]:
    """Apply `embed` to `rows` in batches: `(N, ...)` -> `(N, D)` float32 on the CPU."""
    embeddings: NDArray[np.float32] = torch.cat([embed(batch) for batch in rows.split(BATCH)]).cpu().numpy()
    return embeddings


def split_metrics(model: RetrievalModel, split: SplitData) -> dict[str, float]:
    """Return the metrics of a split, and leave the model in the mode that it was in.

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
    return retrieval_metrics(similarity, split.caption_video.cpu().numpy())
