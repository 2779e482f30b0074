"""Embeddings are computed where the heads are, wherever the features come from."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from svb.retrieve.model.embedder import heads_embedder
from svb.train.config import TrainConfig
from svb.train.run import build_model


def test_captions_from_a_file_reach_heads_on_another_device() -> None:
    """`meta` stands for a GPU: like one, it refuses tensors that are elsewhere."""
    model = {
        "config": dataclasses.asdict(TrainConfig(embedding_size=8)),
        "video": {"backbone": "a:b", "backbone_settings": {"feature_size": 6, "weights_hash": "of a:b"}},
        "text": {"text_encoder": {"feature_size": 5, "weights_hash": "of words"}},
    }
    weights = build_model(model).state_dict()
    embedder = heads_embedder(model, weights, Path("run"), torch.device("meta"))
    embeddings = embedder.text_head(torch.zeros(3, 5))
    assert embeddings.device.type == "meta" and embeddings.shape == (3, 8)
